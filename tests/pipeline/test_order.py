"""Which samples a rank reads at a step."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.read import order


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 1000))
def test_an_epoch_is_a_permutation_of_all_samples(samples, seed, epoch):
    permutation = order.permutation(samples, seed=seed, epoch=epoch)
    assert sorted(permutation.tolist()) == list(range(samples))
    assert (permutation == order.permutation(samples, seed=seed, epoch=epoch)).all()


def test_epochs_and_seeds_are_shuffled_differently_and_well():
    orders = [order.permutation(10_000, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.01
        assert abs(np.corrcoef(a, np.arange(10_000))[0, 1]) < 0.05


@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 500))
def test_a_global_step_has_the_same_ids_in_the_same_order_at_every_world_size(world, per_rank, extra):
    batch = world * per_rank
    permutation = order.permutation(batch + extra, seed=3, epoch=4)
    for step in range(order.steps_per_epoch(len(permutation), batch=batch)):
        one = order.train_ids(permutation, step=step, batch=batch)
        ranks = [order.train_ids(permutation, step=step, batch=batch, rank=r, world=world) for r in range(world)]
        assert all(len(ids) == per_rank for ids in ranks)
        assert np.concatenate(ranks).tolist() == one.tolist()


@given(st.integers(1, 400), st.integers(1, 50))
def test_training_drops_less_than_one_global_batch(samples, batch):
    steps = order.steps_per_epoch(samples, batch=batch)
    assert 0 <= samples - steps * batch < batch


@given(st.integers(0, 5000), st.integers(1, 40))
def test_evaluation_covers_each_id_once_and_evenly(samples, world):
    parts = [order.evaluation_range(samples, rank=r, world=world) for r in range(world)]
    assert [i for part in parts for i in part] == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("batch", "samples", "world", "message"),
    [
        (10, 100, 4, "batch=10 does not divide over 4 ranks; use a multiple of 4, such as 8"),
        (0, 100, 1, "batch=0: must be at least 1"),
        (128, 100, 2, "batch=128 is more than the 100 training samples"),
    ],
)
def test_a_batch_that_cannot_be_trained_with_is_refused_with_its_value(batch, samples, world, message):
    with pytest.raises(ConfigError, match=message):
        order.check_batch(batch, samples=samples, world=world)


def test_the_order_of_all_of_imagenet_takes_a_fraction_of_a_second():
    started = time.process_time()
    order.permutation(1_281_167, seed=0, epoch=0)
    assert time.process_time() - started < 2
