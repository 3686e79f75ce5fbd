"""Where the time of a few steps goes: torch's profiler, and waiting for data against all else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

FOLDER, TRACE, TABLE = "profile", "trace.json", "table.txt"
BEFORE = 5  # steps that are not looked at: compiling, first allocations
ROWS = 10


class Profile:
    """Of `steps` steps of this process within an epoch, after the first BEFORE ones.

    Call `asks` before a batch is waited for, `begins` when it has come, `ends` after its step. What lies between, such
    as saving, counts as neither waiting nor computing.

    Leaves RUN/profile/trace.json, for chrome://tracing or ui.perfetto.dev, and table.txt, the ten dearest operations.
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
        """A step is done. Returns the table after the last one."""
        self.seen += 1
        if self._profiler is not None:
            self._wait_for_device()
            self.computed += time.perf_counter() - self._began
        if self.seen == BEFORE:
            self._start()
        return self._finish() if self._profiler is not None and self.seen == BEFORE + self.steps else None

    def epoch_ends(self) -> str | None:
        """Evaluation would stand in the trace: the table of what was seen, if there was something."""
        return self.cut_short() if self._profiler is not None and self.seen > BEFORE else None

    def cut_short(self) -> str:
        """The table of a run that was over before all steps were seen, or why there is none."""
        if self._profiler is None:
            return f"no profile: it begins after {BEFORE} steps, and the run had {self.seen}"
        self.steps = self.seen - BEFORE
        return self._finish() if self.steps else f"no profile: the run had no more than {BEFORE} steps"

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
        self._profiler = None
        whole = max(self.waited + self.computed, 1e-9)
        summary = (
            f"profile of {self.steps} steps: waiting for data {self.waited / whole:.1%}, computing"
            f" {self.computed / whole:.1%}, {whole / self.steps * 1000:.1f} ms a step; {self.folder / TRACE}"
        )
        (self.folder / TABLE).write_text(f"{summary}\n{table}\n")
        return f"{table}\n{summary}"

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
