"""Step 5: the loader alone, for each cell of tools/bench/cells.py, with the GPU's and its JPEG engine's utilisation."""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from pipeline.cores import usable_cores
from tools.bench.harness import run

from .base import Json, Proof, reject_errors
from .data import enlarged, shards_of
from .preflight import nvidia_smi


def loader_grid(proof: Proof, *, alone: bool) -> Json:
    """Measures the loader cells. alone: those that may crash their process; a crash is recorded and the step passes."""
    cells = measured(proof, alone=alone)
    if not alone:
        reject_errors({cell["name"]: cell for cell in cells})
    return {"cells": cells}


def measured(proof: Proof, *, alone: bool) -> list[Json]:
    from tools.bench.cells import CELLS

    here = "cuda" if proof.on_gpu else "cpu"
    cells = [cell for cell in CELLS if here in cell.devices and cell.alone == alone]
    for data in sorted({cell.data for cell in cells}):
        enlarged(proof, shards_of(proof, data), data)
    batch, seconds = (16, 0.5) if proof.tiny else (256, 5)
    options = {"shards": proof.scratch / "large", "device": proof.device, "batch": batch, "seconds": seconds}
    options |= {"threads": usable_cores(), "dtype": "float16" if proof.on_gpu else "float32"}
    answers = []
    with utilisation(proof) as busy:
        # Cells of one backend share a process, to save imports; backends do not, so that a crash affects only one.
        for _, group in itertools.groupby(cells, lambda cell: cell.name if alone else cell.config.backend):
            names = [{"name": cell.name} for cell in group]
            for name, (found,) in zip(names, run("tools.bench.cells:batches", [options | name for name in names])):
                answers.append(name | (found if "error" in found else rates(found, busy)))
                proof.keep({"cells": answers})
    return answers


def rates(found: Json, busy: Callable[[float, float], Json]) -> Json:
    speed = found["images"] / found["seconds"]
    return {"images_per_second": speed, **busy(found["ended"] - found["seconds"], found["ended"])}


@contextmanager
def utilisation(proof: Proof) -> Iterator[Callable[[float, float], Json]]:
    """Samples nvidia-smi about twice a second; yields a function of two Unix times.

    The function returns the median utilisation, in percent, of the GPU and its JPEG engine between these times; None
    without a GPU, or if nvidia-smi is too old to report the engine.
    """
    samples = []
    done = threading.Event()
    asked = ("--query-gpu=utilization.gpu,utilization.jpeg", "--format=csv,noheader,nounits")

    def sample() -> None:
        # One process per sample: a process that keeps running may buffer its lines.
        while not done.wait(0.5):
            if not (lines := nvidia_smi(*asked, "-i", proof.device.partition(":")[2] or "0")):
                return
            samples.append((time.time(), *lines[0].split(", ")))

    def busy(began: float, ended: float) -> Json:
        rows = [row for row in samples if began <= row[0] <= ended]
        return {"gpu_percent": median(row[1] for row in rows), "jpeg_engine_percent": median(row[2] for row in rows)}

    if proof.on_gpu:
        threading.Thread(target=sample, daemon=True).start()
    try:
        yield busy
    finally:
        done.set()


def median(values: Iterable[str]) -> float | None:
    """The median of the values that are numbers, unlike "[N/A]"; None if there are none."""
    numbers = [float(value) for value in values if value.isdigit()]
    return statistics.median(numbers) if numbers else None
