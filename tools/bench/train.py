"""Training steps on synthetic images: ours, and the seed's own net; medians of interleaved rounds.

Each measurement is a process of its own; compiling and the first three steps are not in the figures.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tools.bench import harness
from tools.bench.harness import Cell, Record
from train.networks import no_compiler

SEEDS = "the seed's own net, fp32"
COMPILED = {"off": "eager", "norm": "LRN compiled", "model": "all compiled"}
PRECISIONS = ("fp32", "bf16")
STEP = "tools.bench.peers.step"


OPTIONS = {"rounds": 3, "seconds": 6.0, "batch": 64, "device": "cpu"}


def run(args: harness.Namespace, record: Record, scratch: Path) -> None:
    common = {"device": args.device, "batch": args.batch, "seconds": args.seconds}
    cells = list(cells_of(common))
    if reason := no_compiler(torch.device(args.device)):
        cells = [cell for cell in cells if cell.options["compiled"] == "off"]
        print(f"nothing is compiled here: {reason}", file=sys.stderr, flush=True)
    harness.interleave(cells, args.rounds, record)
    layers = {}
    for precision in PRECISIONS:
        options = common | {"net": "seed", "compiled": "off" if reason else "norm", "precision": precision}
        layers[precision] = harness.run_once(f"{STEP}:layers", options)["layers"]
        record.keep(layers=layers)
        print(f"\n{precision}\n{harness.table(layers[precision])}")


def cells_of(common: dict[str, Any]) -> Iterator[Cell]:
    def cell(what: str, function: str, against: str = "", compiled: str = "off", **options: Any) -> Cell:
        return Cell({"what": what}, f"{STEP}:{function}", common | {"compiled": compiled} | options, against)

    def ours(net: str, precision: str, compiled: str, *, norm: str = "variant") -> Cell:
        what = f"ours, {net}{' without LRN' if norm == 'none' else ''}, {precision}, {COMPILED[compiled]}"
        return cell(what, "measure", SEEDS, compiled, net=net, precision=precision, norm=norm)

    yield cell(SEEDS, "measure", net="seeds-own", precision="fp32", channels_last=False)
    for compiled, precision in itertools.product(COMPILED, PRECISIONS):
        yield ours("seed", precision, compiled)
    for precision in PRECISIONS:
        yield ours("seed", precision, "off", norm="none")
    for net in ("paper", "original", "caffe", "torchvision", "modern"):
        yield ours(net, "bf16", "norm")
    for layout, last in {"channels-first": False, "channels-last": True}.items():
        torchs = f"torch's LRN, {layout}"
        yield cell(torchs, "lrn", ours=False, channels_last=last)
        for form, compiled in {"eager": "off", "compiled": "norm"}.items():
            yield cell(f"our LRN, {form}, {layout}", "lrn", torchs, compiled, ours=True, channels_last=last)
