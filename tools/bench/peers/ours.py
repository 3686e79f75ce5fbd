"""imagenet-express."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

from pipeline import AugmentConfig, Loader, LoaderConfig
from tools.bench.peers.common import arguments, measure


def main() -> None:
    a = arguments()
    config = LoaderConfig(backend=a.backend, threads=a.threads, verify=a.verify == "yes")
    loader = Loader(
        a.data, batch=a.batch, device=a.device, dtype=a.dtype, augment=AugmentConfig(square=False), config=config
    )

    def batches():
        while True:
            yield from loader

    stream = batches()

    def next_batch() -> int:
        images = next(stream).images
        if images.is_cuda:
            torch.cuda.synchronize()
        return len(images)

    measure(next_batch, a.seconds)
    loader.close()


if __name__ == "__main__":
    main()
