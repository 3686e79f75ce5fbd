"""The images and crops of a rank at each step of each epoch: a function of coordinates, without files or threads."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from ..errors import ConfigError
from ..manifest import Split
from . import order, rng
from .augment import AugmentConfig, colour_shift, place
from .fetch import HEIGHT, WIDTH, Rows

PLAN_IMAGES = 4096  # planned at once: 1 ms, 0.3 µs per image; planning batches of 128 one by one costs 5 µs per image


class Planned(NamedTuple):
    """n images of consecutive steps, one after another: the first fields of a backend.Work."""

    ids: ndarray
    rows: ndarray
    box: ndarray
    flip: ndarray
    mean: ndarray
    checked: ndarray
    kept: ndarray


@dataclass(kw_only=True, eq=False)
class Plan:
    """The steps of one rank; most fields are Loader's arguments."""

    split: Split
    augment: AugmentConfig
    batch: int
    train: bool
    seed: int
    partitions: int
    window: int
    first: int
    rank: int
    world: int
    mean: ndarray  # (3,) subtracted from each pixel
    covariance: ndarray | None  # of the colours; None: no colour shift
    check_every: int  # N: one image in N is chosen for PixelCheck; 0: none
    bad: Collection[int] = ()  # samples that are not read, see bad_samples.py; it may grow

    def __post_init__(self) -> None:
        if self.partitions < 1 or self.window < 0:
            raise ConfigError(f"partitions={self.partitions}, window={self.window}: at least 1 and 0")
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank={self.rank} of world={self.world}: ranks count from 0")
        if not 0 <= self.first <= self.split.samples:
            raise ConfigError(f"first={self.first}: the split {self.split.name} has {self.split.samples} samples")
        self.samples = self.first or self.split.samples
        if self.train:
            order.check_batch(self.batch, samples=self.samples, world=self.world, partitions=self.partitions)
        elif self.batch < 1:
            raise ConfigError(f"batch={self.batch}: must be at least 1")
        self.batch_per_rank = max(1, self.batch // self.world)
        self.views = 1 if self.train else self.augment.views
        self._ends = np.minimum(np.cumsum([shard.samples for shard in self.split.shards]), self.samples)
        settings = {name: getattr(self, name) for name in ("seed", "batch", "partitions", "window")}
        # Two epochs: near an epoch's end, the next one is planned while this one's ids are still in use.
        self._order = lru_cache(2)(partial(order.epoch_order, self._ends, **settings))
        self._shard_steps = lru_cache(2)(partial(order.shard_steps, self._ends, **settings))
        # The ids that this rank reads, in all epochs.
        parts = self.partitions if self.train else self.world
        self.held = order.range_of_rank(self.samples, rank=self.rank, world=self.world, partitions=parts)
        self._chunk: dict[tuple[int, int, int], Planned] = {}  # the latest, by epoch, first step and bad samples

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        if self.train:
            return self.samples // self.batch
        return -(-len(self.held) // self.batch_per_rank)

    def ids(self, epoch: int, step: int, *, whole: bool = False) -> ndarray:
        """See Loader.ids."""
        planned = self._planned_ids(epoch, step, whole=whole)
        ids = self._replaced(planned)
        return ids if self.train else ids[ids == planned]

    def read_ids(self, epoch: int, step: int) -> ndarray:
        """The samples that are read for a step: in evaluation also those that are read in place of bad ones."""
        return self._replaced(self._planned_ids(epoch, step))

    def _planned_ids(self, epoch: int, step: int, *, whole: bool = False) -> ndarray:
        if not self.train:
            return np.array(self.held[step * self.batch_per_rank : (step + 1) * self.batch_per_rank], dtype=np.int64)
        rank, world = (0, 1) if whole else (self.rank, self.world)
        return self._order(epoch=epoch, rank=rank, world=world)[step]

    def shards(self) -> range:
        """The shards from which this rank reads."""
        if not self.held:
            return range(0)
        first, last = np.searchsorted(self._ends, (self.held.start, self.held.stop - 1), side="right").tolist()
        return range(first, last + 1)

    def steps_until(self, epoch: int, step: int) -> ndarray:
        """Returns the number of steps until any rank reads from each shard, (shards,) int64; all 0 without a window."""
        if not self.train or not self.window:
            return np.zeros(len(self._ends), np.int64)
        (first, last), (following, _) = self._shard_steps(epoch=epoch), self._shard_steps(epoch=epoch + 1)
        return np.where(last >= step, np.maximum(first - step, 0), len(self) - step + following)

    def partition(self, sample: int) -> range:
        """The ids that may replace `sample`."""
        parts, n = self.partitions if self.train else 1, self.samples
        part = ((sample + 1) * parts - 1) // n
        return range(part * n // parts, (part + 1) * n // parts)

    def _replaced(self, planned: ndarray) -> ndarray:
        if not self.bad:
            return planned
        ids = [order.replacement(i, self.partition(i), self.bad) if i in self.bad else i for i in planned.tolist()]
        return np.array(ids, dtype=np.int64)

    def coordinates(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """Yields (epoch, step) from here on, endlessly, so that the next epoch's first batches are ready in time."""
        while True:
            yield from ((epoch, s) for s in range(step, len(self)))
            epoch, step = epoch + 1, 0

    def step(self, epoch: int, step: int, rows: Rows) -> Planned:
        """Returns one step's images. rows: of the whole split."""
        n, many = self.batch_per_rank, max(1, PLAN_IMAGES // self.batch_per_rank)
        first = step - step % many
        key = epoch, first, len(self.bad)
        if key not in self._chunk:
            self._chunk = {key: self.steps(epoch, range(first, min(first + many, len(self))), rows)}
        start = (step - first) * n
        return Planned(*[column[start : start + n] for column in self._chunk[key]])

    def steps(self, epoch: int, steps: range, index: Rows) -> Planned:
        """Plans many steps at once: for a single batch, NumPy's call overhead would exceed the work itself."""
        planned = np.concatenate([self._planned_ids(epoch, s) for s in steps])
        ids = self._replaced(planned)
        rows, kept = index[ids], (ids == planned) | self.train
        n, views, at = len(ids), self.views, {"seed": self.seed, "epoch": epoch}
        box, flip = place(self.augment, ids, rows[:, WIDTH : HEIGHT + 1], train=self.train, **at)
        mean = np.tile(self.mean, (n * views, 1))
        if self.covariance is not None:
            mean -= colour_shift(self.augment, ids, self.covariance, **at)
        checked = np.zeros(n, np.bool_)
        if self.check_every:
            checked = rng.bits(ids, stream=rng.CHECK, **at) % self.check_every == 0
        return Planned(ids, rows, box, flip, mean.reshape(n, views, 3), checked, kept)
