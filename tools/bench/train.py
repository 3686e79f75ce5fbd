"""Training steps a second on synthetic images: ours, and the seed's own net.

Interleaved, each measurement in a process of its own; compiling and the first three steps are not in the figures.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.cores import usable_cores
from tools.bench import harness
from tools.bench.harness import Cell, Record
from train.networks import no_compiler

WHAT = "training steps on synthetic images; medians over interleaved rounds"
SEEDS = "the seed's own net, fp32"
COMPILED = {"off": "eager", "norm": "LRN compiled", "model": "all compiled"}


def add_arguments(p: argparse.ArgumentParser) -> None:
    harness.add_options(p, rounds=3, seconds=6.0, batch=64, device="cpu")


def run(args: argparse.Namespace, record: Record) -> None:
    common = {"device": args.device, "batch": args.batch, "seconds": args.seconds}
    common["threads"] = usable_cores() if args.device == "cpu" else 0
    cells = list(cells_of(common))
    if reason := no_compiler(torch.device(args.device)):
        cells = [cell for cell in cells if not needs_compiler(cell)]
        print(f"nothing is compiled here: {reason}", file=sys.stderr, flush=True)
    print(harness.table(harness.interleave(cells, args.rounds, record)))
    layers = {}
    for precision in ("fp32", "bf16"):
        options = common | {"net": "seed", "compiled": "off" if reason else "norm", "precision": precision}
        layers[precision] = harness.run("tools.bench.peers.step:layers", options)[0]["layers"]
        record.keep(layers=layers)
        rows = [[r["layer"], f"{r['milliseconds']:.1f}", f"{r['share']:.1%}"] for r in layers[precision]]
        print("\n" + harness.markdown([f"layer, {precision}", "ms", "share"], rows))


def cells_of(common: dict[str, Any]) -> Iterator[Cell]:
    def cell(what: str, function: str, against: str, **options: Any) -> Cell:
        return Cell({"what": what}, f"tools.bench.peers.step:{function}", common | options, against)

    def ours(what: str, net: str, precision: str, **options: Any) -> Cell:
        return cell(f"ours, {net}{what}", "measure", SEEDS, net=net, precision=precision, **options)

    precisions = ("fp32", "bf16")
    yield cell(SEEDS, "measure", "", net="seeds-own", channels_last=False)
    for (compiled, how), precision in itertools.product(COMPILED.items(), precisions):
        yield ours(f", {precision}, {how}", "seed", precision, compiled=compiled)
    for precision in precisions:
        yield ours(f" without LRN, {precision}, eager", "seed", precision, norm="none")
    for net in ("paper", "original", "caffe", "torchvision", "modern"):
        yield ours(", bf16, LRN compiled", net, "bf16", compiled="norm")
    for layout, last in {"channels-first": False, "channels-last": True}.items():
        torchs = f"torch's LRN, {layout}"
        yield cell(torchs, "lrn", "", form="torch", channels_last=last)
        for form in ("eager", "compiled"):
            yield cell(f"our LRN, {form}, {layout}", "lrn", torchs, form=form, channels_last=last)


def needs_compiler(cell: Cell) -> bool:
    return cell.options.get("compiled", "off") != "off" or cell.options.get("form") == "compiled"
