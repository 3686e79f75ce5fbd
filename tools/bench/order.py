"""What the order costs, and how well a window mixes: computed on made labels, nothing is read."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from pipeline.files import write_json
from pipeline.read import order
from train import environment

SHARDS, SAMPLES_A_SHARD, CLASSES, BATCH = 1024, 1251, 1000, 256
SETTINGS = [(1, 0), (1, 1), (1, 4), (1, 16), (1, 64), (1, 256), (8, 0), (8, 16)]


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--rounds", type=int, default=5, help="timings of each setting (%(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    p.set_defaults(run=run)


def classes_a_batch(labels: np.ndarray, ids: np.ndarray) -> float:
    """Mean number of distinct classes in a global batch."""
    batches = np.sort(labels[ids].reshape(-1, BATCH), axis=1)
    return float((np.diff(batches, axis=1) != 0).sum(1).mean() + 1)


def run(args: argparse.Namespace) -> None:
    sizes = np.full(SHARDS, SAMPLES_A_SHARD)
    samples = SHARDS * SAMPLES_A_SHARD
    in_order = np.arange(samples) * CLASSES // samples  # stored class after class
    shuffled = in_order[np.random.default_rng(0).permutation(samples)]  # stored as make_shards.py does
    records = []
    for partitions, window in SETTINGS:
        seconds = []
        for epoch in range(args.rounds):
            started = time.perf_counter()
            ids = order.epoch_order(sizes, seed=0, epoch=epoch, batch=BATCH, partitions=partitions, window=window)
            seconds.append(time.perf_counter() - started)
        records.append(
            {
                "partitions": partitions,
                "window": window,
                "milliseconds_an_epoch": round(statistics.median(seconds) * 1e3, 1),
                "classes_a_batch_stored_shuffled": round(classes_a_batch(shuffled, ids), 1),
                "classes_a_batch_stored_by_class": round(classes_a_batch(in_order, ids), 1),
            }
        )
    print(table(records))
    if args.json:
        write_json(
            args.json,
            {
                "what": f"{samples} samples in {SHARDS} shards, {CLASSES} classes, global batch {BATCH}",
                "command": "python tools/bench order",
                "environment": environment.describe(),
                "results": records,
            },
        )


def table(records: list[dict]) -> str:
    lines = [
        "| partitions | window | ms an epoch | classes a batch, stored shuffled | stored by class |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += ["| " + " | ".join(str(value) for value in record.values()) + " |" for record in records]
    return "\n".join(lines)
