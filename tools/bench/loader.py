"""Loader rates: ours and the peers', interleaved in one run, each measurement in a process of its own."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cores import usable_cores
from pipeline.errors import DataError, ExpressError
from pipeline.files import write_json
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from tools.bench import peers
from train import environment

PEERS = Path(peers.__file__).parent
JPEG = Encoding("jpeg", size=256, quality=90)


@dataclass
class Cell:
    """One loader on one kind of data, and its measured rates."""

    data: str
    loader: str
    script: str
    path: Path
    extra: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu_microseconds: list[float] = field(default_factory=list)

    def measure(self, args: argparse.Namespace) -> None:
        command = [sys.executable, str(PEERS / self.script), "--data", str(self.path), "--batch", str(args.batch)]
        command += ["--threads", str(args.threads), "--seconds", str(args.seconds), "--dtype", args.dtype, *self.extra]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExpressError(f"{self.loader} on {self.data}: {last}")
        result = json.loads(done.stdout.splitlines()[-1])
        self.rates.append(result["images"] / result["seconds"])
        self.cpu_microseconds.append(result["cpu_seconds"] / result["images"] * 1e6)

    def record(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "loader": self.loader,
            "images_per_second": round(statistics.median(self.rates), 1),
            "rates": [round(rate, 1) for rate in self.rates],
            # Of the measuring process alone: worker processes of a DataLoader are not in it.
            "cpu_microseconds_an_image": round(statistics.median(self.cpu_microseconds), 1),
        }


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--images", type=Path, required=True, help="class folders of JPEGs, or a tar of them")
    p.add_argument("--rounds", type=int, default=5, help="measurements of each loader, in turn (%(default)s)")
    p.add_argument("--seconds", type=float, default=5.0, help="of one measurement (%(default)s)")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--threads", type=int, default=usable_cores(), help="decoding threads (%(default)s)")
    p.add_argument("--dtype", choices=("uint8", "float32"), default="uint8", help="of the crops (%(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="imagenet-express-") as scratch:
        images = unpacked(args.images, Path(scratch) / "images")
        described, cells = prepare(images, Path(scratch))
        for number in range(args.rounds):
            for cell in cells:
                cell.measure(args)
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
        records = [cell.record() for cell in cells]
    print(table(records))
    if args.json:
        settings = {name: getattr(args, name) for name in ("rounds", "seconds", "batch", "threads", "dtype")}
        write_json(
            args.json,
            {
                "what": "loader rates, decoded and cropped to 224, warm page cache; medians over interleaved rounds",
                "command": f"python tools/bench loader --images {args.images.name}",
                "settings": settings,
                "data": described,
                "environment": environment.describe(),
                "results": records,
            },
        )


def unpacked(images: Path, scratch: Path) -> Path:
    """The folder of class folders: `images` itself, or what the tar holds."""
    if images.is_dir():
        return images
    try:
        with tarfile.open(images) as tar:
            tar.extractall(scratch, filter="data")
    except (OSError, tarfile.TarError) as err:
        raise DataError(f"{images}: neither a folder of class folders nor a tar of one ({err})") from err
    return scratch


def prepare(images: Path, scratch: Path) -> tuple[dict[str, Any], list[Cell]]:
    """Shards the images both ways and lists what is to be measured."""
    described, cells = {}, []
    for data, encoding in (("jpeg", JPEG), ("keep", Encoding())):
        plan = Plan(ImageFolder(images), Options(encoding, samples_per_shard=250))
        manifest = build(plan, scratch / data, workers=min(usable_cores(), len(plan.tasks)))
        split = manifest["splits"]["train"]
        size = sum(shard["bytes"] for shard in split["shards"])
        described[data] = {"images": split["samples"], "bytes": size, "fingerprint": manifest["fingerprint"]}
        cells += [
            Cell(data, "ours", "ours.py", scratch / data),
            Cell(data, "ours, unverified", "ours.py", scratch / data, ["--verify", "no"]),
            Cell(data, "DALI readers.webdataset", "dali_webdataset.py", scratch / data),
        ]
    cells.append(Cell("files", "the seed's (ImageFolder)", "seed.py", images))
    return described, cells


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, with each rate as a share of ours on the same data (the seed's: of both of ours)."""
    ours = {r["data"]: r["images_per_second"] for r in records if r["loader"] == "ours"}
    lines = ["| data | loader | img/s, median | ours against it |", "| --- | --- | ---: | --- |"]
    for r in records:
        against = [r["data"]] if r["data"] in ours else list(ours)
        ratios = ", ".join(f"{data} {ours[data] / r['images_per_second']:.2f} ×" for data in against)
        lines.append(f"| {r['data']} | {r['loader']} | {r['images_per_second']:,.0f} | {ratios} |")
    return "\n".join(lines)
