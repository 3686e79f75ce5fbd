"""Reused memory: getting fresh pages from the system costs more than filling them."""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray

UNUSED = 2  # references to an unused buffer: the list's, and the argument of getrefcount


def new_buffer(size: int, *, pinned: bool) -> ndarray:
    """Returns (size,) uint8, not initialised. Imports torch only for pinned memory."""
    if not pinned:
        return np.empty(size, np.uint8)
    import torch

    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()


@dataclass
class Buffers:
    """Arrays whose memory is reused when no array, tensor or memoryview refers to it any more.

    pinned: page-locked, so that a GPU copies from and to them without another copy on the host.
    """

    pinned: bool
    _memory: list[ndarray] = field(default_factory=list)

    def take(self, shape: tuple[int, ...], dtype: Any = np.uint8, *, spare: int = 0) -> ndarray:
        """Returns an array in an unused buffer, or in a new one with `spare` bytes more, to fit larger arrays later."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        # Every view of a buffer, and every view of a view, holds a reference to the buffer.
        free = (i for i in range(len(self._memory)) if sys.getrefcount(self._memory[i]) == UNUSED)
        at = next((i for i in free if len(self._memory[i]) >= size), None)
        if at is None:
            at = len(self._memory)
            self._memory.append(new_buffer(size + spare, pinned=self.pinned))
        return np.asarray(self._memory[at][:size].view(dtype).reshape(shape))
