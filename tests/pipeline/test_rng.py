"""The hash that every random choice comes from."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.read import rng

SMALL = st.integers(0, 2**31)


def test_golden_values_hold_for_good():
    bits = rng.bits(np.arange(4), seed=0, epoch=0, stream=rng.ORDER)
    assert [f"{b:016x}" for b in bits.tolist()] == GOLDEN_BITS
    values = rng.uniform(np.array([0, 1, 1_281_166]), seed=7, epoch=89, stream=rng.CROP, count=2)
    assert values.ravel().tolist() == GOLDEN_UNIFORM
    assert rng.key(1, 2, 3) == GOLDEN_KEY


GOLDEN_BITS = ["3283cd232c6123f1", "8bf8e25d8751c750", "02acf09f5c92465d", "ff0f9dbfcdb9a239"]
GOLDEN_UNIFORM = [
    0.5016145588865265,
    0.5921420740312406,
    0.409227987654185,
    0.5822280277843895,
    0.8273106468054361,
    0.5163045847999053,
]
GOLDEN_KEY = 2869315087210772132


@given(SMALL, SMALL, st.integers(0, 10))
def test_distinct_ids_never_collide(seed, epoch, stream):
    bits = rng.bits(np.arange(5000), seed=seed, epoch=epoch, stream=stream)
    assert len(np.unique(bits)) == 5000


@given(SMALL, SMALL, st.integers(0, 10), st.lists(st.integers(0, 2**64 - 1)))
def test_ids_are_recovered_from_their_bits(seed, epoch, stream, ids):
    at = {"seed": seed, "epoch": epoch, "stream": stream, "draw": 1}
    bits = rng.bits(np.array(ids, np.uint64), **at)
    rng.ids(bits, **at)
    assert bits.tolist() == ids


@given(SMALL, SMALL)
def test_neighbouring_ids_epochs_seeds_streams_and_draws_share_no_number(seed, epoch):
    ids = np.arange(500)
    sets = [
        rng.bits(ids, seed=s, epoch=e, stream=stream, draw=d)
        for s in (seed, seed + 1)
        for e in (epoch, epoch + 1)
        for stream in (0, 1)
        for d in (0, 1, 2)
    ]
    everything = np.concatenate(sets)
    assert len(np.unique(everything)) == len(everything)


@given(SMALL, SMALL, st.integers(0, 10))
def test_a_draw_depends_on_its_own_id_alone(seed, epoch, stream):
    where = {"seed": seed, "epoch": epoch, "stream": stream, "count": 3}
    together = rng.uniform(np.array([5, 900, 17]), **where)
    alone = rng.uniform(np.array([900]), **where)
    assert (together[1] == alone[0]).all()


def test_uniform_fills_the_unit_interval_evenly_and_without_correlation():
    u = rng.uniform(np.arange(200_000), seed=1, epoch=2, stream=rng.CROP, count=2)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram2d(u[:, 0], u[:, 1], bins=20)[0]
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert 280 < chi2 < 530  # 399 degrees of freedom: beyond four deviations either way
    neighbours = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert abs(neighbours) < 0.01


def test_the_order_of_coordinates_matters():
    keys = {rng.key(a, b) for a in range(60) for b in range(60)}
    assert len(keys) == 3600
