"""The shards that steps read: made ones, and those that are given."""

from __future__ import annotations

import io
from pathlib import Path

from pipeline.cores import usable_cores
from pipeline.errors import DataError

from .base import Proof

WIDTH, HEIGHT = 341, 256  # of made pictures
DIFFERENT = 64  # pictures; more only take time to make


def pictures(proof: Proof, *, classes: int, count: int) -> Path:
    """Shards of `count` made JPEGs over `classes` classes: for checks. They flatter decoders, so not for rates."""
    from pipeline import manifest
    from pipeline.shards import Sample, write_array, write_shard
    from pipeline.storage import Folder

    out = proof.scratch / f"pictures-{classes}-{count}"
    if (out / manifest.NAME).is_file():
        return out
    out.mkdir(exist_ok=True)
    made = _made(min(count, DIFFERENT))
    samples = (Sample(f"p{i:05d}", made[i % len(made)], i % classes, WIDTH, HEIGHT) for i in range(count))
    shard, rows = write_shard(Folder(out), "pictures.tar", samples, number=0)
    split = manifest.split_record([shard], "index.npy", write_array(Folder(out), "index.npy", rows))
    content = {"dataset": "pictures", "classes": [f"{c:04d}" for c in range(classes)], "splits": {"train": split}}
    manifest.write_manifest(Folder(out), content | {"statistics": {"mean": [127.5] * 3, "std": [64.0] * 3}})
    return out


def _made(count: int) -> list[bytes]:
    """Smooth colours with some noise, 4:2:0: they compress and decode like photographs of few details."""
    import numpy as np
    from PIL import Image

    random, made = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def shards_of(proof: Proof, data: str) -> Path:
    """The images as keep, jpeg or raw: given, or made from those that are given."""
    from pipeline import manifest
    from pipeline.write.build import Options, Plan, build
    from pipeline.write.sources import ImageFolder
    from tools.bench.loader import ENCODINGS, unpacked

    given = proof.shards / data if proof.shards else None
    if given and (given / manifest.NAME).is_file():
        return given
    if proof.tiny and not (proof.shards or proof.images) and data != "raw":
        return pictures(proof, classes=8, count=64)
    out, images = proof.scratch / data, proof.scratch / "images"
    if (out / manifest.NAME).is_file():
        return out
    if proof.images:
        images = images if images.exists() else unpacked(proof.images, images)
    elif data == "raw":
        extract(shards_of(proof, "jpeg"), images)
    else:
        raise DataError(f"{given}: no shards; make them with tools/make_shards.py imagefolder --encode {data}")
    build(Plan(ImageFolder(images), Options(ENCODINGS[data], samples_per_shard=250)), out, workers=usable_cores())
    return out


def extract(shards: Path, out: Path) -> None:
    """Writes the images of the training split as class folders."""
    from pipeline import open_dataset

    dataset = open_dataset(shards)
    split = dataset.split("train")
    tars = [(split.root / shard.name).read_bytes() for shard in split.shards]
    for number, row in enumerate(split.index):
        folder = out / dataset.classes[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        at = int(row["offset"])
        (folder / f"{number:06d}.jpg").write_bytes(tars[row["shard"]][at : at + int(row["size"])])


def enlarged(proof: Proof, shards: Path, name: str) -> Path:
    """scratch/large/NAME: a dataset of ImageNet's size whose index names the images of `shards` over and over."""
    from pipeline import manifest
    from tools.bench.extremes import enlarge

    out = proof.scratch / "large" / name
    if not (out / manifest.NAME).is_file():
        out.mkdir(parents=True)
        enlarge(shards, out)
    return out
