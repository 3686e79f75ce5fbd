"""The shards that steps read: made ones, and those that are given."""

import io
import math
from pathlib import Path
from random import Random

from pipeline.errors import DataError
from pipeline.manifest import NAME as MANIFEST

from .base import Proof

SIZE, COARSE = (341, 256), (16, 12)  # of made pictures, and of their colours
DIFFERENT = 64  # pictures; more only take time to make


def pictures(proof: Proof, *, classes: int, count: int) -> Path:
    """Shards of `count` made JPEGs in `classes` classes: for checks only, since they decode faster than photographs."""
    from tools.bench.data import shard

    folder = proof.scratch / f"pictures-{classes}-{count}"
    out = folder / "keep"
    if not (out / MANIFEST).is_file():
        made = _made()
        for i in range(count):
            path = folder / "images" / f"{i % classes:04d}" / f"p{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(made[i % len(made)])
        shard(folder / "images", out)
    return out


def _made() -> list[bytes]:
    """JPEGs of smooth colours with some noise, 4:2:0: they compress and decode like photographs with little detail."""
    from PIL import Image

    random, made = Random(0), []
    for _ in range(DIFFERENT):
        coarse, noise = (Image.frombytes("RGB", size, random.randbytes(3 * math.prod(size))) for size in (COARSE, SIZE))
        file = io.BytesIO()
        Image.blend(coarse.resize(SIZE, Image.Resampling.BICUBIC), noise, 0.1).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def shards_of(proof: Proof, data: str) -> Path:
    """The images as keep, jpeg or raw: given, or made from those that are given."""
    from tools.bench.data import shard, unpacked

    given = proof.shards / data if proof.shards else None
    out, images = proof.scratch / data, proof.scratch / "images"
    for made in (given, out):
        if made and (made / MANIFEST).is_file():
            return made
    if proof.tiny and not (proof.shards or proof.images) and data != "raw":
        return pictures(proof, classes=8, count=64)
    if proof.images:
        images = images if images.exists() else unpacked(proof.images, images)
    elif data == "raw":
        images = shards_of(proof, "jpeg") / "*-train-*.tar"
    else:
        raise DataError(f"{given}: no shards; make them with tools/make_shards.py imagefolder --encode {data}")
    shard(images, out)
    return out


def enlarged(proof: Proof, shards: Path, name: str, **samples: int) -> Path:
    """Makes scratch/large/NAME: a dataset of ImageNet's size whose index refers repeatedly to images of `shards`."""
    from tools.bench.data import enlarge

    out = proof.scratch / "large" / name
    return out if (out / MANIFEST).is_file() else enlarge(shards, out, **samples)
