"""Training steps on noise, and how long calls of a function take on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import AlexNet

WARM_CALLS, LEAST_CALLS = 3, 3


def noise(*shape: int, device: torch.device | str, channels_last: bool = True) -> Tensor:
    x = torch.randn(shape, device=device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def training_step(
    net: nn.Module, images: Tensor, *, classes: int = 1000, precision: str = "fp32"
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A step of SGD on the same images each time."""
    device, count = images.device, len(images)
    rows = torch.arange(count, dtype=torch.int32, device=device)
    labels = torch.randint(0, classes, (count,), device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(images, rows) if isinstance(net, AlexNet) else net(images)
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Callable[[], Any]:
    """Both passes of a layer, with a gradient of ones."""
    gradient = torch.ones_like(function(*inputs, **options))

    def both() -> None:
        y = function(*inputs, **options)
        if y.requires_grad:
            y.backward(gradient)
        for x in inputs:
            x.grad = None

    return both


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """The median of single calls, each with the device idle before and after it; the first ones compile and warm up.

    A call that the machine disturbs does not count this way.
    """
    times = []
    for _ in range(WARM_CALLS):
        function()
    while len(times) < LEAST_CALLS or sum(times) < seconds:
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
