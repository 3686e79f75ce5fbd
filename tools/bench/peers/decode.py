"""The limit: libjpeg-turbo alone, on all threads, from memory into buffers that are used again. Nothing is cropped."""

from __future__ import annotations

import queue
import sys
import threading
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import numpy as np
from simplejpeg import decode_jpeg

from pipeline import open_dataset
from tools.bench.peers.common import arguments, measure


def main() -> None:
    a = arguments()
    split = open_dataset(a.data).split("train")
    tars = [np.fromfile(split.root / shard.name, np.uint8) for shard in split.shards]
    images = [tars[row["shard"]][row["offset"] : row["offset"] + row["size"]] for row in split.index]
    largest = 3 * int((split.index["width"].astype(np.int64) * split.index["height"]).max())
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[int] = queue.SimpleQueue()

    def work() -> None:
        buffer = np.empty(largest, np.uint8)
        while True:
            start = todo.get()
            for i in range(start, start + 32):
                decode_jpeg(images[i % len(images)], buffer=buffer)
            done.put(32)

    for _ in range(a.threads):
        threading.Thread(target=work, daemon=True).start()
    starts = iter(range(0, 1 << 40, 32))
    for _ in range(4 * a.threads):
        todo.put(next(starts))

    def next_batch() -> int:
        count = done.get()
        todo.put(next(starts))
        return count

    measure(next_batch, a.seconds, warm_up=32)


if __name__ == "__main__":
    main()
