"""The limit: libjpeg-turbo alone, on all threads, from memory into buffers that are used again. Nothing is cropped."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from simplejpeg import decode_jpeg

from tools.bench import data
from tools.bench.peers import threaded

AT_ONCE = 32  # images
LARGEST = 100_000_000  # bytes of a decoded image; memory that no image reaches is never taken


def batches(images: str, threads: int, shards: str = "", batch: int = AT_ONCE) -> Iterator[int]:
    """Decodes the images of the shards, or the class folders' if there are no shards."""
    files = sorted(Path(images).glob("*/*"))
    encoded = list(data.encoded(Path(shards))) if shards else [path.read_bytes() for path in files]
    local = threading.local()

    def work(number: int) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = np.empty(LARGEST, np.uint8)
        for i in range(number * AT_ONCE, (number + 1) * AT_ONCE):
            decode_jpeg(encoded[i % len(encoded)], buffer=local.buffer)
        return AT_ONCE

    yield from threaded(work, threads)
