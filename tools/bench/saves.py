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
COLUMNS = {
    "net": "{}",
    "megabytes": "{} MB",
    "first_stall_seconds": "{:.3f} s",
    "stall_seconds": "{:.3f} s",
    "cost_seconds": "{:.2f} s",
    "share_at_one_a_minute": "{:.2%}",
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--blocks", type=int, default=5, help="of each kind (%(default)s)")
    harness.add_options(p, seconds=6.0, batch=64, device="cpu")
    p.add_argument("--dir", type=Path, help="where checkpoints are written (default: the system's temporary folder)")


def run(args: argparse.Namespace, record: harness.Record) -> None:
    results = []
    for name in NETS:
        with harness.scratch_folder(args.dir) as folder:
            results.append(measure(name, args, folder))
        record.keep(results=results)
    rows = [[form.format(result[column]) for column, form in COLUMNS.items()] for result in results]
    print(harness.markdown([column.replace("_", " ") for column in COLUMNS], rows))


def measure(name: str, args: argparse.Namespace, folder: Path) -> harness.Json:
    """Seconds a save stalls, takes to be on the disk, and adds to a block of steps."""
    (config, classes, crop), device = NETS[name], torch.device(args.device)
    torch.manual_seed(0)
    net = AlexNet(config, classes=classes, crop=crop).to(device, memory_format=torch.channels_last)
    step, optimizer = training_step(net, noise(args.batch, 3, crop, crop, device=device), classes=classes)
    checkpoints, numbers = Checkpoints(folder, keep=2), itertools.count(1)
    stalls: list[float] = []

    def save() -> None:
        called = time.perf_counter()
        state = {"epoch": 0, "best_top1": 0.0, "config": {}, "loader": {}}
        checkpoints.save(next(numbers), model=net.state_dict(), optimizer=optimizer.state_dict(), state=state)
        stalls.append(time.perf_counter() - called)

    steps = max(2, round(args.seconds / median_seconds(step, 0.0, device)))
    save()  # the first one also takes the memory
    checkpoints.wait()
    blocks = {"without": [], "with": []}
    on_disk = []
    for _, (kind, times) in itertools.product(range(args.blocks), blocks.items()):
        started = time.perf_counter()
        if kind == "with":
            save()
        for _ in range(steps):
            step()
            synchronize(device)
        if kind == "with":
            waiting = time.perf_counter()
            checkpoints.wait()
            on_disk.append(time.perf_counter() - waiting)
        times.append(time.perf_counter() - started)
    cost = statistics.median(w - wo for w, wo in zip(blocks["with"], blocks["without"], strict=True))
    size = sum(p.stat().st_size for p in checkpoints.all()[-1].iterdir())
    first, *later = stalls
    seconds = {"first_stall": first, "stall": statistics.median(later), "longest_stall": max(later)}
    seconds |= {"left_to_write_after_the_block": max(on_disk), "cost": cost}
    return {
        "net": name,
        "megabytes": round(size / 1e6, 1),
        "steps_a_block": steps,
        **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
        "share_at_one_a_minute": round(cost / MINUTE, 5),
        "blocks": {kind: [round(t, 3) for t in times] for kind, times in blocks.items()},
    }
