"""Reads the bytes of samples from shards by their ids, and verifies each sample.

There are two ways. If storage is slow, or if the consumer is not our own code (DALI), a pool keeps many reads in
flight, batches ahead, into reused buffers. If the bytes are in the page cache, the threads that decode images read
them, a block at a time, and the bytes stay in the processor's cache: with a pool alone, raw images lost 10 % of their
rate and took 14 % more CPU time (median of four paired runs, two cores). The reader chooses by counting how often a
thread had to wait. Both ways read and verify by one compiled call per block, without the GIL.
"""

import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray

from ..decode import Scratch
from ..errors import BadSample
from ..files import OpenFile
from ..manifest import Split
from ..shards import crc32, sample_keys
from ..storage import Copies
from .buffers import Buffers
from .byte_source import LocalShards
from .fetch import (
    ALL_ROWS,
    IN_MEMORY,
    SHARD,
    SIZE,
    Block,
    Rows,
    fetch_images,
    zero_rest,
)
from .plan import Plan
from .shard_cache import ShardCache
from .stages import Stages

USAGE = getattr(resource, "RUSAGE_THREAD", 0)  # 0: the system does not count a thread's waits; always read ahead
WAITS_A_READ = 0.3  # waits per read above which a block was slow: reads from the page cache do not wait
SLOW_SHARE = 0.5  # fraction of slow blocks among the latest above which storage is slow
RETRY_AFTER = 4096  # batches after which storage is assumed to be fast again
FAST_TASK = 64  # images per task of the pool if storage is fast; a task costs 15 µs
COPIES_ASKED = 64  # steps between two checks for shards to copy
MOST_ROOM = 3  # a batch is read into rows of equal size if that takes at most this many times its images' bytes


@dataclass
class ReadBatch:
    """The stored bytes of a batch's images: in `buffer` when the `tasks` are done, otherwise still in the shards."""

    ids: ndarray
    rows: ndarray  # see fetch.py
    buffer: ndarray = field(init=False)
    at: ndarray = field(init=False)
    room: int = 0  # bytes from one image to the next, if equal for all, padded with zeros; otherwise 0
    images_a_task: int = 1
    files: dict[int, OpenFile] = field(default_factory=dict)  # of copies, which may be deleted before they are read
    tasks: list[Future[None]] = field(default_factory=list)

    def wait(self) -> None:
        """Waits until all images are in the buffer, verified. Raises DataError or StorageError."""
        for task in self.tasks:
            task.result()

    def images(self) -> list[memoryview]:
        """The stored bytes of each image. After wait()."""
        whole, ends = self.buffer.data, self.at + self.rows[:, SIZE]  # half the cost of an array's slices
        return [whole[at:end] for at, end in zip(self.at.tolist(), ends.tolist(), strict=True)]


class Reader:
    """Reads samples of one split by their ids.

    threads: reads in flight if storage is slow. images_a_task: images per task in that case. verify: check CRC-32.
    always_ahead: for consumers that do not read themselves (DALI). pinned: read into page-locked memory.
    copies, original: `place` and `read` of a ShardCache.
    """

    def __init__(
        self,
        split: Split,
        *,
        threads: int = 32,
        images_a_task: int = 4,
        verify: bool = True,
        always_ahead: bool = False,
        pinned: bool = False,
        copies: Copies | None = None,
        original: Callable[[int, int, int], Any] | None = None,
    ) -> None:
        self.verify = verify
        self.always_ahead = always_ahead or not USAGE
        self.rows, self.closing, self.stages = Rows(split.index), threading.Event(), Stages()
        paths = [split.root / shard.name for shard in split.shards]
        self.source = LocalShards(paths, [copies.path(shard.sha256) for shard in split.shards] if copies else ())
        self.cache = None
        if copies:  # closed files are reopened at their next read, from a copy if one exists by then
            self.cache = ShardCache(copies, split, original or self.source.read, self.source.close, self.closing)
        self.images_a_task = min(images_a_task, self.source.at_once(threads))
        self._fast_task = min(FAST_TASK, self.source.at_once(threads))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="express-read")
        self._buffers = Buffers(pinned=pinned)
        self._scratch = Scratch()
        self._slow_share = 0.0  # moving average over blocks: 1 for a slow one
        self._slow_for = 0  # batches for which storage still counts as slow
        self.done = False  # whether all images are in memory

    @property
    def is_slow(self) -> bool:
        """Whether threads recently had to wait for storage."""
        return self._slow_for > 0 and not self.done

    def follow(self, steps: Iterator[tuple[int, int]], plan: Plan) -> Iterator[tuple[int, int]]:
        """The steps of `plan` that will be read, for storage that fetches them ahead."""
        for number, step in enumerate(steps):
            if self.cache and number % COPIES_ASKED == 0:
                self.cache.request(plan, *step)
            yield step

    def cost(self, plan: Plan) -> str:
        """An epoch's bytes and requests, for the log; "" if they are not worth counting."""
        always = plan.train and not plan.window
        more = "; with window=0 all are read all the time, from their source until copied" if always else ""
        return f"shards are copied to {self.cache.place.folder}{more}" if self.cache else ""

    def read(self, ids: ndarray, rows: ndarray | None = None) -> ReadBatch:
        """Returns a batch of the samples `ids` without waiting; starts reading if storage is slow. rows: of `ids`."""
        batch = ReadBatch(ids, self.rows[ids] if rows is None else rows)
        if self.done:
            return batch
        self._slow_for = max(0, self._slow_for - 1)
        if self._at_once(batch):
            self.ahead(batch)
        return batch

    def _at_once(self, batch: ReadBatch) -> bool:
        return self.always_ahead or self.is_slow

    def ahead(self, batch: ReadBatch) -> None:
        """Starts to read all images, unless that was done already."""
        if batch.tasks:
            return
        size, n = batch.rows[:, SIZE], len(batch.ids)
        ends = np.cumsum(size)
        batch.at, total, room = ends - size, int(ends[-1]), int(size.max())
        if n * room <= MOST_ROOM * total:
            batch.at, total, batch.room = np.arange(n) * room, n * room, room
        batch.buffer = self._buffers.take((total,), spare=total // 4)
        step = batch.images_a_task = self.images_a_task if self.is_slow else self._fast_task
        batch.tasks = [self._pool.submit(self._read_ahead, batch, a, min(a + step, n)) for a in range(0, n, step)]

    def _read_ahead(self, batch: ReadBatch, a: int, b: int) -> None:
        """A pool thread's task: images [a, b)."""
        if batch.room:
            zero_rest(batch.buffer, batch.at[a:b], batch.rows[a:b], batch.room)
        at = a
        while at < b:
            with self._opened(batch, at, b) as fds:
                at += fetch_images(batch.buffer, batch.at[at:b], fds, batch.rows[at:b], self.verify, ALL_ROWS)
            if at < b:  # retry in Python, whose error gives the reason; a read that was only interrupted succeeds
                image, start = self.stored(int(batch.ids[at])), batch.at[at]
                batch.buffer[start : start + len(image)] = image
                at += 1
        self._taken(batch.ids[a:b])

    def fetch(
        self, batch: ReadBatch, a: int, b: int, function: Callable[[Block], int], *, in_turn: bool = False
    ) -> Block:
        """Fetches images [a, b) with a compiled function, which returns the index of the first that fails, or n.

        Raises DataError or StorageError for an image that fails. in_turn: each image may overwrite the previous one, so
        that all use the same memory in the cache. The bytes are valid until this thread's next call and while `batch`
        exists.
        """
        rows = batch.rows[a:b]
        if batch.tasks:
            for task in batch.tasks[a // batch.images_a_task : (b - 1) // batch.images_a_task + 1]:
                task.result()
            buffer, at = batch.buffer, batch.at[a:b]
        else:
            size = rows[:, SIZE]
            at = np.zeros(b - a, np.int64) if in_turn else np.cumsum(size) - size
            buffer = self._scratch(int((at + size).max()))
            with self._opened(batch, a, b) as fds:
                block = Block(buffer, at, fds, rows, self.verify)
                complete = function(block) == b - a
            if not complete:  # the slow path: raises with the reason, or replaces a damaged copy
                buffer = np.concatenate([self.stored(sample) for sample in batch.ids[a:b].tolist()])
                at = np.cumsum(size) - size
            self._taken(batch.ids[a:b])
            if complete:
                return block
        block = Block(buffer, at, np.full(b - a, IN_MEMORY), rows, False)
        function(block)
        return block

    def _taken(self, ids: ndarray) -> None:
        """A hook, called when images of a batch have been read, for storage that keeps them until then."""

    @contextmanager
    def _opened(self, batch: ReadBatch, a: int, b: int) -> Iterator[ndarray]:
        """(n,) int64: a Block's `fds` for images [a, b). Counts this thread's waits while it reads them."""
        rows = batch.rows[a:b]
        files = [batch.files.get(shard) or self.source.open(shard) for shard in rows[:, SHARD].tolist()]
        fds = np.array([file.fd for file in files], np.int64)
        before = resource.getrusage(USAGE)
        with self.stages("read", int(rows[:, SIZE].sum())):
            yield fds
        after = resource.getrusage(USAGE)
        # Page faults of fresh memory: these threads wait for each other, not for storage.
        if not USAGE or after.ru_minflt - before.ru_minflt > len(rows):
            return
        slow = after.ru_nvcsw - before.ru_nvcsw > WAITS_A_READ * len(rows)
        # Threads may overwrite each other's averages: the heuristic does not need a lock.
        self._slow_share += (slow - self._slow_share) / 3
        if self._slow_share > SLOW_SHARE:
            self._slow_for, self._slow_share = RETRY_AFTER, 0.0

    def stored(self, sample: int) -> ndarray:
        """One image's bytes, as stored. Raises BadSample or StorageError."""
        start, size, shard, _, crc, *_ = self.rows[sample].tolist()
        for _ in range(2 if self.cache else 1):  # the first may read a damaged copy
            try:
                image = self.source.read(shard, start, start + size)
                if not self.verify or crc32(image) == crc:
                    return image
                reason = "its bytes changed since they were written (checksum)"
            except EOFError:
                reason = "the shard ends before it"
            if self.cache:
                self.cache.drop(shard)
        raise self._bad(sample, reason)

    def _bad(self, sample: int, reason: str) -> BadSample:
        return BadSample(
            f"{self.describe(sample)}: {reason}; copy the shard again or shard the data again", sample=sample
        )

    def describe(self, sample: int) -> str:
        """Names a sample for a message: shard, key, offset."""
        offset, _, shard, *_ = self.rows[sample].tolist()
        path, key = self.source.paths[shard], ""
        with suppress(OSError):  # its bytes may be those of a copy
            key = f"({sample_keys(path, [offset])[0]!r}) "
        return f"{path}: sample {sample} {key}at byte {offset}"

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.cache:
            self.cache.close()
        self.source.close()
