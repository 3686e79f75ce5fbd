"""Bytes of samples from local shards: many reads in flight, into reused buffers, each one checked.

The consumer's thread never touches storage: it asks for a batch early and collects it when it is there.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import DataError, StorageError
from ..manifest import Split
from ..shards import sample_key

try:
    from zlib_ng.zlib_ng import crc32  # 0.6 µs a 256-side JPEG
except ImportError:  # no wheel for this platform
    from zlib import crc32  # the same polynomial at a thirteenth of the speed

# Few enough for `ulimit -n` 1024 beside everything else, many enough that a shuffled epoch of ImageNet seldom reopens.
MAX_OPEN = 512
SAMPLES_A_TASK = 16  # a task's cost in Python is worth more than one read; a batch of 128 still makes 8


class ReadBatch:
    """A batch that is being read. `wait()` gives its images; `release()` gives its buffer back for reuse."""

    def __init__(
        self, buffer: np.ndarray, images: list[np.ndarray], tasks: list[Future[None]], free: list[np.ndarray]
    ) -> None:
        self.buffer, self.images, self.tasks, self._free = buffer, images, tasks, free

    def wait(self) -> list[np.ndarray]:
        """n uint8 arrays, the encoded images, valid until release(). Raises DataError or StorageError."""
        for task in self.tasks:
            task.result()
        return self.images

    def release(self) -> None:
        self._free.append(self.buffer)


class Reader:
    """Reads samples of one split by their ids."""

    def __init__(self, split: Split, *, threads: int = 8, verify: bool = True) -> None:
        self.split, self.verify = split, verify
        index = split.index
        # Contiguous columns: taking rows from the mapped record array costs three times as much.
        self.offset = index["offset"].astype(np.int64)
        self.size = index["size"].astype(np.int64)
        self.shard = index["shard"].astype(np.int64)
        self.crc32 = index["crc32"].astype(np.int64)
        self.files = OpenFiles([split.root / shard.name for shard in split.shards])
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="express-read")
        self._free: list[np.ndarray] = []

    def read(self, ids: np.ndarray) -> ReadBatch:
        """Starts to read `ids` and returns at once."""
        sizes = self.size[ids]
        ends = np.cumsum(sizes)
        buffer = self._buffer(int(ends[-1]))
        spans = zip((ends - sizes).tolist(), ends.tolist(), strict=True)
        images = [buffer[start:end] for start, end in spans]
        jobs = list(
            zip(images, ids.tolist(), self.shard[ids].tolist(), self.offset[ids].tolist(), self.crc32[ids].tolist())
        )
        parts = [jobs[i : i + SAMPLES_A_TASK] for i in range(0, len(jobs), SAMPLES_A_TASK)]
        tasks = [self.pool.submit(self._read_part, part) for part in parts]
        return ReadBatch(buffer, images, tasks, self._free)

    def _buffer(self, size: int) -> np.ndarray:
        # A fresh buffer of a batch costs a page fault every 4 KiB, more than the read itself from the page cache.
        while self._free:
            if len(buffer := self._free.pop()) >= size:
                return buffer
        return np.empty(size + size // 4, np.uint8)

    def _read_part(self, jobs: list[tuple[np.ndarray, int, int, int, int]]) -> None:
        for image, sample, shard, offset, crc in jobs:
            with self.files.open(shard) as fd:
                self._read_one(fd, image, sample, shard, offset)
            if self.verify and crc32(image) != crc:
                raise self._bad(sample, shard, offset, "its bytes changed since they were written (checksum)")

    def _read_one(self, fd: int, image: np.ndarray, sample: int, shard: int, offset: int) -> None:
        done = 0
        while done < len(image):
            try:
                got = os.preadv(fd, [image.data[done:]], offset + done)
            except OSError as err:
                raise StorageError(f"{self.files.paths[shard]}: cannot be read: {err.strerror}") from err
            if not got:
                raise self._bad(sample, shard, offset, "the shard ends before it")
            done += got

    def _bad(self, sample: int, shard: int, offset: int, reason: str) -> DataError:
        path = self.files.paths[shard]
        return DataError(
            f"{path}: sample {sample} ({sample_key(path, offset)!r}) at byte {offset}: {reason};"
            " copy the shard again or shard the data again"
        )

    def describe(self, sample: int) -> str:
        """Names a sample for a message: shard, key, offset."""
        path, offset = self.files.paths[self.shard[sample]], int(self.offset[sample])
        return f"{path}: sample {sample} ({sample_key(path, offset)!r}) at byte {offset}"

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.files.close()


class OpenFiles:
    """File descriptors by shard number: opened when needed, at most MAX_OPEN kept, none closed while in use."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._lock = threading.Lock()
        self._open: OrderedDict[int, list[int]] = OrderedDict()  # shard → [descriptor, users], oldest use first

    @contextmanager
    def open(self, shard: int) -> Iterator[int]:
        with self._lock:
            entry = self._open.get(shard)
            if entry is None:
                self._make_room()
                entry = self._open[shard] = [self._descriptor(shard), 0]
            self._open.move_to_end(shard)
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def _descriptor(self, shard: int) -> int:
        try:
            return os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise StorageError(f"{self.paths[shard]}: cannot be opened: {err.strerror}") from err

    def _make_room(self) -> None:
        if len(self._open) < MAX_OPEN:
            return
        for shard, (fd, users) in self._open.items():
            if not users:
                os.close(fd)
                del self._open[shard]
                return

    def close(self) -> None:
        with self._lock:
            for fd, _ in self._open.values():
                os.close(fd)
            self._open.clear()
