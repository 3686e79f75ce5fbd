"""Data and runs for other benchmarks: CIFAR-10 as shards, and training runs that are not repeated once finished."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.cores import usable_cores
from pipeline.errors import ConfigError, DataError, ExpressError
from pipeline.files import read_object
from pipeline.settings import flatten, updated
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from tools import report
from tools.bench import harness
from tools.bench.data import unpacked
from train.cli import parse
from train.config import Config
from train.run_folder import EXIT, read_metrics


def shards(images: Path, folder: Path, scratch: Path, *, size: int) -> Path:
    """The images as shards in `folder`, made when first asked for; size: of the mean image."""
    out = folder / f"shards-{size}"
    if not (out / manifest.NAME).is_file():
        root = unpacked(images, scratch / "cifar")
        if not (root / "train").is_dir() or not (root / "test").is_dir():
            raise DataError(f"{images}: has no train/ and test/ with a folder for each class")
        source = ImageFolder(root / "train", root / "test", "cifar10")
        build(Plan(source, Options(Encoding(size=size))), out, workers=usable_cores())
    return out


def trained(run: Path, command: list[str]) -> dict[str, Any]:
    """Returns the result of `python train/run.py COMMAND --run.dir RUN`; runs it unless it is finished already.

    The result of a resumed run has no seconds.
    """
    print(f"{run}: train/run.py {' '.join(command)}", file=sys.stderr, flush=True)
    reject_another(run, command)
    if read_object(run / EXIT).get("code") != 0:
        done = subprocess.run([sys.executable, str(harness.RUN), *command, "--run.dir", str(run)])
        if done.returncode:
            raise ExpressError(f"{run}: exited with code {done.returncode}; the same command resumes it")
    lines = read_metrics(run)
    return report.result(run, lines, timed=len(lines["start"]) == 1)


def reject_another(run: Path, command: list[str]) -> None:
    """Raises ConfigError if the folder holds a run of another configuration."""
    saved = read_object(run / "config.json")
    if not saved:
        return  # nothing was begun
    before = flatten(updated(Config(), saved["config"]))
    now = flatten(parse([*command, "--run.dir", str(run)]))
    for name, value in now.items():
        if before[name] != value and (name, value) != ("data.window", -1):  # the run has chosen it
            raise ConfigError(
                f"{run}: was run with {name}={before[name]}, not {value}; remove it, or take another --dir"
            )


def table(results: harness.Json) -> str:
    """The results of runs; seconds: with evaluation, of a run that was never resumed."""
    fields = ("epochs", "images_per_second", "seconds_training_and_evaluating")
    return harness.table(
        [{"run": name, "top1": r["last"]["top1"], **{f: r.get(f) for f in fields}} for name, r in results.items()]
    )
