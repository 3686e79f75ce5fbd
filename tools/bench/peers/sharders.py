"""What makes shards: ours, the least that it costs, and the resizers of its pixels, each on images in class folders."""

import hashlib
import io
import itertools
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

A_FILE = 1000  # images in each file that `copy_files` writes, as in a shard
SHORT, QUALITY = 256, 90


def ours(images: str, out: str, workers: int, encode: str = "keep", cuts: int = 0, **options: Any) -> dict[str, float]:
    """options: of the sharding."""
    from pipeline.write import resize
    from pipeline.write.build import Options, Plan, build
    from pipeline.write.images import Encoding
    from pipeline.write.sources import ImageFolder

    plan = Plan(ImageFolder(Path(images)), Options(Encoding(encode), **options), cuts)
    count = plan.images(range(len(plan.tasks)))  # lists the images
    resize.prepare()
    started = time.perf_counter()
    build(plan, Path(out), workers=workers)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    found = {"images": count, "seconds": seconds}
    if workers > 1:  # one worker is this process
        found["megabytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return found


def copy_files(images: str, out: str, workers: int) -> dict[str, float]:
    """The least: reading, hashing and writing every byte, in forked processes."""
    paths, folder = sorted(Path(images).glob("*/*")), Path(out)
    folder.mkdir()
    slices = [(paths[i : i + A_FILE], folder / str(i)) for i in range(0, len(paths), A_FILE)]
    with get_context("fork").Pool(workers) as pool:
        pool.map(abs, range(workers))  # the processes start before the clock does
        started = time.perf_counter()
        pool.starmap(copied, slices, chunksize=1)
        seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return {"images": len(paths), "seconds": seconds}


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


def pillow() -> Callable[[bytes], object]:
    from PIL import Image

    def work(data: bytes) -> object:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        size = [side * SHORT // min(image.size) for side in image.size]
        out = io.BytesIO()
        image.resize(size, Image.Resampling.BILINEAR).save(out, "JPEG", quality=QUALITY)
        return out

    return work


def torchvision() -> Callable[[bytes], object]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
    from torchvision.transforms.v2.functional import resize

    torch.set_num_threads(1)

    def work(data: bytes) -> object:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return encode_jpeg(resize(image, [SHORT], antialias=True).contiguous(), quality=QUALITY)

    return work


RESIZERS = {"ours": our_resizer, "Pillow": pillow, "Pillow-SIMD": pillow, "torchvision.io": torchvision}


def resizers(name: str, images: str) -> Iterator[int]:
    work = RESIZERS[name]()
    for data in itertools.cycle([path.read_bytes() for path in sorted(Path(images).glob("*/*"))]):
        work(data)
        yield 1
