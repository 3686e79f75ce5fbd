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


class _Lent(weakref.ref[np.ndarray]):
    """Refers to an array whose memory returns when the array is gone."""

    __slots__ = ("memory",)
    memory: np.ndarray


class Buffers:
    """Arrays whose memory is used again once nobody refers to the array, to a tensor or to a memoryview of it.

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
        # list.append is no Python code: in a callback that is, Ctrl-C would be lost as an ignored exception.
        lent = _Lent(array, self._returned.append)
        lent.memory = memory
        self._lent[id(lent)] = lent
        return array
