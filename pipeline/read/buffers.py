"""Memory that is used again and again: fresh pages cost more than their filling."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np


def new_buffer(size: int, *, pinned: bool) -> np.ndarray:
    """(size,) uint8, not initialised. torch is imported for pinned memory alone."""
    if not pinned:
        return np.empty(size, np.uint8)
    import torch

    buffer: np.ndarray = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return buffer


class Buffers:
    """Arrays whose memory is used again once nobody refers to the array, to a tensor or to a memoryview of it.

    pinned: page-locked, so that a GPU copies from and to them without another copy on the host.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: Any = np.uint8, *, spare: int = 0) -> np.ndarray:
        """spare: bytes more for a buffer that has to be made, so that it fits the next, somewhat larger array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at = next((i for i, memory in enumerate(self._free) if len(memory) >= size), None)
        memory = new_buffer(size + spare, pinned=self.pinned) if at is None else self._free.pop(at)
        array: np.ndarray = memory[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array
