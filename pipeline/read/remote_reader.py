"""Reads remote shards: the images of the coming steps are fetched ahead, in few large requests.

Steps are taken in chunks. While one chunk is used, the next one is fetched, all its requests at once: the more steps a
chunk holds, the more of its images lie side by side and share a request. docs/order.md counts bytes and requests. An
image stays among the bytes of its request until a decoding thread takes it, by compiled code, as it would read a file.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from .. import remote
from ..errors import LOG, BadSample, StorageError
from ..manifest import Split
from ..shards import crc32
from .fetch import NOT_IN_MEMORY, OFFSET, SHARD, SIZE, Rows
from .plan import Plan
from .reader import ReadBatch, Reader

GAP = 16 << 10  # largest gap between two images, in bytes, that one request reads across
MOST = 8 << 20  # bytes of a request after which it starts no further image
FIRST = 64  # the first chunk is 1/64 of the largest, so that the first batch comes soon
FETCHES = 3  # attempts to fetch an image whose checksum is wrong

Step = tuple[int, int]


def requests(rows: ndarray, *, gap: int = GAP, most: int = MOST) -> tuple[ndarray, ndarray]:
    """Returns the requests that fetch n images, (r, 3): shard, first byte, end; and each image's request index, (n,).

    rows: see fetch.py. Requests are ordered by the first image that needs them.
    """
    by_place = np.lexsort((rows[:, OFFSET], rows[:, SHARD]))
    shard, start = rows[by_place, SHARD], rows[by_place, OFFSET]
    end = start + rows[by_place, SIZE]
    apart = np.ones(len(rows), np.bool_)
    apart[1:] = (shard[1:] != shard[:-1]) | (start[1:] - end[:-1] > gap)
    piece = (start - start[apart][np.cumsum(apart) - 1]) // most
    apart[1:] |= piece[1:] != piece[:-1]
    first = np.flatnonzero(apart)
    found = np.stack([shard[first], start[first], np.maximum.reduceat(end, first)], axis=1)
    by_need = np.argsort(np.minimum.reduceat(by_place, first))
    of_image = np.empty_like(by_place)
    of_image[by_place] = np.argsort(by_need)[np.cumsum(apart) - 1]  # the inverse of a permutation
    return found[by_need], of_image


def reads_from(plan: Plan) -> tuple[float, float]:
    """Returns how many shards a rank reads from at a time, and the bytes of its images in them: docs/order.md."""
    shards, parts = plan.split.shards, plan.partitions
    window = min(plan.window or len(shards), len(shards) / parts)
    size = window / len(shards) * sum(shard.bytes for shard in shards)
    return window * max(1.0, parts / plan.world), size * parts / plan.world


def shards_of_a_chunk(plan: Plan, *, limit: float) -> float:
    """Returns the number of shards of a chunk, those of whole windows: images of half a window are not adjacent."""
    shards, size = reads_from(plan)
    return shards * max(1.0, limit // size) if plan.window else len(plan.split.shards)


def expected_requests(plan: Plan, *, limit: int) -> float:
    """Estimates how many requests all ranks make in an epoch, in chunks of at most `limit` bytes: docs/order.md."""
    together = min(1.0, plan.partitions / plan.world) * min(1.0, limit / reads_from(plan)[1])
    return plan.samples * (1 - together) + sum(-(-shard.bytes // MOST) for shard in plan.split.shards)


class Chunk(NamedTuple):
    """Steps, and the images that are fetched for them."""

    steps: list[Step]
    ids: list[ndarray]


def chunks(steps: Iterable[tuple[Step, ndarray]], rows: Rows, *, limit: int, shards: float) -> Iterator[Chunk]:
    """Yields chunks of consecutive steps of an epoch: one step, or at most `limit` bytes from `shards` shards.

    steps: each with its ids. rows: of all samples. A step that exceeds `shards` belongs to the next chunk, except for
    its images from this chunk's shards. The first chunks are small, and each is twice the one before.
    """
    chunk, held, room, seen = Chunk([], []), 0, limit // FIRST, set[int]()
    for step, ids in steps:
        size, shard = rows[ids][:, [SIZE, SHARD]].T
        another = bool(chunk.steps) and chunk.steps[0][0] != step[0]
        beyond = len(seen.union(shard.tolist())) > shards
        if chunk.steps and (another or beyond or held + size.sum() > room):
            if beyond and not another:
                these = np.isin(shard, list(seen))
                chunk.ids.append(ids[these])
                ids, shard, size = ids[~these], shard[~these], size[~these]
            yield chunk
            chunk, held, room, seen = Chunk([], []), 0, min(2 * room, limit), set()
        chunk.steps.append(step)
        chunk.ids.append(ids)
        held += size.sum()
        seen.update(shard.tolist())
    yield chunk


class Fetched(NamedTuple):
    """An image that is being fetched: its request's (bytes, address), and the offset of its first byte in them."""

    request: Future[tuple[ndarray, int]]
    first: int


class RemoteReader(Reader):
    """Reads samples of a remote split by their ids. See Reader; four requests are in flight for each thread."""

    def __init__(self, split: Split, *, threads: int = 32, **settings: Any) -> None:
        super().__init__(split, threads=threads, **settings, original=self._get)
        assert split.remote
        self._folder, self._shards = split.remote, split.shards
        self._requests = ThreadPoolExecutor(4 * threads, thread_name_prefix="express-fetch")
        # Images that are being fetched, by chunk and sample, until they are used. An epoch's last chunk and the next
        # one's first may hold the same sample.
        self._chunks: list[dict[int, Fetched]] = []
        self._copying: list[ReadBatch] = []  # batches of the latest chunk that wait for copies

    def _at_once(self, batch: ReadBatch) -> bool:
        if self.cache:
            with suppress(StorageError):  # if a shard is not copied yet
                batch.files = {shard: self.source.open(shard) for shard in set(batch.rows[:, SHARD].tolist())}
                self._taken(batch.ids)
            if not batch.files:
                self._copying.append(batch)
                return True
        return super()._at_once(batch)

    def follow(self, steps: Iterator[Step], plan: Plan) -> Iterator[Step]:
        if self.done:
            yield from steps
        limit = self._limit(plan)
        # A cache must hold two chunks, and the shards with which the older chunk began.
        room = min(limit, self.cache.place.bytes / (3 * plan.partitions)) if self.cache else limit
        planned = ((step, plan.read_ids(*step)) for step in steps)
        waiting: deque[deque[Step]] = deque()
        try:
            for chunk in chunks(planned, self.rows, limit=limit, shards=shards_of_a_chunk(plan, limit=room)):
                while len(waiting) > 1 or (waiting and sum(map(bool, self._chunks)) > 1):  # no third chunk in memory
                    yield waiting[0].popleft()
                    if not waiting[0]:
                        waiting.popleft()
                waiting.append(deque(chunk.steps))
                ids = np.concatenate(chunk.ids)
                rows = self.rows[ids]
                if self.cache:
                    for batch in self._copying:
                        wait(batch.tasks)  # for copies, which might be deleted now
                    self._copying.clear()
                    shards = rows[:, SHARD]
                    copies = self.cache.request(plan, *waiting[0][0], needed=set(shards.tolist()))
                    apart = ~np.isin(shards, list(copies))
                    ids, rows = ids[apart], rows[apart]
                if len(ids):
                    self._begin(ids, rows)
            for rest in waiting:
                yield from rest
        finally:
            for image in chain.from_iterable(each.values() for each in self._chunks):
                image.request.cancel()
            self._chunks = []

    def _begin(self, ids: ndarray, rows: ndarray) -> None:
        """Begins to fetch a chunk. rows: those of `ids`."""
        ranges, of_image = requests(rows)
        futures = [self._requests.submit(self._addressed, *each) for each in ranges.tolist()]
        images = map(Fetched, [futures[i] for i in of_image], (rows[:, OFFSET] - ranges[of_image, 1]).tolist())
        self._chunks = [*filter(None, self._chunks), dict(zip(ids.tolist(), images, strict=True))]

    def _addressed(self, *request: int) -> tuple[ndarray, int]:
        data = self._get(*request)
        return data, data.ctypes.data

    def _fetched(self, sample: int) -> Fetched | None:
        return next(filter(None, (chunk.get(sample) for chunk in self._chunks)), None)

    def _taken(self, ids: ndarray) -> None:
        for sample in ids.tolist():
            any(chunk.pop(sample, None) for chunk in self._chunks)  # from the first chunk that has it

    def cost(self, plan: Plan) -> str:
        limit, held, size = self._limit(plan), reads_from(plan)[1], sum(shard.bytes for shard in self._shards)
        count, fewer = expected_requests(plan, limit=limit), ""
        if plan.partitions < plan.world:
            fewer = f"; --data.partitions {plan.world} makes fewer"
        elif held > limit:
            fewer = f"; --data.fetch-memory {held / limit * self._folder.fetch_memory:.0f} makes fewer"
        return (
            f"remote: {self._folder}, window={plan.window}; an epoch takes about {count:,.0f} requests and"
            f" {size / 1e9:.1f} GB, over all ranks{fewer}{'; ' * bool(self.cache)}{super().cost(plan)}"
        )

    def _limit(self, plan: Plan) -> int:
        """The largest chunk in bytes: two of training and two of evaluation share the memory as 7 + 7 + 1 + 1."""
        return int(self._folder.fetch_memory * 1e6) * (7 if plan.train else 1) // 16

    def _get(self, shard: int, start: int, end: int) -> ndarray:
        of = self._shards[shard]
        data = self._folder.get(of.name, start, end, size=of.bytes, patience=remote.PATIENCE, stop=self.closing)
        self.stages.add(fetch_bytes=end - start)
        return np.frombuffer(data, np.uint8)

    @contextmanager
    def _opened(self, batch: ReadBatch, a: int, b: int) -> Iterator[ndarray]:
        if batch.files:
            with super()._opened(batch, a, b) as fds:
                yield fds
            return
        images = [self._fetched(sample) for sample in batch.ids[a:b].tolist()]
        with self.stages("fetch"):
            fds = np.array([-image.request.result()[1] - image.first if image else NOT_IN_MEMORY for image in images])
        yield fds  # `images` holds the requests' bytes until the compiled code has read them

    def stored(self, sample: int) -> ndarray:
        """Returns one image's stored bytes: fetched ahead, from its shard's copy, or by a request of its own.

        Bytes with a wrong checksum are fetched again before they count as damaged.
        """
        start, size, shard, _, crc, *_ = self.rows[sample].tolist()
        ahead = self._fetched(sample)
        if self.cache and not ahead:
            with self.stages("fetch"):
                copied = self.cache.wait(shard)
            if copied:
                with suppress(StorageError, BadSample):  # the copy was deleted to make room
                    return super().stored(sample)
                self.cache.drop(shard)
        for attempt in range(FETCHES):
            if ahead and attempt == 0:
                image = ahead.request.result()[0][ahead.first : ahead.first + size]
            else:
                image = self._get(shard, start, start + size)
            if not self.verify or crc32(image) == crc:
                return image
            LOG.warning("%s: wrong checksum; fetched again", self.describe(sample))
        raise self._bad(sample, f"its bytes are not those that were written (checksum), fetched {FETCHES} times")

    def describe(self, sample: int) -> str:
        """Names a sample for a message, without a request: shard, offset."""
        row = self.rows[sample]
        return f"{self._folder / self._shards[row[SHARD]].name}: sample {sample} at byte {row[OFFSET]}"

    def close(self) -> None:
        self.closing.set()
        self._requests.shutdown(wait=True, cancel_futures=True)
        super().close()
