"""Training steps on one synthetic batch: the seed's own net or one of ours; or, with --layers, each layer by itself.

Prints images and seconds as JSON: of the median step times the number of steps, since one that the machine disturbs
says nothing of the net.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import AlexNet, ModelConfig
from model.dropout import Dropout
from model.lrn import LocalResponseNorm, local_response_norm
from model.variants import VARIANTS
from tools.bench.peers.seeds_net import SeedsNet
from train.networks import compile_net

LEAST_STEPS = 3


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("net", help="seeds-own, a variant, or lrn")
    p.add_argument("--norm", default="variant")
    p.add_argument("--form", choices=("torch", "eager", "compiled"), default="eager", help="of lrn")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--compile", choices=("off", "norm", "model"), default="off")
    p.add_argument("--layout", choices=("channels-first", "channels-last"), default="channels-last")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--seconds", type=float, default=6.0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    p.add_argument("--layers", action="store_true")
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    device = torch.device(a.device)
    if a.net == "lrn":
        print(json.dumps(timed(lrn(a, device), a.seconds, device) | {"images": a.batch}))
        return
    net, crop = make(a)
    net = net.to(device)
    images = torch.randn(a.batch, 3, crop, crop, device=device)
    if a.layout == "channels-last":
        net, images = (t.to(memory_format=torch.channels_last) for t in (net, images))
    compiled = compile_net(net, a.compile, device)
    if a.compile != "off" and compiled.startswith("nothing:"):
        raise SystemExit(compiled)
    if a.layers:
        assert isinstance(net, AlexNet)
        print(json.dumps({"images": a.batch, "layers": layers(net, images, a.precision)}))
        return
    rows = torch.arange(a.batch, dtype=torch.int32, device=device)
    labels = torch.randint(0, 1000, (a.batch,), device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=a.precision == "bf16"):
            logits = net(images, rows) if isinstance(net, AlexNet) else net(images)
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(json.dumps(timed(step, a.seconds, device) | {"images": a.batch}))


def make(a: argparse.Namespace) -> tuple[nn.Module, int]:
    if a.net == "seeds-own":
        return SeedsNet(), 224
    crop = VARIANTS[a.net].crop
    return AlexNet(ModelConfig(a.net, norm=a.norm), classes=1000, crop=crop), crop


def lrn(a: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Forward and backward of the first LRN of the seed's net."""
    x = torch.randn(a.batch, 96, 55, 55, device=device)
    if a.layout == "channels-last":
        x = x.to(memory_format=torch.channels_last)
    if a.precision == "bf16":
        x = x.bfloat16()
    grad = torch.randn_like(x)
    x.requires_grad_()

    def step() -> None:
        if a.form == "torch":
            y = F.local_response_norm(x, 5, 1e-4, 0.75, 2.0)
        else:
            y = local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0, compiled=a.form == "compiled")
        torch.autograd.grad(y, x, grad)

    return step


def timed(step: Callable[[], None], seconds: float, device: torch.device) -> dict[str, Any]:
    """The median of steps after two that compile and warm up."""
    for _ in range(2):
        step()
    times: list[float] = []
    while len(times) < LEAST_STEPS or sum(times) < seconds:
        times.append(once(step, device))
    return {"seconds": statistics.median(times), "steps": len(times)}


def once(step: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layers(net: AlexNet, images: Tensor, precision: str) -> list[dict[str, Any]]:
    """Milliseconds of each layer, forward and backward by itself, and its share of their sum."""
    names = {module: name for name, module in net.named_modules()}
    rows = torch.arange(len(images), dtype=torch.int32, device=images.device)
    found, x = [], images
    for number, module in enumerate(net.in_order()):
        inputs = x.detach().requires_grad_(number > 0)

        def step(module: nn.Module = module, inputs: Tensor = inputs) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                # In-place layers would change what the next repetition reads.
                own = inputs.clone() if isinstance(module, nn.ReLU) else inputs
                y: Tensor = module(own, rows) if isinstance(module, Dropout) else module(own)
            if y.requires_grad:
                y.backward(torch.ones_like(y))
            return y

        x = step()
        milliseconds = timed(lambda step=step: step(), 0.2, images.device)["seconds"] * 1e3
        if milliseconds > 0.05 and not isinstance(module, nn.Flatten | nn.Identity):
            compiled = isinstance(module, LocalResponseNorm) and module.compiled
            name = f"{names[module]} {type(module).__name__}"
            found.append({"layer": name, "milliseconds": milliseconds, "compiled": compiled})
    total = sum(row["milliseconds"] for row in found)
    return [
        row | {"milliseconds": round(row["milliseconds"], 2), "share": round(row["milliseconds"] / total, 3)}
        for row in found
    ]


if __name__ == "__main__":
    main()
