"""Loader rates: ours and the peers', interleaved in one run.

Ours are the cells of cells.py. Each measurement is made in a process of its own; 30 cells, in three rounds, take ten
minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cores import usable_cores
from tools.bench import data, extremes, harness
from tools.bench.cells import BY_NAME
from tools.bench.harness import Cell, Json, Record

WHAT = "loader rates, decoded and cropped to 224, warm page cache; medians over interleaved rounds"
OURS = {  # the cells of each kind of data, by the last part of their names
    "portable": "ours",
    "unverified": "ours, checksums off",
    "jitter": "ours, random resized crop",
    "dali-cpu": "ours, backend dali-cpu",
    "2-ranks": "ours, 2 ranks",
    "4-ranks": "ours, 4 ranks",
    "1-ms-late": "ours, each read 1 ms late",
    "10-ms-late": "ours, each read 10 ms late",
}
FFCV = {"FFCV, random resized crop": "random-resized", "FFCV, centre crop": "centre"}
PEERS = {  # on shards
    "decode alone (libjpeg-turbo)": "decode",
    "DALI readers.webdataset": "dali_webdataset",
    "webdataset + Pillow": "webdataset_pillow",
}
ON_FILES = {"torchvision.io": "torchvision_io", "the seed's (ImageFolder)": "seed"}


def add_arguments(p: argparse.ArgumentParser) -> None:
    harness.add_images(p, "ffcv-python")
    harness.add_options(p, rounds=3, seconds=2.0, batch=128, threads=usable_cores())
    p.add_argument("--dtype", choices=("uint8", "float32"), default="uint8", help="of the crops (%(default)s)")


def run(args: argparse.Namespace, record: Record) -> None:
    with harness.scratch_folder() as scratch:
        images = data.unpacked(args.images, scratch / "images")
        manifests = {kind: data.shard(images, scratch / kind) for kind in data.ENCODINGS}
        record.keep(data={kind: described(manifest) for kind, manifest in manifests.items()})
        cells = [cell for kind in data.ENCODINGS for cell in cells_on(kind, images, scratch, args)]
        results = harness.interleave(cells, args.rounds, record)
        small, large = scratch / "jpeg", data.enlarge(scratch / "jpeg", scratch / "large")
        measured = {"first_batch_samples": data.SAMPLES, **extremes.measure(small, large, batch=args.batch)}
        record.keep(extremes=measured)
    print(table(results))
    print("\n".join(f"{name}: {value}" for name, value in measured.items()))


def described(manifest: Json) -> Json:
    split = manifest["splits"]["train"]
    size = sum(shard["bytes"] for shard in split["shards"])
    return {"images": split["samples"], "bytes": size, "fingerprint": manifest["fingerprint"]}


def cells_on(kind: str, images: Path, scratch: Path, args: argparse.Namespace) -> Iterator[Cell]:
    """The cells on one kind of data: ours, and the peers that can read it."""
    common = {name: getattr(args, name) for name in ("batch", "threads", "seconds")}

    def cell(loader: str, module: str, *, python: str | Path = sys.executable, ranks: int = 1, **options: Any) -> Cell:
        what, function = {"data": kind, "loader": loader}, f"tools.bench.{module}:batches"
        return Cell(what, function, common | options, ranks=ranks, python=python)

    shards = scratch / kind
    for name, loader in OURS.items():
        if ours := BY_NAME.get(f"{kind}-{name}"):
            options = {"name": ours.name, "shards": scratch, "device": "cpu", "dtype": args.dtype}
            yield cell(loader, "cells", ranks=ours.ranks, **options)
    if args.ffcv_python:
        options = {"images": images, "path": shards.with_suffix(".beton"), "kind": kind}
        for loader, crop in FFCV.items():
            yield cell(loader, "peers.ffcv", python=args.ffcv_python, crop=crop, **options)
    if kind != "raw":
        for loader, module in PEERS.items():
            yield cell(loader, f"peers.{module}", data=shards, dtype=args.dtype)
    if kind == "keep":
        for loader, module in ON_FILES.items():
            yield cell(loader, f"peers.{module}", data=images)


def table(records: list[Json]) -> str:
    """Markdown, with each rate as a share of ours on the same data."""
    ours = {r["data"]: r["images_per_second"] for r in records if r["loader"] == OURS["portable"]}
    rows = []
    for r in records:
        rate = r["images_per_second"]
        rows.append([r["data"], r["loader"], f"{rate:,.0f}", f"{ours[r['data']] / rate:.2f} ×"])
    return harness.markdown(["data", "loader", "img/s, median", "ours against it"], rows, left=2)
