"""What a run leaves behind: metrics.jsonl, TensorBoard events, recorded ids, exit.json, and lines for people."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.files import atomic_write, write_json
from pipeline.progress import clock

METRICS, EXIT, IDS = "metrics.jsonl", "exit.json", "ids"


class Record:
    """The run's records; only the main rank writes metrics, every rank writes its ids."""

    def __init__(self, run: Path, accelerator: Accelerator, *, resumed_at: int, record_ids: bool) -> None:
        self.run, self.accelerator = run, accelerator
        self.main = accelerator.is_main_process
        self._metrics: Any = None
        self._ids: Any = None
        if self.main:
            _trim(run / METRICS, resumed_at)
            self._metrics = open(run / METRICS, "a")  # noqa: SIM115 (until close)
            # Of all ranks that ever were: the run may go on with fewer.
            for path in (run / IDS).glob("rank-*.jsonl"):
                _trim(path, resumed_at)
            if record_ids:
                (run / IDS).mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        if record_ids:
            self._ids = open(run / IDS / f"rank-{accelerator.process_index:05d}.jsonl", "a")  # noqa: SIM115 (until close)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, one point of each TensorBoard curve."""
        if self._metrics is None:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        numbers = {f"{kind}/{name}": v for name, v in values.items() if isinstance(v, int | float)}
        self.accelerator.log(numbers, step=step)

    def ids(self, step: int, ids: Any) -> None:
        """The samples of this rank at optimiser step `step`."""
        if self._ids is not None:
            self._ids.write(json.dumps({"step": step, "ids": ids.tolist()}) + "\n")
            self._ids.flush()

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)

    def close(self) -> None:
        for file in (self._metrics, self._ids):
            if file is not None:
                file.close()
        self.accelerator.end_training()


def _trim(path: Path, resumed_at: int) -> None:
    """Takes from a .jsonl what a killed run wrote after the checkpoint that it goes on from; all of it at 0."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True) if resumed_at else []
    with atomic_write(path) as file:
        file.write(b"".join(line for line in lines if _is_before(line, resumed_at)))


def _is_before(line: bytes, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False  # the line that a kill cut in two


def write_exit(run: Path, *, code: int, reason: str, step: int) -> None:
    """How the run ended; launchers turn every exit code into 1, this file keeps it."""
    if run.is_dir():
        write_json(run / EXIT, {"code": code, "reason": reason, "step": step})


def summary(epoch: int, epochs: int, metrics: dict[str, float], seconds: float) -> str:
    """The line an epoch leaves on the console."""
    return (
        f"epoch {epoch}/{epochs}: loss {metrics['loss']:.4f}, lr {metrics['lr']:.4g},"
        f" {metrics['images_per_second']:,.0f} img/s, waiting for data {metrics['data_wait']:.0%}, {clock(seconds)}"
    )
