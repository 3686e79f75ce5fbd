"""Turns labelled images into verified WebDataset shards.

    python tools/make_shards.py digits --out shards/digits
    python tools/make_shards.py imagenet2012 --src /data/archives --out /data/shards
    python tools/make_shards.py imagefolder --train /data/train --val /data/val --out /data/shards
    python tools/make_shards.py index 'tars/imagenet1k-train-{0000..1023}.tar' --out /data/shards

Run again, it goes on where it was ended, and touches nothing that is whole. Exit codes: 0 done, 2 usage, 65 bad data,
74 disk full or folder not writable.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import shutil

import PIL
import simplejpeg

from pipeline.cores import usable_cores
from pipeline.errors import ConfigError, DataError
from pipeline.progress import Progress, clock
from pipeline.write import imagenet, index_existing
from pipeline.write.build import BadImages, Options, Plan, build
from pipeline.write.build import forecast as build_forecast
from pipeline.write.images import Encoding
from pipeline.write.sources import Digits, ImageFolder, Source
from tools import cli

PILLOW = (12, 3)  # earlier ones have known security faults


def parser() -> cli.Parser:
    p = cli.Parser(
        prog="make_shards.py",
        description=__doc__,
    )
    kinds = p.add_subparsers(dest="source", required=True, metavar="SOURCE")
    digits = kinds.add_parser("digits", help="1,797 handwritten digits that come with the project")
    digits.add_argument("--side", type=int, default=36, help="pixels of a digit's side (%(default)s)")
    for name in imagenet.EDITIONS:
        official = kinds.add_parser(name, help=f"the official archives of {name[-4:]}, read in place")
        official.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder that holds them")
        official.add_argument(
            "--no-md5", action="store_true", help="do not compare md5 sums (2012: minutes of reading)"
        )
        official.add_argument("--no-counts", action="store_true", help="do not compare counts with the kit's")
        add_options(official)
    folder = kinds.add_parser("imagefolder", help="DIR/<class>/<image>, any depth below the class")
    folder.add_argument("--train", type=Path, required=True, metavar="DIR")
    validation = folder.add_mutually_exclusive_group()
    validation.add_argument("--val", type=Path, metavar="DIR")
    validation.add_argument(
        "--val-fraction", type=float, default=0.0, metavar="F", help="hold out this part of each class as validation"
    )
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
    p.add_argument(
        "--stats",
        choices=("on", "off"),
        default="on",
        help="measure mean, deviation, mean image and covariance of the training images (%(default)s)",
    )
    p.add_argument(
        "--check",
        choices=("full", "header"),
        default="full",
        help="keep, with --stats off: decode every image, or look at headers alone (%(default)s)",
    )
    p.add_argument(
        "--shards",
        metavar="A:B|I/N",
        help="make only these, counted over all splits, or slice I, from 0, of N: for job arrays",
    )
    p.add_argument("--merge", action="store_true", help="make none; check that all are there and write the manifest")
    p.add_argument("--dry-run", action="store_true", help="print the plan, its size and its time, and write nothing")
    p.add_argument(
        "--trust-images",
        action="store_true",
        help=f"decode with a Pillow older than {'.'.join(map(str, PILLOW))}, whose faults are known",
    )


def source(args: argparse.Namespace) -> Source:
    if args.source == "digits":
        if not 8 <= args.side <= 1024:
            raise ConfigError(f"--side {args.side}: choose 8 to 1024 pixels")
        return Digits(side=args.side)
    if args.source in imagenet.EDITIONS:
        return imagenet.ImageNet(args.src, imagenet.EDITIONS[args.source], counts=not args.no_counts)
    if not 0 <= args.val_fraction < 1:
        raise ConfigError(f"--val-fraction {args.val_fraction}: must be in [0, 1)")
    return ImageFolder(args.train, args.val, check_name(args.name), args.val_fraction)


def check_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ConfigError(f"--name {name!r}: use letters, digits, - and _")
    return name


def main() -> None:
    args = parser().parse_args()
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: must not be negative")
    if args.source == "index":
        index(args)
    else:
        make(args)


def index(args: argparse.Namespace) -> None:
    if not 0 <= args.max_bad_fraction < 1:
        raise ConfigError(f"--max-bad-fraction {args.max_bad_fraction}: must be in [0, 1)")
    if args.statistics < 1:
        raise ConfigError(f"--statistics {args.statistics}: must be at least 1")
    splits = {"train": index_existing.expand(args.tars)} | (
        {"val": index_existing.expand(args.val)} if args.val else {}
    )
    tars = index_existing.Existing(
        check_name(args.name), splits, class_names(args.classes), args.statistics, Encoding(size=args.size).size
    )
    started = time.monotonic()
    progress = Progress("indexing", sum(map(len, splits.values())), unit="tar")
    try:
        written = index_existing.index(
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
    if args.shards and args.merge:
        raise ConfigError("--merge goes without --shards: it makes no shard")
    options = Options(
        Encoding(args.encode, args.size, args.square, args.quality),
        args.samples_per_shard,
        args.seed,
        args.max_bad_fraction,
        args.stats == "on",
        args.check,
    )
    say_decoders(trusted=args.trust_images)
    plan = Plan(source(args), options)
    only = numbers(args.shards, len(plan.tasks)) if args.shards else None
    if only is not None and not only:
        print(f"{args.out}: slice {args.shards} of {len(plan.tasks)} shards has none; nothing to do")
        return
    workers = min(args.workers or usable_cores(), len(plan.tasks))
    if args.dry_run:
        foresee(plan, only, args.out, workers)
        return
    started = time.monotonic()
    images = sum(len(task.rows) for n, task in enumerate(plan.tasks) if only is None or n in only)
    progress: Progress | None = None

    def tell(done: int, note: str) -> None:
        nonlocal progress
        progress = progress or Progress("sharding", images)
        progress.update(done, note)

    def first(folder: Path) -> None:
        # Of a job array, the task that makes shard 0 reads the archives once for all.
        if isinstance(plan.source, imagenet.ImageNet) and not args.no_md5 and (only is None or 0 in only):
            verify(plan.source, folder / "md5.json")

    try:
        nothing = range(0) if args.merge else only
        written = build(plan, args.out, workers=workers, tell=tell, only=nothing, merge=not args.shards, first=first)
    except BadImages as err:
        for bad in err.listed:
            print(f"bad: {bad['image']}: {bad['reason']}")
        raise
    finally:
        if progress:
            progress.close()
    if written is None:
        print(f"{args.out}: shards {args.shards} of {len(plan.tasks)} are whole; with all of them there, run --merge")
    else:
        report(written, args.out, time.monotonic() - started)


def numbers(text: str, shards: int) -> range:
    """ "0:64" → range(0, 64); "3/16" → the fourth of 16 slices, which differ by one shard at most and may be empty."""
    if "/" in text:
        return slice_of(text, shards)
    first, colon, last = text.partition(":")
    if not (colon and (first + "0").isdigit() and (last + "0").isdigit()):
        raise ConfigError(f"--shards {text}: say A:B, the first and the one after the last, or I/N, slice I of N")
    chosen = range(int(first or 0), min(int(last or shards), shards))
    if not chosen:
        raise ConfigError(f"--shards {text}: there are {shards} shards, 0 to {shards - 1}")
    return chosen


def slice_of(text: str, shards: int) -> range:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise ConfigError(f"--shards {text}: say I/N, with I from 0 to N - 1")
    n, slices = int(number), int(of)
    return range(n * shards // slices, (n + 1) * shards // slices)


def say_decoders(*, trusted: bool) -> None:
    """What decodes. Pillow-SIMD lags behind Pillow, and then has faults that are known to whoever made an image."""
    simd = ".post" in PIL.__version__
    name = f"{'Pillow-SIMD' if simd else 'Pillow'} {PIL.__version__}"
    if tuple(int(part) for part in PIL.__version__.split(".")[:2]) < PILLOW and not trusted:
        raise ConfigError(
            f"{name} is older than {'.'.join(map(str, PILLOW))}, whose predecessors have known security faults;"
            " install a newer one, or pass --trust-images where you know where the images are from"
        )
    print(f"decoding with libjpeg-turbo (simplejpeg {simplejpeg.__version__}), odd images with {name}", flush=True)


def verify(official: imagenet.ImageNet, remembered: Path) -> None:
    total = sum(size for _, size in official.to_verify())
    if not total:
        return
    progress = Progress("md5", total, unit="B")
    try:
        official.verify(progress.update, remembered)
    finally:
        progress.close()


def foresee(plan: Plan, only: range | None, out: Path, workers: int) -> None:
    """--dry-run: what would be written, how much of it, and for how long."""
    forecast = build_forecast(plan, only)
    for split, items in plan.source.splits.items():
        shards = sum(task.split == split for task in plan.tasks)
        print(f"{split}: {len(items):,} images in {shards} shards")
    existing_folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing_folder).free
    chosen = f"shards {only.start}:{only.stop}" if only else "all shards"
    print(
        f"{chosen}: about {forecast.bytes / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free in {existing_folder};"
        f" about {clock(forecast.seconds / workers)} with {workers} workers,"
        f" by {forecast.tried} images that were tried, {forecast.bad} of them bad"
    )
    if forecast.bytes > free:
        print(f"warning: {out} has too little room", file=sys.stderr)


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
