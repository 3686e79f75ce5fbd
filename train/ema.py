"""A moving average of the weights, which is often the better net: avg ← d·avg + (1 − d)·w after each update.

d is at most (1 + n) / (10 + n) at the n-th update, so that the first ones are soon forgotten. Averages of batch
normalisation are averaged too, counters are copied.
"""

import copy

import torch
from torch import nn


def average_of(net: nn.Module) -> nn.Module:
    """A net like `net`, with its weights, which is only evaluated."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float, number: int) -> None:
    """number: of the update of `net`, counted from 1."""
    decay = min(decay, (1 + number) / (10 + number))
    pairs = list(zip(average.state_dict().values(), net.state_dict().values(), strict=True))
    averages, weights = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    torch._foreach_lerp_(averages, weights, 1 - decay)
    for of_average, counter in pairs:
        if not of_average.is_floating_point():
            of_average.copy_(counter)
