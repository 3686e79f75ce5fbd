"""The optimiser and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from model.alexnet import AlexNet, param_groups

from .config import OptimConfig


def make_optimizer(net: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD over the net's trainable parameters; biases as the net's source treats them, or like weights."""
    bias_lr, bias_decay = 1.0, 1.0
    if isinstance(net, AlexNet) and config.biases == "variant":
        bias_lr, bias_decay = net.variant.bias_lr, net.variant.bias_decay
    groups = param_groups(net, bias_lr=bias_lr, bias_decay=bias_decay)
    for group in groups:
        group["weight_decay"] = config.weight_decay * group["decay_scale"]
        group["lr"] = config.lr * group["lr_scale"]
    return torch.optim.SGD(groups, momentum=config.momentum)


def learning_rate(config: OptimConfig, *, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The rate of optimiser step `step`, counted from 0 over the whole run."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
