"""The cost of a checkpoint: how long training stands still, and how much time one save takes from it in all.

Steps on synthetic images, in blocks of equal length that have a save at their start or none, in turn. The next block
begins when the save is on the disk, so that writing, hashing and copying all fall into the block that pays for them.
"""

import statistics
import time
from pathlib import Path

import torch

from tools.bench import harness
from tools.bench.layers import median_seconds, noise, synchronize, training_step
from train.build import make_net
from train.checkpoint import Checkpoints
from train.presets import PRESETS

NETS = {"demo": 10, "paper": 1000}  # presets, and numbers of classes


OPTIONS = {"blocks": 5, "seconds": 6.0, "batch": 64, "device": "cpu"}


def run(args: harness.Namespace, record: harness.Record, scratch: Path) -> None:
    results = []
    for name in NETS:
        results.append(measure(name, args, scratch / name))
        record.keep(results=results)
    print(harness.table([{field: value for field, value in r.items() if field != "blocks"} for r in results]))


def measure(name: str, args: harness.Namespace, folder: Path) -> harness.Json:
    """Seconds that a save stalls, and that it adds to a block of steps."""
    config, classes, device = PRESETS[name], NETS[name], torch.device(args.device)
    crop, net = config.augment.crop, make_net(config, classes=classes, say=len).to(device)
    step, optimizer = training_step(net, noise(args.batch, 3, crop, crop, device=device), classes=classes)
    folder.mkdir()
    checkpoints = Checkpoints(folder, keep=2)
    stalls: list[float] = []
    steps = max(2, round(args.seconds / median_seconds(step, 0.0, device)))

    def block(steps: int, *, saves: bool) -> float:
        started = time.perf_counter()
        if saves:
            state = {"epoch": 0, "best_top1": 0.0, "config": {}, "loader": {}}
            checkpoints.save(len(stalls) + 1, state=state, model=net.state_dict(), optimizer=optimizer.state_dict())
            stalls.append(time.perf_counter() - started)
        for _ in range(steps):
            step()
            synchronize(device)
        checkpoints.wait()
        return time.perf_counter() - started

    block(0, saves=True)  # the first save also takes the memory
    pairs = [(block(steps, saves=False), block(steps, saves=True)) for _ in range(args.blocks)]
    cost = statistics.median(saving - plain for plain, saving in pairs)
    first, *later = stalls
    return {
        "net": name,
        "megabytes": sum(p.stat().st_size for p in checkpoints.all()[-1].iterdir()) / 1e6,
        "steps_a_block": steps,
        "first_stall_seconds": first,
        "stall_seconds": statistics.median(later),
        "cost_seconds": cost,
        "share_at_one_a_minute": cost / 60,
        "blocks": dict(zip(("without", "with"), zip(*pairs))),
    }
