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
from subprocess import PIPE
from typing import Any

from pipeline.cores import usable_cores
from pipeline.errors import DataError, ExpressError
from pipeline.files import write_json
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from tools.bench import extremes, peers
from train import environment

PEERS = Path(peers.__file__).parent
OURS = "ours"
ENCODINGS = {
    "jpeg": Encoding("jpeg", size=256, quality=90),
    "keep": Encoding(),
    "raw": Encoding("raw", size=256, square=True),
}


@dataclass
class Cell:
    """One loader on one kind of data, and its measured rates."""

    data: str
    loader: str
    command: list[str]
    ranks: int = 1
    rates: list[float] = field(default_factory=list)
    cpu_microseconds: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def measure(self, args: argparse.Namespace) -> None:
        command = [*self.command, "--batch", str(args.batch), "--threads", str(args.threads)]
        command += ["--seconds", str(args.seconds)]
        of = [["--rank", str(rank), "--world", str(self.ranks)] if self.ranks > 1 else [] for rank in range(self.ranks)]
        started = [subprocess.Popen(command + rank, stdout=PIPE, stderr=PIPE, text=True) for rank in of]
        rate = cpu = 0.0
        for process in started:
            printed, said = process.communicate()
            if process.returncode:
                raise ExpressError(f"{self.loader} on {self.data}: {(said.strip().splitlines() or ['no message'])[-1]}")
            result = json.loads(printed.splitlines()[-1])
            self.versions = result.get("versions", {})
            rate += result["images"] / result["seconds"]
            cpu += result["cpu_seconds"] / result["images"] * 1e6 / self.ranks
        self.rates.append(rate)
        self.cpu_microseconds.append(cpu)

    def record(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "loader": self.loader,
            "images_per_second": round(statistics.median(self.rates), 1),
            "rates": [round(rate, 1) for rate in self.rates],
            # Of the measuring process alone: worker processes of a DataLoader are not in it.
            "cpu_microseconds_an_image": round(statistics.median(self.cpu_microseconds), 1),
            **({"versions": self.versions} if self.versions else {}),
        }


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--images", type=Path, required=True, help="class folders of JPEGs, or a tar of them")
    p.add_argument("--rounds", type=int, default=5, help="measurements of each loader, in turn (%(default)s)")
    p.add_argument("--seconds", type=float, default=5.0, help="of one measurement (%(default)s)")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--threads", type=int, default=usable_cores(), help="decoding threads (%(default)s)")
    p.add_argument("--dtype", choices=("uint8", "float32"), default="uint8", help="of the crops (%(default)s)")
    p.add_argument(
        "--ffcv-python", type=Path, metavar="FILE", help="interpreter that has FFCV; without it FFCV is left out"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="imagenet-express-") as scratch:
        images = unpacked(args.images, Path(scratch) / "images")
        described, cells = prepare(images, Path(scratch), args)
        for number in range(args.rounds):
            for cell in cells:
                cell.measure(args)
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
        records = [cell.record() for cell in cells]
        measured = extremes.measure(Path(scratch) / "jpeg", batch=args.batch)
    print(table(records))
    print("\n".join(f"{name}: {value}" for name, value in measured.items()))
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
                "extremes": measured,
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


def prepare(images: Path, scratch: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[Cell]]:
    """Shards the images in three ways and lists what is to be measured."""
    described, cells = {}, []
    ours = [sys.executable, str(PEERS / "ours.py"), "--dtype", args.dtype, "--data"]

    def peer(data: str, loader: str, script: str, path: Path, *extra: str, ranks: int = 1) -> None:
        command = [sys.executable, str(PEERS / script), "--dtype", args.dtype, "--data", str(path), *extra]
        cells.append(Cell(data, loader, command, ranks))

    def ffcv(data: str) -> None:
        if args.ffcv_python:
            script = [str(args.ffcv_python), str(PEERS / "ffcv_loader.py"), "--kind", data, "--images", str(images)]
            for crop, name in (("random-resized", "FFCV, random resized crop"), ("centre", "FFCV, centre crop")):
                cells.append(Cell(data, name, [*script, "--cache", str(scratch), "--crop", crop]))

    for data, encoding in ENCODINGS.items():
        plan = Plan(ImageFolder(images), Options(encoding, samples_per_shard=250))
        manifest = build(plan, scratch / data, workers=min(usable_cores(), len(plan.tasks)))
        split = manifest["splits"]["train"]
        size = sum(shard["bytes"] for shard in split["shards"])
        described[data] = {"images": split["samples"], "bytes": size, "fingerprint": manifest["fingerprint"]}
        path = scratch / data
        cells.append(Cell(data, OURS, [*ours, str(path)]))
        if data != "raw":
            peer(data, "decode alone (libjpeg-turbo)", "decode.py", path)
        ffcv(data)
        if data != "raw":
            peer(data, "DALI readers.webdataset", "dali_webdataset.py", path)
            peer(data, "webdataset + Pillow", "webdataset_pillow.py", path)
        if data == "keep":
            peer(data, "torchvision.io", "torchvision_io.py", images)
            peer(data, "the seed's (ImageFolder)", "seed.py", images)
        cells.append(Cell(data, f"{OURS}, checksums off", [*ours, str(path), "--verify", "no"]))
        cells.append(Cell(data, f"{OURS}, random resized crop", [*ours, str(path), "--jitter"]))
        cells.append(Cell(data, f"{OURS}, backend dali-cpu", [*ours, str(path), "--backend", "dali-cpu"]))
        if data == "jpeg":
            cells += [Cell(data, f"{OURS}, {ranks} ranks", [*ours, str(path)], ranks) for ranks in (2, 4)]
            cells += [
                Cell(data, f"{OURS}, each read {delay * 1000:g} ms late", [*ours, str(path), "--delay", str(delay)])
                for delay in (0.001, 0.01)
            ]
    return described, cells


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, with each rate as a share of ours on the same data."""
    ours = {r["data"]: r["images_per_second"] for r in records if r["loader"] == OURS}
    lines = ["| data | loader | img/s, median | ours against it |", "| --- | --- | ---: | ---: |"]
    for r in records:
        ratio = f"{ours[r['data']] / r['images_per_second']:.2f} ×"
        lines.append(f"| {r['data']} | {r['loader']} | {r['images_per_second']:,.0f} | {ratio} |")
    return "\n".join(lines)
