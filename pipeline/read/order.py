"""Which samples a rank reads at a step. Pure: no files, no clock, no globals.

Training: an epoch is one permutation of all samples, step s takes its ids [s·batch, (s+1)·batch), and a rank takes its
contiguous part of them. So the ids of a global step, in order, do not depend on the number of ranks.
Evaluation: the samples in stored order, a contiguous part a rank, each exactly once.
"""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from . import draws


def permutation(samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """(samples,) int64: the epoch's order. Distinct hashes are sorted, so any correct sort gives the same."""
    keys = draws.bits(np.arange(samples), seed=seed, epoch=epoch, stream=draws.ORDER)
    return np.argsort(keys)


def steps_per_epoch(samples: int, *, batch: int) -> int:
    """Training steps: equal on all ranks; the samples that fill no global batch are left out of this epoch."""
    return samples // batch


def check_batch(batch: int, *, samples: int, world: int, field: str = "batch") -> None:
    """Raises ConfigError for a global batch that cannot be trained with."""
    if batch < 1:
        raise ConfigError(f"{field}={batch}: must be at least 1")
    if batch % world:
        nearest = max(world, round(batch / world) * world)
        raise ConfigError(
            f"{field}={batch} does not divide over {world} ranks; use a multiple of {world}, such as {nearest}"
        )
    if batch > samples:
        raise ConfigError(f"{field}={batch} is more than the {samples} training samples; use a smaller one")


def train_ids(order: np.ndarray, *, step: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """(batch / world,) ids that `rank` reads at `step` of the epoch with this permutation."""
    part = batch // world
    start = step * batch + rank * part
    return order[start : start + part]


def evaluation_range(samples: int, *, rank: int, world: int) -> range:
    """The ids that `rank` evaluates: disjoint, together all, and no two ranks differ by more than one in number."""
    return range(rank * samples // world, (rank + 1) * samples // world)
