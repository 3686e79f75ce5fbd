"""What a run leaves behind: metrics.jsonl, TensorBoard events, recorded ids, and lines for people."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.files import atomic_write
from pipeline.progress import clock

from .config import Config, flatten

METRICS, IDS = "metrics.jsonl", "ids"


def start(accelerator: Accelerator, config: Config) -> None:
    """Accelerate's trackers, each told the configuration; TensorBoard's events lie in the run folder."""
    names = config.run.trackers
    project = "tensorboard" if names == ("tensorboard",) else "imagenet-express"
    told = {name: str(value) for name, value in flatten(config).items()} if names != ("tensorboard",) else None
    accelerator.init_trackers(project, config=told)


class Record:
    """The run's records; only the main rank writes metrics, every rank writes its ids.

    What cannot be written is kept in `error`, once, for the run to decide about; nothing is raised for it.
    """

    def __init__(self, run: Path, accelerator: Accelerator, *, resumed_at: tuple[int, int], record_ids: bool) -> None:
        self.run, self.accelerator = run, accelerator
        self.main, self.record_ids = accelerator.is_main_process, record_ids
        self.error: OSError | None = None
        self._metrics: Any = None
        self._ids: Any = None
        step, epoch = resumed_at  # what was written of later steps and evaluations is forgotten
        if self.main:
            _trim(self.run / METRICS, step, epoch)
            self._metrics = open(self.run / METRICS, "a")  # noqa: SIM115 (until close)
            # Of all ranks that ever were: the run may go on with fewer.
            for path in (self.run / IDS).glob("rank-*.jsonl"):
                _trim(path, step, epoch)
            if self.record_ids:
                (self.run / IDS).mkdir(exist_ok=True)
        self.accelerator.wait_for_everyone()
        if self.record_ids:
            path = self.run / IDS / f"rank-{self.accelerator.process_index:05d}.jsonl"
            self._ids = open(path, "a")  # noqa: SIM115 (until close)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, one point of each TensorBoard curve."""
        if self._metrics is None:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        numbers = {f"{kind}/{name}": v for name, v in values.items() if isinstance(v, int | float)}
        try:
            self._append(self._metrics, line)
            self.accelerator.log(numbers, step=step)
        except OSError as err:
            self.error = self.error or err

    def ids(self, step: int, ids: Any) -> None:
        """The samples of this rank at optimiser step `step`."""
        if self._ids is not None:
            try:
                self._append(self._ids, {"step": step, "ids": ids.tolist()})
            except OSError as err:
                self.error = self.error or err

    def _append(self, file: Any, line: dict[str, Any]) -> None:
        file.write(json.dumps(line) + "\n")
        file.flush()

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)

    def close(self) -> None:
        self._close_files()
        self.accelerator.end_training()

    def _close_files(self) -> None:
        for file in (self._metrics, self._ids):
            if file is not None:
                try:
                    file.close()
                except OSError as err:  # of what was still to be written
                    self.error = self.error or err
        self._metrics = self._ids = None


def _trim(path: Path, step: int, epoch: int) -> None:
    """Takes from a .jsonl what a killed run wrote after the checkpoint that it goes on from; all of it below step 0."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True) if step >= 0 else []
    with atomic_write(path) as file:
        file.write(b"".join(line for line in lines if _is_before(line, step, epoch)))


def _is_before(line: bytes, step: int, epoch: int) -> bool:
    try:
        told = json.loads(line)
        if not line.endswith(b"\n"):
            return False
        return int(told["step"]) <= step and (not told.get("kind", "").startswith("val") or int(told["epoch"]) <= epoch)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # the line that a kill cut in two


def summary(label: str, metrics: dict[str, float], seconds: float) -> str:
    """The line an epoch leaves on the console."""
    return (
        f"{label}: loss {metrics['loss']:.4f}, lr {metrics['lr']:.4g},"
        f" {metrics['images_per_second']:,.0f} img/s, waiting for data {metrics['data_wait']:.0%}, {clock(seconds)}"
    )
