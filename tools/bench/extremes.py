"""What rates do not show: the first batch of a large dataset, memory over many epochs, the planner's share."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import AugmentConfig, Loader, manifest, open_dataset
from pipeline.read.plan import PLAN_IMAGES
from pipeline.shards import write_array
from pipeline.storage import Folder

SAMPLES, VALIDATION, EPOCHS = 1_281_167, 32, 20


def measure(root: Path, *, batch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="imagenet-express-") as scratch:
        large = enlarge(root, Path(scratch))
        first = [json.loads(_python(f"first({str(large)!r}, {batch})")) for _ in range(5)]
        compiled = json.loads(_python(f"first({str(root)!r}, {batch})", NUMBA_CACHE_DIR=scratch))
        planner = planner_microseconds(large, batch=batch)
    memory = json.loads(_python(f"memory({str(root)!r}, {batch})"))
    return {
        "first_batch_samples": SAMPLES,
        "first_batch_seconds": round(statistics.median(f["seconds"] for f in first), 3),
        "first_batch_seconds_with_imports": round(statistics.median(f["with_imports"] for f in first), 3),
        "first_batch_seconds_when_first_compiled": round(compiled["seconds"], 3),
        "resident_megabytes_by_epoch": memory,
        "planner_microseconds_an_image": planner,
    }


def _python(call: str, **extra: str) -> str:
    """A function of this module, in a process of its own."""
    code = f"import time; t = time.perf_counter(); from tools.bench.extremes import *; print({call})"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])} | extra
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return done.stdout.splitlines()[-1]


def enlarge(root: Path, out: Path) -> Path:
    """A dataset of ImageNet's size in `out`, whose index names the images of `root` over and over.

    The first VALIDATION images of `root` are also its validation split.
    """
    dataset = open_dataset(root)
    split = dataset.split("train")
    for shard in split.shards:
        (out / shard.name).symlink_to((root / shard.name).resolve())

    def record(index: np.ndarray, name: str) -> dict[str, Any]:
        counts = np.bincount(index["shard"], minlength=len(split.shards)).tolist()
        shards = [type(s)(s.name, count, s.bytes, s.sha256) for s, count in zip(split.shards, counts, strict=True)]
        return manifest.split_record(shards, name, write_array(Folder(out), name, index))

    repeated = np.resize(np.asarray(split.index), SAMPLES)
    repeated = repeated[np.argsort(repeated["shard"], kind="stable")]
    splits = {"train": record(repeated, "large.npy"), "val": record(split.index[:VALIDATION], "val.npy")}
    names = ("dataset", "classes", "statistics", "options")
    same = {name: dataset.manifest[name] for name in names if name in dataset.manifest}
    manifest.write_manifest(Folder(out), same | {"splits": splits})
    return out


def first(root: str, batch: int) -> str:
    started = time.perf_counter()
    with Loader(root, batch=batch, augment=AugmentConfig()) as loader:
        next(iter(loader))
    now = time.perf_counter()
    return json.dumps({"seconds": now - started, "with_imports": now - _started_importing()})


def _started_importing() -> float:
    return float(vars(sys.modules["__main__"])["t"])


def memory(root: str, batch: int) -> list[float]:
    """Resident megabytes after each epoch."""
    seen = []
    with Loader(root, batch=batch, dtype="uint8", augment=AugmentConfig()) as loader:
        for _ in range(EPOCHS):
            for _batch in loader:
                pass
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1))
    return seen


def planner_microseconds(root: Path, *, batch: int) -> float:
    """Order, crops and flips of a step's images, from coordinates: without the reading of bytes, which is started."""
    with Loader(root, batch=batch, augment=AugmentConfig()) as loader:
        seconds = []
        for start in range(0, 30 * PLAN_IMAGES // batch, PLAN_IMAGES // batch):
            started = time.perf_counter()
            steps = range(start, start + PLAN_IMAGES // batch)
            planned = loader.plan.steps(0, steps, loader._reader.rows)
            seconds.append((time.perf_counter() - started) / len(planned.ids))
        started = time.perf_counter()
        loader.ids(1, 0)  # the next epoch's order
        shuffling = (time.perf_counter() - started) / (len(loader) * batch)
    return round((statistics.median(seconds) + shuffling) * 1e6, 2)
