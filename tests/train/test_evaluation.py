"""Counts of correct predictions, and the learning rate."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.config import OptimConfig
from train.evaluation import Result, rank_of_label
from train.optim import learning_rate


def test_ranks_count_the_classes_that_score_as_high():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert rank_of_label(logits, torch.tensor([0, 2, 1])).tolist() == [0, 1, 2]


@given(st.integers(0, 10_000))
def test_ranks_agree_with_topk(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 12, generator=generator)
    labels = torch.randint(0, 12, (20,), generator=generator)
    for k in (1, 5):
        hits = (logits.topk(k, 1).indices == labels[:, None]).any(1)
        assert ((rank_of_label(logits, labels) < k) == hits).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
def test_a_constant_or_broken_net_is_never_right(value):
    logits = torch.full((4, 10), value)
    assert (rank_of_label(logits, torch.tensor([0, 3, 5, 9])) == 9).all()


def test_the_last_line_is_what_others_parse():
    assert str(Result(0.98765, 1.0, 0.1, 359)) == "val top1=0.9877 top5=1.0000 images=359"


def test_schedules_by_optimiser_step():
    at = lambda config, step: learning_rate(config, step=step, steps_per_epoch=10, total_steps=100)  # noqa: E731
    assert {at(OptimConfig(lr=0.3), s) for s in range(100)} == {0.3}
    cosine = OptimConfig(lr=0.2, schedule="cosine", warmup_epochs=2)
    rates = [at(cosine, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[19] == rates[20] == pytest.approx(0.2)
    assert rates[60] == pytest.approx(0.1)
    assert 0 < rates[99] < 1e-3
    assert all(math.isclose(b - a, 0.01) for a, b in pairwise(rates[:20]))
    assert all(a > b for a, b in pairwise(rates[20:]))
