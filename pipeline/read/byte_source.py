"""The source of stored bytes: shards as local files. Another kind of storage must implement the same `read`."""

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import StorageError
from ..files import OpenFile

MAX_OPEN = 512  # enough that a shuffled epoch of ImageNet seldom reopens


def files_for_a_reader() -> int:
    """Returns how many files a reader may keep open; its threads may use as many again: each an eighth of the limit.

    A process has a training and a validation reader, and other files. Increases the soft limit (`ulimit -n`, often
    1,024 or 256 for programs that use select()) as far as the system permits, which is the purpose of that limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS reports "infinite" but allows fewer
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return max(1, (sys.maxsize if soft == resource.RLIM_INFINITY else soft) // 8)


class LocalShards:
    """Reads the files `paths`: opens each at its first read, and keeps the MAX_OPEN most recently used ones open.

    copies: the path of each shard's copy, which is read instead if it exists.

    Uses pread, not mmap: mmap was a little faster from the page cache, but kills the process if a shard is truncated,
    and is slow on network filesystems.
    """

    def __init__(self, paths: list[Path], copies: Sequence[Path] = ()) -> None:
        def opened(shard: int) -> OpenFile:
            try:
                if copies:
                    with contextlib.suppress(OSError):  # it may exist and not be readable
                        return OpenFile(os.open(copies[shard], os.O_RDONLY))
                return OpenFile(os.open(paths[shard], os.O_RDONLY))
            except OSError as err:
                if err.errno == errno.EMFILE and self.open.cache_info().currsize:
                    self.open.cache_clear()
                    return opened(shard)
                cure = f"; raise `ulimit -n` ({8 * room})" if err.errno == errno.EMFILE else ""
                raise StorageError(f"{paths[shard]}: cannot be opened: {err.strerror}{cure}") from err

        room = self._room = files_for_a_reader()
        self.paths = paths
        # While in use, a file stays open even if it leaves the cache.
        self.open = lru_cache(min(MAX_OPEN, room))(opened)

    def at_once(self, threads: int) -> int:
        """How many files each of `threads` threads may use at a time."""
        return max(1, self._room // threads)

    def read(self, shard: int, start: int, end: int) -> np.ndarray:
        """The bytes [start, end), uint8. Raises StorageError; EOFError if the shard ends before them."""
        file, buffer, done = self.open(shard), np.empty(end - start, np.uint8), 0
        while done < len(buffer):
            try:
                got = os.preadv(file.fd, [buffer.data[done:]], start + done)
            except OSError as err:
                raise StorageError(f"{self.paths[shard]}: cannot be read: {err.strerror}") from err
            if not got:
                raise EOFError
            done += got
        return buffer

    def close(self) -> None:
        self.open.cache_clear()
