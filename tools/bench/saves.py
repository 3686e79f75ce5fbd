"""What a checkpoint costs a run: how long training stands still, and how much time one save takes from it in all.

Steps on synthetic images, in blocks of equal length that have a save at their start or none, in turn. The next block
begins when the save is on the disk, so that writing, hashing and copying all fall into the block that pays for them.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from model import AlexNet, ModelConfig
from pipeline.files import write_json
from train import environment
from train.checkpoint import Checkpoints

MINUTE = 60.0
NETS = {
    "demo": (ModelConfig(name="small", width=0.25, weight_init="he"), 10, 32),
    "full": (ModelConfig(name="paper"), 1000, 224),
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--blocks", type=int, default=5, help="of each kind (%(default)s)")
    p.add_argument("--seconds", type=float, default=6.0, help="of a block (%(default)s)")
    p.add_argument("--batch", type=int, default=64, help="images a step (%(default)s)")
    p.add_argument("--device", default="cpu", help="(%(default)s)")
    p.add_argument("--dir", type=Path, help="where checkpoints are written (default: the system's temporary folder)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = []
    for name in NETS:
        folder = Path(tempfile.mkdtemp(dir=args.dir))
        try:
            results.append(measure(name, args, folder))
        finally:
            shutil.rmtree(folder)
    print(table(results))
    if args.json:
        described = {
            "what": "what one checkpoint costs; medians of interleaved blocks of training steps",
            "command": "python tools/bench saves",
            "settings": {name: getattr(args, name) for name in ("blocks", "seconds", "batch", "device")},
            "environment": environment.describe(),
        }
        write_json(args.json, described | {"results": results})


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds a save stalls, takes to be on the disk, and adds to a block of steps."""
    step, net, optimizer = training(name, args.device, args.batch)
    checkpoints = Checkpoints(folder, keep=2)
    numbers = itertools.count(1)

    def save() -> None:
        state: dict[str, Any] = {"epoch": 0, "best_top1": 0.0, "config": {}, "loader": {}}
        checkpoints.save(next(numbers), model=net.state_dict(), optimizer=optimizer.state_dict(), state=state)

    for _ in range(3):
        step()
    steps = max(2, round(args.seconds / _seconds(step)))
    save()  # the first one also takes the memory
    checkpoints.wait()
    blocks: dict[str, list[float]] = {"without": [], "with": []}
    on_disk = []
    for _ in range(args.blocks):
        for kind, times in blocks.items():
            started = time.perf_counter()
            if kind == "with":
                save()
            for _ in range(steps):
                step()
            if kind == "with":
                waiting = time.perf_counter()
                checkpoints.wait()
                on_disk.append(time.perf_counter() - waiting)
            times.append(time.perf_counter() - started)
    cost = statistics.median(w - wo for w, wo in zip(blocks["with"], blocks["without"], strict=True))
    size = sum(p.stat().st_size for p in checkpoints.all()[-1].iterdir())
    return {
        "net": name,
        "megabytes": round(size / 1e6, 1),
        "steps_a_block": steps,
        "first_stall_seconds": round(checkpoints.stalls[0], 4),
        "stall_seconds": round(statistics.median(checkpoints.stalls[1:]), 4),
        "longest_stall_seconds": round(max(checkpoints.stalls[1:]), 4),
        "left_to_write_after_the_block_seconds": round(max(on_disk), 4),
        "cost_seconds": round(cost, 4),
        "share_at_one_a_minute": round(cost / MINUTE, 5),
        "blocks": {kind: [round(t, 3) for t in times] for kind, times in blocks.items()},
    }


def training(name: str, device: str, batch: int) -> tuple[Callable[[], None], AlexNet, torch.optim.Optimizer]:
    config, classes, crop = NETS[name]
    torch.manual_seed(0)
    net = AlexNet(config, classes=classes, crop=crop).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    images = torch.randn(batch, 3, crop, crop, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), device=device)

    def step() -> None:
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()

    return step, net, optimizer


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(3):
        step()
    return (time.perf_counter() - started) / 3


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| net | MB | stall, first save | stall, later | cost of a save | of the time, one a minute |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        lines.append(
            f"| {r['net']} | {r['megabytes']} | {r['first_stall_seconds']:.3f} s | {r['stall_seconds']:.3f} s"
            f" | {r['cost_seconds']:.2f} s | {r['share_at_one_a_minute']:.2%} |"
        )
    return "\n".join(lines)
