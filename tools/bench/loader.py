"""Loader rates, ours and the peers': decoded and cropped to 224, page cache warm, medians of interleaved rounds.

Ours are the cells of cells.py. In each round a process of its own measures each cell.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.cores import usable_cores
from pipeline.errors import ConfigError
from tools.bench import data, explain, extremes, harness
from tools.bench.cells import BY_NAME, DATA, JPEGS
from tools.bench.harness import Cell, Json, Record
from train.presets import PRESETS

OURS = {  # the cells of each kind of data, by the last part of their names
    "portable": "ours",
    "unverified": "ours, checksums off",
    "jitter": "ours, random resized crop",
    "dali-cpu": "ours, backend dali-cpu",
    "resident": "ours, backend resident",
    "cuts-portable": "ours, cuts",
    "cuts-jitter": "ours, random resized crop, cuts",
    "cuts-dali-cpu": "ours, backend dali-cpu, cuts",
    "2-ranks": "ours, 2 ranks",
    "4-ranks": "ours, 4 ranks",
    "1-ms-late": "ours, each read 1 ms late",
    "10-ms-late": "ours, each read 10 ms late",
}
PEERS = {  # the function, the kinds of data that it can read, and its own options
    "decode alone (libjpeg-turbo)": ("decode", JPEGS, {}),
    "FFCV, random resized crop": ("ffcv", DATA, {"crop": "random-resized"}),
    "FFCV, centre crop": ("ffcv", DATA, {"crop": "centre"}),
    "DALI readers.webdataset": ("dali_webdataset", JPEGS, {}),
    "webdataset + Pillow": ("webdataset_pillow", JPEGS, {}),
    "torchvision.io": ("torchvision_io", ["keep"], {}),
    "the seed's (ImageFolder)": ("seed", ["keep"], {}),
}
NAMES = [*OURS, *dict.fromkeys(name for name, *_ in PEERS.values()), "extremes"]


ALL = f"of {', '.join(NAMES)} (default: all)"
OPTIONS = {
    "images": None,
    "explain": None,
    "step-rate": 0.0,
    "preset": {
        "choices": PRESETS,
        "metavar": "NAME",
        "help": "whose crops --explain takes, and whose step it measures",
    },
    "ffcv-python": None,
    "rounds": 3,
    "seconds": 1.5,
    "batch": 128,
    "threads": usable_cores(),
    "only": {"nargs": "+", "choices": NAMES, "default": NAMES, "metavar": "NAME", "help": ALL},
}


def run(args: harness.Namespace, record: Record, scratch: Path) -> None:
    if bool(args.images) == bool(args.explain):
        raise ConfigError("name either the images to measure with by --images, or your shards by --explain")
    if args.explain:
        return explain.run(args, record)
    if args.only != NAMES and "ffcv" in args.only and not args.ffcv_python:
        raise ConfigError("--only ffcv: name the interpreter that has it by --ffcv-python")
    images = data.unpacked(args.images, scratch / "images")
    manifests = {kind: data.shard(images, scratch / kind) for kind in data.ENCODINGS}
    record.keep(data={kind: described(manifest) for kind, manifest in manifests.items()})
    cells = [cell for kind in data.ENCODINGS for cell in cells_on(kind, images, scratch, args)]
    if cells:
        harness.interleave(cells, args.rounds, record)
    if "extremes" in args.only:
        large = data.enlarge(scratch / "jpeg", scratch / "large")
        record.keep(extremes=extremes.measure(scratch / "jpeg", large, batch=args.batch))
        print("\n".join(f"{name}: {value}" for name, value in record.content["extremes"].items()))


def described(manifest: Json) -> Json:
    split = manifest["splits"]["train"]
    stored = sum(shard["bytes"] for shard in split["shards"])
    return {"images": split["samples"], "bytes": stored, "fingerprint": manifest["fingerprint"]}


def cells_on(kind: str, images: Path, scratch: Path, args: harness.Namespace) -> Iterator[Cell]:
    """The cells on one kind of data: ours, and the peers that can read it."""
    common = {name: getattr(args, name) for name in ("batch", "threads", "seconds")}
    for name, loader in OURS.items():
        if name in args.only and (ours := BY_NAME.get(f"{kind}-{name}")):
            options = common | {"name": ours.name, "shards": scratch}
            yield Cell({"data": kind, "loader": loader}, "tools.bench.cells:batches", options, ranks=ours.ranks)
    common |= {"images": images, "shards": scratch / kind}
    for loader, (name, kinds, own) in PEERS.items():
        python, module = (args.ffcv_python, "ffcv") if name == "ffcv" else (sys.executable, "loaders")
        if name in args.only and kind in kinds and python:
            function, what = f"tools.bench.peers.{module}:{name}", {"data": kind, "loader": loader}
            yield Cell(what, function, common | own, python=python)
