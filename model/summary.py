"""A net's layers as a table: shapes, parameters, multiply-adds, receptive fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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

    def cells(self) -> tuple[str, ...]:
        numbers = (f"{n:,}" if n else "" for n in (self.parameters, self.multiply_adds, self.receptive))
        return (self.name, self.kind, " × ".join(map(str, self.shape)), *numbers)


HEADER = ("layer", "kind", "output", "parameters", "multiply-adds", "receptive field")


def rows(net: nn.Module, crop: int) -> list[Row]:
    """Every layer of a net on the meta device, in order."""
    x, receptive, jump = torch.empty(1, 3, crop, crop, device="meta"), 1, 1
    found = []
    for name, module in net.eval().named_modules():
        if any(module.children()):
            continue
        x = module(x)
        match module:
            case nn.Conv2d() | nn.MaxPool2d():
                receptive += (_side(module.kernel_size) - 1) * jump
                jump *= _side(module.stride)
            case SpatialResponseNorm():
                receptive += (module.options["size"] - 1) * jump
        spatial = x.dim() == 4 and not isinstance(module, nn.AdaptiveAvgPool2d)
        reach = min(receptive, crop) if spatial else None
        found.append(
            Row(name, _kind(module), tuple(x.shape[1:]), count_parameters(module), _products(module, x), reach)
        )
    return found


def count_parameters(net: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _products(module: nn.Module, out: Tensor) -> int:
    return out.numel() * module.weight[0].numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0


def _kind(module: nn.Module) -> str:
    match module:
        case nn.Conv2d():
            towers = f", {module.groups} towers" if module.groups > 1 else ""
            return f"Conv {_side(module.kernel_size)}×{_side(module.kernel_size)} / {_side(module.stride)}{towers}"
        case nn.MaxPool2d():
            return f"MaxPool {_side(module.kernel_size)} / {_side(module.stride)}"
        case _:
            return type(module).__name__


def table(net: nn.Module, crop: int) -> str:
    """The rows for people; the last line holds the sums."""
    found = rows(net, crop)
    lines = [HEADER, *(row.cells() for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    template = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<<<>>>", widths))  # names left, numbers right
    text = [template.format(*line).rstrip() for line in lines]
    neurons = sum(torch.Size(row.shape).numel() for row in found if row.multiply_adds)
    multiply_adds = sum(row.multiply_adds for row in found)
    sums = f"{count_parameters(net):,} parameters, {neurons:,} neurons, {multiply_adds:,} multiply-adds an image"
    return "\n".join([*text, "", sums])
