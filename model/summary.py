"""A net's layers as a table: shapes, parameters, multiply-adds, receptive fields."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .alexnet import VARIANTS, AlexNet, ModelConfig, count_parameters
from .lrn import SpatialResponseNorm


@dataclass(frozen=True)
class Row:
    """One layer for one image. receptive: pixels of the image along a side that reach one of its outputs."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    receptive: int | None


def rows(net: AlexNet, crop: int) -> list[Row]:
    """Every layer of a net on the meta device, in order."""
    names = {module: name for name, module in net.named_modules()}
    x, receptive, jump = torch.empty(1, 3, crop, crop, device="meta"), 1, 1
    found = []
    for module in net.eval().in_order():
        x = module(x)
        match module:
            case nn.Conv2d() | nn.MaxPool2d():
                receptive += (_side(module.kernel_size) - 1) * jump
                jump *= _side(module.stride)
            case SpatialResponseNorm():
                receptive += (module.size - 1) * jump
        spatial = x.dim() == 4 and not isinstance(module, nn.AdaptiveAvgPool2d)
        shape, reach = tuple(x.shape[1:]), min(receptive, crop) if spatial else None
        found.append(Row(names[module], _kind(module), shape, count_parameters(module), _products(module, x), reach))
    return found


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _products(module: nn.Module, out: Tensor) -> int:
    if isinstance(module, nn.Conv2d | nn.Linear):
        return out.numel() * module.weight[0].numel()
    return 0


def _kind(module: nn.Module) -> str:
    match module:
        case nn.Conv2d():
            towers = f", {module.groups} towers" if module.groups > 1 else ""
            return f"Conv {_side(module.kernel_size)}×{_side(module.kernel_size)} / {_side(module.stride)}{towers}"
        case nn.MaxPool2d():
            return f"MaxPool {_side(module.kernel_size)} / {_side(module.stride)}"
        case _:
            return type(module).__name__


def table(net: AlexNet, crop: int) -> str:
    """For people; the last lines hold the sums."""
    found = rows(net, crop)
    lines = [("layer", "kind", "output", "parameters", "multiply-adds", "receptive field")]
    for row in found:
        lines.append(
            (
                row.name,
                row.kind,
                " × ".join(map(str, row.shape)),
                f"{row.parameters:,}" if row.parameters else "",
                f"{row.multiply_adds:,}" if row.multiply_adds else "",
                str(row.receptive) if row.receptive else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
    weighted = (nn.Conv2d, nn.Linear)
    neurons = sum(torch.Size(row.shape).numel() for row, m in zip(found, net.in_order()) if isinstance(m, weighted))
    multiply_adds = sum(row.multiply_adds for row in found)
    return "\n".join(
        [
            *text,
            "",
            f"{count_parameters(net):,} parameters, {neurons:,} neurons, {multiply_adds:,} multiply-adds an image",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m model.alexnet", description="Prints a variant's layers.")
    p.add_argument("variant", choices=VARIANTS)
    p.add_argument("--crop", type=int, help="pixels along a side of the input (the variant's own)")
    p.add_argument("--classes", type=int, default=1000, help="(%(default)s)")
    p.add_argument("--width", type=float, default=1.0, help="multiplies channels and units (%(default)s)")
    p.add_argument("--norm", default="variant", help="variant, lrn, bn or none (%(default)s)")
    p.add_argument("--towers", type=int, default=0, help="0: the variant's own (%(default)s)")
    p.add_argument("--drop", nargs="*", default=[], metavar="CONV", help="convolutions to leave out")
    a = p.parse_args(argv)
    crop = a.crop or VARIANTS[a.variant].crop
    try:
        config = ModelConfig(a.variant, width=a.width, norm=a.norm, towers=a.towers, drop=tuple(a.drop))
        with torch.device("meta"):
            net = AlexNet(config, classes=a.classes, crop=crop)
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    print(table(net, crop))
    return 0
