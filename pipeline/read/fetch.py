"""The reader's inner loop: bytes from an open file, verified, without the GIL; compiled by Numba.

A thread that reads, checks and crops image by image asks for the interpreter's lock after each step, and waits for the
other threads. Here a block of images costs one call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ..jit import compiled
from . import checksum
from .jpeg import cut_short, is_jpeg_of_size

# What the C library has anyway: called by address, so that compiled code can be kept on disk.
_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.uintp, types.uintp, types.int64))

IN_MEMORY = -1  # instead of a file's descriptor: the bytes are in the buffer already


@compiled
def fetched(buffer: np.ndarray, at: int, fd: int, offset: int, size: int, crc: int, verify: bool) -> bool:
    """buffer[at : at + size] = the file's bytes from `offset` on. False where that fails, or the CRC-32 differs."""
    done = 0
    while fd >= 0 and done < size:
        got = _pread(
            np.int32(fd), np.uintp(buffer.ctypes.data + at + done), np.uintp(size - done), np.int64(offset + done)
        )
        if got <= 0:
            return False
        done += got
    return not verify or checksum.crc32(buffer, at, size) == crc


@compiled
def fetch_images(
    buffer: np.ndarray,
    at: np.ndarray,
    fds: np.ndarray,
    offset: np.ndarray,
    size: np.ndarray,
    crc: np.ndarray,
    verify: bool,
    width: np.ndarray,
    height: np.ndarray,
    rows: np.ndarray,
    cut: np.ndarray,
) -> int:
    """n images to buffer[at[i] : at[i] + size[i]]; returns the number of the first that fails, or n.

    cut: (n,) bool, set where image i is a JPEG that could be made rows[i] high: see jpeg.cut_short. Where cut is empty,
    width, height and rows are not used.
    """
    for i in range(len(at)):
        if not fetched(buffer, at[i], fds[i], offset[i], size[i], crc[i], verify):
            return i
        if len(cut):
            cut[i] = rows[i] < height[i] and cut_short(buffer, at[i], size[i], width[i], height[i], rows[i])
    return len(at)


@compiled
def not_plain_jpegs(
    buffer: np.ndarray, at: np.ndarray, size: np.ndarray, width: np.ndarray, height: np.ndarray
) -> np.ndarray:
    """(n,) bool: which images in the buffer do not begin as JPEGs of their width × height."""
    odd = np.zeros(len(at), np.bool_)
    for i in range(len(at)):
        odd[i] = not is_jpeg_of_size(buffer, at[i], size[i], width[i], height[i])
    return odd


def prepare() -> None:
    """Compiles the kernels, or loads what an earlier process compiled."""
    none, one = np.zeros(0, np.int64), np.zeros(1, np.uint8)
    not_plain_jpegs(one, none, none, none, none)
    fetch_images(one, none, none, none, none, none, False, none, none, none, np.zeros(0, np.bool_))
