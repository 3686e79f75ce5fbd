"""Seconds and bytes of the loader's stages, and other counts, added up over its threads."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("read", "fetch", "cut", "decode", "copy")
KEYS = ["wait_seconds", "cuts_missed", *(f"{name}_{unit}" for name in NAMES for unit in ("seconds", "bytes"))]


class Stages:
    """Counters of stages. read: from files, including checksums and, for raw images, the crop. fetch: bytes from a URL,
    and seconds that threads wait for them. decode: including the crop. copy: to the device, in seconds of the host."""

    def __init__(self) -> None:
        self._lock, self._sums = threading.Lock(), dict.fromkeys(KEYS, 0.0)

    @contextmanager
    def __call__(self, name: str, size: int = 0) -> Iterator[None]:
        """Counts the calling thread's seconds in the block, and `size` bytes, for stage `name`."""
        started = time.perf_counter()
        yield
        self.add(**{f"{name}_seconds": time.perf_counter() - started, f"{name}_bytes": size})

    def copied(self, images: Any, device: Any) -> Any:
        """The images on the device; to a GPU they may still be on their way."""
        if images.device == device:
            return images
        with self("copy", images.nbytes):
            return images.to(device, non_blocking=True)

    def add(self, **counts: float) -> None:
        with self._lock:
            for name, count in counts.items():
                self._sums[name] = self._sums.get(name, 0.0) + count

    def take(self) -> dict[str, float]:
        """The sums since the last call."""
        with self._lock:
            taken, self._sums = self._sums, dict.fromkeys(self._sums, 0.0)
            return taken


def shares(sums: dict[str, float]) -> str:
    """Returns the fraction of the threads' time in each stage, for the log."""
    seconds = {name: sums[f"{name}_seconds"] for name in NAMES}
    total = sum(seconds.values())
    return ", ".join(f"{name} {part / total:.0%}" for name, part in seconds.items() if part > total / 200)
