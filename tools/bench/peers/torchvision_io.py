"""torchvision.io: decode_jpeg and an antialiased uint8 resize in threads, on the original files."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2 import functional as F

from tools.bench.peers import threaded


def load(path: str) -> torch.Tensor:
    image = decode_jpeg(read_file(path), mode=ImageReadMode.RGB)
    image = F.resize(image, [256], antialias=True)
    image = F.crop(image, *(random.randint(0, side - 224) for side in image.shape[1:]), 224, 224)
    return F.horizontal_flip(image) if random.random() < 0.5 else image


def batches(images: str, shards: str, batch: int, threads: int) -> Iterator[int]:
    torch.set_num_threads(1)  # each thread makes batches of its own
    paths = [str(path) for path in sorted(Path(images).glob("*/*"))]
    yield from threaded(lambda _: len(torch.stack([load(path) for path in random.choices(paths, k=batch)])), threads)
