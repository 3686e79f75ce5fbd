"""Local response normalisation, forward and backward by formula."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Window(NamedTuple):
    """The neighbours whose squares are summed, and the parameters of x · (k + alpha · s)^-beta, where s is the sum."""

    size: int
    dims: tuple[int, ...]
    alpha: float
    beta: float
    k: float


def local_response_norm(
    x: Tensor,
    *,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    towers: int = 1,
    **how: Any,
) -> Tensor:
    """Divides each channel by its neighbours' energy (Krizhevsky et al. 2012, section 3.3).

    x: (N, C, ...), any float dtype; computed in float32 (float64 stays), returned in x's dtype and memory format.
    alpha is divided by `size`, as in the original code and in torch: the paper's formula is alpha = size · 1e-4.
    towers: equal groups of channels that do not see each other. how: see `_normalise`.
    Raises ValueError when size is even or C does not divide.
    """
    if x.shape[1] % towers:
        raise ValueError(f"towers={towers}: {x.shape[1]} channels do not divide")
    # Uses the memory layout, so that padding and sums run along whole lines: channels last is contiguous (N, H, W, C).
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    lying, channels = (x.permute(0, 2, 3, 1), 3) if last else (x, 1)
    window = Window(size, (channels + 1,), alpha / size, beta, k)
    grouped = torch.unflatten(lying, channels, (towers, -1))
    normalised = _normalise(grouped, window, **how).flatten(channels, channels + 1)
    return normalised.permute(0, 3, 1, 2) if last else normalised


def spatial_response_norm(x: Tensor, *, size: int, alpha: float, beta: float, k: float, **how: Any) -> Tensor:
    """Normalises within each channel, over `size` × `size` pixels, as the original code does after its second LRN.

    x: (N, C, H, W). alpha is divided by size². Raises ValueError when size is even.
    """
    return _normalise(x, Window(size, (2, 3), alpha / size**2, beta, k), **how)


def saves_scale(device: torch.device) -> bool:
    """Whether the forward pass saves the scale s for the backward pass, which otherwise recomputes it from x.

    CPU: yes; recomputing takes 1.2 to 1.4 times as long, eager and compiled, and 1.04 to 1.24 times in a compiled model
    (64 × 96 × 55 × 55 and 64 × 256 × 27 × 27, float32 and bfloat16, forward and backward; medians of 15 in turn, two
    busy cores).
    CUDA: no; step 3 of `make gpu-proof` will decide, not measured yet. Chosen by memory traffic until then: in bfloat16
    a compiled model keeps 2 bytes per element between the passes (x) instead of 6.2 (x and padded float32 squares,
    which torch.compile saves instead of s).
    """
    return device.type == "cpu"


def _normalise(x: Tensor, window: Window, *, compiled: bool = False, save_scale: bool | None = None) -> Tensor:
    """Applies the formula. compiled: use torch.compile, if it works. save_scale: save s for the backward pass; None:
    as `saves_scale` returns. Raises ValueError when the window's size is even."""
    if window.size < 1 or window.size % 2 == 0:
        raise ValueError(f"size={window.size}: must be odd, so that a channel is the middle of its neighbours")
    save_scale = saves_scale(x.device) if save_scale is None else save_scale
    arguments = (x, window, compiled and torch.is_grad_enabled(), save_scale)
    # Without autocast, which would cast at other places: the function casts itself.
    device = "cpu" if x.is_meta else x.device.type
    with torch.autocast(device, enabled=False):
        if torch.compiler.is_compiling() and not save_scale:
            # torch.compile chooses what a compiled model saves; this makes it recompute (torch 2.12 or newer: older
            # ones compute the same and save float32 squares).
            return checkpoint(_Normalise.apply, *arguments, use_reentrant=False)
        return _Normalise.apply(*arguments)


class _Normalise(torch.autograd.Function):
    """y = x · s^-β with s = k + α Σ x², the sum over a window.

    dx = g · s^-β - 2αβ x Σ (g · x · s^(-β-1)): the window is symmetric, so the sum's transpose is the sum itself.
    torch's own runs square, pad, avg_pool3d, pow and div, and saves all of their results for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window, compiled: bool, save_scale: bool) -> Tensor:
        y, *scale = _form(forward, compiled)(_readable(x, compiled), window, save_scale)
        ctx.save_for_backward(x, *scale)
        ctx.window, ctx.compiled = window, compiled
        return _cast(y, x.dtype)

    @staticmethod
    @once_differentiable  # s is treated as a constant here: a second derivative would be silently wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *scale = ctx.saved_tensors
        dx = _form(backward, ctx.compiled)(
            _readable(grad, ctx.compiled), _readable(x, ctx.compiled), ctx.window, *scale
        )
        return _cast(dx, x.dtype), None, None, None


def forward(x: Tensor, window: Window, save_scale: bool) -> tuple[Tensor, ...]:
    """(y,) in x's dtype, or (y, s) with s as `scale_of` returns it."""
    scale = scale_of(x, window)
    y = _cast(_cast(x, scale.dtype) * inverse_power(scale, window.beta), x.dtype)
    return (y, scale) if save_scale else (y,)


def backward(grad: Tensor, x: Tensor, window: Window, scale: Tensor | None = None) -> Tensor:
    """dx, in x's dtype. scale: s of the forward pass; None: recompute it."""
    scale = scale_of(x, window) if scale is None else scale
    wide = _cast(x, scale.dtype)
    direct = inverse_power(scale, window.beta) * _cast(grad, scale.dtype)
    through = window_sum(direct * wide / scale, window)
    return _cast(direct - 2 * window.alpha * window.beta * wide * through, x.dtype)


def scale_of(x: Tensor, window: Window) -> Tensor:
    """s = k + α Σ x², in float32, or float64 if x is."""
    wide = _cast(x, torch.promote_types(x.dtype, torch.float32))
    return window_sum(wide * wide, window) * window.alpha + window.k


def window_sum(x: Tensor, window: Window) -> Tensor:
    """Sums each element and its size // 2 neighbours on either side, with zeros beyond the edges."""
    for dim in window.dims:
        reach, length = max(0, min(window.size // 2, x.shape[dim] - 1)), x.shape[dim]
        # Slices of a padded copy, not in-place sums: a compiler fuses them into one loop.
        padded = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [reach, reach])
        total = padded.narrow(dim, 0, length)
        for shift in range(1, 2 * reach + 1):
            total = total + padded.narrow(dim, shift, length)
        x = total
    return x


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x.to(dtype), but does not call `to` if x has that dtype.

    In torch 2.11, one such call in a compiled autograd.Function's forward makes its gradient zero, without an error.
    """
    return x if x.dtype == dtype else x.to(dtype)


def inverse_power(scale: Tensor, beta: float) -> Tensor:
    """Returns scale^-beta; for the paper's beta of 0.75 by square roots, which cost a tenth of a power."""
    if beta != 0.75:
        return scale.pow(-beta)
    root = scale.rsqrt()
    return root * root.sqrt()


def _readable(x: Tensor, compiled: bool) -> Tensor:
    """Returns x, or x in float32 if compiled CPU loops would process half precision element by element.

    They do so for the rest of a line after whole vectors, once per neighbour: with 24 channels, four times float32's
    time. Lines of whole vectors are faster without the copy: fresh float32 memory costs more than the casts.
    """
    slow = compiled and x.device.type == "cpu" and x.dtype.itemsize == 2 and x.shape[-1] % 16
    return x.float() if slow else x


def _form(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    # Inside a compiled model the formula is traced with the rest. In evaluation, nothing is compiled: batches differ in
    # size, and each size would compile a kernel of its own.
    return _compiled(function) if compiled and not torch.compiler.is_compiling() else function


_compiled = cache(partial(torch.compile, dynamic=False))


class ResponseNorm(nn.Module):
    """A response norm as a layer. options: those of `function`. compiled: use torch.compile, if it works."""

    function: Callable[..., Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.compiled = options, False

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self.options, compiled=self.compiled)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class LocalResponseNorm(ResponseNorm):
    function = staticmethod(local_response_norm)


class SpatialResponseNorm(ResponseNorm):
    function = staticmethod(spatial_response_norm)
