"""Training steps a second on synthetic images: ours, and the seed's own net; interleaved, each in a process of its own.

Compiling and the first two steps are not in the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.cores import usable_cores
from pipeline.errors import ExpressError
from pipeline.files import write_json
from tools.bench import peers
from tools.bench.shards import Cell
from train import environment
from train.networks import no_compiler

STEP = Path(peers.__file__).parent / "step.py"
SEEDS, TORCHS = "the seed's own net, fp32", "torch's LRN"


def layers(arguments: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, str(STEP), "seed", "--layers", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ExpressError(f"layers: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["layers"]
    return found


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--rounds", type=int, default=3, help="measurements of each, in turn (%(default)s)")
    p.add_argument("--seconds", type=float, default=6.0, help="of each measurement (%(default)s)")
    p.add_argument("--batch", type=int, default=64, help="images a step (%(default)s)")
    p.add_argument("--device", default="cpu", help="(%(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    result = measure(args.device, batch=args.batch, seconds=args.seconds, rounds=args.rounds)
    print(result.pop("table"))
    if args.json:
        described = {
            "what": "training steps on synthetic images; medians over interleaved rounds",
            "command": "python tools/bench train",
            "settings": {name: getattr(args, name) for name in ("rounds", "seconds", "batch", "device")},
            "environment": environment.describe(),
        }
        write_json(args.json, described | result)


def measure(device: str, *, batch: int, seconds: float, rounds: int, few: bool = False) -> dict[str, Any]:
    """All cells in turn, or a few of each kind, and the layers of the seed variant; `table` is for people."""
    common = ["--device", device, "--batch", str(batch), "--seconds", str(seconds)]
    if device == "cpu":
        common += ["--threads", str(usable_cores())]
    steps = [cell for i, cell in enumerate(cells(common)) if not few or i % 5 == 0]
    reason = no_compiler(torch.device(device))
    if reason:
        steps = [cell for cell in steps if not {"norm", "model", "compiled"} & set(cell.command)]
        print(f"nothing is compiled here: {reason}", file=sys.stderr, flush=True)
    for number in range(rounds):
        for cell in steps:
            cell.measure()
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    how = "off" if reason else "norm"
    shares = {
        precision: layers(["--compile", how, "--precision", precision, *common]) for precision in ("fp32", "bf16")[few:]
    }
    return {"results": [cell.record() for cell in steps], "layers": shares, "table": table(steps, shares)}


def cells(common: list[str]) -> list[Cell]:
    def step(what: str, arguments: list[str], against: str = "") -> Cell:
        return Cell(what, [sys.executable, str(STEP), *arguments, *common], against)

    bf16 = ["--precision", "bf16"]
    steps = [step(SEEDS, ["seeds-own", "--layout", "channels-first"])]
    for compiled in ("off", "norm", "model"):
        how = {"off": "eager", "norm": "LRN compiled", "model": "all compiled"}[compiled]
        steps.append(step(f"ours, seed, fp32, {how}", ["seed", "--compile", compiled], SEEDS))
        steps.append(step(f"ours, seed, bf16, {how}", ["seed", "--compile", compiled, *bf16], SEEDS))
    for precision in ("fp32", "bf16"):
        without = ["seed", "--norm", "none", "--precision", precision]
        steps.append(step(f"ours, seed without LRN, {precision}, eager", without, SEEDS))
    for name in ("paper", "original", "caffe", "torchvision", "modern"):
        steps.append(step(f"ours, {name}, bf16, LRN compiled", [name, "--compile", "norm", *bf16], SEEDS))
    for layout in ("channels-first", "channels-last"):
        at = ["lrn", "--layout", layout]
        steps.append(step(f"{TORCHS}, {layout}", [*at, "--form", "torch"]))
        for form in ("eager", "compiled"):
            steps.append(step(f"our LRN, {form}, {layout}", [*at, "--form", form], f"{TORCHS}, {layout}"))
    return steps


def table(steps: list[Cell], shares: dict[str, list[dict[str, Any]]]) -> str:
    by_name = {cell.what: cell for cell in steps}
    lines = ["| step | img/s, median | against |", "| --- | ---: | --- |"]
    for cell in steps:
        other = by_name.get(cell.against)
        ratio = f"{cell.rate / other.rate:.2f} × {other.what}" if other else ""
        lines.append(f"| {cell.what} | {cell.rate:,.1f} | {ratio} |")
    for precision, layers in shares.items():
        lines += ["", f"| layer, {precision} | ms | share |", "| --- | ---: | ---: |"]
        lines += [f"| {row['layer']} | {row['milliseconds']:.1f} | {row['share']:.1%} |" for row in layers]
    return "\n".join(lines)
