"""The source of stored bytes: shards as local files. Another storage has to implement the same `read`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import StorageError

# Few enough for `ulimit -n` 1024 beside everything else, many enough that a shuffled epoch of ImageNet seldom reopens.
MAX_OPEN = 512


class Source(Protocol):
    """Bytes by shard and range."""

    def read(self, shard: int, ranges: Iterable[tuple[int, int]]) -> list[np.ndarray]:
        """The bytes at each (offset, size), uint8. Raises StorageError; EOFError if the shard ends before a range."""

    def close(self) -> None:
        """Releases everything that is held open."""


class OpenFile:
    """A descriptor that is closed when nobody refers to it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class LocalShards:
    """The files `paths`: opened when first read, the MAX_OPEN that were used last kept open.

    pread and not mmap: a map was a little faster from the page cache, but kills the process if a shard is truncated,
    and is slow on network filesystems.
    """

    def __init__(self, paths: list[Path]) -> None:
        def opened(shard: int) -> OpenFile:
            try:
                return OpenFile(os.open(paths[shard], os.O_RDONLY | os.O_CLOEXEC))
            except OSError as err:
                raise StorageError(f"{paths[shard]}: cannot be opened: {err.strerror}") from err

        self.paths = paths
        self.open = lru_cache(MAX_OPEN)(opened)  # while in use, a file stays open even if it leaves the cache

    def read(self, shard: int, ranges: Iterable[tuple[int, int]]) -> list[np.ndarray]:
        file = self.open(shard)
        return [self._range(shard, file.fd, offset, size) for offset, size in ranges]

    def _range(self, shard: int, fd: int, offset: int, size: int) -> np.ndarray:
        buffer, done = np.empty(size, np.uint8), 0
        while done < size:
            try:
                got = os.preadv(fd, [buffer.data[done:]], offset + done)
            except OSError as err:
                raise StorageError(f"{self.paths[shard]}: cannot be read: {err.strerror}") from err
            if not got:
                raise EOFError
            done += got
        return buffer

    def close(self) -> None:
        self.open.cache_clear()
