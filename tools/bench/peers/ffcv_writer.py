"""FFCV's DatasetWriter, in an environment of its own, from class folders: jpg, its long side at most 341 pixels."""

from __future__ import annotations

import argparse
import json
import time
from importlib import metadata
from pathlib import Path

import torchvision
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--images", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--workers", type=int, required=True)
    a = p.parse_args()
    folder = torchvision.datasets.ImageFolder(str(a.images))
    path = a.out.with_suffix(".beton")
    fields = {
        "image": RGBImageField(write_mode="jpg", max_resolution=341, jpeg_quality=90),
        "label": IntField(),
    }
    writer = DatasetWriter(str(path), fields, num_workers=a.workers)
    started = time.perf_counter()
    writer.from_indexed_dataset(folder)
    seconds = time.perf_counter() - started
    path.unlink()
    print(json.dumps({"images": len(folder), "seconds": seconds, "versions": {"ffcv": metadata.version("ffcv")}}))


if __name__ == "__main__":
    main()
