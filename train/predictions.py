"""What nets answer to a whole split: one net or several, one view or ten, each image once at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from pipeline.read.loader import Loader

from .evaluation import rank_of_label

BEST = 5  # answers kept of each image
CONFUSIONS = 10


class Answers(NamedTuple):
    """Of n images, in stored order; k is 5, or the number of classes where that is less."""

    labels: np.ndarray  # (n,) int64; -1 where it is not known
    ranks: np.ndarray  # (n,) int64: validation.rank_of_label; 0 where it is not known
    losses: np.ndarray  # (n,) float64, cross-entropy; 0 where it is not known
    best: np.ndarray  # (n, k) int64: the classes of the greatest probabilities, the greatest first
    probabilities: np.ndarray  # (n, k) float64: theirs


class Part(NamedTuple):
    """Nets that see the same images, and the loader that makes them."""

    nets: Sequence[nn.Module]
    loader: Loader


@torch.no_grad()
def answer(parts: Sequence[Part], accelerator: Accelerator, *, progress: Callable[[int], None]) -> Answers:
    """Runs all nets over this rank's part of the split and gathers what all ranks found.

    Probabilities are means over all nets and views, as in Krizhevsky et al. 2012. progress is told of images.
    """
    rows: list[Answers] = []
    for batches in zip(*(part.loader for part in parts), strict=True):
        logits = []
        for part, batch in zip(parts, batches, strict=True):
            logits += [of for net in part.nets for of in _by_view(net, batch.images, accelerator)]
        scores = joined(logits)
        labels = batches[0].labels
        known = labels >= 0
        ranks = torch.where(known, rank_of_label(scores, labels.clamp(min=0)), 0)
        losses = F.cross_entropy(scores, labels, reduction="none", ignore_index=-1)
        found = scores.softmax(1).sort(descending=True, stable=True)  # of equal ones the first class, on every device
        best, probabilities = found.indices[:, :BEST], found.values[:, :BEST]
        rows.append(Answers(*(t.cpu().numpy() for t in (labels, ranks, losses.double(), best, probabilities.double()))))
        progress(len(labels))
    mine = _joined_rows(rows) if rows else None
    # Consecutive ranks have consecutive images, so that one after another they are in stored order.
    everyone = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    answers = _joined_rows([part for part in everyone if part is not None])
    assert len(answers.labels) == parts[0].loader.samples
    return answers


def _by_view(net: nn.Module, images: Tensor, accelerator: Accelerator) -> list[Tensor]:
    """(n, classes) float32 logits for each view."""
    views = images if images.dim() == 5 else images[:, None]
    flat = views.reshape(-1, *views.shape[2:]).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        logits = net(flat)
    return list(logits.float().view(*views.shape[:2], -1).unbind(1))


def joined(logits: Sequence[Tensor]) -> Tensor:
    """(n, classes): one net's logits as they are, of several the logarithm of their mean probabilities.

    Logarithms, since a float32 probability is 0 for all that is far from the best, and such ties would cost ranks.
    """
    if len(logits) == 1:
        return logits[0]
    logs = torch.stack([one.log_softmax(1) for one in logits])
    return torch.logsumexp(logs, 0) - float(np.log(len(logits)))


def _joined_rows(rows: Sequence[Answers]) -> Answers:
    return Answers(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def summary(answers: Answers, classes: Sequence[str], *, resamples: int = 1000) -> dict[str, Any]:
    """Accuracy as whole numbers and fractions, with 95 % bootstrap intervals, by class, and what is confused most.

    Of images whose labels are known.
    """
    assert answers.labels.min() >= 0
    hits = np.stack([answers.ranks < 1, answers.ranks < BEST])
    n = len(answers.labels)
    values = {"top1": hits[0], "top5": hits[1], "loss": answers.losses}
    return {
        "images": n,
        "correct": {"top1": int(hits[0].sum()), "top5": int(hits[1].sum())},
        **{name: float(of.mean()) for name, of in values.items()},
        "interval_95": bootstrap(values, resamples=resamples),
        "by_class": _by_class(answers, hits, classes),
        "confusions": _confusions(answers, hits[0], classes),
    }


def bootstrap(values: dict[str, np.ndarray], *, resamples: int, seed: int = 0) -> dict[str, list[float]]:
    """The middle 95 % of each value's mean over images drawn again with replacement (Efron 1979), percentiles."""
    if resamples < 1:
        return {}
    generator, table = np.random.default_rng(seed), np.stack([v.astype(np.float64) for v in values.values()])
    n = table.shape[1]
    means = [table[:, generator.integers(0, n, n)].mean(1) for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(values, low, high, strict=True)}


def _by_class(answers: Answers, hits: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    images = np.bincount(answers.labels, minlength=len(classes))
    top1, top5 = (np.bincount(answers.labels[hit], minlength=len(classes)) for hit in hits)
    rows = zip(classes, images.tolist(), top1.tolist(), top5.tolist(), strict=True)
    return [{"class": name, "images": n, "top1": a, "top5": b} for name, n, a, b in rows]


def _confusions(answers: Answers, right: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    wrong = ~right & (answers.best[:, 0] != answers.labels)  # not those that only ties made wrong
    pairs, counts = np.unique(np.stack([answers.labels[wrong], answers.best[wrong, 0]]), axis=1, return_counts=True)
    worst = np.argsort(-counts, kind="stable")[:CONFUSIONS]
    images = np.bincount(answers.labels, minlength=len(classes))
    return [
        {
            "class": classes[pairs[0, i]],
            "taken_for": classes[pairs[1, i]],
            "count": int(counts[i]),
            "images": int(images[pairs[0, i]]),
        }
        for i in worst
    ]
