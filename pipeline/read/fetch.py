"""The reader's inner loop: bytes from an open file, verified, without the GIL; compiled by Numba.

A thread that reads, checks and crops image by image must reacquire the GIL after each step, and waits for the other
threads. Here a block of images costs one call.
"""

import os
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numpy import ndarray

from ..errors import StorageError
from ..files import OpenFile
from ..jit import compiled
from ..shards import INDEX_DTYPE
from .checksum import crc32
from .truncate_jpeg import cut_short, headers_of_size

# The columns of `rows`: (n, 7) int64, one row per sample. One gather takes a sample's numbers from one cache line.
COLUMNS = INDEX_DTYPE.names or ()
OFFSET, SIZE, SHARD, LABEL, CRC32, WIDTH, HEIGHT = range(len(COLUMNS))

# The C library's function, called by its name, so that compiled code can be kept on disk.
_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.uintp, types.uintp, types.int64))
_memcpy: Any = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))

RECORD = INDEX_DTYPE.itemsize
MAPPED = 100_000_000  # largest index that is memory-mapped, in bytes: 3.6 million samples
# Values in place of a file descriptor. A value below IN_MEMORY is minus the address of an image's first byte.
IN_MEMORY = -1  # the bytes are in the buffer already, verified
NOT_IN_MEMORY = (1 << 31) - 1  # no file has it: reading fails
ALL_ROWS = np.zeros(0, np.int64)


class Block(NamedTuple):
    """n images and the places of their bytes in memory: the first arguments of the compiled functions."""

    buffer: ndarray  # flat uint8
    at: ndarray  # (n,) int64: the image's first byte in the buffer
    fds: ndarray  # (n,) int64: file descriptors, or the values above
    rows: ndarray
    verify: bool


class Rows:
    """A split's index as an array of `rows`, computed on access: rows[ids].

    Stored, they would take twice the index's memory. Gathering the index's words, not its records, halves the cost.
    From a large index, records are read at 0.5 instead of 0.05 µs per image: a memory map would soon be all in memory.
    """

    def __init__(self, index: Any) -> None:
        self._words, self._file = index.view(np.uint32).reshape(len(index), RECORD // 4), None
        if index.nbytes > MAPPED:
            self._path, self._start = index.filename, index.offset
            self._file = OpenFile(os.open(index.filename, os.O_RDONLY))

    def __getitem__(self, ids: Any) -> ndarray:
        if self._file:
            records = np.empty(np.shape(ids), INDEX_DTYPE)
            if not read_records(self._file.fd, self._start, np.ravel(ids), records.reshape(-1).view(np.uint8)):
                raise StorageError(f"{self._path}: its end is missing, or cannot be read; copy it again")
        else:
            records = self._words[ids].view(INDEX_DTYPE)[..., 0]
        rows = np.empty((*records.shape, len(COLUMNS)), np.int64)
        for i, name in enumerate(COLUMNS):
            rows[..., i] = records[name]
        return rows


@compiled
def fetched(
    buffer: ndarray, at: int, fd: int, offset: int, size: int, crc: int, verify: bool, before: int = 0
) -> bool:  # fmt: skip
    """Reads `size` bytes at `offset` into buffer[at:]. Returns False if that fails, or if the CRC-32 differs.

    before: the CRC-32 of preceding bytes, which `crc` continues.
    """
    if fd == IN_MEMORY:
        return True
    done, address = 0, np.uintp(buffer.ctypes.data + at)
    if fd < IN_MEMORY:
        _memcpy(address, np.uintp(-fd), np.uintp(size))
        done = size
    while done < size:
        got = _pread(np.int32(fd), address + np.uintp(done), np.uintp(size - done), np.int64(offset + done))
        if got <= 0:
            return False
        done += got
    return not verify or np.int64(crc32(np.uint32(before), address, np.uint32(size))) == crc


@compiled
def read_records(fd: int, start: int, ids: ndarray, records: ndarray) -> bool:
    """Reads the index's records of `ids` into `records`, flat uint8. Returns False if that fails."""
    done = True
    for i in range(len(ids)):
        done &= fetched(records, i * RECORD, fd, start + ids[i] * RECORD, RECORD, 0, False)
    return done


@compiled
def fetch_images(
    buffer: ndarray,
    at: ndarray,
    fds: ndarray,
    rows: ndarray,
    verify: bool,
    needed: ndarray,
) -> int:
    """Fetches n images; returns the index of the first that fails, or n.

    needed: (n,) int64, rows that are needed: each JPEG is cut to that height if possible, see truncate_jpeg.cut_short,
    and the value is set to its new height. ALL_ROWS: no image is cut.
    """
    for i in range(len(at)):
        size, width, height = rows[i, SIZE], rows[i, WIDTH], rows[i, HEIGHT]
        if not fetched(buffer, at[i], fds[i], rows[i, OFFSET], size, rows[i, CRC32], verify):
            return i
        image = buffer[at[i] : at[i] + size]
        if len(needed) and not (needed[i] < height and cut_short(image, width, height, needed[i])):
            needed[i] = height
    return len(at)


@compiled
def not_plain_jpegs(buffer: ndarray, at: ndarray, rows: ndarray) -> ndarray:
    """(n,) bool: which images in the buffer are no JPEGs of their width × height with an end."""
    odd = np.zeros(len(at), np.bool_)
    for i in range(len(at)):
        odd[i] = headers_of_size(buffer[at[i] : at[i] + rows[i, SIZE]], rows[i, WIDTH], rows[i, HEIGHT])[0] == 0
    return odd


@compiled
def zero_rest(buffer: ndarray, at: ndarray, rows: ndarray, room: int) -> None:
    """Fills the rest of each image's `room` bytes with zeros, so that a decoder cannot read an older image there."""
    for i in range(len(at)):
        buffer[at[i] + rows[i, SIZE] : at[i] + room] = 0


def prepare() -> None:
    """Compiles the functions, or loads what an earlier process compiled."""
    pixel, none, rows = np.zeros(1, np.uint8), np.zeros(0, np.int64), np.zeros((0, len(COLUMNS)), np.int64)
    not_plain_jpegs(pixel, none, rows)
    zero_rest(pixel, none, rows, 0)
    fetch_images(pixel, none, none, rows, False, ALL_ROWS)
