"""Optimisers, and the learning rate as a function of the update's number alone: the same at any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.alexnet import AlexNet, param_groups

from .config import OptimConfig


class Velocity(torch.optim.Optimizer):
    """SGD whose velocity holds the rate: v ← m·v − λ·lr·w − lr·g, w ← w + v (Krizhevsky et al. 2012, section 5).

    torch's keeps the rate outside; the two differ for some steps after each change of it. Where lr is 0 nothing moves.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group, w, g, v in _moving(self):
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_add_(v, w, alpha=-group["weight_decay"] * group["lr"])
            torch._foreach_add_(v, g, alpha=-group["lr"])
            torch._foreach_add_(w, v)


class Lars(torch.optim.Optimizer):
    """SGD with a rate for each layer: v ← m·v + r·(g + λ·w), w ← w − v, with t = η·|w| / (|g| + λ·|w|).

    r = lr·t (LARS: You, Gitman and Ginsburg 2017, arXiv 1708.03888), or with `clip` min(t, lr) ("LARC"): then lr is
    a bound, which layers reach when it has fallen far. Groups of "adapt": False have r = lr, as biases and
    normalisation's parameters should. Weights that are all zero have no scale of their own: t = η.
    """

    def __init__(
        self, params: Any, *, lr: float, momentum: float, weight_decay: float = 0.0, eta: float, clip: bool
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "clip": clip}
        super().__init__(params, {**defaults, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group, w, g, v in _moving(self):
            update = torch._foreach_add(g, w, alpha=group["weight_decay"])
            torch._foreach_mul_(update, list(_adapted(w, g, group)) if group["adapt"] else group["lr"])
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_add_(v, update)
            torch._foreach_sub_(w, v)


def _adapted(w: list[Tensor], g: list[Tensor], group: dict[str, Any]) -> Tensor:
    """(n,) lr·t of n layers, on the device: the host does not wait for it."""
    weight, gradient = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(g))
    others = gradient + group["weight_decay"] * weight
    has_scale = (weight > 0) & (others > 0)
    trust = torch.where(has_scale, group["eta"] * weight / others, torch.full_like(weight, group["eta"]))
    rate: Tensor = trust.clamp(max=group["lr"]) if group["clip"] else trust * group["lr"]
    return rate


def _moving(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor]]]:
    """(group, weights, gradients, velocities) of all that an update moves. A group is updated by a few calls over all
    its tensors: one by one, a GPU would wait for the host to start some 60 small kernels."""
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if p.grad is not None and group["lr"] > 0]
        if weights:
            states = [optimizer.state[p] for p in weights]
            for p, state in zip(weights, states, strict=True):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
            yield group, weights, [p.grad for p in weights], [state["momentum_buffer"] for state in states]


def make_optimizer(
    net: nn.Module, config: OptimConfig, *, first_apart: bool = False, scaled: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of `config` over the net's trainable parameters, in groups of how they are treated.

    first_apart: the first convolution can be frozen by `set_learning_rate`. scaled: gradients are a loss scaler's.
    """
    groups = param_groups(net, **_rules(net, config), first_apart=first_apart)
    for group in groups:
        group["weight_decay"] = config.weight_decay * group["decay_scale"]
        group["lr"] = config.lr * group["lr_scale"]
        if config.name == "lars":
            group["adapt"] = group["kind"] == "weight"
    common: Any = {"lr": config.lr, "momentum": config.momentum}
    if config.name == "velocity":
        return Velocity(groups, **common)
    if config.name == "lars":
        return Lars(groups, **common, eta=config.lars_eta, clip=config.lars_clip)
    # A fused update of torch's makes the skipping of overflows its own business, where nobody could count it.
    fused = not scaled and all(p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.SGD(groups, **common, nesterov=config.nesterov, fused=fused or None)


def _rules(net: nn.Module, config: OptimConfig) -> dict[str, float]:
    rules = {"bias_lr": 1.0, "bias_decay": 1.0, "norm_decay": float(config.norms == "weights")}
    if config.biases == "no-decay":
        rules["bias_decay"] = 0.0
    elif config.biases == "variant" and isinstance(net, AlexNet):
        rules |= {"bias_lr": net.variant.bias_lr, "bias_decay": net.variant.bias_decay}
    return rules


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, *, freeze_first: bool = False) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if freeze_first and group["first"] else rate * group["lr_scale"]


# The rate over time


def scaled_to_batch(config: OptimConfig, batch: int) -> OptimConfig:
    """`config` with the rates that its rule of scaling gives for a global batch."""
    share = batch / config.base_batch
    factor = share if config.scale_lr == "linear" else 1.0
    return replace(config, lr=config.lr * factor, warmup_from=config.warmup_from * factor, scale_lr="none")


def learning_rate(config: OptimConfig, *, step: int, steps_per_epoch: int, total_steps: int, drops: int = 0) -> float:
    """The rate of update `step`, counted from 0 over the whole run. drops: how often a plateau has lowered it."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_from + (config.lr - config.warmup_from) * min((step + 1) / warmup, 1.0)
    at = _At(step, warmup, steps_per_epoch, total_steps, drops)
    return config.lr * _SHAPES[config.schedule](config, at)


@dataclass(frozen=True)
class _At:
    """Where a schedule stands, in updates."""

    step: int
    warmup: float
    steps_per_epoch: int
    total_steps: int
    drops: int

    @property
    def progress(self) -> float:
        """0 at the end of the warm-up, 1 at the end of the run."""
        return min((self.step - self.warmup) / max(self.total_steps - self.warmup, 1), 1.0)


_SHAPES: dict[str, Callable[[OptimConfig, _At], float]] = {
    "constant": lambda c, at: 1.0,
    "cosine": lambda c, at: 0.5 * (1 + math.cos(math.pi * at.progress)),
    "step": lambda c, at: c.factor ** sum(at.step >= epoch * at.steps_per_epoch for epoch in c.milestones),
    "plateau": lambda c, at: c.factor**at.drops,
    # Of the whole run, the warm-up counted in, as in Caffe.
    "poly": lambda c, at: (1 - min(at.step / max(at.total_steps, 1), 1)) ** c.power,
}


@dataclass
class Plateau:
    """Lowers the rate when evaluations no longer improve, at most `config.plateau_drops` times."""

    best: float = -1.0
    since: int = 0  # evaluations since the best
    drops: int = 0

    def see(self, top1: float, config: OptimConfig) -> bool:
        """After each evaluation; whether the rate is lowered now."""
        if top1 > self.best:
            self.best, self.since = top1, 0
            return False
        self.since += 1
        if self.since < config.plateau_patience or self.drops >= config.plateau_drops:
            return False
        self.since, self.drops = 0, self.drops + 1
        return True
