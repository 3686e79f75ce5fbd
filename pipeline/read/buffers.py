"""Reused memory: getting fresh pages from the system costs more than filling them."""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray

UNUSED = 2  # references to a buffer: the list's, and the one that asks


def new_buffer(size: int, *, pinned: bool) -> ndarray:
    """(size,) uint8, not initialised. torch is imported for pinned memory alone."""
    if not pinned:
        return np.empty(size, np.uint8)
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


@dataclass
class Buffers:
    """Arrays whose memory is reused when no array, tensor or memoryview refers to it any more.

    pinned: page-locked, so that a GPU copies from and to them without another copy on the host.
    """

    pinned: bool
    _memory: list[ndarray] = field(default_factory=list)

    def take(self, shape: tuple[int, ...], dtype: Any = np.uint8, *, spare: int = 0) -> ndarray:
        """spare: bytes more for a buffer that has to be made, so that it fits the next, somewhat larger array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        # An array that is a part of a buffer refers to it, and so does an array that is made of this one.
        free = (i for i in range(len(self._memory)) if sys.getrefcount(self._memory[i]) == UNUSED)
        at = next((i for i in free if len(self._memory[i]) >= size), None)
        if at is None:
            at = len(self._memory)
            self._memory.append(new_buffer(size + spare, pinned=self.pinned))
        return np.asarray(self._memory[at][:size].view(dtype).reshape(shape))
