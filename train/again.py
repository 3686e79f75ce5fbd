"""One step of a run again, for tools/replay.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.read.loader import Batch

from .trainer import Trainer


@dataclass(frozen=True)
class Replayed:
    """A step's numbers: of its global batch, and the loss of each of its samples."""

    ids: list[int]
    loss: float
    gradient_norm: float
    losses: list[float]


def replay(run: Trainer, step: int) -> Replayed:
    """Trains up to `step`, counted from 1, and tells of its numbers in place of an update; all ranks together."""
    assert run.state.step < step <= run.total_steps
    while True:
        run.enter_epoch()
        for batch in run.loader:  # an epoch
            if run.state.step + 1 == step:
                return _look_at(run, batch, step)
            run.step(batch)


def _look_at(run: Trainer, batch: Batch, step: int) -> Replayed:
    loss, each = run.stepper.backward(batch, run.loader.ids(*run.coordinates(step)), step=step - 1)
    gradients = [p.grad for p in run.stepper.bare.parameters() if p.grad is not None]
    return Replayed(
        ids=run.ids_of(step),
        loss=float(run.accelerator.reduce(loss, "mean")),
        gradient_norm=float(torch.nn.utils.get_total_norm(gradients)),
        losses=run.accelerator.gather(each.float()).tolist(),
    )
