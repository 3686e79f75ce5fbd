"""The synthetic backend: noise that is ready on the device. It measures the network without a data pipeline.

Steps, labels and ids are those of the plan. Nothing is read from storage, decoded or copied to the device.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from .backend import Engine, Setup, Work

BATCHES = 4  # different batches, used in turn; more only cost memory: 1,024 float32 crops of 224 pixels are 617 MB


class Synthetic(Engine):
    """See backend.Engine."""

    def __init__(self, setup: Setup) -> None:
        self.output, self.most_crops = setup.output, setup.most_crops

    @cached_property
    def _batches(self) -> Iterator[Tensor]:  # not in __init__: the loader of the other split may never be used
        return itertools.cycle([self._noise(seed) for seed in range(BATCHES)])

    def next(self) -> tuple[Work, Tensor]:
        work = self.source()
        return work, next(self._batches)[: work.flip.size]

    def close(self) -> None:
        vars(self).pop("_batches", None)

    def decoder(self) -> str:
        return "none: pixels are noise"

    def _noise(self, seed: int) -> Tensor:
        """(most_crops, 3, crop, crop) in the output's form; standard normal, or 0 to 255 for uint8."""
        o = self.output
        layout = torch.channels_last if o.channels_last else torch.contiguous_format
        images = torch.empty(
            (self.most_crops, 3, o.crop, o.crop), dtype=getattr(torch, o.dtype), device=o.device, memory_format=layout
        )
        generator = torch.Generator(o.device).manual_seed(seed)
        if o.dtype == "uint8":
            return images.random_(0, 256, generator=generator)
        return images.normal_(generator=generator)
