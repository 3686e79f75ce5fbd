"""Compares the rate that `tools/bench loader --explain` predicts with the loader's: IMAGES FOLDER FILE.json.

Shards of each kind are made in FOLDER from IMAGES, class folders or a tar of them, unless they exist. In each of five
pairs, short measurements of the stages and of the loader take turns, so that both meet the same machine. The prediction
is that of the medians of the stages.
"""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipeline.cores import usable_cores  # noqa: E402 (the path comes first)
from tools.bench import data, explain  # noqa: E402
from train import environment  # noqa: E402

PAIRS, TURNS, BATCH, BOUND = 5, 12, 128, 0.15
STAGES, LOADER = 0.4, 0.8  # seconds
FIRST = 4  # batches of a turn that are not counted: threads and queues are empty when it begins


def loader_rate(loader: explain.Loader) -> float:
    """Images a second of one turn."""
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in range(FIRST):
        next(batches)
    images, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < LOADER or not images:
        images += len(next(batches).ids)
    loader._stop()  # what it has prefetched would take time from the stages
    return images / elapsed


def pair(shards: Path) -> dict[str, float]:
    threads = usable_cores()
    with explain.portable(shards, BATCH, threads) as parts, explain.portable(shards, BATCH, threads) as loader:
        stages = explain.Stages(parts, STAGES)
        stages.measured()  # compiles
        rounds, rates = [], []
        for _ in range(TURNS):
            rounds.append(stages.measured())
            rates.append(loader_rate(loader))
    found, measured = explain.middle(rounds), statistics.median(rates)
    rate, limit = explain.predicted(
        found[explain.WARM], found[explain.DECODE], found[explain.ASSEMBLE], threads=threads, cores=threads
    )
    return {"predicted": rate, "measured": measured, "ratio": rate / measured, "limit": limit}


def main() -> None:
    images, folder, out = map(Path, sys.argv[1:])
    for kind in data.ENCODINGS:
        if not (folder / kind / "manifest.json").exists():
            data.shard(data.unpacked(images, folder / "images"), folder / kind)
    results = {kind: [] for kind in data.ENCODINGS}
    for _, kind in itertools.product(range(PAIRS), data.ENCODINGS):
        results[kind].append(pair(folder / kind))
        print(kind, json.dumps(results[kind][-1]), flush=True)
    ratios = {kind: statistics.median(one["ratio"] for one in pairs) for kind, pairs in results.items()}
    command = shlex.join(["python", "tests/tools/explain_pairs.py", *(path.name for path in (images, folder, out))])
    content = {"what": "predicted and measured rates of the loader, img/s, page cache warm", "command": command}
    content |= {"batch": BATCH, "threads": usable_cores(), "environment": environment.describe()}
    out.write_text(json.dumps(content | {"results": results, "median_ratios": ratios}, indent=1) + "\n")
    print(ratios)
    sys.exit(any(abs(ratio - 1) > BOUND for ratio in ratios.values()))


if __name__ == "__main__":
    main()
