"""Single layers and optimisers on one device: what decides which form of each the network uses."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import AlexNet, ModelConfig
from model.lrn import local_response_norm
from train.config import OptimConfig
from train.optim import make_optimizer

LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
SHAPES = {"lrn1": (96, 55), "lrn2": (256, 27)}  # channels, side: the inputs of the seed's normalisations and pools
BLOCK = 4  # conv1's stride: its space-to-depth form has the stride 1


def space_to_depth(x: Tensor, block: int = BLOCK) -> Tensor:
    """(N, C, H, W) → (N, block² · C, H / block, W / block), H and W being multiples of block."""
    return F.pixel_unshuffle(x, block)


def conv1_weights_as_blocks(weight: Tensor, block: int = BLOCK) -> Tensor:
    """(O, 3, 11, 11) weights of stride 4 as (O, 48, 3, 3) weights for `space_to_depth`'s output: equal sums, since the
    kernel is filled up to 12 × 12 with zeros."""
    side = -(-weight.shape[-1] // block) * block
    return space_to_depth(F.pad(weight, (0, side - weight.shape[-1]) * 2), block)


def conv1(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    return F.conv2d(x, weight, stride=BLOCK, padding=padding)


def conv1_as_blocks(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The same by a 3 × 3 convolution of 48 channels. The image is filled up on the right and below, and what the
    original would not have computed is cut off."""
    out = (x.shape[-1] + 2 * padding - weight.shape[-1]) // BLOCK + 1
    side = BLOCK * (out + 2)
    x = F.pad(x, (padding, side - padding - x.shape[-1]) * 2)
    return F.conv2d(space_to_depth(x), conv1_weights_as_blocks(weight))


def measure(
    device: str | torch.device,
    *,
    batch: int,
    seconds: float,
    dtype: torch.dtype,
    compiled: bool = True,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """{item: {"milliseconds", …}} or {item: {"error"}}: an item that fails costs nothing but itself.

    seconds: of each item, after a warm-up. Forward and backward together, channels last; lrn's "times_copy" is against
    copying its input. compiled: also the compiled forms; compiling them takes most of the time on a CPU.
    keep: is called with what was found so far.
    """
    device = torch.device(device)
    found: dict[str, Any] = {}
    for name, prepare in items(device, batch, dtype).items():
        if "compiled" in name and not compiled:
            continue
        try:
            found[name] = {"milliseconds": round(milliseconds(prepare(), device, seconds), 4)}
        except Exception as err:  # whatever it is, the other items still have figures to give
            found[name] = {"error": f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"}
        keep(found)
    for name, result in found.items():
        copy = found.get(f"{name.split()[0]} copy", {}).get("milliseconds")
        if name.startswith("lrn") and copy and "milliseconds" in result:
            result["times_copy"] = round(result["milliseconds"] / copy, 2)
    return found


def items(device: torch.device, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name: what prepares an item and returns the function to time."""

    def tensor(*shape: int, grad: bool = True) -> Tensor:
        x = torch.randn(shape, device=device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        return x.requires_grad_(grad)

    def trained(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Callable[[], None]:
        gradient = torch.ones_like(function(*inputs, **options))

        def both() -> None:
            function(*inputs, **options).backward(gradient)
            for x in inputs:
                x.grad = None

        return both

    def conv(form: Callable[..., Tensor], padding: int) -> Callable[[], Callable[[], None]]:
        return lambda: trained(form, tensor(batch, 3, 224, 224, grad=False), tensor(96, 3, 11, 11), padding=padding)

    def norm(layer: str, form: str, **options: bool) -> Callable[[], Callable[[], None]]:
        channels, side = SHAPES[layer]
        function: Callable[..., Tensor] = functools.partial(
            local_response_norm, **LRN, compiled=form == "compiled", **options
        )
        function = torch.compile(function, dynamic=False) if form == "in a compiled model" else function
        return lambda: trained(function, tensor(batch, channels, side, side))

    def copy(layer: str) -> Callable[[], Callable[[], Any]]:
        channels, side = SHAPES[layer]
        return lambda: (lambda x: lambda: x.clone())(tensor(batch, channels, side, side, grad=False))

    def pool(layer: str) -> Callable[[], Callable[[], None]]:
        channels, side = SHAPES[layer]
        return lambda: trained(F.max_pool2d, tensor(batch, channels, side, side), kernel_size=3, stride=2)

    found: dict[str, Callable[[], Callable[[], Any]]] = {}
    for padding, (name, form) in itertools.product((2, 0), {"as it is": conv1, "48 channels": conv1_as_blocks}.items()):
        found[f"conv1 padding {padding} {name}"] = conv(form, padding)
    for layer in SHAPES:
        found[f"{layer} copy"] = copy(layer)
        # Compiling takes seconds: as part of a model, the first layer stands for both.
        forms = ("eager", "compiled", *(["in a compiled model"] if layer == "lrn1" else []))
        for form, save in itertools.product(forms, (True, False)):
            name = f"{form}, {'saves the scale' if save else 'computes it again'}"
            found[f"{layer} {name}"] = norm(layer, form, save_scale=save)
        found[f"pool after {layer}"] = pool(layer)
    for name in ("sgd", "velocity", "lars"):
        found[f"optimiser {name}"] = lambda name=name: updates(device, name)  # type: ignore[misc]
    return found


def updates(device: torch.device, name: str) -> Callable[[], Any]:
    """An update of the seed's network at full size, in float32."""
    net: nn.Module = AlexNet(ModelConfig("seed"), classes=1000, crop=224).to(device)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    return make_optimizer(net, OptimConfig(name=name, lr=0.01, weight_decay=5e-4)).step  # type: ignore[arg-type]


def milliseconds(function: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median of single calls, each with the device idle before and after it."""

    def timed() -> float:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(3):
        timed()
    until, times = time.perf_counter() + seconds, []
    while not times or time.perf_counter() < until:
        times.append(timed())
    return statistics.median(times) * 1e3
