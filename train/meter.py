"""Loss, rate and waiting, summed on the device and read when somebody asks."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.read.loader import Loader


class Meter:
    """Loss, rate and waiting since the last reading, and over the whole epoch. Reading it waits for the device."""

    def __init__(self, accelerator: Accelerator, batch: int) -> None:
        self.accelerator, self.batch = accelerator, batch
        self.started = self.last = time.perf_counter()
        self.steps = self.all_steps = 0
        self.loss: Tensor | float = 0.0
        self.all_loss = self.all_wait = 0.0

    def add(self, loss: Tensor) -> None:
        self.loss = self.loss + loss
        self.steps += 1

    def read(self, loader: Loader) -> dict[str, float]:
        """Means over the steps since the last reading; the loss over all ranks. The one host-device synchronisation."""
        loss = float(self.accelerator.reduce(self.loss / self.steps, "mean"))
        now, stats = time.perf_counter(), loader.stats()
        wait = stats.pop("wait_seconds")
        metrics = self._metrics(loss, self.steps, now - self.last, wait)
        if stats:  # counts of checked pixels, over all ranks
            counts = torch.tensor(list(stats.values()), device=self.accelerator.device)
            metrics |= dict(zip(stats, self.accelerator.reduce(counts, "sum").tolist()))
        self.all_loss, self.all_wait = self.all_loss + loss * self.steps, self.all_wait + wait
        self.all_steps, self.steps, self.loss, self.last = self.all_steps + self.steps, 0, 0.0, now
        return metrics

    @property
    def seconds(self) -> float:
        return self.last - self.started

    def whole(self) -> dict[str, float]:
        """The same over all readings."""
        return self._metrics(self.all_loss / self.all_steps, self.all_steps, self.seconds, self.all_wait)

    def _metrics(self, loss: float, steps: int, seconds: float, wait: float) -> dict[str, float]:
        return {"loss": loss, "images_per_second": steps * self.batch / seconds, "data_wait": wait / seconds}

    # What was added and not yet read outlives the process: a resumed run records the same means.

    def state_dict(self) -> dict[str, Any]:
        """Asks all ranks."""
        if not self.steps:
            return {"steps": 0, "losses": []}
        losses: Tensor = self.accelerator.gather(torch.as_tensor(self.loss).reshape(1))
        return {"steps": self.steps, "losses": losses.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of another number of ranks the mean is taken on, so that the next reading's is right."""
        if not state["steps"]:
            return
        losses, world = state["losses"], self.accelerator.num_processes
        loss = losses[self.accelerator.process_index] if len(losses) == world else sum(losses) / len(losses)
        self.steps, self.loss = state["steps"], torch.tensor(loss, device=self.accelerator.device)
