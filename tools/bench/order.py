"""The cost of the order, and how well a window mixes, of 1,024 shards of 1,251 samples, 1,000 classes, batches of 256.

Computed on made labels; nothing is read.
"""

import statistics
import time
from pathlib import Path

import numpy as np

from pipeline.read import order
from tools.bench import harness

SHARDS, SAMPLES_A_SHARD, CLASSES, BATCH = 1024, 1251, 1000, 256
SAMPLES = SHARDS * SAMPLES_A_SHARD
SETTINGS = [(1, 0), (1, 1), (1, 4), (1, 16), (1, 64), (1, 256), (8, 0), (8, 16)]


OPTIONS = {"rounds": 5}


def run(args: harness.Namespace, record: harness.Record, scratch: Path) -> None:
    by_class = np.arange(SAMPLES) * CLASSES // SAMPLES
    stored = {"shuffled": by_class[np.random.default_rng(0).permutation(SAMPLES)], "by_class": by_class}
    sizes, results = np.full(SHARDS, SAMPLES_A_SHARD), []
    for partitions, window in SETTINGS:
        setting, seconds = {"partitions": partitions, "window": window}, []
        for epoch in range(args.rounds):
            started = time.perf_counter()
            ids = order.epoch_order(np.cumsum(sizes), seed=0, epoch=epoch, batch=BATCH, **setting)
            seconds.append(time.perf_counter() - started)
        result = setting | {"milliseconds_an_epoch": statistics.median(seconds) * 1e3}
        for how, labels in stored.items():
            batches = np.sort(labels[ids].reshape(-1, BATCH), axis=1)
            distinct = (np.diff(batches, axis=1) != 0).sum(1) + 1
            result[f"classes_a_batch_stored_{how}"] = float(distinct.mean())
        results.append(result)
        record.keep(results=results)
    print(harness.table(results))
