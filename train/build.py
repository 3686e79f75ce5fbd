"""Builds a run from its configuration: loaders, net, optimiser, checkpoint to resume from, records."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from model import AlexNet
from model.dropout import Dropout
from model.summary import count_parameters
from pipeline.errors import ConfigError, DataError, first_line
from pipeline.files import Json, write_json
from pipeline.manifest import Dataset
from pipeline.read import order, rng
from pipeline.read.backend import PixelType
from pipeline.read.loader import Loader
from pipeline.settings import flatten, updated
from pipeline.storage import absolute

from . import distributed, environment, resume
from .background_saves import Saver
from .checkpoint import Checkpoints, Saved, restore_optimizer
from .classifier import recorded
from .config import Config
from .distributed import Agreement
from .metrics import Meter, Record
from .model_card import INPUTS, Inputs
from .networks import create_net, load_weights
from .nonfinite import Finite
from .optim import Plateau
from .preflight import open_alike
from .profiling import Profile
from .run_folder import CONFIG, RunFolder
from .showcase import Showcase
from .signals import Stop
from .step import Stepper
from .trainer import Trainer, TrainState
from .watchdog import Watchdog

LEAST_EPOCHS = 3  # from here on, decoding all images once saves more than it costs
INIT = 1_000_000  # a random stream that the loader does not use


def check_batch(config: Config, dataset: Dataset, *, world: int) -> None:
    """Raises ConfigError for a batch that cannot be divided into ranks and micro-batches."""
    data, train = config.data, config.train
    images = dataset.split(data.train_split).samples
    if config.overfit > images:
        raise ConfigError(f"overfit={config.overfit}: the split {data.train_split} has {images} images")
    samples = config.overfit or images
    order.check_batch(train.batch, samples=samples, world=world, partitions=data.partitions, field="train.batch")
    images = train.batch // world
    if train.accumulate > max(images // 2, 1):
        raise ConfigError(
            f"train.accumulate={train.accumulate}: a rank has {images} images a step, and at least two go together"
        )


def pixel_type(mixed_precision: str, device: torch.device) -> PixelType:
    """Returns the dtype of the input images. On a GPU, bf16 and fp16 nets get float16, half the bytes: their first
    layer rounds at least as much. On a CPU, float32, so that runs stay bit-identical."""
    return "float16" if device.type == "cuda" and mixed_precision in ("bf16", "fp16") else "float32"


def build_trainer(config: Config, *, folder: RunFolder, stop: Stop) -> Trainer:
    """Builds the run, resumed from a checkpoint if there is one, and opens its run folder.

    Raises ExpressError, the same at all ranks, before anything of the run folder has changed.
    """
    dataset = open_alike(config)
    accelerator = distributed.make_accelerator(config)
    main, world = accelerator.is_main_process, accelerator.num_processes
    train, say = config.train, accelerator.on_main_process(print)
    agreement = Agreement(accelerator, distributed.patience(config.guard.hang_seconds))
    precision = distributed.resolved_precision(train.precision, accelerator)
    cores = distributed.take_cores(accelerator.device)
    check_batch(config, dataset, world=world)
    checkpoints = Checkpoints(folder.path, keep=config.run.keep_checkpoints)
    config = resume.with_window(config, dataset, checkpoints, agreement)
    with agreement.alike(config.data.shards):
        make_loader, loader, val_loader = make_loaders(config, dataset, accelerator)
    net = make_net(config, classes=len(dataset.classes), say=say)
    fixed = resume.invariants(flatten(config), dataset, precision=precision)
    saved = resume.choose(
        config, fixed, steps_per_epoch=len(loader), folder=folder, checkpoints=checkpoints, agreement=agreement
    )
    if config.model.init and not saved:
        with agreement.alike(config.model.init):
            known = recorded(Path(config.model.init))[1]
            other_classes = known is not None and known.classes != tuple(dataset.classes)
            say(load_weights(net, Path(config.model.init), other_classes=other_classes) or "the output layer is kept")
    stepper = Stepper(net, config, accelerator)
    if world > 1:
        stepper.settle_buckets(loader, loader.augment.crop)
    if reason := reason_for_memory(config, stepper, agreement, loader, val_loader):
        loader.close()
        val_loader.close()
        with agreement.alike(config.data.shards):
            make_loader, loader, val_loader = make_loaders(
                updated(config, {"loader.backend": "resident"}), dataset, accelerator
            )
        loader.backend_reason = reason
    state, meter = TrainState(), Meter(accelerator, train.batch)
    if saved:
        restore(saved, state, stepper=stepper, meter=meter, loader=loader)
        val_loader.bad.load(saved.state.get("val_bad", ()))
        steps = state.step - state.epoch * len(loader)
        more = f" and {steps} of {len(loader)} steps" if steps else ""
        say(f"resuming from {saved.path}: {state.epoch} of {train.epochs} epochs{more} done")
    if main:
        described = {
            "config": dataclasses.asdict(config),
            "shards": absolute(config.data.shards),
            "fingerprint": dataset.fingerprint,
            "backend": loader.backend,
            "backend_reason": loader.backend_reason,
            "precision": precision,
            "compiled": stepper.compiled,
            "ranks": world,
            "threads": cores,
            "command": environment.command(),
            "environment": environment.describe(),
        }
        write_json(folder.path / CONFIG, described)
        write_json(folder.path / INPUTS, Inputs.of(dataset, config.augment).as_json())
    resumed_at = (state.step, state.epoch) if saved else (-1, -1)
    record = Record(config, accelerator, resumed_at=resumed_at)
    record.write("start", state.step, {"ranks": world})
    return Trainer(
        config=config,
        fixed=fixed,
        accelerator=accelerator,
        loader=loader,
        make_loader=make_loader,
        val_loader=val_loader,
        stepper=stepper,
        state=state,
        finite=Finite(
            stepper.bare.parameters() if accelerator.scaler is None else (),
            late=accelerator.device.type == "cuda" and config.guard.on_bad_numbers == "stop",
        ),
        meter=meter,
        agreement=agreement,
        saver=Saver(checkpoints, agreement, on_error=config.guard.on_save_error),
        record=record,
        folder=folder,
        stop=stop,
        watchdog=Watchdog(folder.path, accelerator.process_index, world, config.guard.hang_seconds, stop),
        profile=Profile(folder.path, config.profile * main, accelerator.device, record.log),
        showcase=Showcase(folder.path, accelerator, on=config.run.report, step=resumed_at[0]),
    )


def reason_for_memory(config: Config, stepper: Stepper, agreement: Agreement, *loaders: Loader) -> str:
    """Returns the reason why `auto` keeps a run's images in GPU memory, the same at all ranks; "" if it does not."""
    accelerator, auto = stepper.accelerator, config.loader.backend == "auto" and not config.limit_steps
    if not auto or accelerator.device.type != "cuda" or config.train.epochs < LEAST_EPOCHS:
        return ""
    from pipeline.read.resident import bytes_held, free_memory, gigabytes  # Numba takes a while to import

    try:
        images = sum(bytes_held(loader.plan) for loader in loaders)
    except ConfigError:  # they are of several sizes
        return ""
    share, ranks = min(0.5, config.loader.resident_memory), environment.launched("LOCAL_WORLD_SIZE", 1)
    images, lacking = agreement.largest(images, -free_memory(accelerator.device, ranks))
    if images > -lacking * share:  # before the pass below, which takes memory from DALI
        return ""
    # A step's peak memory stays allocated after it. Not compiled, since the first crop may be smaller and would compile
    # again; eager mode may need more memory, even too much. no_sync, so that no rank waits for one that ran out of it.
    with suppress(torch.OutOfMemoryError), torch.compiler.set_stance("force_eager"), accelerator.no_sync(stepper.net):
        stepper.settle_buckets(loaders[0], config.augment.crop)
    velocities = sum(p.nbytes for p in stepper.bare.parameters())  # allocated by the first update
    images, lacking = agreement.largest(images, velocities - free_memory(accelerator.device, ranks))
    if images > -lacking * share:
        return ""
    return f"auto: images take {gigabytes(images)} of the {gigabytes(-lacking)} that a step leaves free on each GPU"


def restore(saved: Saved, state: TrainState, *, stepper: Stepper, meter: Meter, loader: Loader) -> None:
    """Restores all state from a checkpoint. Raises DataError if it is of another net."""
    kept, scaler, average = saved.state, stepper.accelerator.scaler, stepper.average
    try:
        stepper.bare.load_state_dict(saved.model)
        restore_optimizer(stepper.optimizer, saved.optimizer)
        if scaler is not None and kept["scaler"]:
            scaler.load_state_dict(kept["scaler"])
        for name in vars(state):
            setattr(state, name, kept[name])
        state.plateau = Plateau(**kept["plateau"])
        if average is not None:
            average.load_state_dict(saved.average)
        meter.load_state_dict(kept["meter"])
    except (LookupError, RuntimeError, TypeError, ValueError) as err:
        raise DataError(f"{saved.path}: does not fit this net ({first_line(err)}); choose another --run.dir") from err
    loader.load_state_dict(kept["loader"])


def of_this_rank(accelerator: Accelerator) -> Json:
    """Returns the Loader arguments for a net on this rank's device."""
    return {
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "local_world": environment.launched("LOCAL_WORLD_SIZE", 1),
        "device": accelerator.device,
        "dtype": pixel_type(accelerator.mixed_precision, accelerator.device),
        "channels_last": True,
    }


def make_loaders(
    config: Config, dataset: Dataset, accelerator: Accelerator
) -> tuple[Callable[..., Loader], Loader, Loader]:
    """Returns a function `augment` → training loader, the first training loader, and the validation loader."""
    data, train = config.data, config.train
    make = partial(
        Loader,
        dataset,
        seed=config.run.seed,
        partitions=data.partitions,
        window=data.window,
        first=config.overfit,
        **of_this_rank(accelerator),
        config=config.loader,
    )
    training = partial(make, split=data.train_split, batch=train.batch, train=True)
    validation = make(split=data.val_split, batch=train.eval_batch, train=False, augment=config.augment)
    return training, training(augment=config.augment_at(0)), validation


def make_net(config: Config, *, classes: int, say: Callable[[str], None]) -> nn.Module:
    """Makes the net on the host, initialised from the seed. Raises ConfigError for a net that cannot work."""
    torch.manual_seed(rng.key(config.run.seed, INIT) >> 1)
    crop, model = config.augment.crop, config.model
    net = create_net(model, classes=classes, crop=crop, crop_sizes=config.train.crop_sizes)
    if isinstance(net, AlexNet) and net.variant.crop != crop and not net.variant.any_crop:
        made_for = f"model.name={model.name} is made for augment.crop={net.variant.crop}"
        say(f"{made_for}; at {crop} it has {count_parameters(net):,} parameters")
    for module in net.modules() if config.overfit else ():
        if isinstance(module, Dropout | nn.modules.dropout._DropoutNd):
            module.p = 0.0
    # Convolutions are fastest with channels last, on tensor cores and on the CPU.
    return net.to(memory_format=torch.channels_last)
