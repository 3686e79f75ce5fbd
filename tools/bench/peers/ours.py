"""imagenet-express."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import numpy as np
import torch

from pipeline import AugmentConfig, Loader, LoaderConfig
from pipeline.read import portable, reader
from tools.bench.peers.common import arguments, measure


def slow_storage(seconds: float) -> None:
    """As if nothing were cached and every read took so long: each read waits, whoever does it. Of encoded images."""
    read, fetch_images = os.preadv, reader.fetch_images

    def delayed(*args: object) -> int:
        time.sleep(seconds)
        return read(*args)

    def delayed_block(buffer: np.ndarray, at: np.ndarray, fds: np.ndarray, *args: object) -> int:
        for fd in fds:
            if fd >= 0:
                time.sleep(seconds)
        return fetch_images(buffer, at, fds, *args)

    os.preadv, portable.fetch_images, reader.fetch_images = delayed, delayed_block, delayed_block


def main() -> None:
    a = arguments()
    if a.delay:
        slow_storage(a.delay)
    loader = Loader(
        a.data,
        batch=a.batch * a.world,
        rank=a.rank,
        world=a.world,
        device=a.device,
        dtype=a.dtype,
        augment=AugmentConfig(square=False, scale_jitter=(0.08, 1.0) if a.jitter else None),
        # Without a number of threads of its own, each rank takes its share of the cores.
        config=LoaderConfig(a.backend, threads=a.threads if a.world == 1 else 0, verify=a.verify == "yes"),
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

    measure(next_batch, a.seconds, warm_up=16)
    loader.close()


if __name__ == "__main__":
    main()
