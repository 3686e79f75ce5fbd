"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

PLAIN_SECONDS = 10.0


class Progress:
    """Counts towards `total`; `note` adds what is worth reading beside it. Writes to stderr."""

    def __init__(self, label: str, total: int, *, unit: str = "img", enabled: bool = True) -> None:
        self.label, self.total, self.unit, self.enabled = label, total, unit, enabled
        self.done, self.note = 0, ""
        self.started = self.said = time.monotonic()
        self.bar: Any = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", smoothing=0.1, leave=False)

    def update(self, count: int, note: str = "") -> None:
        self.done, self.note = self.done + count, note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.said >= PLAIN_SECONDS:
            self.say()

    def say(self) -> None:
        """One plain line."""
        if not self.enabled:
            return
        self.said = time.monotonic()
        rate = self.done / max(self.said - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        line = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f} {self.unit}/s"
        parts = [line, f"{clock(left)} left"] + ([self.note] if self.note else [])
        print(", ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.said > self.started:  # a quick job leaves no line
            self.say()


def clock(seconds: float) -> str:
    """3725 → "1:02:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
