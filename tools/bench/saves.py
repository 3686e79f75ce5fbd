"""The cost of a checkpoint: how long training stands still, and how much time one save takes from it in all.

Steps on synthetic images, in blocks of equal length that have a save at their start or none, in turn. The next block
begins when the save is on the disk, so that writing, hashing and copying all fall into the block that pays for them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch

from model import AlexNet, ModelConfig
from tools.bench import harness
from tools.bench.synthetic import median_seconds, noise, synchronize, training_step
from train.checkpoint import Checkpoints

WHAT = "what one checkpoint costs; medians of interleaved blocks of training steps"
MINUTE = 60.0
NETS = {
    "demo": (ModelConfig(name="small", width=0.25, weight_init="he"), 10, 32),
    "full": (ModelConfig(name="paper"), 1000, 224),
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    harness.add_options(p, blocks=5, seconds=6.0, batch=64, device="cpu")


def run(args: argparse.Namespace, record: harness.Record, scratch: Path) -> None:
    results = []
    for name in NETS:
        results.append(measure(name, args, scratch / name))
        record.keep(results=results)
    print(harness.table([{field: value for field, value in r.items() if field != "blocks"} for r in results]))


def measure(name: str, args: argparse.Namespace, folder: Path) -> harness.Json:
    """Seconds a save stalls, takes to be on the disk, and adds to a block of steps."""
    (config, classes, crop), device = NETS[name], torch.device(args.device)
    torch.manual_seed(0)
    net = AlexNet(config, classes=classes, crop=crop).to(device, memory_format=torch.channels_last)
    step, optimizer = training_step(net, noise(args.batch, 3, crop, crop, device=device), classes=classes)
    folder.mkdir()
    checkpoints, numbers, on_disk = Checkpoints(folder, keep=2), itertools.count(1), []

    def save() -> None:
        state = {"epoch": 0, "best_top1": 0.0, "config": {}, "loader": {}}
        checkpoints.save(next(numbers), model=net.state_dict(), optimizer=optimizer.state_dict(), state=state)

    def block(kind: str) -> float:
        started = time.perf_counter()
        if kind == "with":
            save()
        for _ in range(steps):
            step()
            synchronize(device)
        waiting = time.perf_counter()
        checkpoints.wait()
        on_disk.append(time.perf_counter() - waiting)
        return time.perf_counter() - started

    steps = max(2, round(args.seconds / median_seconds(step, 0.0, device)))
    save()  # the first one also takes the memory
    checkpoints.wait()
    pairs = [(block("without"), block("with")) for _ in range(args.blocks)]
    cost = statistics.median(saving - plain for plain, saving in pairs)
    first, *later = checkpoints.stalls
    seconds = {"first_stall": first, "stall": statistics.median(later), "longest_stall": max(later)}
    seconds |= {"left_to_write_after_the_block": max(on_disk), "cost": cost}
    return {
        "net": name,
        "megabytes": round(sum(p.stat().st_size for p in checkpoints.all()[-1].iterdir()) / 1e6, 1),
        "steps_a_block": steps,
        **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
        "share_at_one_a_minute": round(cost / MINUTE, 5),
        "blocks": {kind: [round(t, 3) for t in times] for kind, times in zip(("without", "with"), zip(*pairs))},
    }
