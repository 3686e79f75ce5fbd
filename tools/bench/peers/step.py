"""Training steps on one synthetic batch: the seed's own net or one of ours; an LRN alone; or each layer by itself.

Seconds are medians over many calls: one that the machine disturbs does not describe the net.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import AlexNet, ModelConfig
from model.dropout import Dropout
from model.lrn import LocalResponseNorm, local_response_norm
from model.variants import VARIANTS
from tools.bench.layers import LRN, forward_backward, median_seconds, noise, training_step
from train.distributed import take_cores
from train.networks import compile_net


def measure(seconds: float, precision: str, **options: Any) -> dict[str, float]:
    """Whole steps; options: of `prepare`."""
    net, images = prepare(**options)
    step, _ = training_step(net, images, precision=precision)
    return {"images": len(images), "seconds": median_seconds(step, seconds, images.device)}


def prepare(
    net: str, batch: int, device: str, compiled: str, norm: str = "variant", channels_last: bool = True
) -> tuple[nn.Module, Tensor]:
    """The net ("seeds-own" or a variant), compiled (off, norm or model), and a batch for it."""
    take_cores(torch.device(device))
    torch.manual_seed(0)
    variant = "seed" if net == "seeds-own" else net
    crop = VARIANTS[variant].crop
    made = AlexNet(ModelConfig(variant, norm=norm), classes=1000, crop=crop)
    if net == "seeds-own":
        made = nn.Sequential(*map(torchs_own, made.in_order()))
    made = made.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    compile_net(made, compiled, torch.device(device))
    return made, noise(batch, 3, crop, crop, device=device, channels_last=channels_last)


def torchs_own(layer: nn.Module) -> nn.Module:
    """Replaces a layer by torch's own LRN or dropout, as in the document that this project comes from."""
    if isinstance(layer, LocalResponseNorm):
        return nn.LocalResponseNorm(**LRN)
    return nn.Dropout(layer.p) if isinstance(layer, Dropout) else layer


def lrn(batch: int, seconds: float, device: str, compiled: str, ours: bool, channels_last: bool) -> dict[str, float]:
    """The first LRN of the seed's net, by torch or by ours."""
    take_cores(torch.device(device))
    x = noise(batch, 96, 55, 55, device=device, channels_last=channels_last).requires_grad_()
    our_form = functools.partial(local_response_norm, compiled=compiled != "off")
    step = forward_backward(our_form if ours else F.local_response_norm, x, **LRN)
    return {"images": batch, "seconds": median_seconds(step, seconds, x.device)}


def layers(seconds: float, precision: str, **options: Any) -> dict[str, Any]:
    """Milliseconds of each layer by itself, and its fraction of their sum; options: of `prepare`."""
    net, x = prepare(**options)
    found = []
    for name, layer in net.named_modules():
        if any(layer.children()):
            continue
        inputs = x.detach().requires_grad_(x.requires_grad)
        forward = functools.partial(call, layer, precision=precision)
        x = forward(inputs)
        milliseconds = median_seconds(forward_backward(forward, inputs), 0.2, inputs.device) * 1e3
        if milliseconds > 0.05:
            what, compiled = f"{name} {type(layer).__name__}", getattr(layer, "compiled", False)
            found.append({"layer": what, "milliseconds": milliseconds, "compiled": compiled})
    total = sum(row["milliseconds"] for row in found)
    return {"layers": [row | {"share": row["milliseconds"] / total} for row in found]}


def call(layer: nn.Module, inputs: Tensor, *, precision: str) -> Tensor:
    rows = [torch.arange(len(inputs), dtype=torch.int32, device=inputs.device)] if isinstance(layer, Dropout) else []
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
        # In-place layers would change what the next repetition reads.
        return layer(inputs.clone() if isinstance(layer, nn.ReLU) else inputs, *rows)
