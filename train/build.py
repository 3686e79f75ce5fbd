"""What a run is put together from, as its configuration says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from model import AlexNet
from model.summary import count_parameters
from pipeline.errors import ConfigError
from pipeline.manifest import Dataset
from pipeline.read import order, rng
from pipeline.read.augment import AugmentConfig
from pipeline.read.backend import PixelType
from pipeline.read.loader import Loader

from .config import Config, OptimConfig
from .distributed import local_world
from .ema import Average
from .networks import check_crop_sizes, compile_net, create_net, load_weights, set_training, without_dropout
from .optim import make_optimizer
from .step import Stepper

INIT = 1_000_000  # a stream of draws, away from the loader's


def check_batch(config: Config, *, samples: int, world: int) -> None:
    """Raises ConfigError for a batch that cannot be cut into ranks and micro-batches."""
    train = config.train
    order.check_batch(train.batch, samples=samples, world=world, partitions=config.data.partitions, field="train.batch")
    part = train.batch // world
    if train.accumulate > max(part // 2, 1):
        raise ConfigError(
            f"train.accumulate={train.accumulate}: a rank has {part} images a step, and at least two go together"
        )


def pixel_type(mixed_precision: str, device: torch.device) -> PixelType:
    """What pixels a net is given. On a GPU, bf16 and fp16 nets get float16: their first layer rounds further, and the
    pixels are half the bytes. On a CPU pixels stay float32, so that runs keep their bits."""
    return "float16" if device.type == "cuda" and mixed_precision in ("bf16", "fp16") else "float32"


def make_loader(
    config: Config, dataset: Dataset, accelerator: Accelerator, *, train: bool, augment: AugmentConfig
) -> Loader:
    """This rank's; of the training or the validation split."""
    return Loader(
        dataset,
        split=config.data.train_split if train else config.data.val_split,
        batch=config.train.batch if train else config.train.eval_batch,
        train=train,
        seed=config.run.seed,
        partitions=config.data.partitions,
        window=config.data.window,
        first=config.overfit,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        local_world=local_world(),
        device=accelerator.device,
        dtype=pixel_type(accelerator.mixed_precision, accelerator.device),
        channels_last=True,
        augment=augment,
        config=config.loader,
    )


def make_net(config: Config, *, classes: int, say: Callable[[str], None]) -> nn.Module:
    """On the host, initialised from the seed. Raises ConfigError for a net that cannot be."""
    torch.manual_seed(rng.key(config.run.seed, INIT) >> 1)
    net = create_net(config.model, classes=classes, crop=config.augment.crop)
    check_crop_sizes(net, config.model.name, config.train.crop_sizes)
    if isinstance(net, AlexNet) and net.variant.crop != config.augment.crop and not net.variant.any_crop:
        made_for = f"model.name={config.model.name} is made for augment.crop={net.variant.crop}"
        say(f"{made_for}; at {config.augment.crop} it has {count_parameters(net):,} parameters")
    if config.overfit:
        without_dropout(net)
    # Channels last is what convolutions like best, on tensor cores and on the CPU alike.
    return net.to(memory_format=torch.channels_last)


def start_from(net: nn.Module, weights: str, *, say: Callable[[str], None]) -> None:
    """Raises DataError for weights of another net."""
    if note := load_weights(net, Path(weights)):
        say(note)


def make_stepper(net: nn.Module, config: Config, accelerator: Accelerator, optim: OptimConfig) -> tuple[Stepper, str]:
    """The net on its device, wrapped, with its optimiser; and what of it was compiled.

    optim: config.optim, its rates scaled to the batch.
    """
    device = accelerator.device
    average = Average(net.to(device), config.regularize.ema) if config.regularize.ema else None
    # Before it is wrapped, in place: names of weights stay.
    compiled = compile_net(net, config.train.compile, device, world=accelerator.num_processes)
    if average:
        compile_net(average.net, config.train.compile, device, world=accelerator.num_processes)
    first_apart, scaled = bool(config.train.conv1_epochs), accelerator.scaler is not None
    optimizer = make_optimizer(net, optim, first_apart=first_apart, scaled=scaled)
    try:
        net, optimizer = accelerator.prepare(net, optimizer)
    except TypeError as err:  # torch's word for links that cannot carry such numbers
        raise ConfigError(f"train.compress={config.train.compress}: {err}") from err
    stepper = Stepper(config, accelerator, net, optimizer, average)
    set_training(stepper.bare, config.model)
    return stepper, compiled
