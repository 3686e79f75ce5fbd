"""Bytes of samples from local shards, by their ids, each one checked.

Where storage has to be waited for, a pool keeps many reads in flight, batches ahead, into reused buffers. Where the
operating system holds the bytes already, a pool would cost more than it hides, and whoever decodes an image reads it
himself. The reader finds out which by the time that reads take, and by what the system had to fetch for them.

pread and not mmap: a map gave 1.02 times the rate of 256-pixel JPEGs and 1.24 times that of raw pixels, on two cores
from the page cache, but ends the process where somebody cuts a shard short, and is slow on network filesystems.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np

from ..errors import DataError, StorageError
from ..manifest import Split
from ..shards import crc32, sample_key

# Few enough for `ulimit -n` 1024 beside everything else, many enough that a shuffled epoch of ImageNet seldom reopens.
MAX_OPEN = 512
SLOW_SECONDS = 150e-6  # a read of so long comes from storage: from the page cache 100 kB take 20 µs
BLOCKS_A_READ = 8  # of 512 bytes: more than that an image, on average, came from a disk
THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
SLOW_SHARE = 0.3  # of the latest reads
PATIENCE = 64, 4096  # batches until the pool is done without again, at first and at most


_Job = tuple[int, int, int, int, int]  # one sample to read: id, shard, offset, size, crc32


class ReadBatch:
    """A batch to read. Its images are read ahead once `ahead()` was called, otherwise by whoever asks for one.

    `release()` gives its buffer back for reuse.
    """

    def __init__(self, reader: Reader, jobs: list[_Job]) -> None:
        self._reader, self._jobs = reader, jobs
        self._buffer: np.ndarray | None = None
        self._images: list[np.ndarray] = []
        self._tasks: list[Future[None]] = []

    def ahead(self) -> None:
        """Starts to read all images and returns at once; does nothing where that was done already."""
        if self._tasks:
            return
        sizes = [size for _, _, _, size, _ in self._jobs]
        ends = np.cumsum(sizes).tolist()
        self._buffer = buffer = self._reader.buffer(ends[-1])
        images = [buffer[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        step = self._reader.samples_a_task
        self._tasks = [
            self._reader.pool.submit(self._reader.read_into, images[i : i + step], self._jobs[i : i + step])
            for i in range(0, len(images), step)
        ]
        self._images = images

    def image(self, i: int) -> tuple[np.ndarray, bool]:
        """The stored bytes of the i-th image, uint8, the caller's until this thread's next call and until release().

        And whether they are still to be verified, by check(i, crc32) with what whoever works on them computed.
        Raises DataError or StorageError.
        """
        if not self._tasks:
            return self._reader.read_now(self._jobs[i]), self._reader.verify
        self._tasks[i // self._reader.samples_a_task].result()
        return self._images[i], self._reader.verify and not self._reader.always_ahead

    def check(self, i: int, crc: int) -> None:
        """Raises DataError unless the i-th image is what was written."""
        if crc != self._jobs[i][4]:
            raise self._reader.changed(self._jobs[i][0])

    def worked_on(self, images: int) -> None:
        """To be called by a thread that is done with so many of the images."""
        if not self._tasks:
            self._reader.worked_on(images)

    def wait(self) -> list[np.ndarray]:
        """The stored bytes of all images, valid until release(). Raises DataError or StorageError."""
        self.ahead()
        for task in self._tasks:
            task.result()
        return self._images

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def release(self) -> None:
        if self._buffer is not None:
            self._reader.free.append(self._buffer)


class Reader:
    """Reads samples of one split by their ids.

    threads: reads in flight where storage is slow. samples_a_task: how many a thread reads in turn; a task costs 15 µs.
    always_ahead: for consumers that neither read nor verify themselves.
    """

    def __init__(
        self,
        split: Split,
        *,
        threads: int = 32,
        samples_a_task: int = 4,
        verify: bool = True,
        always_ahead: bool = False,
    ) -> None:
        self.split, self.verify, self.always_ahead = split, verify, always_ahead
        self.samples_a_task = samples_a_task
        index = split.index
        # Contiguous columns: taking rows from the mapped record array costs three times as much.
        self.offset = index["offset"].astype(np.int64)
        self.size = index["size"].astype(np.int64)
        self.shard = index["shard"].astype(np.int64)
        self.crc32 = index["crc32"].astype(np.int64)
        self.files = OpenFiles([split.root / shard.name for shard in split.shards])
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="express-read")
        self.free: list[np.ndarray] = []
        self._local = threading.local()
        self._slow_share = 0.0  # moving mean over reads that were waited for
        self._ahead_for, self._patience = 0, PATIENCE[0]

    def read(self, ids: np.ndarray) -> ReadBatch:
        """The samples `ids` as a batch, already being read where that takes time; returns at once."""
        columns = (ids, self.shard[ids], self.offset[ids], self.size[ids], self.crc32[ids])
        batch = ReadBatch(self, list(zip(*(column.tolist() for column in columns), strict=True)))
        if self.is_slow():
            self._ahead_for -= 1
            batch.ahead()
        return batch

    def is_slow(self) -> bool:
        """Whether batches are to be read ahead: as long as reads took, and then for another try without."""
        if self.always_ahead or self._ahead_for > 0:
            return True
        if self._slow_share < SLOW_SHARE:
            return False
        self._ahead_for, self._slow_share = self._patience, 0.0
        self._patience = min(2 * self._patience, PATIENCE[1])
        return True

    def buffer(self, size: int) -> np.ndarray:
        # A fresh buffer of a batch costs a page fault every 4 KiB, more than the read itself from the page cache.
        while self.free:
            if len(buffer := self.free.pop()) >= size:
                return buffer
        return np.empty(size + size // 4, np.uint8)

    def read_into(self, images: list[np.ndarray], jobs: list[_Job]) -> None:
        """A pool thread's task."""
        for image, job in zip(images, jobs, strict=True):
            self._read(image, job, verify=self.verify and self.always_ahead)

    def read_now(self, job: _Job) -> np.ndarray:
        """One sample, read in the calling thread into this thread's buffer. Not verified."""
        size, buffer = job[3], getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = np.empty(2 * size, np.uint8)
        image: np.ndarray = buffer[:size]
        started = time.perf_counter()
        self._read(image, job, verify=False)
        self._judge(time.perf_counter() - started > SLOW_SECONDS, of=16)
        return image

    def worked_on(self, images: int) -> None:
        """To be told by a thread that read and worked on so many: of a fast disk the system counts what it fetched."""
        before = getattr(self._local, "fetched", None)
        self._local.fetched = fetched = resource.getrusage(THREAD).ru_inblock
        self._judge(before is not None and fetched - before > BLOCKS_A_READ * images, of=3)

    def _judge(self, slow: bool, *, of: int) -> None:
        # Threads may overwrite each other's means: it is a rule of thumb, and a lock would cost more than it is worth.
        self._slow_share += (slow - self._slow_share) / of

    def _read(self, image: np.ndarray, job: _Job, *, verify: bool) -> None:
        sample, shard, offset, size, crc = job
        with self.files.open(shard) as fd:
            done = 0
            while done < size:
                try:
                    got = os.preadv(fd, [image.data[done:]], offset + done)
                except OSError as err:
                    raise StorageError(f"{self.files.paths[shard]}: cannot be read: {err.strerror}") from err
                if not got:
                    raise self._bad(sample, "the shard ends before it")
                done += got
        if verify and crc32(image) != crc:
            raise self.changed(sample)

    def changed(self, sample: int) -> DataError:
        return self._bad(sample, "its bytes changed since they were written (checksum)")

    def _bad(self, sample: int, reason: str) -> DataError:
        return DataError(f"{self.describe(sample)}: {reason}; copy the shard again or shard the data again")

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
        self._kept: list[int | None] = [None] * len(paths)  # of few shards, all stay open: no lock, no count of users

    def open(self, shard: int) -> AbstractContextManager[int]:
        """The shard's descriptor, for as long as the block lasts."""
        if len(self.paths) > MAX_OPEN:
            return self._borrowed(shard)
        descriptor = self._kept[shard]
        if descriptor is None:
            with self._lock:
                descriptor = self._kept[shard]
                if descriptor is None:
                    descriptor = self._kept[shard] = self._descriptor(shard)
        return nullcontext(descriptor)

    @contextmanager
    def _borrowed(self, shard: int) -> Iterator[int]:
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
            for fd in (*(fd for fd, _ in self._open.values()), *(fd for fd in self._kept if fd is not None)):
                os.close(fd)
            self._open.clear()
            self._kept = [None] * len(self.paths)
