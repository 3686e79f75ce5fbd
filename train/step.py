"""What one step does to the net: forward, backward, update. When, and what about failures, is the loop's business."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from model import AlexNet
from pipeline.read import rng
from pipeline.read.backend import to_device
from pipeline.read.loader import Batch

from .config import Config
from .ema import Average


def micro_batches(images: int, count: int) -> list[slice]:
    """`count` consecutive slices of a rank's images, of two images at least: batch normalisation needs two."""
    pairs = math.ceil(images / 2)
    ends = [min(2 * (pairs * i // count), images) for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends) if b > a]


class Stepper:
    """The net, its optimiser and the average of its weights.

    net: as Accelerate wraps it; bare: itself. ids are a batch's on the host: asking the device for them would wait
    for all that it has to do.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, net: nn.Module, optimizer: Any, average: Average | None
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.net, self.optimizer, self.average = net, optimizer, average
        self.bare: nn.Module = accelerator.unwrap_model(net)
        self.takes_rows = isinstance(self.bare, AlexNet)

    def backward(
        self, batch: Batch, ids: np.ndarray, *, step: int, between: Callable[[], None] = lambda: None
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of step `step`, from 0; returns this rank's mean loss () and each image's (n,).

        between: called after the last forward pass, before the ranks wait for each other.
        """
        count, smoothing = len(ids), self.config.regularize.label_smoothing
        parts = micro_batches(count, self.config.train.accumulate)
        losses = []
        for number, part in enumerate(parts):
            images, labels = batch.images[part], batch.labels[part]
            last = part is parts[-1]
            # Ranks add up their gradients once, after the last part.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                logits = self.logits(images, ids[part], step=step, part=number)
                each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
                if last:
                    between()
                self.accelerator.backward(each.sum() / count)
            losses.append(each.detach())
        all_losses = torch.cat(losses)
        return all_losses.mean(), all_losses

    def logits(self, images: Tensor, ids: np.ndarray, *, step: int, part: int = 0) -> Tensor:
        """Of the training net, with the dropout of step `step`."""
        seed = self.config.run.seed
        if self.takes_rows:  # masks from coordinates: the same at any world size
            rows = rng.bits(ids, seed=seed, epoch=step, stream=rng.DROPOUT)
            upper = (rows >> np.uint64(32)).astype(np.uint32).view(np.int32)
            logits: Tensor = self.net(images, to_device(upper, images.device))
            return logits
        # Other nets draw from torch's generator: seeded from coordinates, so that it has no state to save.
        torch.manual_seed(rng.key(seed, step, self.accelerator.process_index, *([part] if part else [])) >> 1)
        logits = self.net(images)
        return logits

    def update(self) -> bool:
        """Updates the weights; returns False if the loss scaler found infinite gradients and skipped the update."""
        if self.config.optim.clip_norm:
            self.accelerator.clip_grad_norm_(self.bare.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        moved = not self.optimizer.step_was_skipped
        if moved and self.average is not None:
            self.average.update(self.bare)
        return moved

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def settle_buckets(self, ids: np.ndarray, *, crop: int, dtype: torch.dtype) -> None:
        """A pass over nothing, before the first step; ids: of any step, crop and dtype: of its images.

        After its first backward pass DDP reorders its buckets. A resumed run has another first step, and would add
        up gradients in another order than an undisturbed one: at three and more ranks that gives other bits.
        """
        ids = ids[micro_batches(len(ids), self.config.train.accumulate)[0]]
        images = torch.zeros(len(ids), 3, crop, crop, device=self.accelerator.device, dtype=dtype)
        images = images.to(memory_format=torch.channels_last)
        buffers = self.buffers()
        self.accelerator.backward(self.logits(images, ids, step=0).sum() * 0)
        self.clear()
        self.put_back(buffers)

    # What the forward pass itself changes: a batch that is left out must not stay in averages

    def buffers(self) -> list[Tensor]:
        return [b.clone() for b in self.bare.buffers()]

    def put_back(self, buffers: list[Tensor]) -> None:
        for buffer, before in zip(self.bare.buffers(), buffers, strict=True):
            buffer.copy_(before)
