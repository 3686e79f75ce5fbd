"""A run's metrics: summed on the device, then written to metrics.jsonl, to trackers and to the console."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.files import Json, atomic_write
from pipeline.read.loader import Loader
from pipeline.settings import flatten

from .config import Config


class Meter:
    """Loss, images per second and waiting time, since the last reading and over the epoch. Reading waits for the
    device."""

    def __init__(self, accelerator: Accelerator, batch: int) -> None:
        self.accelerator, self.batch = accelerator, batch
        self.begin()
        self.steps = self.all_steps = 0
        self.loss: Tensor | float = 0.0
        self.all_loss = self.all_wait = 0.0

    def begin(self) -> None:
        """Starts the clock. Call it before waiting for the first batch, when evaluation and saving are over."""
        self.started = self.last = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        self.loss = self.loss + loss
        self.steps += 1

    def read(self, loader: Loader) -> dict[str, float]:
        """Means over the steps since the last reading; the loss over all ranks. The one host-device synchronisation."""
        loss = float(self.accelerator.reduce(self.loss / self.steps, "mean"))
        now, stats = time.perf_counter(), loader.stats()
        wait = stats.pop("wait_seconds")
        if "queued" in stats:  # a mean over steps and ranks
            stats["queue_depth"] = stats.pop("queued") / self.steps / self.accelerator.num_processes
        metrics = self._metrics(loss, self.steps, now - self.last, wait)
        if stats:  # all are sums over the ranks
            counts = self.accelerator.reduce(torch.tensor([*stats.values()], device=self.accelerator.device), "sum")
            metrics |= dict(zip(stats, counts.tolist()))
        self.all_loss, self.all_wait = self.all_loss + loss * self.steps, self.all_wait + wait
        self.all_steps, self.steps, self.loss, self.last = self.all_steps + self.steps, 0, 0.0, now
        return metrics

    def whole(self) -> dict[str, float]:
        """Returns the means over all readings, and their seconds."""
        seconds = self.last - self.started
        return {"seconds": seconds} | self._metrics(
            self.all_loss / self.all_steps, self.all_steps, seconds, self.all_wait
        )

    def _metrics(self, loss: float, steps: int, seconds: float, wait: float) -> dict[str, float]:
        return {"loss": loss, "images_per_second": steps * self.batch / seconds, "data_wait": wait / seconds}

    # The state holds losses that were added but not read yet, so that a resumed run records the same means.

    def state_dict(self) -> Json:
        """Gathers the unread losses of all ranks: a collective call."""
        losses = self.accelerator.gather(torch.as_tensor(self.loss).reshape(1)).tolist() if self.steps else []
        return {"steps": self.steps, "losses": losses}

    def load_state_dict(self, state: Json) -> None:
        """Restores the unread losses. If the number of ranks has changed, each takes their mean."""
        self.steps, losses = state["steps"], state["losses"]
        if self.steps:
            same = len(losses) == self.accelerator.num_processes
            loss = losses[self.accelerator.process_index] if same else sum(losses) / len(losses)
            self.loss = torch.tensor(loss, device=self.accelerator.device)


METRICS, IDS = "metrics.jsonl", "ids"


class Record:
    """The run's records: the main rank writes metrics, every rank writes its ids.

    log: prints a line at the main rank. The first write error is stored in `error` and not raised: the run decides.
    """

    def __init__(self, config: Config, accelerator: Accelerator, *, resumed_at: tuple[int, int]) -> None:
        """resumed_at: (step, epoch); records of later steps and epochs are deleted."""
        self.run = Path(config.run.dir)
        self.accelerator, self.log = accelerator, accelerator.on_main_process(print)
        # TensorBoard's events are in the run folder, beside the configuration; other trackers receive it.
        alone = config.run.trackers == ("tensorboard",)
        values = None if alone else {name: str(value) for name, value in flatten(config).items()}
        accelerator.init_trackers("tensorboard" if alone else "imagenet-express", config=values)
        self.error: OSError | None = None
        self._metrics: Any = None
        self._ids: Any = None
        if accelerator.is_main_process:
            # Includes ids of ranks that no longer exist: a run may resume on fewer.
            for path in (self.run / METRICS, *(self.run / IDS).glob("rank-*.jsonl")):
                _trim(path, *resumed_at)
            self._metrics = open(self.run / METRICS, "a")  # noqa: SIM115 (until close)
        self.accelerator.wait_for_everyone()
        if config.run.record_ids:
            (self.run / IDS).mkdir(exist_ok=True)
            path = self.run / IDS / f"rank-{self.accelerator.process_index:05d}.jsonl"
            self._ids = open(path, "a")  # noqa: SIM115 (until close)

    def write(self, kind: str, step: int, values: Json) -> None:
        """One line of metrics.jsonl, one point of each TensorBoard curve."""
        if self._metrics is None:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        numbers = {f"{kind}/{name}": v for name, v in values.items() if isinstance(v, int | float)}
        with self._keeping_error():
            print(json.dumps(line), file=self._metrics, flush=True)
            self.accelerator.log(numbers, step=step)

    def ids(self, step: int, ids: Any) -> None:
        """The samples of this rank at optimiser step `step`."""
        if self._ids is not None:
            with self._keeping_error():
                print(json.dumps({"step": step, "ids": ids.tolist()}), file=self._ids, flush=True)

    @contextlib.contextmanager
    def _keeping_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            self.error = self.error or err

    def close(self) -> None:
        for file in filter(None, (self._metrics, self._ids)):
            with self._keeping_error():  # of what was still to be written
                file.close()
        self.accelerator.end_training()


def _trim(path: Path, step: int, epoch: int) -> None:
    """Removes the lines that a killed run wrote to a .jsonl after its last checkpoint; step -1: all lines."""
    if not path.exists():
        return
    with atomic_write(path) as file:
        file.writelines(line for line in path.read_bytes().splitlines(keepends=True) if _is_before(line, step, epoch))


def _is_before(line: bytes, step: int, epoch: int) -> bool:
    try:
        values = json.loads(line)
        is_done = not values.get("kind", "").startswith("val") or int(values["epoch"]) <= epoch
        return line.endswith(b"\n") and int(values["step"]) <= step and is_done
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # a line truncated by a kill
