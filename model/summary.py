"""A net's layers as a table: shapes, parameters, multiply-adds, receptive fields."""

from typing import Any

import torch
from torch import nn

from .lrn import SpatialResponseNorm

HEADER = ("layer", "kind", "output", "parameters", "multiply-adds", "receptive field")


def count_parameters(net: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def table(net: nn.Module, crop: int) -> str:
    """Returns a line for each layer of a net on the meta device, for one image; the last line holds the sums.

    receptive field: image pixels along a side that influence one output of the layer.
    """
    x, receptive, jump, lines = torch.empty(1, 3, crop, crop, device="meta"), 1, 1, [HEADER]
    neurons = multiply_adds = 0
    for name, module in net.eval().named_modules():
        if any(module.children()):
            continue
        x = module(x)
        products, (kind, kernel, stride) = 0, _window(module)
        if isinstance(module, nn.Conv2d | nn.Linear):
            products = x.numel() * module.weight[0].numel()
            neurons += x.numel()
            multiply_adds += products
        receptive += (kernel - 1) * jump
        jump *= stride
        spatial = x.dim() == 4 and not isinstance(module, nn.AdaptiveAvgPool2d)
        numbers = (count_parameters(module), products, min(receptive, crop) if spatial else 0)
        shape = " × ".join(map(str, x.shape[1:]))
        lines.append((name, kind, shape, *(f"{n:,}" if n else "" for n in numbers)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    template = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<<<>>>", widths))  # names left, numbers right
    text = [template.format(*line).rstrip() for line in lines]
    sums = f"{count_parameters(net):,} parameters, {neurons:,} neurons, {multiply_adds:,} multiply-adds an image"
    return "\n".join([*text, "", sums])


def _window(module: Any) -> tuple[str, int, int]:
    """A layer in words, and the side and stride of the window that each of its outputs sees."""
    match module:
        case nn.Conv2d(kernel_size=(side, _), stride=(stride, _), groups=groups):
            return f"Conv {side}×{side} / {stride}{f', {groups} towers' if groups > 1 else ''}", side, stride
        case nn.MaxPool2d(kernel_size=int(side), stride=int(stride)):
            return f"MaxPool {side} / {stride}", side, stride
        case SpatialResponseNorm():
            return type(module).__name__, module.options["size"], 1
        case _:
            return type(module).__name__, 1, 1
