"""A moving average of the weights, which is often the better net."""

import copy

import torch
from torch import nn


class Average:
    """avg ← d·avg + (1 − d)·w after each update; `net` is a net like the one it follows, with those weights.

    d is at most (1 + n) / (10 + n) at the n-th update, so that the first ones are soon forgotten. Averages of batch
    normalisation are averaged too, counters are copied.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, number: int) -> None:
        """number: of the update, counted from 1."""
        decay = min(self.decay, (1 + number) / (10 + number))
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        averages, weights = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, counter in pairs:
            if not average.is_floating_point():
                average.copy_(counter)
