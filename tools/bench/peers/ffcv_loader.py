"""FFCV, in an environment of its own (Python 3.10; docs/results.md describes it), from images in class folders.

Encodes them its own way into the file `path`, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image
from torchvision.datasets import ImageFolder

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


def square(image: Image.Image) -> Image.Image:
    """256²: raw storage needs all images of one size."""
    short = min(image.size)
    image = image.resize((image.width * 256 // short, image.height * 256 // short), Image.Resampling.BILINEAR)
    left, top = (image.width - 256) // 2, (image.height - 256) // 2
    return image.crop((left, top, left + 256, top + 256))


def folder_of(images: str, kind: str) -> ImageFolder:
    return ImageFolder(images, square if kind == "raw" else None)


def writer(path: str, kind: str, *, workers: int) -> DatasetWriter:
    return DatasetWriter(path, {"image": RGBImageField(**FIELDS[kind]), "label": IntField()}, num_workers=workers)


def batches(images: str, path: str, kind: str, crop: str, batch: int, threads: int) -> Iterator[int]:
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
