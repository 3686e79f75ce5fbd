"""Measures a few steps: torch's profiler, and the time spent waiting for data and computing."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER, TRACE, TABLE = "profile", "trace.json", "table.txt"
BEFORE = 5  # steps that are not profiled: compiling, first allocations
ROWS = 10


@dataclass
class Profile:
    """Profiles `steps` steps of this process within an epoch, after the first BEFORE ones. 0 steps: does nothing.

    Call `waits` before waiting for a batch, and use `step` around its step. The time between them, such as saving,
    counts as neither waiting nor computing.

    Writes RUN/profile/trace.json, for chrome://tracing or ui.perfetto.dev, and table.txt, the ten slowest operations,
    which are also logged. Does not use torch.profiler.schedule: its step marks would be the table's slowest rows.
    """

    run: Path
    steps: int
    device: torch.device
    log: Callable[[str], None]
    seen: int = 0
    waited: float = 0.0
    computed: float = 0.0
    _asked: float = 0.0
    _profiler: Any = None

    def waits(self) -> None:
        if self.steps and self.seen == BEFORE and not self._profiler:
            from torch.profiler import profile

            self._wait_for_device()
            self._profiler = profile()  # of the host, and of a GPU if there is one
            self._profiler.start()
        self._asked = time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seen += 1
        if self._profiler:
            self._wait_for_device()
            self.waited += began - self._asked
            self.computed += time.perf_counter() - began
            if self.seen == BEFORE + self.steps:
                self.end_epoch()

    def end_epoch(self) -> None:
        """Ends the profile, if it has begun: evaluation must not be in the trace."""
        if not self._profiler or self.seen == BEFORE:
            return
        self._profiler.stop()
        folder = self.run / FOLDER
        folder.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(folder / TRACE))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=50)
        steps, whole = self.seen - BEFORE, max(self.waited + self.computed, 1e-9)
        summary = (
            f"profile of {steps} steps: waiting for data {self.waited / whole:.1%}, computing"
            f" {self.computed / whole:.1%}, {whole / steps * 1000:.1f} ms a step; {folder / TRACE}"
        )
        (folder / TABLE).write_text(f"{summary}\n{table}\n")
        self.log(f"{table}\n{summary}")
        self._profiler = None

    def end_run(self) -> None:
        """Logs why there is no profile, if there is none."""
        if self.steps and self.seen <= BEFORE:
            self.log(f"no profile: it begins after {BEFORE} steps, and the run had {self.seen}")

    def _wait_for_device(self) -> None:
        torch.get_device_module(self.device).synchronize(self.device)
