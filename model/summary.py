"""A net's layers as a table: shapes, parameters, multiply-adds, receptive fields."""

from typing import Any

import torch
from torch import nn

from .lrn import SpatialResponseNorm

HEADER = ("layer", "kind", "output", "parameters", "multiply-adds", "receptive field")


def count_parameters(net: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def table(net: nn.Module, crop: int) -> str:
    """A line for each layer of a net on the meta device, for one image; the last line holds the sums.

    receptive field: pixels of the image along a side that reach one of the layer's outputs.
    """
    x, receptive, jump, lines = torch.empty(1, 3, crop, crop, device="meta"), 1, 1, [HEADER]
    neurons = multiply_adds = 0
    for name, module in net.eval().named_modules():
        if any(module.children()):
            continue
        x = module(x)
        products = 0
        match module:
            case nn.Conv2d() | nn.Linear():
                products = x.numel() * module.weight[0].numel()
                neurons += x.numel()
                multiply_adds += products
        match module:
            case nn.Conv2d() | nn.MaxPool2d():
                receptive += (_side(module.kernel_size) - 1) * jump
                jump *= _side(module.stride)
            case SpatialResponseNorm():
                receptive += (module.options["size"] - 1) * jump
        spatial = x.dim() == 4 and not isinstance(module, nn.AdaptiveAvgPool2d)
        numbers = (count_parameters(module), products, min(receptive, crop) if spatial else 0)
        shape = " × ".join(map(str, x.shape[1:]))
        lines.append((name, _kind(module), shape, *(f"{n:,}" if n else "" for n in numbers)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    template = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<<<>>>", widths))  # names left, numbers right
    text = [template.format(*line).rstrip() for line in lines]
    sums = f"{count_parameters(net):,} parameters, {neurons:,} neurons, {multiply_adds:,} multiply-adds an image"
    return "\n".join([*text, "", sums])


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _kind(module: nn.Module) -> str:
    match module:
        case nn.Conv2d():
            towers = f", {module.groups} towers" if module.groups > 1 else ""
            return f"Conv {_side(module.kernel_size)}×{_side(module.kernel_size)} / {_side(module.stride)}{towers}"
        case nn.MaxPool2d():
            return f"MaxPool {_side(module.kernel_size)} / {_side(module.stride)}"
        case _:
            return type(module).__name__
