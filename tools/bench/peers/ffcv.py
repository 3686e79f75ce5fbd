"""FFCV's loader and writer, in an environment of its own (Python 3.10; docs/results.md), from images in class folders.

It encodes them its own way, for the loader once.
"""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from torchvision import transforms
from torchvision.datasets import ImageFolder

SQUARE = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(256)])  # raw storage needs one size
VERSIONS = {name: metadata.version(name) for name in ("ffcv", "torch")}
FIELDS = {
    "keep": {"write_mode": "jpg", "jpeg_quality": 90},
    "jpeg": {"write_mode": "jpg", "max_resolution": 341, "jpeg_quality": 90},
    "raw": {"write_mode": "raw"},
}
CROPS = {
    "random-resized": RandomResizedCropRGBImageDecoder((224, 224)),  # its only random crop, and its ImageNet recipe's
    "centre": CenterCropRGBImageDecoder((224, 224), ratio=224 / 256),  # the least work that it has for such a crop
}


def folder_of(images: str, kind: str) -> ImageFolder:
    return ImageFolder(images, SQUARE if kind == "raw" else None)


def writer(path: str, kind: str, *, workers: int) -> DatasetWriter:
    return DatasetWriter(path, {"image": RGBImageField(**FIELDS[kind]), "label": IntField()}, num_workers=workers)


def ffcv(images: str, shards: str, crop: str, batch: int, threads: int) -> Iterator[int]:
    """The images are written once, beside the shards, in the same way as them."""
    kind, path = Path(shards).name, f"{shards}.beton"
    folder = folder_of(images, kind)
    if not Path(path).exists():
        writer(path, kind, workers=threads).from_indexed_dataset(folder)
    loader = Loader(
        path,
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        # An epoch of this sample is a second or less, and would be half start-up: many repetitions make one long epoch.
        indices=np.tile(np.arange(len(folder)), 50),
        drop_last=True,
        os_cache=True,
        pipelines={"image": [CROPS[crop], RandomHorizontalFlip(), ToTensor(), ToTorchImage()], "label": None},
    )
    while True:
        for images_of_batch, *_ in loader:
            yield len(images_of_batch)


def measure(images: str, out: str, workers: int) -> Iterator[int]:
    """The writer: jpg, its long side at most 341 pixels."""
    path, folder = Path(out).with_suffix(".beton"), folder_of(images, "jpeg")
    dataset = writer(str(path), "jpeg", workers=workers)
    yield 0
    dataset.from_indexed_dataset(folder)
    yield len(folder)
    path.unlink()
