"""Optimisers against plain references in NumPy, and the learning rate over time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import AlexNet, ModelConfig
from pipeline.errors import ConfigError
from pipeline.settings import declared
from train.config import Config, OptimConfig, TrainConfig
from train.optim import Plateau, learning_rate, make_optimizer, set_learning_rate
from train.presets import PRESETS

SCHEDULES = get_args(declared(OptimConfig)["schedule"][0])
RATES = [0.1, 0.1, 0.01, 0.01, 0.3]  # a fall and a rise: forms of momentum differ after each


def small() -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(ModelConfig("small", width=0.1, norm="bn", weight_init="he"), classes=5, crop=32).double()


def gradients(net: nn.Module) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [[rng.normal(size=p.shape) for p in net.parameters()] for _ in RATES]


def trained(config: OptimConfig, net: nn.Module) -> list[np.ndarray]:
    optimizer = make_optimizer(net, config)
    for rate, step in zip(RATES, gradients(net), strict=True):
        set_learning_rate(optimizer, rate)
        for p, g in zip(net.parameters(), step, strict=True):
            p.grad = torch.from_numpy(g)
        optimizer.step()
    return [p.detach().numpy() for p in net.parameters()]


def reference(net: nn.Module, move) -> list[np.ndarray]:
    """Each parameter after a step of move(w, g, v, rate, is_weight) → (w, v) for each of RATES."""
    norms = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    out = []
    for i, (name, p) in enumerate(net.named_parameters()):
        w, v = p.detach().numpy().copy(), np.zeros(p.shape)
        is_weight = not name.endswith("bias") and id(p) not in norms
        for rate, step in zip(RATES, gradients(net), strict=True):
            w, v = move(w, step[i], v, rate, is_weight)
        out.append(w)
    return out


DECAY = 0.05


def torchs(w, g, v, rate, is_weight):
    v = 0.9 * v + g + DECAY * w
    return w - rate * v, v


def papers(w, g, v, rate, is_weight):
    v = 0.9 * v - DECAY * rate * w - rate * g
    return w + v, v


def lars(clip: bool):
    def move(w, g, v, rate, is_weight):
        decay = DECAY if is_weight else 0.0
        own = rate
        if is_weight:
            weight, gradient = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
            trust = 0.02 * weight / (gradient + decay * weight) if weight else 0.02
            own = min(trust, rate) if clip else trust * rate
        v = 0.9 * v + own * (g + decay * w)
        return w - v, v

    return move


@pytest.mark.parametrize(
    ("config", "move"),
    [
        (OptimConfig(weight_decay=DECAY), torchs),
        (OptimConfig(name="velocity", weight_decay=DECAY), papers),
        (
            OptimConfig(name="lars", weight_decay=DECAY, lars_eta=0.02, biases="no-decay", norms="no-decay"),
            lars(clip=False),
        ),
        (
            OptimConfig(
                name="lars", weight_decay=DECAY, lars_eta=0.02, lars_clip=True, biases="no-decay", norms="no-decay"
            ),
            lars(clip=True),
        ),
    ],
    ids=["sgd", "velocity", "lars", "larc"],
)
def test_optimisers_move_as_their_formulas_say(config, move):
    wanted = reference(small(), move)
    for ours, theirs in zip(trained(config, small()), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def velocity_of_one(w, g, v, lr, decay, group):
    v.mul_(0.9).add_(w, alpha=-decay * lr)
    w.add_(v.add_(g, alpha=-lr))


def lars_of_one(w, g, v, lr, decay, group):
    rate = lr
    if group["kind"] == "weight":
        weight, gradient = torch.linalg.vector_norm(w), torch.linalg.vector_norm(g)
        others = gradient + decay * weight
        trust = torch.where((weight > 0) & (others > 0), 0.02 * weight / others, torch.full_like(weight, 0.02))
        rate = trust.clamp(max=lr) if group["clip"] else trust * lr
    v.mul_(0.9).add_(g.add(w, alpha=decay) * rate)
    w.sub_(v)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("config", "of_one", "tolerance"),
    [
        (OptimConfig(name="velocity", weight_decay=DECAY), velocity_of_one, 0.0),
        (OptimConfig(name="lars", weight_decay=DECAY, lars_eta=0.02), lars_of_one, 1e-6),
        (OptimConfig(name="lars", weight_decay=DECAY, lars_eta=0.02, lars_clip=True), lars_of_one, 1e-6),
    ],
    ids=["velocity", "lars", "larc"],
)
def test_whole_groups_move_as_their_parameters_one_by_one(config, of_one, tolerance, memory_format):
    """In float32; with a frozen first layer, a layer of zeros, and one without a gradient."""
    net = small().float().to(memory_format=memory_format)
    with torch.no_grad():
        list(net.parameters())[2].zero_()
    optimizer = make_optimizer(net, config, first_apart=True)
    theirs = {p: p.detach().clone(memory_format=torch.preserve_format) for p in net.parameters()}
    velocities = {p: torch.zeros_like(p) for p in net.parameters()}
    for number, (rate, step) in enumerate(zip(RATES, gradients(net), strict=True)):
        set_learning_rate(optimizer, rate, freeze_first=number >= 2)
        for i, (p, g) in enumerate(zip(net.parameters(), step, strict=True)):
            p.grad = None if i == 4 else torch.from_numpy(g).float()
        optimizer.step()
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and group["lr"] > 0:
                    lr, decay = group["lr"], group["weight_decay"]
                    of_one(theirs[p], p.grad, velocities[p], lr, decay, group)
    for p, expected in theirs.items():
        assert (p.detach() - expected).abs().max() <= tolerance * expected.abs().max()
        if "momentum_buffer" in optimizer.state[p]:
            assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()


@pytest.mark.parametrize("name", ["velocity", "lars"])
def test_an_update_is_a_few_calls_a_group_and_waits_for_nothing(name):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    net, seen = small(), []
    optimizer = make_optimizer(net, OptimConfig(name=name, weight_decay=DECAY))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # makes the velocities
    with Calls():
        optimizer.step()
    seen = [call for call in seen if "record_function" not in call]
    in_groups = [call for call in seen if call.startswith("_foreach")]
    assert len(in_groups) <= 7 * len(optimizer.param_groups)
    assert len(seen) - len(in_groups) <= (14 if name == "lars" else 0) * len(optimizer.param_groups)
    assert "_local_scalar_dense" not in seen


def test_the_papers_form_differs_from_torchs_only_where_the_rate_changes():
    same = [0.1] * 5
    differences = []
    for rates in (same, RATES):
        ends = []
        for name in ("sgd", "velocity"):
            w = nn.Parameter(torch.ones(3, dtype=torch.float64))
            net = nn.Module()
            net.weight = w
            optimizer = make_optimizer(net, OptimConfig(name=name, weight_decay=0.05))
            for rate in rates:
                set_learning_rate(optimizer, rate)
                w.grad = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
                optimizer.step()
            ends.append(w.detach().clone())
        differences.append((ends[0] - ends[1]).abs().max().item())
    assert differences[0] < 1e-12
    assert differences[1] > 1e-3


@pytest.mark.parametrize("name", ["sgd", "velocity", "lars"])
def test_a_frozen_first_convolution_stays_and_the_rest_moves(name):
    net = small().float()
    optimizer = make_optimizer(net, OptimConfig(name=name, weight_decay=0.1), first_apart=True)
    set_learning_rate(optimizer, 0.1)

    def step():
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    before = [p.detach().clone() for p in net.parameters()]
    set_learning_rate(optimizer, 0.1, freeze_first=True)
    for _ in range(3):
        step()
    same = {n for (n, p), b in zip(net.named_parameters(), before, strict=True) if torch.equal(p, b)}
    assert same == {"features.conv1.weight", "features.conv1.bias"}


def test_norms_and_biases_are_spared_decay_where_asked():
    net = small()
    config = OptimConfig(weight_decay=0.1, biases="no-decay", norms="no-decay")
    decays = {group["kind"]: group["weight_decay"] for group in make_optimizer(net, config).param_groups}
    assert decays == {"weight": 0.1, "bias": 0.0, "norm": 0.0}
    kinds = {group["kind"]: len(group["params"]) for group in make_optimizer(net, config).param_groups}
    assert kinds == {"weight": 8, "bias": 8, "norm": 10}


# The rate


def rates(config: OptimConfig, *, epochs: int = 10, steps: int = 7, drops: int = 0) -> list[float]:
    return [
        learning_rate(config, step=s, steps_per_epoch=steps, total_steps=epochs * steps, drops=drops)
        for s in range(epochs * steps)
    ]


def test_each_schedule_has_its_shape():
    step = rates(OptimConfig(lr=1, schedule="step", milestones=(2, 5), factor=0.1))
    assert step == pytest.approx([1.0] * 14 + [0.1] * 21 + [0.01] * 35)
    poly = rates(OptimConfig(lr=2, schedule="poly", power=2))
    assert poly == pytest.approx([2 * (1 - s / 70) ** 2 for s in range(70)])
    cosine = rates(OptimConfig(lr=2, schedule="cosine"))
    assert cosine == pytest.approx([1 + math.cos(math.pi * s / 70) for s in range(70)])
    assert rates(OptimConfig(lr=3, schedule="plateau"), drops=2) == pytest.approx([0.03] * 70)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_leads_to_each_schedule(schedule):
    milestones = (5.0,) if schedule == "step" else ()
    config = OptimConfig(lr=1, schedule=schedule, milestones=milestones, warmup_epochs=2, warmup_from=0.3)
    found = rates(config)
    assert found[:14] == pytest.approx([0.3 + 0.7 * (s + 1) / 14 for s in range(14)])
    assert found[14] == pytest.approx((1 - 14 / 70) ** 2 if schedule == "poly" else 1)
    assert all(a >= b for a, b in itertools.pairwise(found[14:]))


@given(st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(1, 40), st.floats(0, 3))
def test_rates_are_never_negative_and_never_above_the_peak(schedule, epochs, steps, warmup):
    milestones = (1.0,) if schedule == "step" else ()
    config = OptimConfig(lr=0.5, schedule=schedule, milestones=milestones, warmup_epochs=warmup)
    assert all(0 <= rate <= 0.5 + 1e-12 for rate in rates(config, epochs=epochs, steps=steps))


def test_the_rate_follows_the_batch():
    optim = OptimConfig(lr=0.1, warmup_from=0.01, warmup_epochs=1, scale_lr="linear", base_batch=256)
    config = Config(train=TrainConfig(batch=1024), optim=optim)
    scaled = config.scaled_optim()
    assert scaled.lr == pytest.approx(0.4)
    assert scaled.warmup_from == pytest.approx(0.04)
    assert dataclasses.replace(config, optim=scaled).scaled_optim() == scaled  # once is enough
    assert PRESETS["large-batch"].scaled_optim().lr == 10


def test_a_plateau_lowers_the_rate_three_times_at_most():
    config = OptimConfig(schedule="plateau", plateau_patience=2, plateau_drops=3)
    plateau = Plateau()
    improving = [plateau.see(top1, config) for top1 in (0.1, 0.2, 0.3)]
    stalling = [plateau.see(0.3, config) for _ in range(10)]
    assert improving == [False] * 3
    assert [i for i, lowered in enumerate(stalling) if lowered] == [1, 3, 5]
    assert plateau.drops == 3
    assert not plateau.see(0.9, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "optim.name=adam: choose one of sgd, velocity, lars"),
        ({"schedule": "linear"}, "optim.schedule=linear: choose one of constant, step"),
        ({"schedule": "step"}, "optim.milestones is empty"),
        ({"schedule": "step", "milestones": (3, 2)}, r"optim.milestones=3 2: must be epochs that rise"),
        ({"schedule": "step", "milestones": (0,)}, r"optim.milestones=0: must be epochs that rise, above 0"),
        ({"schedule": "step", "milestones": (float("nan"),)}, r"optim.milestones=nan"),
        ({"factor": 0.0}, "optim.factor=0.0: must be a number above 0, at most 1"),
        ({"factor": 2.0}, "optim.factor=2.0"),
        ({"lars_eta": 0.0}, "optim.lars_eta=0.0"),
        ({"plateau_patience": 0}, "optim.plateau_patience=0"),
        ({"plateau_drops": -1}, "optim.plateau_drops=-1"),
        ({"power": -1.0}, "optim.power=-1.0"),
        ({"clip_norm": -1.0}, "optim.clip_norm=-1.0"),
        ({"scale_lr": "square"}, "optim.scale_lr=square: choose one of none, linear"),
        ({"base_batch": 0}, "optim.base_batch=0"),
        ({"warmup_from": 0.1}, "optim.warmup_from=0.1: set optim.warmup_epochs too"),
        ({"nesterov": True, "name": "lars"}, "optim.nesterov=True: needs optim.name=sgd"),
        ({"nesterov": True, "momentum": 0.0}, "optim.nesterov=True"),
        ({"biases": "all"}, "optim.biases=all"),
        ({"norms": "variant"}, "optim.norms=variant"),
    ],
)
def test_what_cannot_be_is_rejected_with_field_and_value(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**fields)
