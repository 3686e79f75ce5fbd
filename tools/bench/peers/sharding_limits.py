"""What sharding costs at least: decoding every image, or reading, hashing and writing every byte. Forked processes."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from multiprocessing import get_context
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import numpy as np
from simplejpeg import decode_jpeg

A_FILE = 1000  # images in each file that is written, as in a shard


IN_MEMORY: dict[Path, bytes] = {}  # forked processes share it


def decode(paths: list[Path], out: Path) -> None:
    buffer = np.empty(100_000_000, np.uint8)
    for path in paths:
        decode_jpeg(IN_MEMORY[path], buffer=buffer)


def copy(paths: list[Path], out: Path) -> None:
    digest = hashlib.sha256()
    with open(out, "wb") as file:
        for path in paths:
            data = path.read_bytes()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("kind", choices=("decode", "copy"))
    p.add_argument("--images", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--workers", type=int, required=True)
    a = p.parse_args()
    paths = sorted(a.images.glob("*/*"))
    shutil.rmtree(a.out, ignore_errors=True)
    a.out.mkdir()
    parts = [(paths[i : i + A_FILE], a.out / str(i)) for i in range(0, len(paths), A_FILE)]
    if a.kind == "decode":
        IN_MEMORY.update((path, path.read_bytes()) for path in paths)
    with get_context("fork").Pool(a.workers) as pool:
        pool.starmap(abs_of, [(0,)] * a.workers)
        started = time.perf_counter()
        pool.starmap({"decode": decode, "copy": copy}[a.kind], parts, chunksize=1)
        seconds = time.perf_counter() - started
    shutil.rmtree(a.out)
    print(json.dumps({"images": len(paths), "seconds": seconds}))


def abs_of(number: int) -> int:
    """For a pool to start its processes before the clock does."""
    return abs(number)


if __name__ == "__main__":
    main()
