"""Sharding rates: ours, those of other writers, and what the work costs at least; medians of interleaved rounds.

Each measurement is a process of its own. Starting a process and listing the images are not in the figures;
writing, fsync and the manifest are.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cores import usable_cores
from tools.bench import harness
from tools.bench.data import unpacked
from tools.bench.harness import Cell, Record

DECODE, COPY = "decode alone (libjpeg-turbo, reused buffers)", "read, sha256, write"
FFCV = "FFCV's writer, jpg, at most 341 pixels"
JPEG, KEEP = "ours, jpeg 256", "ours, keep"
WRITERS = {"webdataset": "ShardWriter", "mosaicml": "MDSWriter", "litdata": "optimize"}
SECONDS = 4.0  # of what is no work with an end


OPTIONS = {
    "images": Path,
    "ffcv-python": None,
    "writers-python": None,
    "simd-python": None,
    "rounds": 3,
    "workers": usable_cores(),
    "repeat": 10,
}


def run(args: harness.Namespace, record: Record, scratch: Path) -> None:
    images = unpacked(args.images, scratch / "images")
    cells = list(cells_on(images, repeated(images, scratch / "many", args.repeat), scratch / "out", args))
    harness.interleave(cells, args.rounds, record)


def repeated(images: Path, many: Path, times: int) -> Path:
    """Each image `times` times, by links: the page cache holds it once, and every reader reads it so often."""
    for path in sorted(images.glob("*/*")):
        folder = many / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(times):
            (folder / f"{path.stem}-{i}{path.suffix}").symlink_to(path.resolve())
    return many


def cells_on(images: Path, many: Path, out: Path, args: harness.Namespace) -> Iterator[Cell]:
    def cell(what: str, function: str, against: str = "", *, python: Any = sys.executable, **options: Any) -> Cell:
        return Cell({"what": what}, f"tools.bench.peers.{function}", options, against, python=python)

    def ours(what: str, against: str, **options: Any) -> Cell:
        return cell(what, "sharders:ours", against, **work | options)

    work = {"images": many, "out": out, "workers": args.workers}
    yield cell(DECODE, "loaders:decode", images=images, threads=args.workers, seconds=SECONDS)
    yield cell(COPY, "sharders:copy_files", **work)
    if args.ffcv_python:
        yield cell(FFCV, "ffcv:measure", python=args.ffcv_python, **work)
    yield ours(JPEG, FFCV, encode="jpeg")
    yield ours(f"{JPEG}, cuts", JPEG, encode="jpeg", cuts=32)
    yield ours(f"{KEEP}, cuts", KEEP, cuts=32)
    yield ours(f"{JPEG}, no statistics", FFCV, encode="jpeg", stats=False)
    yield ours(KEEP, DECODE)
    yield ours(f"{KEEP}, no statistics", DECODE, stats=False)
    unchecked = f"{KEEP}, headers only, no statistics"
    yield ours(unchecked, COPY, stats=False, check="header")
    for name, writer in WRITERS.items() if args.writers_python else ():
        yield cell(f"{name}'s {writer}", "writers:measure", unchecked, python=args.writers_python, name=name, **work)
    yield ours(f"{JPEG}, one worker", JPEG, encode="jpeg", workers=1)
    for name in ("ours", "Pillow", "torchvision.io", "Pillow-SIMD"):
        python = args.simd_python if name == "Pillow-SIMD" else sys.executable
        what = f"one thread: decode, resize 256, encode: {name}"
        if python:
            yield cell(what, "sharders:resizers", python=python, name=name, images=images, seconds=SECONDS)
