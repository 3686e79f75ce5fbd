"""Figures that rates do not show: the first batch of a large dataset, memory over many epochs, the planner's time."""

import statistics
import time
from pathlib import Path

import psutil

from pipeline import Loader
from pipeline.read.plan import PLAN_IMAGES
from tools.bench import data, harness

EPOCHS = 20


def measure(root: Path, large: Path, *, batch: int) -> harness.Json:
    """large: a dataset of ImageNet's size, on the images of `root`."""

    def alone(function: str, root: Path, **env: str) -> harness.Json:
        return harness.run_once(f"{__name__}:{function}", {"root": root, "batch": batch}, **env)

    first = [alone("first_batch", large) for _ in range(5)]
    imports = statistics.median(found["import_seconds"] for found in first)
    seconds = statistics.median(found["seconds"] for found in first)
    return {
        "first_batch_samples": data.SAMPLES,
        "first_batch_seconds": seconds,
        "first_batch_seconds_with_imports": imports + seconds,
        "first_batch_seconds_when_first_compiled": alone("first_batch", root, NUMBA_CACHE_DIR=str(large))["seconds"],
        "resident_megabytes_by_epoch": alone("memory", root)["megabytes"],
        "planner_microseconds_an_image": planner_microseconds(large, batch=batch),
    }


def first_batch(*, root: str, batch: int) -> dict[str, float]:
    started = time.perf_counter()
    with Loader(root, batch=batch) as loader:
        next(iter(loader))
        return {"seconds": time.perf_counter() - started}


def memory(*, root: str, batch: int) -> dict[str, list[float]]:
    """Resident megabytes after each epoch."""
    seen = []
    with Loader(root, batch=batch, dtype="uint8") as loader:
        for _ in range(EPOCHS):
            for _batch in loader:
                pass
            seen.append(psutil.Process().memory_info().rss / 1e6)
    return {"megabytes": seen}


def planner_microseconds(root: Path, *, batch: int) -> float:
    """Order, crops and flips of a step's images, from coordinates: without the reading of bytes, which is started."""
    with Loader(root, batch=batch) as loader:
        seconds, count = [], PLAN_IMAGES // batch
        for start in range(0, 30 * count, count):
            started = time.perf_counter()
            planned = loader.plan.steps(0, range(start, start + count), loader._reader.rows)
            seconds.append((time.perf_counter() - started) / len(planned.ids))
        started = time.perf_counter()
        loader.ids(1, 0)  # the next epoch's order
        shuffling = (time.perf_counter() - started) / (len(loader) * batch)
    return (statistics.median(seconds) + shuffling) * 1e6
