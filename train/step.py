"""One step of the net: forward, backward, update. The loop decides when, and handles failures."""

import contextlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from model import AlexNet
from pipeline.errors import ConfigError
from pipeline.read import rng
from pipeline.read.backend import to_device
from pipeline.read.loader import Batch, Loader

from .config import Config
from .ema import average_of, update_average
from .networks import compile_net
from .optim import make_optimizer


def micro_batches(images: int, count: int) -> list[slice]:
    """Returns at most `count` consecutive slices, each of at least two images: batch normalisation needs two."""
    pairs = math.ceil(images / 2)
    ends = [min(2 * (pairs * i // count), images) for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends) if b > a]


class Stepper:
    """The net, its optimiser and the average of its weights.

    net: wrapped by Accelerate; bare: the unwrapped net; nets: bare and its average, if there is one. compiled: the
    resolved train.compile.
    """

    def __init__(self, net: nn.Module, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.decay, device = config.regularize.ema, accelerator.device
        self.average = average_of(net.to(device)) if self.decay else None
        self.nets = [net] if self.average is None else [net, self.average]
        # Before it is wrapped, in place: names of weights stay.
        self.compiled = compile_net(net, config.train.compile, device, world=accelerator.num_processes)
        optimizer = make_optimizer(
            net,
            config.scaled_optim(),
            first_apart=config.train.conv1_epochs > 0,
            scaled=accelerator.scaler is not None,
        )
        try:
            self.net, self.optimizer = accelerator.prepare(net, optimizer)
        except TypeError as err:  # torch's word for links that cannot carry such numbers
            raise ConfigError(f"train.compress={config.train.compress}: {err}") from err
        self.bare: nn.Module = accelerator.unwrap_model(self.net)

    def backward(self, batch: Batch, *, step: int, between: Callable[[], None] = lambda: None) -> Tensor:
        """Accumulates the gradients of step `step`, counted from 0; returns each of this rank's images' loss, (n,).

        between: called after the last forward pass, before the ranks wait for each other.
        """
        ids = batch.ids.numpy()  # on the host already: a copy from the device would wait for its queued work
        smoothing = self.config.regularize.label_smoothing
        parts = micro_batches(len(ids), self.config.train.accumulate)
        losses = []
        for number, part in enumerate(parts):
            last = part is parts[-1]
            # Gradients are all-reduced once, after the last micro-batch.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                logits = self.logits(batch.images[part], ids[part], step=step, part=number)
                each = F.cross_entropy(logits, batch.labels[part], reduction="none", label_smoothing=smoothing)
                if last:
                    between()
                self.accelerator.backward(each.sum() / len(ids))
            losses.append(each.detach())
        return torch.cat(losses)

    def logits(self, images: Tensor, ids: np.ndarray, *, step: int, part: int = 0) -> Tensor:
        """The logits of the training net, with the dropout of step `step`."""
        seed = self.config.run.seed
        if isinstance(self.bare, AlexNet):  # masks from coordinates: the same at any world size
            rows = rng.bits(ids, seed=seed, epoch=step, stream=rng.DROPOUT) >> np.uint64(32)  # the upper half
            return self.net(images, to_device(rows.astype(np.uint32).view(np.int32), images.device))
        # Other nets draw from torch's generator: seeded from coordinates, so that it has no state to save.
        torch.manual_seed(rng.key(seed, step, self.accelerator.process_index, *([part] if part else [])) >> 1)
        return self.net(images)

    def update(self, number: int) -> bool:
        """Makes the run's update `number`, counted from 1; returns False if the loss scaler found infinite gradients
        and skipped it."""
        if self.config.optim.clip_norm:
            self.accelerator.clip_grad_norm_(self.bare.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        moved = not self.optimizer.step_was_skipped
        if moved and self.average is not None:
            update_average(self.average, self.bare, self.decay, number)
        return moved

    def settle_buckets(self, loader: Loader, crop: int) -> None:
        """Runs a forward and backward pass over zeros of crop × crop pixels, before the first step.

        After its first backward pass DDP reorders its buckets. A resumed run has another first step and would reduce
        gradients in another order than an uninterrupted run, with other rounding at three and more ranks.
        """
        ids, dtype = loader.ids(0, 0), getattr(torch, loader.dtype)
        ids = ids[micro_batches(len(ids), self.config.train.accumulate)[0]]
        images = torch.zeros(len(ids), 3, crop, crop, device=loader.device, dtype=dtype)
        images = images.to(memory_format=torch.channels_last)
        buffers = self.buffers()
        try:
            self.accelerator.backward(self.logits(images, ids, step=0).sum() * 0)
        finally:
            self.optimizer.zero_grad()
            self.put_back(buffers)

    # The forward pass updates buffers: a skipped batch must not stay in running statistics

    def buffers(self) -> list[Tensor]:
        return [b.clone() for b in self.bare.buffers()]

    def put_back(self, buffers: list[Tensor]) -> None:
        for buffer, before in zip(self.bare.buffers(), buffers, strict=True):
            buffer.copy_(before)
