"""Reused memory: getting fresh pages from the system costs more than filling them."""

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


class _Lent(weakref.ref[np.ndarray]):
    """A weak reference to an array; its memory returns to the pool when the array is deleted."""

    __slots__ = ("memory",)
    memory: np.ndarray


class Buffers:
    """Arrays whose memory is reused when no array, tensor or memoryview refers to it any more.

    pinned: page-locked, so that a GPU copies from and to them without another copy on the host.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._free: list[np.ndarray] = []
        self._lent: dict[int, _Lent] = {}  # by id: a reference to an array cannot be hashed
        self._returned: list[Any] = []

    def take(self, shape: tuple[int, ...], dtype: Any = np.uint8, *, spare: int = 0) -> np.ndarray:
        """spare: bytes more for a buffer that has to be made, so that it fits the next, somewhat larger array."""
        while self._returned:
            self._free.append(self._lent.pop(id(self._returned.pop())).memory)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at = next((i for i, memory in enumerate(self._free) if len(memory) >= size), None)
        memory = new_buffer(size + spare, pinned=self.pinned) if at is None else self._free.pop(at)
        array: np.ndarray = memory[:size].view(dtype).reshape(shape)
        # list.append is written in C: in a callback written in Python, Ctrl-C would be lost as an ignored exception.
        lent = _Lent(array, self._returned.append)
        lent.memory = memory
        self._lent[id(lent)] = lent
        return array
