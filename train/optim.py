"""Optimisers, and the learning rate as a function of the update's number alone: the same at any number of processes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model import AlexNet

from .config import OptimConfig

Tensors = list[Tensor]
Group = dict[str, Any]  # of parameters that an update treats alike, as in torch


class _InGroups(torch.optim.Optimizer):
    """SGD with momentum that updates all tensors of a group by a few calls: with one call per tensor, a GPU would wait
    for the host to launch some 60 small kernels.

    move: updates weights and velocities from the gradients."""

    move: Callable[..., None]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None and group["lr"] > 0]
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if weights:
                self.move(
                    group,
                    weights,
                    [p.grad for p in weights],
                    [self.state[p]["momentum_buffer"] for p in weights],
                )


class Velocity(_InGroups):
    """SGD whose velocity includes the rate: v ← m·v − λ·lr·w − lr·g, w ← w + v (Krizhevsky et al. 2012, section 5).

    torch's keeps the rate outside; the two differ for some steps after each change of it. If lr is 0 nothing moves.
    """

    def move(self, group: Group, w: Tensors, g: Tensors, v: Tensors) -> None:
        torch._foreach_mul_(v, group["momentum"])
        torch._foreach_add_(v, w, alpha=-group["weight_decay"] * group["lr"])
        torch._foreach_add_(v, g, alpha=-group["lr"])
        torch._foreach_add_(w, v)


class Lars(_InGroups):
    """SGD with a rate for each layer: v ← m·v + r·(g + λ·w), w ← w − v, with t = η·|w| / (|g| + λ·|w|).

    r = lr·t (LARS: You, Gitman and Ginsburg 2017, arXiv 1708.03888), or with `clip` min(t, lr) ("LARC"): then lr is
    a bound, which layers reach when it has fallen far. Biases and normalisation's parameters have r = lr. Weights that
    are all zero have no scale of their own: t = η.
    """

    def move(self, group: Group, w: Tensors, g: Tensors, v: Tensors) -> None:
        update = torch._foreach_add(g, w, alpha=group["weight_decay"])
        torch._foreach_mul_(update, list(_adapted(w, g, group)) if group["kind"] == "weight" else group["lr"])
        torch._foreach_mul_(v, group["momentum"])
        torch._foreach_add_(v, update)
        torch._foreach_sub_(w, v)


def _adapted(w: Tensors, g: Tensors, group: Group) -> Tensor:
    """Returns the rates r of n layers, (n,), on the device, without waiting for it."""
    weight, gradient = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(g))
    others = gradient + group["weight_decay"] * weight
    has_scale = (weight > 0) & (others > 0)
    trust = torch.where(has_scale, group["eta"] * weight / others, group["eta"])
    return trust.clamp(max=group["lr"]) if group["clip"] else trust * group["lr"]


def make_optimizer(
    net: nn.Module, config: OptimConfig, *, first_apart: bool = False, scaled: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of `config` over the net's trainable parameters, in `param_groups`.

    first_apart: lets `set_learning_rate` freeze the first convolution. scaled: a loss scaler scales the gradients.
    """
    groups = param_groups(net, config, first_apart=first_apart)
    common: Any = {"lr": config.lr, "momentum": config.momentum}
    if config.name == "velocity":
        return Velocity(groups, common)
    if config.name == "lars":
        return Lars(groups, common | {"eta": config.lars_eta, "clip": config.lars_clip})
    # torch's fused update skips overflows inside the optimiser, so that they cannot be counted.
    fused = not scaled and all(p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.SGD(groups, **common, nesterov=config.nesterov, fused=fused or None)


def param_groups(net: nn.Module, config: OptimConfig, *, first_apart: bool = False) -> list[Group]:
    """Groups the trainable parameters by treatment: kind is "weight", "bias" or "norm" (normalisation's parameters).

    lr_scale multiplies the run's learning rate. first_apart: puts the first convolution's parameters into groups of
    their own, marked `first`, so that a rate of 0 can freeze them.
    """
    bias_lr, bias_decay = 1.0, float(config.biases != "no-decay")
    if config.biases == "variant" and isinstance(net, AlexNet):
        bias_lr, bias_decay = net.variant.bias_lr, net.variant.bias_decay
    scales = {"weight": (1.0, 1.0), "bias": (bias_lr, bias_decay), "norm": (bias_lr, float(config.norms == "weights"))}
    groups: dict[tuple[str, bool], Group] = {
        (kind, first): {
            "params": [],
            "kind": kind,
            "first": first,
            "lr": config.lr * lr,
            "lr_scale": lr,
            "weight_decay": config.weight_decay * decay,
        }
        for kind, (lr, decay) in scales.items()
        for first in (True, False)
    }
    norms = {p for m in net.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    convolutions = (m for m in net.modules() if isinstance(m, nn.Conv2d))
    apart = {*next(convolutions, nn.Identity()).parameters()} if first_apart else set()
    for name, p in net.named_parameters():
        if p.requires_grad:
            kind = "norm" if p in norms else "bias" if name.split(".")[-1] == "bias" else "weight"
            groups[kind, p in apart]["params"].append(p)
    return [group for group in groups.values() if group["params"]]


NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, *, freeze_first: bool = False) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if freeze_first and group["first"] else rate * group["lr_scale"]


# The rate over time


def learning_rate(config: OptimConfig, *, step: int, steps_per_epoch: int, total_steps: int, drops: int = 0) -> float:
    """Returns the rate of update `step`, counted from 0 over the run. drops: how often a plateau lowered it."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_from + (config.lr - config.warmup_from) * min((step + 1) / warmup, 1.0)
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    shapes: dict[str, float] = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "step": config.factor ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones),
        "plateau": config.factor**drops,
        # Over the whole run, the warm-up included, as in Caffe.
        "poly": (1 - min(step / max(total_steps, 1), 1)) ** config.power,
    }
    return config.lr * shapes[config.schedule]


@dataclass
class Plateau:
    """Lowers the rate when evaluations no longer improve, at most `config.plateau_drops` times."""

    best: float = -1.0
    since: int = 0  # evaluations since the best
    drops: int = 0

    def see(self, top1: float, config: OptimConfig) -> bool:
        """Records an evaluation; returns whether the rate is lowered now."""
        if top1 > self.best:
            self.best, self.since = top1, 0
            return False
        self.since += 1
        if self.since < config.plateau_patience or self.drops >= config.plateau_drops:
            return False
        self.since, self.drops = 0, self.drops + 1
        return True
