"""Where the time of a few steps goes: torch's profiler, and waiting for data against everything else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

FOLDER, TRACE, TABLE = "profile", "trace.json", "table.txt"
BEFORE = 5  # steps that are not profiled: compiling, first allocations
ROWS = 10


class Profile:
    """Profiles `steps` steps of this process within an epoch, after the first BEFORE ones.

    Call `asks` before waiting for a batch, `begins` when it has come, `ends` after its step. The time between `ends`
    and `asks`, such as saving, counts as neither waiting nor computing.

    Leaves RUN/profile/trace.json, for chrome://tracing or ui.perfetto.dev, and table.txt, the ten slowest operations.
    Not by torch.profiler.schedule: its step marks would be the slowest rows of the table.
    """

    def __init__(self, run: Path, steps: int, device: torch.device) -> None:
        self.folder, self.steps, self.device = run / FOLDER, steps, device
        self.seen, self.waited, self.computed = 0, 0.0, 0.0
        self._asked = self._began = 0.0
        self._profiler: Any = None

    def asks(self) -> None:
        self._asked = time.perf_counter()

    def begins(self) -> None:
        self._began = time.perf_counter()
        if self._profiler is not None:
            self.waited += self._began - self._asked

    def ends(self) -> str | None:
        """Counts a step. Returns the table after the last one."""
        self.seen += 1
        if self._profiler is not None:
            self._wait_for_device()
            self.computed += time.perf_counter() - self._began
        if self.seen == BEFORE:
            self._start()
        return self._finish() if self.seen == BEFORE + self.steps else None

    def epoch_ends(self) -> str | None:
        """Returns the table of the steps until here, if any: evaluation must not be in the trace."""
        return self.cut_short() if self.seen > BEFORE else None

    def cut_short(self) -> str:
        """The table of a run that ended before all steps were profiled, or why there is none."""
        if self.seen > BEFORE:
            return self._finish()
        return f"no profile: it begins after {BEFORE} steps, and the run had {self.seen}"

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._wait_for_device()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _finish(self) -> str:
        self._profiler.stop()
        self.folder.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(self.folder / TRACE))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table: str = self._profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=50)
        steps, whole = self.seen - BEFORE, max(self.waited + self.computed, 1e-9)
        summary = (
            f"profile of {steps} steps: waiting for data {self.waited / whole:.1%}, computing"
            f" {self.computed / whole:.1%}, {whole / steps * 1000:.1f} ms a step; {self.folder / TRACE}"
        )
        (self.folder / TABLE).write_text(f"{summary}\n{table}\n")
        return f"{table}\n{summary}"

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
