"""How rates are counted. The standard library alone: FFCV runs in an environment that has none of our packages."""

from __future__ import annotations

import time
from collections.abc import Iterator

# The page cache is warm, but a process's own caches and the memory behind a file that nobody read for minutes are not.
WARM_SECONDS = 2.0
WARM_BATCHES = 8  # the first ones fill queues, allocate memory, load kernels and compile


def rate(batches: Iterator[int], seconds: float, *, warm_seconds: float = WARM_SECONDS) -> dict[str, float]:
    """Counts images for `seconds` after a warm-up. batches: the sizes of batches, without end.

    cpu_seconds: of this process alone; worker processes of a DataLoader are not in it.
    """
    warm_until = time.perf_counter() + warm_seconds
    for number, _ in enumerate(batches, 1):
        if number >= WARM_BATCHES and time.perf_counter() > warm_until:
            break
    images, cpu, started = 0, time.process_time(), time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        images += next(batches)
    return {"images": images, "seconds": elapsed, "cpu_seconds": time.process_time() - cpu}
