"""Which samples each rank reads at a step."""

from __future__ import annotations

import time
import tracemalloc
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.read import order, rng

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=30).map(np.array)
WINDOWS = st.integers(0, 8)


def epoch_of(sizes, *, batch, seed=0, epoch=0, **kwargs):
    return order.epoch_order(np.cumsum(sizes), seed=seed, epoch=epoch, batch=batch, **kwargs).ravel()


@given(SIZES, st.integers(0, 2**31), st.integers(0, 1000), WINDOWS)
def test_an_epoch_holds_every_sample_once(sizes, seed, epoch, window):
    ids = epoch_of(sizes, batch=1, seed=seed, epoch=epoch, window=window)
    assert sorted(ids.tolist()) == list(range(sizes.sum()))
    assert (ids == epoch_of(sizes, batch=1, seed=seed, epoch=epoch, window=window)).all()


@given(SIZES, st.integers(1, 6), st.integers(1, 6), WINDOWS)
def test_partitions_read_their_own_consecutive_ids_and_drop_less_than_one_global_batch(
    sizes, partitions, piece, window
):
    batch, samples = partitions * piece, int(sizes.sum())
    ids = epoch_of(sizes, batch=batch, partitions=partitions, window=window)
    assert len(set(ids.tolist())) == len(ids)
    assert 0 <= samples - len(ids) < batch
    steps = ids.reshape(-1, partitions, piece)
    for part in range(partitions):
        start, end = part * samples // partitions, (part + 1) * samples // partitions
        assert ((steps[:, part] >= start) & (steps[:, part] < end)).all()


@given(SIZES, st.sampled_from([1, 2, 4, 12]), st.integers(1, 5), WINDOWS)
def test_a_global_step_has_the_same_ids_in_the_same_order_at_every_world_size(sizes, partitions, multiple, window):
    batch = 12 * multiple
    ids = epoch_of(sizes, batch=batch, partitions=partitions, window=window)
    of = {"seed": 0, "epoch": 0, "batch": batch, "partitions": partitions, "window": window}
    for world in (1, 2, 3, 4, 6, 12):
        ranks = [order.epoch_order(np.cumsum(sizes), rank=rank, world=world, **of) for rank in range(world)]
        assert all(part.shape == (int(sizes.sum()) // batch, batch // world) for part in ranks)
        assert np.concatenate(ranks, axis=1).ravel().tolist() == ids.tolist()


def test_fewer_samples_than_parts_make_an_epoch_without_steps():
    assert len(epoch_of([1, 1], batch=4, partitions=4, window=1)) == 0


@given(st.integers(2, 12), st.integers(1, 5))
def test_a_window_bounds_the_shards_that_are_read_at_once(shards, window):
    size, batch = 40, 8
    ids = epoch_of([size] * shards, batch=batch, window=window).reshape(-1, batch)
    shard_of = ids // size
    first, last = ({s: f(np.flatnonzero((shard_of == s).any(1))) for s in range(shards)} for f in (min, max))
    for step in range(len(ids)):
        being_read = [s for s in range(shards) if first[s] <= step <= last[s]]
        assert len(being_read) <= 2 * window  # the end of one group and the start of the next


def test_epochs_and_seeds_are_shuffled_differently_and_well():
    orders = [epoch_of([1000] * 10, batch=1, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.01
        assert abs(np.corrcoef(a, np.arange(10_000))[0, 1]) < 0.05


def test_golden_orders_hold_for_good():
    assert epoch_of([4, 4, 4], batch=6, seed=1, epoch=2).tolist() == GOLDEN
    assert epoch_of([4, 4, 4], batch=6, seed=1, epoch=2, partitions=2, window=1).tolist() == GOLDEN_PARTS


GOLDEN = [8, 10, 1, 5, 0, 3, 4, 9, 11, 7, 2, 6]
GOLDEN_PARTS = [1, 0, 3, 8, 10, 9, 2, 5, 4, 11, 7, 6]


@given(st.integers(1, 400), st.integers(1, 50))
def test_training_drops_less_than_one_global_batch(samples, batch):
    steps = samples // batch
    assert 0 <= samples - steps * batch < batch


@given(st.integers(0, 5000), st.integers(1, 40))
def test_evaluation_covers_each_id_once_and_evenly(samples, world):
    parts = [order.range_of_rank(samples, rank=r, world=world, partitions=world) for r in range(world)]
    assert [i for part in parts for i in part] == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("batch", "samples", "world", "partitions", "message"),
    [
        (10, 100, 4, 1, "batch=10 does not divide over 4 ranks; use a multiple of 4, such as 8"),
        (0, 100, 1, 1, "batch=0: must be at least 1"),
        (128, 100, 2, 1, "batch=128 is more than the 100 training samples; use a smaller one, such as 12$"),
        (128, 100, 8, 1, "use a smaller one, such as 8$"),
        (24, 20, 8, 3, "use fewer ranks and partitions$"),
        (12, 100, 2, 8, "batch=12 does not divide over partitions=8"),
    ],
)
def test_a_batch_that_cannot_be_trained_with_is_rejected_with_its_value(batch, samples, world, partitions, message):
    with pytest.raises(ConfigError, match=message):
        order.check_batch(batch, samples=samples, world=world, partitions=partitions)


@pytest.mark.parametrize(("partitions", "window"), [(1, 0), (1, 16), (8, 16)])
def test_the_order_of_all_of_imagenet_takes_no_python_loop_over_images(partitions, window):
    started = time.process_time()
    epoch_of([1251] * 1024, batch=1024, partitions=partitions, window=window)
    assert time.process_time() - started < 20  # a tenth of a second; minutes if each image were visited by Python


@pytest.mark.parametrize(
    ("settings", "bytes_a_sample"),
    [({}, 8), ({"window": 16}, 16), ({"partitions": 8}, 16), ({"partitions": 8, "world": 8, "rank": 3}, 1)],
)
def test_an_epoch_is_ordered_in_8_bytes_for_each_sample_of_the_ranks_partitions(settings, bytes_a_sample):
    shards = np.full(1000, 1000)
    tracemalloc.start()
    try:
        order.epoch_order(np.cumsum(shards), batch=256, seed=0, epoch=0, **settings)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (bytes_a_sample + 1.5) * 1_000_000


@given(SIZES, st.integers(1, 4), WINDOWS, st.integers(0, 2**63))
def test_an_order_is_that_of_the_hashes(sizes, partitions, window, seed):
    """The same as sorting the ids of a group of shards by their hashes, and the shards of a partition by theirs."""

    def by_hash(numbers: list[int], stream: int) -> list[int]:
        hashes = rng.bits(np.array(numbers, np.int64), seed=seed, epoch=3, stream=stream).tolist()
        return [number for _, number in sorted(zip(hashes, numbers))]

    samples, shard_of = int(sizes.sum()), np.repeat(np.arange(len(sizes)), sizes)
    steps, pieces = samples // partitions, []
    for part in range(partitions):
        ids = range(part * samples // partitions, (part + 1) * samples // partitions)
        shards = by_hash(sorted({int(shard_of[i]) for i in ids}), rng.SHARDS)
        groups = [shards[i : i + window] for i in range(0, len(shards), window)] if window else [shards]
        shuffled = [by_hash([i for i in ids if shard_of[i] in group], rng.ORDER) for group in groups]
        pieces.append(list(chain.from_iterable(shuffled))[:steps])
    made = epoch_of(sizes, batch=partitions, partitions=partitions, window=window, seed=seed, epoch=3)
    assert made.tolist() == [i for step in zip(*pieces) for i in step]
