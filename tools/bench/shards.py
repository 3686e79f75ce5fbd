"""Sharding rates: ours, FFCV's writer, and what the work costs at least; interleaved, each in a process of its own.

Starting a process and listing the images are not in the figures; writing, fsync and the manifest are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cores import usable_cores
from pipeline.errors import ExpressError
from pipeline.files import write_json
from tools.bench import peers
from tools.bench.loader import unpacked
from train import environment

PEERS = Path(peers.__file__).parent
JPEG, KEEP = ["--encode", "jpeg"], ["--encode", "keep"]
NO_STATS = ["--stats", "off"]
SMALL = ["--samples-per-shard", "100"]


@dataclass
class Cell:
    """One way to make shards, and its measured rates."""

    what: str
    command: list[str]
    against: str = ""  # the cell that it is compared with
    rates: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)  # resident, of the largest worker

    def measure(self) -> None:
        done = subprocess.run(self.command, capture_output=True, text=True)
        if done.returncode:
            raise ExpressError(f"{self.what}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        result = json.loads(done.stdout.splitlines()[-1])
        self.rates.append(result["images"] / result["seconds"])
        self.megabytes.append(result.get("megabytes", 0.0))

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def record(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "images_per_second": round(self.rate, 1),
            "rates": [round(rate, 1) for rate in self.rates],
            **({"against": self.against} if self.against else {}),
            **({"megabytes_a_worker": round(max(self.megabytes), 1)} if any(self.megabytes) else {}),
        }


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--images", type=Path, required=True, help="class folders of JPEGs, or a tar of them")
    p.add_argument("--repeat", type=int, default=10, help="how often each image is taken (%(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="measurements of each, in turn (%(default)s)")
    p.add_argument("--workers", type=int, default=usable_cores(), help="processes (%(default)s)")
    p.add_argument("--ffcv-python", type=Path, metavar="FILE", help="interpreter that has FFCV; without it left out")
    p.add_argument("--simd-python", type=Path, metavar="FILE", help="interpreter that has Pillow-SIMD; likewise")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="imagenet-express-") as scratch:
        images = unpacked(args.images, Path(scratch) / "images")
        many = repeated(images, Path(scratch) / "many", args.repeat)
        cells = prepare(images, many, Path(scratch), args)
        for number in range(args.rounds):
            for cell in cells:
                cell.measure()
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    print(table(cells))
    if args.json:
        write_json(
            args.json,
            {
                "what": "images sharded a second; medians over interleaved rounds",
                "command": f"python tools/bench shards --images {args.images.name}",
                "settings": {name: getattr(args, name) for name in ("repeat", "rounds", "workers")},
                "environment": environment.describe(),
                "results": [cell.record() for cell in cells],
            },
        )


def repeated(images: Path, many: Path, times: int) -> Path:
    """Each image `times` times, by links: the page cache holds it once, and every reader reads it so often."""
    for path in sorted(images.glob("*/*")):
        folder = many / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(times):
            if images.stat().st_dev == many.stat().st_dev:
                os.link(path, folder / f"{path.stem}-{i}{path.suffix}")
            else:
                shutil.copy(path, folder / f"{path.stem}-{i}{path.suffix}")
    return many


def prepare(images: Path, many: Path, scratch: Path, args: argparse.Namespace) -> list[Cell]:
    common = ["--images", str(many), "--out", str(scratch / "out")]
    ours = [sys.executable, str(PEERS / "ours_shards.py"), *common]
    workers = ["--workers", str(args.workers)]
    cells = [
        Cell(
            "decode alone (libjpeg-turbo, reused buffers)", [*python("sharding_limits.py"), "decode", *common, *workers]
        ),
        Cell("read, sha256, write", [*python("sharding_limits.py"), "copy", *common, *workers]),
    ]
    decode, copy, ffcv = cells[0].what, cells[1].what, "FFCV's writer, jpg, at most 341 pixels"
    if args.ffcv_python:
        script = [str(args.ffcv_python), str(PEERS / "ffcv_writer.py")]
        cells.append(Cell(ffcv, [*script, *common, *workers]))
    cells += [
        Cell("ours, jpeg 256", [*ours, *workers, *JPEG], ffcv),
        Cell("ours, jpeg 256, no statistics", [*ours, *workers, *JPEG, *NO_STATS], ffcv),
        Cell("ours, keep", [*ours, *workers, *KEEP], decode),
        Cell("ours, keep, no statistics", [*ours, *workers, *KEEP, *NO_STATS], decode),
        Cell("ours, keep, headers only, no statistics", [*ours, *workers, *KEEP, *NO_STATS, "--check", "header"], copy),
        Cell("ours, jpeg 256, one worker", [*ours, "--workers", "1", *JPEG], "ours, jpeg 256"),
        Cell(
            "ours, keep, a tenth of the images", [*ours, "--images", str(images), *workers, *KEEP, *SMALL], "ours, keep"
        ),
    ]
    one = python("resizers.py")
    for name, kind in (("ours", "ours"), ("Pillow", "pillow"), ("torchvision.io", "torchvision")):
        cells.append(Cell(f"one thread: decode, resize 256, encode: {name}", [*one, kind, "--images", str(images)]))
    if args.simd_python:
        simd = [str(args.simd_python), str(PEERS / "resizers.py"), "pillow", "--images", str(images)]
        cells.append(Cell("one thread: decode, resize 256, encode: Pillow-SIMD", simd))
    return cells


def python(script: str) -> list[str]:
    return [sys.executable, str(PEERS / script)]


def table(cells: list[Cell]) -> str:
    by_name = {cell.what: cell for cell in cells}
    lines = ["| what | img/s, median | against | MB a worker |", "| --- | ---: | --- | ---: |"]
    for cell in cells:
        other = by_name.get(cell.against)
        ratio = f"{cell.rate / other.rate:.2f} × {other.what}" if other else ""
        memory = f"{max(cell.megabytes):,.0f}" if any(cell.megabytes) else ""
        lines.append(f"| {cell.what} | {cell.rate:,.0f} | {ratio} | {memory} |")
    return "\n".join(lines)
