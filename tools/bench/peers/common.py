"""What a measured loader shares: warm up, then count images for a while."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

# The page cache is warm, but a process's own caches and the memory behind a file that nobody read for minutes are not.
WARM_SECONDS = 2.0


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser()
    p.add_argument("--data", type=Path, required=True, help="shard folder, or image folder for the seed's loader")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seconds", type=float, default=4.0)
    p.add_argument("--dtype", choices=("uint8", "float16", "float32"), default="uint8")
    p.add_argument("--backend", default="auto")
    p.add_argument("--device", default="cpu")
    p.add_argument("--verify", choices=("yes", "no"), default="yes")
    p.add_argument("--rank", type=int, default=0)
    p.add_argument("--world", type=int, default=1, help="ranks; --batch is that of each")
    p.add_argument("--jitter", action="store_true", help="random resized crops")
    p.add_argument("--delay", type=float, default=0.0, help="seconds to sleep before every read")
    return p.parse_args()


def measure(next_batch: Callable[[], int], seconds: float, warm_up: int = 8) -> None:
    """Prints images and seconds as JSON. `next_batch` makes one batch and returns its size."""
    warm = time.perf_counter() + WARM_SECONDS
    for _ in range(warm_up):
        next_batch()
    while time.perf_counter() < warm:
        next_batch()
    images, cpu, started = 0, time.process_time(), time.perf_counter()
    while (now := time.perf_counter()) - started < seconds:
        images += next_batch()
    wall = time.perf_counter() - started if images else now - started
    print(json.dumps({"images": images, "seconds": wall, "cpu_seconds": time.process_time() - cpu}))
