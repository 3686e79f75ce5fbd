"""Steps 2, 6 and 7: train/run.py as it is, on noise, fed from shards, and on CIFAR-10."""

import json
import shutil
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import ExpressError
from tools.bench.harness import RUN

from .base import Json, Proof
from .data import enlarged, pictures, shards_of

CLASSES = 1000
PIXELS = ("pixels_checked", "pixels_different")  # crops; on a GPU the loader checks some in the background
LEVELS = (0.75, 0.85)  # top-1 that step 7 measures the seconds to


def train(proof: Proof, *flags: object) -> None:
    # A run with a tracker that is not installed is rejected.
    trackers = [] if find_spec("tensorboard") else ["--run.trackers"]
    proof.python("train/run.py", RUN, *flags, *trackers)


def records(run: Path, kind: str) -> list[Json]:
    """The lines of one kind in metrics.jsonl, without a last line that was truncated by a kill."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if line["kind"] == kind]


def seed_run(proof: Proof, *flags: object, shards: Path, batch: int, backend: str, steps: int) -> Path:
    """The folder of a run of the preset `seed`, without its checkpoints: one holds half a gigabyte."""
    run = proof.new_run()
    own = ["--data.shards", shards, "--run.dir", run, "--loader.backend", backend, "--limit-steps", steps]
    own += ["--train.batch", batch, "--train.eval-batch", batch, "--train.precision", "bf16", "--train.compile", "auto"]
    train(proof, "seed", *own, *(["--model.width", 0.25] if proof.tiny else []), *flags)
    shutil.rmtree(run / "checkpoints")
    return run


def speed(proof: Proof, shards: Path, *, batch: int, backend: str) -> Json:
    """Images per second of the preset `seed`: the median over metrics.jsonl's windows after a warm-up.

    A window is the run's own, of 20 steps. Compiling falls into the first one; the checkpoint and the evaluation at the
    run's end come after the last one.
    """
    steps, every, warm_up = (4, 1, 2) if proof.tiny else (150, 20, 40)
    options = {"shards": shards, "batch": batch, "backend": backend, "steps": steps}
    run = seed_run(proof, "--run.log-every", every, **options)
    windows = [line for line in records(run, "train") if line["step"] > warm_up and line["step"] % every == 0]
    described = json.loads((run / "config.json").read_text())
    return {
        "batch": batch,
        **{name: described[name] for name in ("backend", "compiled", "precision")},
        "images_per_second": statistics.median(line["images_per_second"] for line in windows),
        "data_wait": statistics.median(line["data_wait"] for line in windows),
        "memory_gb": windows[-1]["memory_gb"],
        **{name: sum(line[name] for line in windows) for name in PIXELS if name in windows[0]},
        "windows": windows,
    }


def noise_index(proof: Proof) -> Path:
    """A dataset of ImageNet's size and classes, of which the synthetic backend reads no image."""
    return enlarged(proof, pictures(proof, classes=CLASSES, count=CLASSES), "noise")


def synthetic(proof: Proof, full_batch: int) -> Json:
    """The rate of the network alone."""
    return speed(proof, noise_index(proof), batch=proof.batch(full_batch), backend="synthetic")


def profile(proof: Proof) -> Json:
    """torch's profiler: the slowest operations of ten steps."""
    batch, steps = proof.batch(1024), 2 if proof.tiny else 10
    options = {"shards": noise_index(proof), "batch": batch, "backend": "synthetic", "steps": steps + 6}
    run = seed_run(proof, "--profile", steps, **options)
    return {"batch": batch, "table": (run / "profile" / "table.txt").read_text().splitlines()}


def fed(proof: Proof, full_batch: int) -> Json:
    return fed_from(enlarged(proof, shards_of(proof, "jpeg"), "jpeg"), proof, full_batch, backend="auto")


def fed_from(shards: Path, proof: Proof, full_batch: int, *, backend: str, **known: Any) -> Json:
    """Measures training fed from shards, and compares it with noise: step 2's result in this walk, or measured here.

    known: earlier results of the step, with which its result begins.
    """
    result = known | {"fed": speed(proof, shards, batch=proof.batch(full_batch), backend=backend)}
    proof.keep(result)
    result["synthetic"] = proof.earlier(f"train-{full_batch}") or synthetic(proof, full_batch)
    fraction = result["fed"]["images_per_second"] / result["synthetic"]["images_per_second"]
    return {**result, "fed_of_synthetic": fraction}


def cifar(proof: Proof, recipe: str) -> Json:
    """Measures the seconds of training and evaluation until top-1 on CIFAR-10's test images reaches 75 and 85 %."""
    from tools.bench import accuracy, trained

    shards, run = trained.shards(proof.cifar, proof.scratch, proof.scratch, size=36), proof.new_run()
    epochs, width = (1, 0.125) if proof.tiny else (accuracy.EPOCHS // 2, 1.0)
    flags = accuracy.flags(recipe, shards, epochs=epochs, width=width)
    more = {}
    try:
        train(proof, *flags, "--run.dir", run, "--train.stop-at", max(LEVELS))
    except ExpressError as err:  # mostly for lack of time: what it reached until then counts
        if not records(run, "val"):
            raise
        more["cut_short"] = str(err).splitlines()[0]
    return times_to(LEVELS, run) | more


def times_to(levels: tuple[float, ...], run: Path) -> Json:
    """Seconds until an evaluation, of the weights or their average, reached each top-1, if the run was not resumed."""
    starts, evaluations = records(run, "start"), records(run, "val") + records(run, "val of average")
    evaluations.sort(key=lambda line: line["time"])
    timed = [(line["top1"], line["time"] - starts[0]["time"]) for line in evaluations if len(starts) == 1]
    reached = {f"{level:.0%}": next((seconds for top1, seconds in timed if top1 >= level), None) for level in levels}
    rates = [line["images_per_second"] for line in records(run, "train")]
    return {
        "seconds_to": reached,
        "best_top1": max(line["top1"] for line in evaluations),
        "epochs": max(line["epoch"] for line in evaluations),
        "images_per_second": statistics.median(rates),
    }
