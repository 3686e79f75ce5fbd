"""The images that benchmarks read: unpacked, as shards of each kind, and as a set of ImageNet's size."""

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import cuts, manifest, open_dataset
from pipeline.cores import usable_cores
from pipeline.errors import DataError
from pipeline.shards import write_array
from pipeline.storage import Folder
from pipeline.write.build import Options, Plan, build
from pipeline.write.cuts import make_cuts
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder
from pipeline.write.sources.tars import WebDataset

SAMPLES, VALIDATION = 1_281_167, 32
ENCODINGS = {
    "jpeg": Encoding("jpeg", size=256, quality=90),
    "keep": Encoding(),
    "raw": Encoding("raw", size=256, square=True),
}


def unpacked(images: Path, scratch: Path) -> Path:
    """Returns the folder of class folders: `images` itself, or the folder in the tar, unpacked."""
    if images.is_dir():
        return images
    try:
        with tarfile.open(images) as tar:
            tar.extractall(scratch, filter="data")
    except (OSError, tarfile.TarError) as err:
        raise DataError(f"{images}: neither a folder of class folders nor a tar of one ({err})") from err
    return scratch


def shard(images: Path, out: Path) -> dict[str, Any]:
    """Makes shards and cuts; returns the manifest. The name of `out` is the kind of data: keep, jpeg or raw.

    images: class folders, or a pattern of shards.
    """
    source = ImageFolder(images) if images.is_dir() else WebDataset(str(images))
    plan = Plan(source, Options(ENCODINGS[out.name], samples_per_shard=250))
    made = build(plan, out, workers=usable_cores())
    if out.name != "raw":
        make_cuts(open_dataset(out), workers=usable_cores())
    return made


def enlarge(root: Path, out: Path, samples: int = SAMPLES) -> Path:
    """Makes a dataset of `samples` samples in `out`, whose index refers repeatedly to the images of `root`.

    The first VALIDATION images of `root` are also its validation split.
    """
    dataset, folder = open_dataset(root), Folder(out)
    split = dataset.split("train")
    made = [path for path, _ in cuts.open_cuts(dataset, split)]
    whole = np.concatenate([*map(cuts.table, made, split.shards)] or [[]])
    out.mkdir(parents=True)
    for shard in split.shards:
        (out / shard.name).symlink_to((root / shard.name).resolve())

    def record(samples: np.ndarray, split_name: str) -> dict[str, Any]:
        index = split.index[samples]
        counts = np.bincount(index["shard"], minlength=len(split.shards)).tolist()
        shards = [replace(shard, samples=count) for shard, count in zip(split.shards, counts, strict=True)]
        for number, path in enumerate(made):
            table = whole[samples[index["shard"] == number]]
            places = path.read_bytes()[: -whole.itemsize * split.shards[number].samples]
            folder.write(cuts.file_name(split_name, number), places + table.tobytes())
        name = f"{split_name}.npy"
        return manifest.split_record(shards, name, write_array(folder, name, index))

    count = len(split.index)
    repeated = np.arange(samples) * count // samples  # in the order of the shards, as each index is
    splits = {"train": record(repeated, "train"), "val": record(np.arange(min(VALIDATION, count)), "val")}
    manifest.write_manifest(folder, dataset.manifest | {"splits": splits})
    if made:
        make_cuts(open_dataset(out), workers=1)  # only cuts.json: the other files exist
    return out
