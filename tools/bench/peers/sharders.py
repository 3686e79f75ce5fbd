"""Programs that make shards: ours, the least that it costs, and resizers of its pixels, each on class folders."""

import hashlib
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

A_FILE = 1000  # images in each file that `copy_files` writes, as in a shard
SHORT, QUALITY = 256, 90


def ours(images: str, out: str, workers: int, encode: str = "keep", cuts: int = 0, **options: Any) -> Iterator[int]:
    """options: of the sharding."""
    from pipeline.write import resize
    from pipeline.write.build import Options, Plan, build
    from pipeline.write.images import Encoding
    from pipeline.write.sources import ImageFolder

    plan = Plan(ImageFolder(Path(images)), Options(Encoding(encode), **options), cuts)
    count = plan.images(range(len(plan.tasks)))  # lists the images
    resize.prepare()
    yield 0
    build(plan, Path(out), workers=workers)
    yield count
    shutil.rmtree(out)


def copy_files(images: str, out: str, workers: int) -> Iterator[int]:
    """Measures the minimum: reading, hashing and writing every byte, in forked processes."""
    paths, folder = sorted(Path(images).glob("*/*")), Path(out)
    folder.mkdir()
    slices = [(paths[i : i + A_FILE], folder / str(i)) for i in range(0, len(paths), A_FILE)]
    with get_context("fork").Pool(workers) as pool:
        pool.map(abs, range(workers))  # the processes start before the clock does
        yield 0
        pool.starmap(copied, slices, chunksize=1)
        yield len(paths)
    shutil.rmtree(folder)


def copied(paths: list[Path], out: Path) -> None:
    digest = hashlib.sha256()
    with open(out, "wb") as file:
        for path in paths:
            data = path.read_bytes()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


# Decoding, resizing to a short side of 256 and encoding as JPEG, on one thread; equal work, equal quality


def our_resizer() -> Callable[[bytes], object]:
    from pipeline.write import resize
    from pipeline.write.images import Encoding, prepare

    resize.prepare()
    return partial(prepare, encoding=Encoding("jpeg", SHORT, quality=QUALITY))


def pillow(data: bytes) -> None:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    size = [side * SHORT // min(image.size) for side in image.size]
    image.resize(size, Image.Resampling.BILINEAR).save(io.BytesIO(), "JPEG", quality=QUALITY)


def torchvision(data: bytes) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
    from torchvision.transforms.v2.functional import resize

    torch.set_num_threads(1)
    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    encode_jpeg(resize(image, [SHORT], antialias=True).contiguous(), quality=QUALITY)


PEERS = {"Pillow": pillow, "Pillow-SIMD": pillow, "torchvision.io": torchvision}


def resizers(name: str, images: str) -> Iterator[int]:
    work = PEERS.get(name) or our_resizer()
    for data in itertools.cycle([path.read_bytes() for path in sorted(Path(images).glob("*/*"))]):
        work(data)
        yield 1
