"""FFCV, in an environment of its own (Python 3.10; docs/results.md says how), from images in class folders.

Encodes them its own way into a file beside `--cache`, once, then measures. Nothing of the project is imported here.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torchvision
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image


class Folder:
    """(image, label) by number; `square`: 256² as raw storage wants all images of one size."""

    def __init__(self, root: Path, square: bool) -> None:
        self.folder, self.square = torchvision.datasets.ImageFolder(str(root)), square

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int):
        image, label = self.folder[i]
        if self.square:
            short = min(image.size)
            size = (image.width * 256 // short, image.height * 256 // short)
            image = image.resize(size, Image.Resampling.BILINEAR)
            left, top = (image.width - 256) // 2, (image.height - 256) // 2
            image = image.crop((left, top, left + 256, top + 256))
        return image, label


FIELDS = {
    "keep": {"write_mode": "jpg", "jpeg_quality": 90},
    "jpeg": {"write_mode": "jpg", "max_resolution": 341, "jpeg_quality": 90},
    "raw": {"write_mode": "raw"},
}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--images", type=Path, required=True)
    p.add_argument("--cache", type=Path, required=True)
    p.add_argument("--kind", choices=tuple(FIELDS), required=True)
    p.add_argument("--crop", choices=("random-resized", "centre"), default="random-resized")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seconds", type=float, default=4.0)
    a = p.parse_args()
    path = a.cache / f"{a.kind}.beton"
    if not path.exists():
        fields = {"image": RGBImageField(**FIELDS[a.kind]), "label": IntField()}
        DatasetWriter(str(path), fields, num_workers=a.threads).from_indexed_dataset(Folder(a.images, a.kind == "raw"))
    if a.crop == "random-resized":
        crop = RandomResizedCropRGBImageDecoder((224, 224))  # its only random crop, and its ImageNet recipe's
    else:
        crop = CenterCropRGBImageDecoder((224, 224), ratio=224 / 256)  # the least work that it has for such a crop
    # An epoch of this sample is a second or less, and would be half start-up: many repetitions make one long epoch.
    repeated = np.tile(np.arange(len(Folder(a.images, False))), 50)
    loader = Loader(
        str(path),
        batch_size=a.batch,
        num_workers=a.threads,
        order=OrderOption.RANDOM,
        indices=repeated,
        drop_last=True,
        os_cache=True,
        pipelines={"image": [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()], "label": None},
    )
    stream = iter(loader)
    warm = time.perf_counter() + 2.0
    for _ in range(8):  # compiles
        next(stream)
    while time.perf_counter() < warm:  # as the others: see common.py
        next(stream)
    images, cpu, started = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - started < a.seconds:
        try:
            images += len(next(stream)[0])
        except StopIteration:
            stream = iter(loader)
    seconds = time.perf_counter() - started
    versions = {"ffcv": metadata.version("ffcv"), "torch": metadata.version("torch")}
    done = {"images": images, "seconds": seconds, "cpu_seconds": time.process_time() - cpu, "versions": versions}
    print(json.dumps(done))


if __name__ == "__main__":
    main()
