"""Turns labelled images into verified WebDataset shards.

    python tools/make_shards.py digits --out shards/digits
    python tools/make_shards.py imagefolder --train /data/train --val /data/val --out /data/shards
    python tools/make_shards.py index 'tars/imagenet1k-train-{0000..1023}.tar' --out /data/shards

Exit codes: 0 done, 2 usage, 65 bad data, 74 disk full or folder not writable.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from pipeline.cores import usable_cores
from pipeline.errors import ConfigError, DataError
from pipeline.progress import Progress, clock
from pipeline.write import existing
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import Digits, ImageFolder, Source
from tools import cli


def parser() -> cli.Parser:
    p = cli.Parser(
        prog="make_shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = p.add_subparsers(dest="source", required=True, metavar="SOURCE")
    digits = kinds.add_parser("digits", help="1,797 handwritten digits that come with the project")
    digits.add_argument("--side", type=int, default=36, help="pixels of a digit's side (%(default)s)")
    folder = kinds.add_parser("imagefolder", help="DIR/<class>/<image>, any depth below the class")
    folder.add_argument("--train", type=Path, required=True, metavar="DIR")
    folder.add_argument("--val", type=Path, metavar="DIR")
    folder.add_argument("--name", default="imagefolder", help="the shards' first name (%(default)s)")
    for kind in (digits, folder):
        add_options(kind)
    add_index(kinds.add_parser("index", help="WebDataset tars that exist already: indexed, not copied"))
    return p


def add_index(p: argparse.ArgumentParser) -> None:
    p.add_argument("tars", metavar="PATTERN", help="training tars, with {0000..1023} or *; quote it")
    p.add_argument("--val", metavar="PATTERN", help="validation tars")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; the tars' folder or another")
    p.add_argument("--name", default="webdataset", help="the dataset's name (%(default)s)")
    p.add_argument("--classes", type=Path, metavar="FILE", help="class names, a line each (default: their numbers)")
    p.add_argument("--size", type=int, default=256, help="short side in pixels, for statistics (%(default)s)")
    p.add_argument(
        "--statistics",
        type=int,
        default=10_000,
        metavar="N",
        help="images to measure mean and deviation of (%(default)s)",
    )
    p.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: a core each)")
    p.add_argument("--max-bad-fraction", type=float, default=0.0, metavar="F", help="leave out so many (%(default)s)")


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, empty or new")
    p.add_argument(
        "--encode",
        choices=("keep", "jpeg", "raw"),
        default="keep",
        help="keep the original bytes, or store JPEGs or raw pixels of a fixed short side (%(default)s)",
    )
    p.add_argument(
        "--size", type=int, default=256, help="short side in pixels, for jpeg, raw and statistics (%(default)s)"
    )
    p.add_argument("--square", action="store_true", help="jpeg, raw: store only the centre square")
    p.add_argument("--quality", type=int, default=90, help="jpeg: quality, 1 to 100 (%(default)s)")
    p.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="(%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the shuffle (%(default)s)")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: a core each)")
    p.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="leave out up to this fraction of images that cannot be used (%(default)s)",
    )


def source(args: argparse.Namespace) -> Source:
    if args.source == "digits":
        if not 8 <= args.side <= 1024:
            raise ConfigError(f"--side {args.side}: choose 8 to 1024 pixels")
        return Digits(side=args.side)
    return ImageFolder(args.train, args.val, check_name(args.name))


def check_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ConfigError(f"--name {name!r}: use letters, digits, - and _")
    return name


def main() -> None:
    args = parser().parse_args()
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: must not be negative")
    if args.source == "index":
        index_existing(args)
    else:
        make(args)


def index_existing(args: argparse.Namespace) -> None:
    if not 0 <= args.max_bad_fraction < 1:
        raise ConfigError(f"--max-bad-fraction {args.max_bad_fraction}: must be in [0, 1)")
    if args.statistics < 1:
        raise ConfigError(f"--statistics {args.statistics}: must be at least 1")
    splits = {"train": existing.expand(args.tars)} | ({"val": existing.expand(args.val)} if args.val else {})
    tars = existing.Existing(
        check_name(args.name), splits, class_names(args.classes), args.statistics, Encoding(size=args.size).size
    )
    started = time.monotonic()
    progress = Progress("indexing", sum(map(len, splits.values())), unit="tar")
    try:
        written = existing.index(
            tars,
            args.out,
            workers=min(args.workers or usable_cores(), progress.total),
            max_bad_fraction=args.max_bad_fraction,
            progress=lambda samples: progress.update(1),
        )
    finally:
        progress.close()
    report(written, args.out, time.monotonic() - started)
    for split, how in written["stored_order"].items():
        if split == "train" and how != "mixed":
            print(
                f"warning: the samples of {split} are stored {how}; leave window at 0 or set it to many shards"
                " (docs/order.md), or a batch will hold few classes",
                file=sys.stderr,
            )


def class_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except ValueError as err:
        raise DataError(f"{path}: not UTF-8; save it as UTF-8, a class name a line") from err


def make(args: argparse.Namespace) -> None:
    options = Options(
        Encoding(args.encode, args.size, args.square, args.quality),
        args.samples_per_shard,
        args.seed,
        args.max_bad_fraction,
    )
    started = time.monotonic()
    plan = Plan(source(args), options)
    workers = min(args.workers or usable_cores(), len(plan.tasks))
    progress = Progress("sharding", plan.samples)
    try:
        written = build(plan, args.out, workers=workers, progress=progress.update)
    finally:
        progress.close()
    report(written, args.out, time.monotonic() - started)


def report(written: dict, out: Path, seconds: float) -> None:
    for name, split in written["splits"].items():
        size = sum(shard["bytes"] for shard in split["shards"]) / 1e6
        print(f"{name}: {split['samples']:,} images in {len(split['shards'])} shards, {size:,.1f} MB")
    for what, label in (("converted", "converted to JPEG"), ("quarantine", "left out")):
        if written[what]:
            print(f"{label}: {len(written[what])}, listed in the manifest under {what!r}")
    print(f"{out}: {len(written['classes'])} classes, done in {clock(seconds)}")


if __name__ == "__main__":
    cli.run(main)
