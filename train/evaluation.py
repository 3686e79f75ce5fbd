"""Exact validation: every image once, at any number of ranks, counted in whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.read.loader import Loader

NAMES = ("top1", "top5", "loss", "images")  # of a Result, as records have them


@dataclass(frozen=True)
class Result:
    """Fractions of `images`, and their mean cross-entropy."""

    top1: float
    top5: float
    loss: float
    images: int

    def __str__(self) -> str:
        return f"val top1={self.top1:.4f} top5={self.top5:.4f} images={self.images}"


@dataclass(frozen=True)
class Evaluation:
    """Of the weights, and of their average where there is one."""

    weights: Result
    average: Result | None = None

    @property
    def best(self) -> Result:
        return max(filter(None, (self.weights, self.average)), key=lambda result: result.top1)

    def __str__(self) -> str:
        average = str(self.average).replace("val", "val of averaged weights") + "\n" if self.average else ""
        return f"{average}{self.weights}"


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) how many classes score at least as high as the labelled one, itself not counted.

    Ties and NaN count against the net, so a constant or broken one is never right by accident, and the answer does not
    depend on how a batch is cut.
    """
    own = logits.gather(1, labels[:, None])
    return logits.shape[1] - 1 - (logits < own).sum(1)


@torch.no_grad()
def evaluate(
    net: nn.Module, loader: Loader, accelerator: Accelerator, *, between: Callable[[], None] = lambda: None
) -> Result:
    """Runs `net` over this rank's part and sums over the ranks.

    between: called after each batch that all ranks have; it may ask the other ranks, and end the evaluation by raising.
    """
    training = [module for module in net.modules() if module.training]  # frozen layers are not
    net.eval()
    hits = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    seen = 0
    for number, (images, labels, _) in enumerate(loader):
        with accelerator.autocast():
            logits = net(images)
        logits = logits.float()
        ranks = rank_of_label(logits, labels)
        hits += torch.stack([(ranks < 1).sum(), (ranks < 5).sum()])
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        seen += len(labels)
        if number < loader.common_steps:
            between()
    for module in training:
        module.training = True
    # float64 holds whole numbers to 9e15, so one reduction carries all four sums.
    sums = torch.cat([hits.double(), loss_sum[None], torch.full_like(loss_sum[None], seen)])
    top1, top5, loss, images = accelerator.reduce(sums, "sum").tolist()
    assert images == loader.samples, f"evaluated {images} of {loader.samples} images"
    return Result(top1 / images, top5 / images, loss / images, int(images))
