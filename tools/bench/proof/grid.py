"""Step 5: the loader alone, for each cell of tools/bench/cells.py, with the GPU's and its JPEG engine's utilisation."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipeline.cores import usable_cores
from pipeline.errors import ExpressError
from tools.bench.harness import run

from .base import Json, Proof
from .data import enlarged, shards_of
from .preflight import nvidia_smi


def loader_grid(proof: Proof) -> Json:
    cells = measured(proof, alone=False)
    if failed := [f"{cell['name']}: {cell['error']}" for cell in cells if "error" in cell]:
        raise ExpressError("; ".join(failed))
    return {"cells": cells}


def region_cells(proof: Proof) -> Json:
    """Cells that may crash their process; if one does, that is the answer."""
    return {"cells": measured(proof, alone=True)}


def measured(proof: Proof, *, alone: bool) -> list[Json]:
    from tools.bench.cells import CELLS

    here = "cuda" if proof.on_gpu else "cpu"
    cells = [cell for cell in CELLS if here in cell.devices and cell.alone == alone]
    for data in sorted({cell.data for cell in cells}):
        enlarged(proof, shards_of(proof, data), data)
    batch, seconds = (16, 0.5) if proof.tiny else (256, 5)
    common = {"device": proof.device, "batch": batch, "seconds": seconds, "threads": usable_cores()}
    common |= {"dtype": "float16" if proof.on_gpu else "float32"}
    answers = []
    with utilisation(proof) as busy:
        # Cells of a backend share a process, which spares imports; backends do not, which bounds what a crash costs.
        for _, group in itertools.groupby(cells, lambda cell: cell.name if alone else cell.config.backend):
            calls = [{"name": cell.name} | common for cell in group]
            shards = {"shards": proof.scratch / "large"}
            for call, (found,) in zip(calls, run("tools.bench.cells:batches", [call | shards for call in calls])):
                answers.append(call | (found if "error" in found else rates(found, busy)))
                proof.keep({"cells": answers})
    return answers


def rates(found: Json, busy: Callable[[float, float], Json]) -> Json:
    ended, images, seconds = found["ended"], found["images"], found["seconds"]
    cpu = round(found["cpu_seconds"] / images * 1e6, 1)
    speed = {"images_per_second": round(images / seconds, 1), "cpu_microseconds_per_image": cpu}
    return speed | busy(ended - seconds, ended)


@contextmanager
def utilisation(proof: Proof) -> Iterator[Callable[[float, float], Json]]:
    """Samples nvidia-smi about twice a second; yields a function of two Unix times.

    It returns the median percent of the time between them that the GPU and its JPEG engine were busy: None without a
    GPU, or if nvidia-smi is too old to report the engine.
    """
    samples = []
    done = threading.Event()

    def sample() -> None:
        # One process a sample: the lines of one that keeps running may wait in a buffer.
        while not done.wait(0.5):
            lines = nvidia_smi("dmon", "-s", "u", "-c", "1", "-i", proof.device.partition(":")[2] or "0")
            if lines is None:
                return
            samples.append((time.time(), parse_dmon(lines)))

    def busy(began: float, ended: float) -> Json:
        found = {}
        for name, column in (("gpu_percent", "sm"), ("jpeg_engine_percent", "jpg")):
            values = [row[column] for at, row in samples if began <= at <= ended and column in row]
            found[name] = statistics.median(values) if values else None
        return found

    if proof.on_gpu:
        threading.Thread(target=sample, daemon=True).start()
    try:
        yield busy
    finally:
        done.set()


def parse_dmon(lines: list[str]) -> dict[str, float]:
    """The last row of `nvidia-smi dmon` by the names in its header, without columns that hold no number ("-")."""
    names = []
    row = {}
    for line in map(str.strip, lines):
        words = line.lstrip("# ").lower().split()
        if line.startswith("#"):
            names = words if "gpu" in words else names  # the second header line holds units
            continue
        row = {}
        for name, word in zip(names, words):
            with suppress(ValueError):
                row[name] = float(word)
    return row
