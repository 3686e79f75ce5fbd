"""Turns labelled images into verified WebDataset shards.

    python tools/make_shards.py digits --out shards/digits
    python tools/make_shards.py imagenet2012 --src /data/archives --out /data/shards
    python tools/make_shards.py imagefolder --train /data/train --val /data/val --out /data/shards
    python tools/make_shards.py index 'tars/imagenet1k-train-{0000..1023}.tar' --out /data/shards

Run again, it resumes, and changes nothing that is whole. Exit codes: 0 done, 2 usage, 65 bad data,
74 disk full or folder not writable.
"""

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import pipeline  # noqa: F401 (first: it names a package that is missing)

# isort: split
import argparse
import math
import shutil
import unicodedata
from functools import partial

import PIL
import simplejpeg

from pipeline import pool
from pipeline.errors import ConfigError, DataError, reading
from pipeline.manifest import open_dataset
from pipeline.progress import Progress, clock
from pipeline.storage import Folder, folder_at, is_url
from pipeline.write import index_existing, ray_pool
from pipeline.write.build import build, forecast
from pipeline.write.cuts import CHECKS, make_cuts
from pipeline.write.images import Encoding
from pipeline.write.manifest_content import BadImages
from pipeline.write.plan import Options, Plan, numbers
from pipeline.write.sources import SOURCES
from pipeline.write.sources.base import PassedOver, check_fraction, check_name, few_images
from pipeline.write.sources.tars import expand
from tools import cli

PILLOW = (12, 3)  # earlier ones have known security faults
OLDEST = ".".join(map(str, PILLOW))


def parser() -> cli.Parser:
    p = cli.Parser(description=__doc__)
    kinds = p.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, source in SOURCES.items():
        kind = kinds.add_parser(name, help=source.help)
        source.add_options(kind)
        add_options(kind)
    add_index(kinds.add_parser("index", help="WebDataset tars that exist already: indexed, not copied"))
    cuts = kinds.add_parser("cuts", help="for a finished shard folder: faster crops of its JPEGs (docs/cuts.md)")
    cuts.add_argument("out", metavar="DIR", help="the shard folder, or its URL")
    add_shared(cuts)
    return p


def add_index(p: cli.Parser) -> None:
    p.add_argument("tars", metavar="PATTERN", help="training tars, with {0000..1023} or *; quote it")
    p.add_argument("--val", metavar="PATTERN", help="validation tars")
    p.option("name", "webdataset", "the dataset's name (%(default)s)")
    p.path("--classes", "FILE", "class names, a line each (default: their numbers)")
    p.option("statistics", 10_000, "images to measure mean and deviation of (%(default)s)", metavar="N")
    p.flag("cuts", "also make what `make_shards.py cuts` makes: takes several times as long")
    add_common(p, out="folder to write: the tars' own or another", size="statistics")


def add_shared(p: cli.Parser) -> None:
    p.workers()
    checks = "images whose cut is compared with the whole: one in 32, or all (%(default)s)"
    p.option("check-cuts", "some", checks, choices=tuple(CHECKS))
    p.flag("allow-http", "use a URL also without encryption")


def add_common(p: cli.Parser, *, out: str, size: str) -> None:
    p.add_argument("--out", metavar="DIR", required=True, help=out)
    p.option("size", 256, f"short side in pixels, for {size} (%(default)s)")
    allowed = "leave out up to this fraction of images that cannot be used (%(default)s)"
    p.option("max-bad-fraction", 0.0, allowed, metavar="F")
    add_shared(p)


def add_options(p: cli.Parser) -> None:
    add_common(p, out="folder or URL to write, empty or new", size="jpeg, raw and statistics")
    encode = "keep the original bytes, or store JPEGs or raw pixels of a fixed short side (%(default)s)"
    p.option("encode", "keep", encode, choices=("keep", "jpeg", "raw"))
    p.flag("square", "jpeg, raw: store only the centre square")
    p.option("quality", 90, "jpeg: quality, 1 to 100 (%(default)s)")
    p.option("samples-per-shard", 1000, "(%(default)s)", metavar="N")
    p.option("seed", 0, "of the shuffle (%(default)s)")
    measured = "measure mean, deviation, mean image and covariance of the training images (%(default)s)"
    p.option("stats", "on", measured, choices=("on", "off"))
    checks = "keep, with --stats off: decode every image, or read only headers (%(default)s)"
    p.option("check", "full", checks, choices=("full", "header"))
    cuts = "make what crops JPEGs faster, docs/cuts.md (default: if statistics are measured, and not for raw)"
    p.add_argument("--cuts", action=argparse.BooleanOptionalAction, help=cuts)
    p.add_argument(
        "--shards",
        metavar="A:B|I/N",
        help="make only these, counted over all splits, or slice I, from 0, of N: for job arrays",
    )
    p.option("executor", "local", "what runs the workers: this machine, or Ray (%(default)s)", choices=("local", "ray"))
    p.option("ray-address", "", "a Ray cluster's address, or auto (default: $RAY_ADDRESS, or Ray on this machine)")
    p.flag("merge", "make none; check that all exist and write the manifest")
    p.flag("dry-run", "print the plan, its size and its time, and write nothing")
    p.flag("trust-images", f"decode with a Pillow older than {OLDEST}, whose faults are known")


def main() -> None:
    args = parser().parse_args()
    args.workers = pool.worker_count(args.workers)
    args.out = folder_at(args.out, allow_http=args.allow_http)
    started = time.monotonic()
    if args.source == "cuts":
        return cut(args)
    try:
        written = index(args) if args.source == "index" else make(args)
    except BadImages as err:
        for bad in err.listed:
            print(cli.printable(f"bad: {bad['image']}: {bad['reason']}"))
        raise
    if written:
        report(written, args.out, time.monotonic() - started)
        if args.cuts:
            cut(args)


def index(args: argparse.Namespace) -> dict:
    if is_url(args.out):
        raise ConfigError(f"{args.out}: index writes into a folder; name one, and upload what it holds then")
    if args.statistics < 1:
        raise ConfigError(f"--statistics {args.statistics}: must be at least 1")
    splits = {"train": expand(args.tars)} | ({"val": expand(args.val)} if args.val else {})
    if args.val and (both := {*splits["train"]}.intersection(splits["val"])):
        raise ConfigError(f"{min(both)}: is in both splits; name it in one of them")
    with Progress("indexing", sum(map(len, splits.values())), unit="tar") as progress:
        written, passed_over = index_existing.index(
            check_name(args.name),
            splits,
            args.out.path,
            classes=args.classes and class_names(args.classes),
            statistics_images=args.statistics,
            size=Encoding(size=args.size).size,
            max_bad_fraction=check_fraction("--max-bad-fraction", args.max_bad_fraction),
            workers=args.workers,
            progress=progress.update,
        )
    print_passed_over(passed_over)
    if not args.val:
        print("note: no validation split, which training needs; --val names its tars")
    return written


def print_passed_over(passed_over: PassedOver) -> None:
    if passed_over:
        print(cli.printable(f"passed over: {passed_over}"))


def cut(args: argparse.Namespace) -> None:
    dataset = open_dataset(str(args.out), allow_http=args.allow_http)
    if dataset.encoding == "raw":
        raise ConfigError(f"{args.out}: its images are raw pixels; cuts are for JPEGs")
    images = sum(split.samples for split in dataset.splits.values())
    with Progress("finding cuts", images) as progress:
        made = make_cuts(dataset, workers=args.workers, check_one_in=CHECKS[args.check_cuts], progress=progress.update)
    number, size = (sum(file[name] for file in made) for name in ("cut", "bytes"))
    print(f"{args.out}: {number:,} of {images:,} images can be cut; {size / 1e6:,.1f} MB")


def class_names(path: Path) -> list[str]:
    with reading(f"{path}:", "name a file in UTF-8, a class name a line", OSError):
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    number_of = {}
    for number, line in enumerate(lines, 1):
        name = unicodedata.normalize("NFC", line.strip())
        if not name:
            raise DataError(f"{path}: line {number} is empty; write a class name a line")
        if name in number_of:
            raise DataError(
                f"{path}: lines {number_of[name]} and {number} are both {name!r}; give each class a name of its own"
            )
        number_of[name] = number
    return [line.strip() for line in lines]


def make(args: argparse.Namespace) -> dict | None:
    """Makes the shards; returns the manifest, or None if it was not to be written."""
    if args.shards and args.merge:
        raise ConfigError("--merge: leave out --shards; merging makes no shard")
    options = Options(
        Encoding(args.encode, args.size, args.square, args.quality),
        args.samples_per_shard,
        args.seed,
        args.max_bad_fraction,
        args.stats == "on",
        args.check,
    )
    if args.cuts is None:
        args.cuts = options.stats and args.encode != "raw"
    if args.cuts and args.encode == "raw":
        raise ConfigError("--cuts goes with --encode keep or jpeg: raw pixels are not decoded")
    print_decoders(trusted=args.trust_images)
    if args.source == "imagefolder" and Path(str(args.out)).resolve().is_relative_to(args.train.resolve()):
        raise ConfigError(f"{args.out}: lies in {args.train}, whose folders are classes; choose another --out")
    source = SOURCES[args.source].from_options(args)
    plan = Plan(source, options, CHECKS[args.check_cuts] if args.cuts else 0)
    print_passed_over(source.passed_over)
    for note in few_images(source):
        print(cli.printable(f"note: {note}"))
    shards = len(plan.tasks)
    only = numbers(args.shards, shards) if args.shards else range(shards)
    if not only:
        print(f"{args.out}: slice {args.shards} of {shards} shards has none; nothing to do")
        return None
    if args.dry_run:
        print_forecast(plan, only, args.out, min(args.workers, len(only)))
        return None
    with Progress("sharding", plan.images(only)) as progress:
        chosen = range(0) if args.merge else only
        run = partial(ray_pool.run, source=source, address=args.ray_address) if args.executor == "ray" else pool.run
        written = build(
            plan, args.out, only=chosen, merge=not args.shards, workers=args.workers, report=progress.update, run=run
        )
    if written is None:
        print(f"{args.out}: shards {args.shards} of {shards} are whole; with all of them there, run --merge")
    return written


def print_decoders(*, trusted: bool) -> None:
    """Rejects old decoders: Pillow-SIMD lags behind Pillow, and then has known faults that an image could exploit."""
    simd = ".post" in PIL.__version__
    name = f"{'Pillow-SIMD' if simd else 'Pillow'} {PIL.__version__}"
    if tuple(int(part) for part in PIL.__version__.split(".")[:2]) < PILLOW and not trusted:
        raise ConfigError(
            f"{name} is older than {OLDEST}, whose predecessors have known security faults;"
            " install a newer one, or pass --trust-images if you know where the images are from"
        )
    print(f"decoding with libjpeg-turbo (simplejpeg {simplejpeg.__version__}), odd images with {name}", flush=True)


def print_forecast(plan: Plan, only: range, out: Folder, workers: int) -> None:
    """Prints what --dry-run would write, its size, and the time it would take."""
    record, seconds = forecast(plan, only)
    tried = record.shard.samples + len(record.bad)
    factor = plan.images(only) / tried
    size = record.shard.bytes * factor
    for split, items in plan.source.splits.items():
        print(f"{split}: {len(items):,} images in {sum(task.split == split for task in plan.tasks)} shards")
    free, room = math.inf, ""
    if not is_url(out):
        path = out.path.absolute()
        existing_folder = next(folder for folder in (path, *path.parents) if folder.is_dir())
        free = shutil.disk_usage(existing_folder).free
        room = f", {free / 1e9:,.1f} GB are free in {existing_folder}"
    chosen = "all shards" if len(only) == len(plan.tasks) else f"shards {only.start}:{only.stop}"
    print(
        f"{chosen}: about {size / 1e9:,.1f} GB{room};"
        f" about {clock(seconds * factor / workers)} with {workers} workers,"
        f" by {tried} images that were tried, {len(record.bad)} of them bad"
    )
    if size > free:
        print(f"warning: {out} has too little room", file=sys.stderr)


def report(written: dict, out: Folder, seconds: float) -> None:
    for name, split in written["splits"].items():
        size = sum(shard["bytes"] for shard in split["shards"]) / 1e6
        print(f"{name}: {split['samples']:,} images in {len(split['shards'])} shards, {size:,.1f} MB")
    for what, label in (("converted", "converted to JPEG"), ("quarantine", "left out")):
        if written[what]:
            print(f"{label}: {len(written[what])}, listed in the manifest under {what!r}")
    print(f"{out}: {len(written['classes'])} classes, done in {clock(seconds)}")
    if written.get("stored_order", {}).get("train", "mixed") != "mixed":
        print(
            f"warning: the samples of train are stored {written['stored_order']['train']}; set window to 0 or"
            " to many shards (docs/order.md), or a batch will hold few classes",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run(main)
