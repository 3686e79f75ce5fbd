"""FFCV's DatasetWriter, in an environment of its own, from class folders: jpg, its long side at most 341 pixels."""

from __future__ import annotations

import time
from pathlib import Path

from tools.bench.peers.ffcv_loader import VERSIONS as VERSIONS
from tools.bench.peers.ffcv_loader import folder_of, writer


def measure(images: str, out: str, workers: int) -> dict[str, float]:
    path, folder = Path(out).with_suffix(".beton"), folder_of(images, "jpeg")
    shards = writer(str(path), "jpeg", workers=workers)
    started = time.perf_counter()
    shards.from_indexed_dataset(folder)
    seconds = time.perf_counter() - started
    path.unlink()
    return {"images": len(folder), "seconds": seconds}
