"""Dropout with masks that are hashes of coordinates: the same on one rank and on eight, with no generator state."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # Wellons's lowbias32, as int32: products wrap on every device
_LAYER = 0x9E3779B9 - (1 << 32)  # 2^32 / golden ratio: keeps the units of two layers apart


def keep_mask(rows: Tensor, units: int, *, layer: int, p: float) -> Tensor:
    """Returns (N, units) bool, True for units that are kept, with probability 1 - p, by a hash of (row, layer, unit).

    rows: (N,) int32, for each row a hash of (seed, step, sample id): equal rows have equal masks on every rank.
    p is rounded to a multiple of 2^-32.
    """
    # The sum is computed in int64 and wraps when it is converted to int32.
    unit = _scrambled((torch.arange(units, device=rows.device) + layer * _LAYER).to(torch.int32))
    unit = unit ^ _shifted(unit, 16)
    # The hash's last step is omitted: it changes only low bits, which hardly affect the comparison.
    return _scrambled(rows[:, None] ^ unit[None, :]) >= min(round(p * (1 << 32)), (1 << 32) - 1) - (1 << 31)


def _scrambled(x: Tensor) -> Tensor:
    """Wellons's hash without its last step."""
    x = (x ^ _shifted(x, 16)) * _M1
    return (x ^ _shifted(x, 15)) * _M2


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical right shift, filling with zeros: torch does not shift unsigned numbers on every device."""
    return (x >> by) & ((1 << (32 - by)) - 1)


class Dropout(nn.Module):
    """Zeroes units with probability p while training and scales the others by 1 / (1 - p).

    forward: x (N, ...), rows (N,) int32 or None. With rows, the mask is `keep_mask`'s; without, torch's dropout.
    layer: a number that is different for each dropout layer of a net, so that their masks differ.
    """

    def __init__(self, p: float, *, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if rows is None:
            return F.dropout(x, self.p)
        keep = keep_mask(rows, x.shape[1:].numel(), layer=self.layer, p=self.p).view(x.shape)
        return x * (keep.to(x.dtype) * (1 / (1 - self.p)))

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"
