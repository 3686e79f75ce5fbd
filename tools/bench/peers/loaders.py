"""Loaders that ours are measured beside, set up as their users do. Each yields the sizes of its batches without end.

Their libraries are imported by the one that is measured.
"""

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import open_dataset

AT_ONCE = 32  # images that `decode` calls a batch
LARGEST = 100_000_000  # bytes of a decoded image; pages that no image uses are never allocated


def sizes(loader: Iterable[Any]) -> Iterator[int]:
    """The sizes of a loader's batches of (images, labels), epoch after epoch."""
    for images, *_ in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield len(images)


def threaded(work: Callable[[int], int], threads: int) -> Iterator[int]:
    """The results of work(0), work(1) and so on without end, by threads that never wait for the next call."""
    pending = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number in itertools.count():
            pending.append(pool.submit(work, number))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()


def tars_of(shards: str) -> tuple[list[str], bool]:
    """The training split's tars, and whether their images have been resized."""
    dataset = open_dataset(shards)
    return [str(Path(shards, shard.name)) for shard in dataset.split("train").shards], dataset.encoding == "jpeg"


def decode(images: str, threads: int, shards: str = "", batch: int = AT_ONCE) -> Iterator[int]:
    """Measures the upper limit: libjpeg-turbo alone, from memory into reused buffers, without crops.

    Decodes the images of the shards, or those of the class folders if no shards are given.
    """
    from simplejpeg import decode_jpeg

    from pipeline.decode import Scratch
    from pipeline.read.reader import Reader

    if shards:
        split = open_dataset(shards).split("train")
        encoded = list(map(Reader(split).stored, range(split.samples)))
    else:
        encoded = [path.read_bytes() for path in sorted(Path(images).glob("*/*"))]
    memory = Scratch()

    def work(number: int) -> int:
        for i in range(number * AT_ONCE, (number + 1) * AT_ONCE):
            decode_jpeg(encoded[i % len(encoded)], buffer=memory(LARGEST))
        return AT_ONCE

    yield from threaded(work, threads)


def seed(images: str, shards: str, batch: int, threads: int) -> Iterator[int]:
    """The seed's: torchvision's ImageFolder and a DataLoader of two workers, on the original files."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    view = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(256),
            transforms.RandomCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    folder = datasets.ImageFolder(images, view)
    yield from sizes(DataLoader(folder, batch, shuffle=True, num_workers=threads, persistent_workers=True))


def torchvision_io(images: str, shards: str, batch: int, threads: int) -> Iterator[int]:
    """decode_jpeg and an antialiased uint8 resize in threads, on the original files."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms.v2 import functional as F

    torch.set_num_threads(1)  # each thread makes batches of its own
    paths = [str(path) for path in sorted(Path(images).glob("*/*"))]

    def load(path: str) -> torch.Tensor:
        image = F.resize(decode_jpeg(read_file(path), mode=ImageReadMode.RGB), [256], antialias=True)
        image = F.crop(image, *(random.randint(0, side - 224) for side in image.shape[1:]), 224, 224)
        return F.horizontal_flip(image) if random.random() < 0.5 else image

    yield from threaded(lambda _: len(torch.stack([load(path) for path in random.choices(paths, k=batch)])), threads)


def webdataset_pillow(images: str, shards: str, batch: int, threads: int) -> Iterator[int]:
    """webdataset and Pillow in a DataLoader's worker processes, on the same shards, as webdataset's examples do it."""
    import torch
    import webdataset
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    tars, presized = tars_of(shards)
    resize = [] if presized else [v2.Resize(256)]
    view = v2.Compose([*resize, v2.RandomCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), resampled=True)
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(view, int)
    )
    yield from sizes(torch.utils.data.DataLoader(samples, batch, num_workers=threads))


def dali_webdataset(images: str, shards: str, batch: int, threads: int) -> Iterator[int]:
    """DALI's own readers.webdataset on the same shards: buffer shuffle, DALI's random operators."""
    from nvidia.dali import fn, pipeline_def, types

    tars, presized = tars_of(shards)

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix("tar") + "idx" for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=256,
        )
        position = {f"crop_pos_{axis}": fn.random.uniform(range=(0.0, 1.0)) for axis in "xy"}
        if presized:
            crops = fn.decoders.image_crop(encoded, crop=(224, 224), output_type=types.RGB, **position)
        else:
            resized = fn.resize(fn.decoders.image(encoded, output_type=types.RGB), resize_shorter=256, antialias=True)
            crops = fn.crop(resized, crop=(224, 224), **position)
        return fn.crop_mirror_normalize(crops, dtype=types.UINT8, mirror=fn.random.coin_flip())

    pipe = pipeline()
    pipe.build()
    yield from sizes(iter(pipe.run, None))
