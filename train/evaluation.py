"""Measures nets on a whole split: every image once, at any number of ranks.

`evaluate` counts the correct images while a net trains. `predict` keeps the prediction for each image, of one net or
several, by one view or ten; `summary` counts those.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy import ndarray
from torch import Tensor, nn

from pipeline.files import Json
from pipeline.read.loader import Batch, Loader

NAMES = ("top1", "top5", "loss", "images")  # of a Result, as records have them
BEST = 5  # predicted classes kept for each image
CONFUSIONS = 10


class Result(NamedTuple):
    """Fractions of `images`, and their mean cross-entropy. bad_samples: images that were left out."""

    top1: float
    top5: float
    loss: float
    images: int
    bad_samples: int = 0

    def __str__(self) -> str:
        of = f" of {self.images + self.bad_samples}" if self.bad_samples else ""
        return f"val top1={self.top1:.4f} top5={self.top5:.4f} images={self.images}{of}"


class Evaluation(NamedTuple):
    """Results of the weights, and of their average if there is one."""

    weights: Result
    average: Result | None = None

    @property
    def best(self) -> Result:
        return max(filter(None, self), key=lambda result: result.top1)

    def __str__(self) -> str:
        average = f"{self.average}\n".replace("val", "val of averaged weights") if self.average else ""
        return f"{average}{self.weights}"


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns how many other classes score at least as high as the labelled one, (N,).

    Ties and NaN count against the net, so that a constant or broken net is never correct by accident, and the result
    does not depend on how samples are batched.
    """
    return logits.shape[1] - 1 - (logits < logits.gather(1, labels[:, None])).sum(1)


@torch.no_grad()
def evaluate(
    net: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    *,
    between: Callable[[], None],
    see: Callable[[Batch, Tensor, Loader], None],
) -> Result:
    """Evaluates `net` on this rank's images and sums the counts over the ranks.

    between: called after each batch that all ranks have; it may call collectives, or raise to end the evaluation.
    see: called with each batch, its float32 logits and the loader.
    """
    training = [module for module in net.modules() if module.training]  # frozen layers are not
    net.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # float64 holds whole numbers to 9e15
    for number, batch in enumerate(loader):
        with accelerator.autocast():
            logits = net.forward(batch.images)  # not compiled: that would take longer than it saves, for each net
        logits = logits.float()
        ranks = rank_of_label(logits, batch.labels)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        sums += torch.stack([(ranks < 1).sum(), (ranks < BEST).sum(), loss, (ranks >= 0).sum()])
        see(batch, logits, loader)
        if number < loader.common_steps:
            between()
    for module in training:
        module.training = True
    top1, top5, loss, images = accelerator.reduce(sums, "sum").tolist()
    bad = loader.samples - int(images)
    assert bad == 0 or loader.bad.limit, f"evaluated {images} of {loader.samples} images"
    return Result(top1 / images, top5 / images, loss / images, int(images), bad)


# Predictions


class Predictions(NamedTuple):
    """Predictions for n images, in stored order without bad samples; k is 5, or the number of classes if less."""

    labels: ndarray  # (n,) int64; -1: unknown
    ranks: ndarray  # (n,) int64: rank_of_label; 0 if the label is unknown
    losses: ndarray  # (n,) float64, cross-entropy; 0 if the label is unknown
    best: ndarray  # (n, k) int64: the classes of the greatest probabilities, the greatest first
    probabilities: ndarray  # (n, k) float64: theirs
    ids: ndarray  # (n,) int64: positions in the split's index


@torch.no_grad()
def predict(
    nets: dict[Loader, list[nn.Module]], accelerator: Accelerator, *, progress: Callable[[int], None]
) -> Predictions:
    """Evaluates all nets on this rank's images, each with its own loader, and gathers all ranks' predictions.

    Probabilities are means over all nets and views, as in Krizhevsky et al. 2012. progress: called with image counts.
    Raises DataError if more samples are bad, over all ranks, than a loader's limit.
    """
    rows = []
    for loader in nets:
        loader.bad.together = accelerator.num_processes > 1
    for batches in map(in_common, zip(*nets, strict=True)):
        scores = mean_scores(
            [
                logits
                for group, batch in zip(nets.values(), batches, strict=True)
                for net in group
                for logits in logits_by_view(net, batch.images, accelerator.autocast)
            ]
        )
        labels = batches[0].labels
        ranks = torch.where(labels >= 0, rank_of_label(scores, labels.clamp(min=0)), 0)
        losses = F.cross_entropy(scores, labels, reduction="none", ignore_index=-1).double()
        best, probabilities = best_classes(scores)
        found = labels, ranks, losses, best, probabilities.double(), batches[0].ids
        rows.append(Predictions(*(t.cpu().numpy() for t in found)))
        progress(len(labels))
    for loader in nets:
        loader.bad.share(lambda found: gather_object([found]))
    # Consecutive ranks have consecutive images, so that their concatenated rows are in stored order.
    predictions = Predictions(*(np.concatenate(column) for column in zip(*gather_object(rows), strict=True)))
    assert loader.bad.limit or len(predictions.labels) == loader.samples
    return predictions


def in_common(batches: Sequence[Batch]) -> list[Batch]:
    """Returns one step's batches of several loaders, without samples that are bad in any of them."""
    ids = torch.from_numpy(reduce(np.intersect1d, [batch.ids.numpy() for batch in batches]))
    kept = [torch.isin(batch.ids, ids) for batch in batches]
    return [b if k.all() else Batch(*(each[k] for each in b)) for b, k in zip(batches, kept, strict=True)]


def logits_by_view(
    net: nn.Module, images: Tensor, autocast: Callable[[], Any] = contextlib.nullcontext
) -> list[Tensor]:
    """(n, classes) float32 logits of each view. images: (n, 3, crop, crop), or (n, views, 3, crop, crop)."""
    views = images if images.dim() == 5 else images[:, None]
    flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with autocast():
        logits = net(flat)
    return list(logits.float().unflatten(0, views.shape[:2]).unbind(1))


def mean_scores(logits: Sequence[Tensor]) -> Tensor:
    """Returns (n, classes): the logits themselves if there is one view of one net, else the log of mean probabilities.

    Logarithms, since float32 probabilities far below the best are 0, and such ties would worsen ranks.
    """
    if len(logits) == 1:
        return logits[0]
    return torch.stack([one.log_softmax(1) for one in logits]).logsumexp(0) - float(np.log(len(logits)))


def best_classes(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns classes and probabilities, both (n, k), in descending order; ties go to the lower class on any device."""
    found = scores.softmax(1).sort(descending=True, stable=True)
    return found.indices[:, :BEST], found.values[:, :BEST]


def summary(predictions: Predictions, classes: Sequence[str], *, resamples: int) -> Json:
    """Returns accuracy as counts and fractions with 95 % intervals, per-class accuracy, and the pairs confused most.

    All labels must be known.
    """
    labels, ranks, losses, best, *_ = predictions
    assert labels.min() >= 0
    hits = {"top1": ranks < 1, "top5": ranks < BEST}
    images, *correct = (
        np.bincount(labels[of], minlength=len(classes)).tolist() for of in (labels >= 0, *hits.values())
    )
    values = {**hits, "loss": losses}
    return {
        "images": len(labels),
        "correct": {name: int(hit.sum()) for name, hit in hits.items()},
        **{name: float(of.mean()) for name, of in values.items()},
        "interval_95": bootstrap(values, resamples=resamples),
        "by_class": [
            {"class": name, "images": n, "top1": a, "top5": b}
            for name, n, a, b in zip(classes, images, *correct, strict=True)
        ],
        "confusions": confusions(labels, np.where(hits["top1"], labels, best[:, 0]), classes),
    }


def confusions(labels: ndarray, taken_for: ndarray, classes: Sequence[str]) -> list[Json]:
    """The pairs confused most. taken_for: (n,) the class predicted for each image, or its own if not confused."""
    images = np.bincount(labels, minlength=len(classes)).tolist()
    wrong = taken_for != labels
    pairs, counts = np.unique([labels[wrong], taken_for[wrong]], axis=1, return_counts=True)
    worst = np.argsort(-counts, kind="stable")[:CONFUSIONS]
    return [
        {"class": classes[own], "taken_for": classes[other], "count": count, "images": images[own]}
        for own, other, count in zip(*pairs[:, worst].tolist(), counts[worst].tolist())
    ]


def bootstrap(values: dict[str, ndarray], *, resamples: int) -> dict[str, list[float]]:
    """Returns a 95 % bootstrap percentile interval of each value's mean (Efron 1979); {} for one image."""
    table = np.stack(list(values.values())).astype(np.float64)
    if resamples < 1 or table.shape[1] < 2:
        return {}
    from scipy import stats  # a second to import

    found = stats.bootstrap(
        (table,),
        np.mean,
        axis=1,
        n_resamples=resamples,
        batch=1,  # of 50,000 images, more at once take gigabytes
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return {name: [float(end) for end in ends] for name, ends in zip(values, np.transpose(found.confidence_interval))}
