"""torchvision.io: decode_jpeg and an antialiased uint8 resize in threads, on the original files."""

from __future__ import annotations

import random
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2 import functional as F

from tools.bench.peers.common import arguments, measure


def load(path: str) -> torch.Tensor:
    image = decode_jpeg(read_file(path), mode=ImageReadMode.RGB)
    image = F.resize(image, [256], antialias=True)
    top, left = random.randint(0, image.shape[1] - 224), random.randint(0, image.shape[2] - 224)
    image = image[:, top : top + 224, left : left + 224]
    return F.horizontal_flip(image) if random.random() < 0.5 else image


def main() -> None:
    a = arguments()
    torch.set_num_threads(1)  # the images are what is shared out
    paths = [str(path) for path in sorted(a.data.glob("*/*"))]
    pool = ThreadPoolExecutor(a.threads)
    pending: deque[list[Future[torch.Tensor]]] = deque()

    def next_batch() -> int:
        while len(pending) < 3:
            pending.append([pool.submit(load, path) for path in random.choices(paths, k=a.batch)])
        return len(torch.stack([image.result() for image in pending.popleft()]))

    measure(next_batch, a.seconds)
    pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
