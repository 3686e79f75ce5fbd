"""Times training steps, single layers and optimisers on noise.

The times of `items` decide which form of each layer the network uses on a device.
"""

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

WARM_CALLS, LEAST_CALLS = 3, 3
LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
SHAPES = {"lrn1": (96, 55), "lrn2": (256, 27)}  # channels, side: the inputs of the seed's normalisations and pools
Prepare = Callable[[], Callable[[], Any]]  # makes an item's inputs and returns the function to time
BLOCK = 4  # conv1's stride: its space-to-depth form has the stride 1


def noise(*shape: int, device: torch.device | str, channels_last: bool = True) -> Tensor:
    x = torch.randn(shape, device=device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def training_step(
    net: nn.Module, images: Tensor, *, classes: int = 1000, precision: str = "fp32"
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Returns a function that runs a step of SGD, on the same images each time, and the optimiser."""
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
    """Returns a function that runs forward and backward pass of a layer, with a gradient of ones."""
    gradient = torch.ones_like(function(*inputs, **options))

    def both() -> None:
        y = function(*inputs, **options)
        if y.requires_grad:
            y.backward(gradient)
        for x in inputs:
            x.grad = None

    return both


def synchronize(device: torch.device) -> None:
    torch.get_device_module(device).synchronize(device)


def median_seconds(function: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Returns the median of single calls, each with the device idle before and after it, after a warm-up.

    The median ignores calls that other processes on the machine have slowed down.
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


def conv1(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    return F.conv2d(x, weight, stride=BLOCK, padding=padding)


def conv1_as_blocks(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Computes conv1 as a 3 × 3 convolution of 48 channels, after space-to-depth of image and weights.

    The sums are equal: the kernel is padded to 12 × 12 with zeros, and the image on the right and below; outputs that
    conv1 would not have are cut off.
    """
    out = (x.shape[-1] + 2 * padding - weight.shape[-1]) // BLOCK + 1
    side = BLOCK * (out + 2)
    x = F.pad(x, (padding, side - padding - x.shape[-1]) * 2)
    weight = F.pad(weight, (0, -weight.shape[-1] % BLOCK) * 2)
    return F.conv2d(F.pixel_unshuffle(x, BLOCK), F.pixel_unshuffle(weight, BLOCK))


def milliseconds(prepare: Prepare, seconds: float, device: torch.device) -> dict[str, float]:
    """Returns the milliseconds of one item, measured for `seconds` after a warm-up."""
    return {"milliseconds": 1e3 * median_seconds(prepare(), seconds, device)}


def items(device: torch.device, batch: int, dtype: torch.dtype) -> dict[str, Prepare]:
    """Returns the items by name, each forward and backward in channels last. On a CPU, most time goes to compiling."""

    def layer(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Prepare:
        """shapes: of its inputs; the last one needs a gradient, the images before it do not."""

        def prepare() -> Callable[[], Any]:
            inputs = [noise(*shape, device=device).to(dtype) for shape in shapes]
            inputs[-1].requires_grad_()
            return forward_backward(function, *inputs)

        return prepare

    found = {}
    for padding, (name, form) in itertools.product((2, 0), {"as it is": conv1, "48 channels": conv1_as_blocks}.items()):
        convolve = functools.partial(form, padding=padding)
        found[f"conv1 padding {padding} {name}"] = layer(convolve, (batch, 3, 224, 224), (96, 3, 11, 11))
    for name, (channels, side) in SHAPES.items():
        shape = (batch, channels, side, side)
        found[f"{name} copy"] = layer(lambda x: x.detach().clone(), shape)
        # Compiling takes seconds: as part of a model, the first layer stands for both.
        ways = ("eager", "compiled", *(["in a compiled model"] if name == "lrn1" else []))
        for form, save in itertools.product(ways, (True, False)):
            kept = "saves the scale" if save else "computes it again"
            found[f"{name} {form}, {kept}"] = layer(norm(form, save_scale=save), shape)
        found[f"pool after {name}"] = layer(functools.partial(F.max_pool2d, kernel_size=3, stride=2), shape)
    for name in ("sgd", "velocity", "lars"):
        found[f"optimiser {name}"] = functools.partial(updates, device, name)
    return found


def norm(form: str, *, save_scale: bool) -> Callable[..., Tensor]:
    function = functools.partial(local_response_norm, **LRN, compiled=form == "compiled", save_scale=save_scale)
    return torch.compile(function, dynamic=False) if form == "in a compiled model" else function


def updates(device: torch.device, name: str) -> Callable[[], Any]:
    """Returns an update step of the seed's network at full size, in float32."""
    net = AlexNet(ModelConfig("seed"), classes=1000, crop=224).to(device)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    return make_optimizer(net, OptimConfig(name=name, lr=0.01, weight_decay=5e-4)).step  # type: ignore[arg-type]
