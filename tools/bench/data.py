"""The images that benchmarks read: unpacked, as shards of each kind, and as a set of ImageNet's size."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import manifest, open_dataset
from pipeline.cores import usable_cores
from pipeline.errors import DataError
from pipeline.shards import write_array
from pipeline.storage import Folder
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder

SAMPLES, VALIDATION = 1_281_167, 32
ENCODINGS = {
    "jpeg": Encoding("jpeg", size=256, quality=90),
    "keep": Encoding(),
    "raw": Encoding("raw", size=256, square=True),
}


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


def shard(images: Path, out: Path) -> dict[str, Any]:
    """Makes shards of class folders, stored as the name of `out` says; returns their manifest."""
    plan = Plan(ImageFolder(images), Options(ENCODINGS[out.name], samples_per_shard=250))
    return build(plan, out, workers=min(usable_cores(), len(plan.tasks)))


def encoded(shards: Path) -> Iterator[np.ndarray]:
    """The bytes of each image of the training split."""
    split = open_dataset(shards).split("train")
    tars = [np.fromfile(split.root / shard.name, np.uint8) for shard in split.shards]
    for row in split.index:
        yield tars[row["shard"]][row["offset"] : row["offset"] + row["size"]]


def enlarge(root: Path, out: Path) -> Path:
    """A dataset of ImageNet's size in `out`, whose index names the images of `root` over and over.

    The first VALIDATION images of `root` are also its validation split.
    """
    dataset = open_dataset(root)
    split = dataset.split("train")
    out.mkdir(parents=True)
    for shard in split.shards:
        (out / shard.name).symlink_to((root / shard.name).resolve())

    def record(index: np.ndarray, name: str) -> dict[str, Any]:
        counts = np.bincount(index["shard"], minlength=len(split.shards)).tolist()
        shards = [type(s)(s.name, count, s.bytes, s.sha256) for s, count in zip(split.shards, counts, strict=True)]
        return manifest.split_record(shards, name, write_array(Folder(out), name, index))

    repeated = np.resize(np.asarray(split.index), SAMPLES)
    repeated = repeated[np.argsort(repeated["shard"], kind="stable")]
    splits = {"train": record(repeated, "large.npy"), "val": record(split.index[:VALIDATION], "val.npy")}
    names = ("dataset", "classes", "statistics", "options")
    same = {name: dataset.manifest[name] for name in names if name in dataset.manifest}
    manifest.write_manifest(Folder(out), same | {"splits": splits})
    return out
