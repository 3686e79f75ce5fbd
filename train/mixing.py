"""Mixup and cutmix with partners from coordinates: the same at any number of ranks, and nothing to save.

Partners are neighbours in the global batch, whose order is shuffled anew each epoch: 0 and 1, 2 and 3, and so on.
A pair never parts between ranks, so no rank has to fetch another's pixels.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.read import draws

from .config import RegularizeConfig

MIX = 1_000_001  # a stream of draws, away from the loader's


class Mix(NamedTuple):
    """How each of n images is mixed with its partner. A function of seed, step and id."""

    share: np.ndarray  # (n,) float64: of an image's own label
    box: np.ndarray | None  # (n, 4) int64: left, top, right, bottom of the partner's pixels; where empty, mixup
    blend: np.ndarray  # (n,) float64: of an image's own pixels outside the box


def check_pairs(regularize: RegularizeConfig, *, batch: int, world: int) -> None:
    """Raises ConfigError where pairs would part between ranks."""
    if regularize.mixes and batch // world % 2:
        raise ConfigError(
            f"train.batch={batch} gives each of {world} ranks {batch // world} images: regularize.mixup and cutmix pair"
            " neighbours, so choose a batch that gives each an even number"
        )


def plan(regularize: RegularizeConfig, ids: np.ndarray, *, seed: int, step: int, side: int) -> Mix:
    """The mixture of each of the images `ids`, of side × side pixels, in step `step` of the run."""
    u = draws.uniform(ids, seed=seed, epoch=step, stream=MIX, count=4)
    cuts = u[:, 0] < _cut_probability(regularize)
    alpha = np.where(cuts, regularize.cutmix or 1.0, regularize.mixup or 1.0)
    share = betaincinv(alpha, alpha, u[:, 1])
    if not cuts.any():
        return Mix(share, None, share)
    box = _boxes(np.where(cuts, share, 1.0), u[:, 2:], side)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return Mix(np.where(cuts, 1 - area / side**2, share), box, np.where(cuts, 1.0, share))


def _cut_probability(regularize: RegularizeConfig) -> float:
    if not regularize.mixup:
        return 1.0
    return 0.5 if regularize.cutmix else 0.0


def _boxes(share: np.ndarray, centre: np.ndarray, side: int) -> np.ndarray:
    """Squares of 1 - share of the area about a random centre, cut off at the edges (Yun et al. 2019)."""
    half = np.floor(side * np.sqrt(1 - share)).astype(np.int64)[:, None] // 2
    middle = (centre * side).astype(np.int64)
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half, side)
    return np.concatenate([first, last], axis=1)


def apply(mix: Mix, images: Tensor) -> Tensor:
    """(n, 3, side, side) mixed images, in the memory format of `images`; n is even."""
    partners = _partners(images)
    blend = _on(images, mix.blend)[:, None, None, None]
    mixed = torch.lerp(partners, images, blend)
    if mix.box is not None:
        left, top, right, bottom = (_on(images, edge)[:, None] for edge in mix.box.T)
        at = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
        rows, columns = (top <= at) & (at < bottom), (left <= at) & (at < right)
        mixed = torch.where(rows[:, None, :, None] & columns[:, None, None, :], partners, mixed)
    return mixed


def loss_of_each(logits: Tensor, labels: Tensor, mix: Mix | None, *, label_smoothing: float) -> Tensor:
    """(n,) cross-entropy against each image's label, and its partner's as far as it is mixed in."""
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if mix is None:
        return own
    partners = F.cross_entropy(logits, _partners(labels), reduction="none", label_smoothing=label_smoothing)
    return torch.lerp(partners, own, _on(own, mix.share))


def _partners(x: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, …"""
    assert len(x) % 2 == 0, "pairs stay together"  # check_pairs() and chunks() promised it
    swapped = torch.empty_like(x)  # in x's memory format, which an index would lose
    swapped[0::2], swapped[1::2] = x[1::2], x[0::2]
    return swapped


def _on(like: Tensor, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float32)).to(like.device, like.dtype, non_blocking=True)


def chunks(images: int, count: int) -> list[slice]:
    """`count` consecutive parts of a rank's images, or as many as there are pairs; pairs stay together."""
    pairs = math.ceil(images / 2)
    ends = [min(2 * (pairs * i // count), images) for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends) if b > a]
