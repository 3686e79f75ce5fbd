"""Bytes of samples from local shards, by their ids, each one checked.

If storage has to be waited for, a pool keeps many reads in flight, batches ahead, into reused buffers. If the
operating system holds the bytes already, a pool would cost more than it hides, and the threads that decode images read
them, a block at a time. The reader finds out which: the system counts how often a thread had to wait. Both ways read
and verify by one compiled call per block, which does not hold the GIL.

pread and not mmap: a map was a little faster from the page cache, but ends the process where somebody cuts a shard
short, and is slow on network filesystems.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from ..errors import BadSample, StorageError
from ..manifest import Split
from ..shards import crc32, sample_key
from . import checksum
from .fetch import IN_MEMORY, fetch_images, not_plain_jpegs

# Few enough for `ulimit -n` 1024 beside everything else, many enough that a shuffled epoch of ImageNet seldom reopens.
MAX_OPEN = 512
WAITS_A_READ = 0.3  # of a thread, on average: from the page cache it has not to wait at all
BLOCKS_A_READ = 8  # of 512 bytes: more than that an image, on average, came from a disk
OF_THREAD = hasattr(resource, "RUSAGE_THREAD")
USAGE = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
SLOW_SHARE = 0.5  # of the latest blocks
PATIENCE = 64, 4096  # batches until the pool is done without again, at first and at most


class Files(NamedTuple):
    """Where n images are and where they go: what the kernels of fetch.py take first."""

    buffer: np.ndarray  # flat uint8
    at: np.ndarray  # (n,) int64: the image's first byte in the buffer, and so on
    fds: np.ndarray  # fetch.IN_MEMORY: it is there already
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    verify: bool


NOTHING, NO_CUTS = np.zeros(0, np.int64), np.zeros(0, np.bool_)
NOT_OPEN = -1


def fetch(files: Files) -> int:
    """Reads and verifies n images, without the GIL if the processor can; returns the number of the first that fails,
    or n."""
    in_kernel = checksum.AVAILABLE or not files.verify
    n = fetch_images(*files._replace(verify=files.verify and in_kernel), NOTHING, NOTHING, NOTHING, NO_CUTS)
    if not in_kernel:
        for i, (at, size, crc) in enumerate(zip(files.at[:n], files.size, files.crc32)):
            if crc32(files.buffer[at : at + size]) != crc:
                return i
    return int(n)


class ReadBatch:
    """A batch to read. Its images are read ahead once `ahead()` was called, otherwise by whoever asks for them.

    `release()` gives its buffer back for reuse.
    """

    def __init__(self, reader: Reader, ids: np.ndarray) -> None:
        self._reader, self.ids = reader, ids
        self.shard, self.offset, self.size, self.crc32 = (
            column[ids] for column in (reader.shard, reader.offset, reader.size, reader.crc32)
        )
        self._buffer: np.ndarray | None = None
        self._at = NOTHING
        self._tasks: list[Future[None]] = []

    def ahead(self) -> None:
        """Starts to read all images and returns at once; does nothing where that was done already."""
        if self._tasks:
            return
        reader, step, n = self._reader, self._reader.samples_a_task, len(self.ids)
        self._at = np.cumsum(self.size) - self.size
        self._buffer = reader.buffer(int(self.size.sum()))
        self._tasks = [reader.pool.submit(self._read_ahead, i, min(i + step, n)) for i in range(0, n, step)]

    def _read_ahead(self, a: int, b: int) -> None:
        """A pool thread's task: images [a, b)."""
        assert self._buffer is not None
        reader = self._reader
        while a < b:
            part = slice(a, b)
            with reader.files.several(self.shard[part]) as fds:
                columns = self.offset[part], self.size[part], self.crc32[part], reader.verify_ahead
                a += fetch(Files(self._buffer, self._at[part], fds, *columns))
            if a < b:  # read once more by Python, which knows the reason; a read that was only interrupted succeeds
                image = self._buffer[int(self._at[a]) :][: int(self.size[a])]
                reader.read_one(self, a, image, verify=reader.verify_ahead)
                a += 1

    @contextmanager
    def files(self, a: int, b: int, *, in_turn: bool = False) -> Iterator[Files]:
        """Images [a, b), to be fetched by one of fetch.py's kernels while the block lasts.

        in_turn: each may overwrite the one before it, so that all meet in the processor's cache.
        The bytes are the caller's until this thread's next call, and until release().
        """
        reader, verify, part = self._reader, self._reader.verify, slice(a, b)
        offset, size, crc = self.offset[part], self.size[part], self.crc32[part]
        if self._tasks:
            for task in self._tasks[a // reader.samples_a_task : (b - 1) // reader.samples_a_task + 1]:
                task.result()
            assert self._buffer is not None
            in_memory = np.full(b - a, IN_MEMORY)
            verify = verify and not reader.verify_ahead
            files = Files(self._buffer, self._at[part], in_memory, offset, size, crc, verify)
            yield self._verified_here(files, a) if verify and not checksum.AVAILABLE else files
            return
        in_turn = in_turn and (checksum.AVAILABLE or not verify)
        at = np.zeros_like(size) if in_turn else np.cumsum(size) - size
        buffer = reader.own_buffer(int((at + size).max()))
        with reader.files.several(self.shard[part]) as fds, reader.watched(b - a):
            files = Files(buffer, at, fds, offset, size, crc, verify)
            yield self._verified_here(files, a) if verify and not checksum.AVAILABLE else files

    def _verified_here(self, files: Files, a: int) -> Files:
        """Where kernels cannot verify: the same, in memory and verified."""
        n = fetch(files)
        if n < len(files.at):
            self.refuse(a + n)
        return files._replace(fds=np.full(len(files.at), IN_MEMORY), verify=False)

    def refuse(self, i: int) -> NoReturn:
        """Raises DataError or StorageError for the i-th image, which could not be fetched."""
        if not self._tasks:  # once more, slowly, for the reason
            self._reader.read_one(self, i, np.empty(int(self.size[i]), np.uint8), verify=self._reader.verify)
        raise self._reader.changed(int(self.ids[i]))

    def wait(self) -> list[memoryview]:
        """The stored bytes of all images, verified, valid until release(). Raises DataError or StorageError."""
        assert self._reader.always_ahead
        self.ahead()
        for task in self._tasks:
            task.result()
        assert self._buffer is not None
        whole = self._buffer.data  # half the cost of an array's slices
        return [whole[at:end] for at, end in zip(self._at.tolist(), (self._at + self.size).tolist(), strict=True)]

    def not_plain_jpegs(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """The numbers of those images that do not begin as JPEGs of (n,) width × height. After wait()."""
        odd: np.ndarray = np.flatnonzero(not_plain_jpegs(self._buffer, self._at, self.size, width, height))
        return odd

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def release(self) -> None:
        if self._buffer is not None:
            self._reader.free.append(self._buffer)


class Reader:
    """Reads samples of one split by their ids.

    threads: reads in flight if storage is slow. samples_a_task: how many a thread reads in turn; a task costs 15 µs.
    always_ahead: for consumers that neither read nor verify themselves. pinned: buffers are page-locked, so that a
        GPU copies from them without another copy on the host.
    """

    def __init__(
        self,
        split: Split,
        *,
        threads: int = 32,
        samples_a_task: int = 4,
        verify: bool = True,
        always_ahead: bool = False,
        pinned: bool = False,
    ) -> None:
        self.split, self.verify, self.always_ahead, self.pinned = split, verify, always_ahead, pinned
        self.verify_ahead = verify and always_ahead
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
        self._slow_share = 0.0  # moving mean over blocks: those that were waited for
        self._ahead_for, self._patience = 0, PATIENCE[0]

    def read(self, ids: np.ndarray) -> ReadBatch:
        """The samples `ids` as a batch, already being read where that takes time; returns at once."""
        batch = ReadBatch(self, ids)
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
        return new_buffer(size + size // 4, pinned=self.pinned)

    def own_buffer(self, size: int) -> np.ndarray:
        """This thread's, of at least `size` bytes."""
        buffer: np.ndarray | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = np.empty(2 * size, np.uint8)
        return buffer

    @contextmanager
    def watched(self, images: int) -> Iterator[None]:
        """Meanwhile this thread fetches so many images: whether it had to wait for them is what is_slow() goes by."""
        before = resource.getrusage(USAGE)
        yield
        after = resource.getrusage(USAGE)
        if after.ru_minflt - before.ru_minflt > images:
            return  # fresh memory: threads that ask the system for pages wait for each other, which says nothing
        waits = after.ru_nvcsw - before.ru_nvcsw if OF_THREAD else 0
        slow = waits > WAITS_A_READ * images or after.ru_inblock - before.ru_inblock > BLOCKS_A_READ * images
        # Threads may overwrite each other's means: it is a rule of thumb, and a lock would cost more than it is worth.
        self._slow_share += (slow - self._slow_share) / 3

    def read_one(self, batch: ReadBatch, i: int, image: np.ndarray, *, verify: bool) -> None:
        """Reads the batch's i-th image into `image`, of its size. Raises DataError or StorageError."""
        sample, shard, offset, size = (int(column[i]) for column in (batch.ids, batch.shard, batch.offset, batch.size))
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
        if verify and crc32(image) != batch.crc32[i]:
            raise self.changed(sample)

    def stored(self, sample: int) -> np.ndarray:
        """One image's bytes, as stored. Raises BadSample or StorageError."""
        batch = ReadBatch(self, np.array([sample]))
        image = np.empty(int(batch.size[0]), np.uint8)
        self.read_one(batch, 0, image, verify=self.verify)
        return image

    def changed(self, sample: int) -> BadSample:
        return self._bad(sample, "its bytes changed since they were written (checksum)")

    def _bad(self, sample: int, reason: str) -> BadSample:
        cure = "copy the shard again or shard the data again"
        return BadSample(f"{self.describe(sample)}: {reason}; {cure}", sample=sample)

    def describe(self, sample: int) -> str:
        """Names a sample for a message: shard, key, offset."""
        path, offset = self.files.paths[self.shard[sample]], int(self.offset[sample])
        return f"{path}: sample {sample} ({sample_key(path, offset)!r}) at byte {offset}"

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.files.close()


def new_buffer(size: int, *, pinned: bool) -> np.ndarray:
    """(size,) uint8, not initialised. torch is imported for pinned memory alone."""
    if not pinned:
        return np.empty(size, np.uint8)
    import torch

    buffer: np.ndarray = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return buffer


class OpenFiles:
    """File descriptors by shard number: opened when needed, at most MAX_OPEN kept, none closed while in use."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._lock = threading.Lock()
        self._open: OrderedDict[int, list[int]] = OrderedDict()  # shard → [descriptor, users], oldest use first
        self._kept = np.full(len(paths), NOT_OPEN)  # few shards all stay open: no lock, no count of users

    def open(self, shard: int) -> AbstractContextManager[int]:
        """The shard's descriptor, for as long as the block lasts."""
        if len(self.paths) > MAX_OPEN:
            return self._borrowed(shard)
        if self._kept[shard] == NOT_OPEN:
            with self._lock:
                if self._kept[shard] == NOT_OPEN:
                    self._kept[shard] = self._descriptor(shard)
        return nullcontext(int(self._kept[shard]))

    @contextmanager
    def several(self, shards: np.ndarray) -> Iterator[np.ndarray]:
        """(n,) int64: the descriptor of each of (n,) shards, for as long as the block lasts."""
        if len(self.paths) <= MAX_OPEN and (kept := self._kept[shards]).min(initial=0) != NOT_OPEN:
            yield kept
            return
        with ExitStack() as stack:
            yield np.array([stack.enter_context(self.open(shard)) for shard in shards.tolist()], np.int64)

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
            for fd in (*(fd for fd, _ in self._open.values()), *self._kept[self._kept != NOT_OPEN].tolist()):
                os.close(fd)
            self._open.clear()
            self._kept[:] = NOT_OPEN
