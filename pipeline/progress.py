"""Shows progress: a bar on a terminal, otherwise a plain line from time to time."""

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

PLAIN_SECONDS = 10.0
BAR = "{desc}: |{bar}| {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left{postfix}"


@dataclass
class Progress(AbstractContextManager["Progress"]):
    """Counts towards `total`, from the first update on; `note` is shown beside it. Writes to stderr."""

    label: str
    total: int
    unit: str = "img"
    enabled: bool = True
    note: str = ""
    done: int = 0
    started: float = 0.0
    printed: float = 0.0
    bar: Any = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, count: int, note: str = "") -> None:
        if not self.started:
            self.started = self.printed = time.monotonic()
            if self.enabled and sys.stderr.isatty():
                self.bar = tqdm(
                    desc=self.label, total=self.total, unit=self.unit, unit_scale=True, bar_format=BAR, smoothing=0.1,
                    leave=False,
                )  # fmt: skip
        self.done, self.note = self.done + count, note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.print_line()

    def print_line(self) -> None:
        self.printed = time.monotonic()
        rate = self.done / max(self.printed - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        line = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f} {self.unit}/s, {clock(left)} left"
        print(line + (f", {self.note}" if self.note else ""), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """3725 → "1:02:05"."""
    return tqdm.format_interval(round(seconds))
