"""Dropout from coordinates: golden values, statistics, and the same masks however a batch is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import AlexNet, ModelConfig
from model.dropout import Dropout, keep_mask

GOLDEN = [
    "00100101010110111100010011100000",
    "00010101111001111100001000101000",
    "00000101110100100111101100001011",
    "00100000011100000000001110101111",
]


def rows_of(count, seed=0):
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, count)
    return torch.from_numpy(words.astype(np.int32))


def test_golden_masks():
    """These values must never change: a run must drop the same units in ten years."""
    mask = keep_mask(torch.tensor([0, 1, -1, 123456789], dtype=torch.int32), 32, layer=6, p=0.5)
    assert ["".join(map(str, row)) for row in mask.int().tolist()] == GOLDEN


def mixed(x):
    """Wellons's lowbias32 on Python's whole numbers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(1, 9), st.sampled_from([0.1, 0.5, 0.9]))
def test_the_mask_is_the_hash_in_whole_numbers(row, layer, p):
    units = [mixed((u + layer * 0x9E3779B9) % 2**32) ^ (row % 2**32) for u in range(50)]
    # The comparison is of signed numbers; the last shift of the hash is left out.
    expected = []
    for x in units:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        expected.append((x + 2**31) % 2**32 >= round(p * 2**32))
    assert keep_mask(torch.tensor([row], dtype=torch.int32), 50, layer=layer, p=p)[0].tolist() == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_units_live_independently_with_the_right_chance(p):
    count, units = 512, 4096
    mask = keep_mask(rows_of(count), units, layer=6, p=p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * sigma / (count * units) ** 0.5
    assert (mask.mean(0) - (1 - p)).abs().max() < 6 * sigma / count**0.5
    assert (mask.mean(1) - (1 - p)).abs().max() < 6 * sigma / units**0.5
    centred = (mask - (1 - p)) / sigma
    for other in (
        centred.roll(1, 0),  # between samples
        centred.roll(1, 1),  # between units
        (keep_mask(rows_of(count), units, layer=7, p=p).double() - (1 - p)) / sigma,  # between layers
        (keep_mask(rows_of(count) + 1, units, layer=6, p=p).double() - (1 - p)) / sigma,  # between neighbouring keys
    ):
        assert abs((centred * other).mean()) < 5 / (count * units) ** 0.5
    rows = centred @ centred.T / units
    assert (rows - torch.eye(count, dtype=torch.double) * rows.diag()).abs().max() < 7 / units**0.5


def test_the_mask_of_a_sample_depends_on_nobody_else():
    rows = rows_of(8)
    whole = keep_mask(rows, 100, layer=6, p=0.5)
    for cut in (1, 3, 7):
        parts = [keep_mask(part, 100, layer=6, p=0.5) for part in (rows[:cut], rows[cut:])]
        assert torch.equal(torch.cat(parts), whole)


def test_compiled_masks_are_the_same(compiler):
    rows = rows_of(16)
    assert torch.equal(torch.compile(keep_mask)(rows, 1000, layer=7, p=0.3), keep_mask(rows, 1000, layer=7, p=0.3))


@pytest.mark.parametrize("with_rows", [True, False])
def test_survivors_are_scaled_and_gradients_follow_them(with_rows):
    torch.manual_seed(0)
    layer = Dropout(0.25, layer=6)
    x = torch.ones(64, 1000, requires_grad=True)
    y = layer(x, rows_of(64) if with_rows else None)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    layer.eval()
    assert layer(x, rows_of(64)) is x


def test_a_whole_net_drops_alike_however_its_batch_is_cut():
    torch.manual_seed(0)
    net = AlexNet(ModelConfig("small", width=0.1, weight_init="torch"), classes=7, crop=32).double()
    images, rows = torch.randn(6, 3, 32, 32, dtype=torch.double), rows_of(6)
    whole = net(images, rows)
    torch.testing.assert_close(torch.cat([net(images[:2], rows[:2]), net(images[2:], rows[2:])]), whole)
    torch.testing.assert_close(net(images, rows), whole)
    assert not torch.allclose(net(images, rows + 1), whole)
