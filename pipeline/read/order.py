"""The samples that each rank reads at each step. Pure: no files, no clock, no globals. The contract: docs/order.md.

Training: an epoch is an array of ids with one row per global batch; leftover samples that fill no global batch are
dropped. A rank takes a contiguous slice of each row, so the ordered ids of a step do not depend on the number of ranks.
Evaluation: the samples in stored order, one contiguous slice per rank, each sample exactly once.
"""

import math
from collections.abc import Container, Iterator
from itertools import chain

import numpy as np
from numpy import ndarray

from ..errors import ConfigError
from . import rng

CACHED = 1 << 15  # ids that are hashed at a time: they fit into the processor's cache


def epoch_order(
    ends: ndarray, *, batch: int, partitions: int = 1, window: int = 0, rank: int = 0, world: int = 1, **at: int
) -> ndarray:
    """Returns the ids that `rank` reads at each step of an epoch, (steps, batch / world) int64.

    at: seed and epoch. ends: (shards,) ids at which the shards end; ids count through their samples in stored order.
    partitions: the number of partitions of consecutive ids. Each is shuffled by itself, and a global batch consists of
        a slice of each. If world divides partitions, a rank reads only the shards of its own partitions.
    window: shuffle within groups of this number of shards, the groups in random order: at most two groups of a
        partition are read at once. 0: shuffle over all shards of a partition.
    """
    samples = int(ends[-1])
    steps, piece, share = samples // batch, batch // partitions, batch // world
    mine, pieces = partitions_of_rank(rank=rank, world=world, partitions=partitions), []
    for part in mine:
        ids = _shuffled_part(ends, part * samples // partitions, (part + 1) * samples // partitions, window, **at)
        pieces.append(ids[: steps * piece].reshape(steps, piece))
    start = rank * share - mine.start * piece
    return (pieces[0] if len(mine) == 1 else np.concatenate(pieces, axis=1))[:, start : start + share]


def shard_steps(ends: ndarray, *, batch: int, partitions: int = 1, window: int, **at: int) -> tuple[ndarray, ndarray]:
    """Returns the first and the last step of an epoch at which any rank reads from each shard, both (shards,) int64.

    For a shard that is not read: the number of steps, and -1. Arguments: see epoch_order.
    """
    samples = int(ends[-1])
    steps, piece = samples // batch, batch // partitions
    first, last = np.full(len(ends), steps), np.full(len(ends), -1)
    for part in range(partitions):
        start, end = part * samples // partitions, (part + 1) * samples // partitions
        done = 0
        for shards, ids in _groups(ends, start, end, window, **at) if start < end else ():
            if done // piece < steps:
                first[shards] = np.minimum(first[shards], done // piece)
                last[shards] = np.maximum(last[shards], min((done + len(ids) - 1) // piece, steps - 1))
            done += len(ids)
    return first, last


def _shuffled_part(ends: ndarray, start: int, end: int, window: int, **at: int) -> ndarray:
    """The ids [start, end) in random order; with a window, one group of shards after another.

    The ids of a group are ordered by their hashes, which are distinct, so any correct sort gives the same order.
    Sorting the hashes in place and inverting them takes a quarter of an argsort's time and a third of its memory.
    """
    if not window or start == end:  # a partition is empty if there are fewer samples than partitions
        ids, groups = np.arange(start, end), []
    else:
        groups = [ids for _, ids in _groups(ends, start, end, window, **at)]
        ids, groups = np.concatenate(groups), np.cumsum(list(map(len, groups))).tolist()
    hashes = ids.view(np.uint64)
    chunks = np.array_split(hashes, len(ids) // CACHED + 1)
    for chunk in chunks:
        chunk[:] = rng.bits(chunk, stream=rng.ORDER, **at)
    for group in np.split(hashes, groups):
        group.sort()
    for chunk in chunks:
        rng.ids(chunk, stream=rng.ORDER, **at)
    return ids


def _groups(ends: ndarray, start: int, end: int, window: int, **at: int) -> Iterator[tuple[ndarray, ndarray]]:
    """(shards, ids) of each group of a partition, in the order in which they are read."""
    first, last = np.searchsorted(ends, (start, end - 1), side="right")
    bounds = np.clip(np.concatenate([[0], ends])[first : last + 2], start, end)
    shards = np.argsort(rng.bits(np.arange(first, last + 1), stream=rng.SHARDS, **at))
    for group in (shards[i : i + window] for i in range(0, len(shards), window)):
        yield first + group, np.concatenate([np.arange(*bounds[s : s + 2]) for s in group])


def replacement(sample: int, partition: range, bad: Container[int]) -> int:
    """The next sample of the partition, cyclically, that is not bad; `sample` itself if all are."""
    others = chain(range(sample + 1, partition.stop), range(partition.start, sample))
    return next((i for i in others if i not in bad), sample)


def check_batch(batch: int, *, samples: int, world: int, partitions: int = 1, field: str = "batch") -> None:
    """Raises ConfigError if the global batch does not divide over ranks and partitions, or exceeds the samples."""
    if batch < 1:
        raise ConfigError(f"{field}={batch}: must be at least 1")
    if batch % world:
        nearest = max(world, round(batch / world) * world)
        raise ConfigError(
            f"{field}={batch} does not divide over {world} ranks; use a multiple of {world}, such as {nearest}"
        )
    if batch % partitions:
        raise ConfigError(f"{field}={batch} does not divide over partitions={partitions}; use a multiple of it")
    if batch > samples:
        least = math.lcm(world, partitions)
        smaller = max(samples // 8 // least, 1) * least  # some steps an epoch
        cure = f"use a smaller one, such as {smaller}" if smaller <= samples else "use fewer ranks and partitions"
        raise ConfigError(f"{field}={batch} is more than the {samples} training samples; {cure}")


def partitions_of_rank(*, rank: int, world: int, partitions: int) -> range:
    """The partitions from which `rank` reads in training."""
    return range(rank * partitions // world, -(-(rank + 1) * partitions // world))


def range_of_rank(samples: int, *, rank: int, world: int, partitions: int) -> range:
    """The ids of the partitions from which `rank` reads in training.

    With partitions=world, these are the ids that `rank` evaluates: each id belongs to exactly one rank, and the ranks'
    counts differ by at most one.
    """
    mine = partitions_of_rank(rank=rank, world=world, partitions=partitions)
    return range(mine.start * samples // partitions, mine.stop * samples // partitions)
