"""A moving average of the weights, which is often the better net: avg ← d·avg + (1 − d)·w after each update.

d is at most (1 + n) / (10 + n) at the n-th update, so that early weights are soon forgotten. Batch normalisation's
running statistics are averaged too; counters are copied.
"""

import copy

import torch
from torch import nn


def average_of(net: nn.Module) -> nn.Module:
    """Returns a copy of `net` in evaluation mode, with its weights."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float, number: int) -> None:
    """Updates `average` from `net`, in place. number: of the update of `net`, counted from 1."""
    decay = min(decay, (1 + number) / (10 + number))
    pairs = list(zip(average.state_dict().values(), net.state_dict().values(), strict=True))
    averages, weights = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    torch._foreach_lerp_(averages, weights, 1 - decay)
    for of_average, counter in pairs:
        if not of_average.is_floating_point():
            of_average.copy_(counter)
