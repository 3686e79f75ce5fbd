"""Mixup and cutmix by coordinates, against a plain reference, one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from train import mixing
from train.config import RegularizeConfig

BOTH = RegularizeConfig(mixup=0.4, cutmix=1.0)
KINDS = {"mixup": RegularizeConfig(mixup=0.4), "cutmix": RegularizeConfig(cutmix=1.0), "both": BOTH}


def planned(config: RegularizeConfig, ids: np.ndarray, *, step: int = 3) -> mixing.Mix:
    return mixing.plan(config, ids, seed=1, step=step, side=16)


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_targets_are_mixed_as_planned(kind):
    ids = np.arange(40, 52)
    mix = planned(KINDS[kind], ids)
    images = torch.rand(12, 3, 16, 16).to(memory_format=torch.channels_last)
    mixed = mixing.apply(mix, images)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    logits, labels = torch.randn(12, 10), torch.randint(10, (12,))
    losses = mixing.loss_of_each(logits, labels, mix, label_smoothing=0.1)
    for i in range(12):
        partner = i + 1 if i % 2 == 0 else i - 1
        wanted = mix.blend[i] * images[i] + (1 - mix.blend[i]) * images[partner]
        inside = 0
        if mix.box is not None:
            left, top, right, bottom = mix.box[i]
            wanted[:, top:bottom, left:right] = images[partner][:, top:bottom, left:right]
            inside = (right - left) * (bottom - top)
        torch.testing.assert_close(mixed[i], wanted)
        # An image's label counts as its pixels do.
        assert mix.share[i] == pytest.approx(mix.blend[i] * (1 - inside / 256))
        one = [F.cross_entropy(logits[i : i + 1], labels[j : j + 1], label_smoothing=0.1) for j in (i, partner)]
        torch.testing.assert_close(losses[i], mix.share[i] * one[0] + (1 - mix.share[i]) * one[1], check_dtype=False)


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=30, unique=True), st.integers(0, 10**6))
def test_a_mixture_depends_on_id_and_step_alone(ids, step):
    together = planned(BOTH, np.array(ids), step=step)
    for i, id_ in enumerate(ids):
        alone = planned(BOTH, np.array([id_]), step=step)
        assert (alone.share[0], alone.blend[0]) == (together.share[i], together.blend[i])
        if alone.box is not None:
            assert (alone.box[0] == together.box[i]).all()
    assert 0 <= together.share.min() <= together.share.max() <= 1


def test_shares_have_the_distribution_that_is_asked_for():
    ids = np.arange(20_000)
    flat = planned(RegularizeConfig(mixup=1.0), ids).share
    assert np.abs(np.histogram(flat, bins=10, range=(0, 1))[0] / 2000 - 1).max() < 0.1
    steep = planned(RegularizeConfig(mixup=0.2), ids).share
    assert steep.var() == pytest.approx(0.25 / (2 * 0.2 + 1), rel=0.03)  # of Beta(a, a)
    cut = planned(BOTH, ids).box
    assert cut is not None
    area = (cut[:, 2] - cut[:, 0]) * (cut[:, 3] - cut[:, 1])
    assert (area > 0).mean() == pytest.approx(0.5, abs=0.05)  # each half of the time
    assert not (planned(BOTH, ids, step=4).share == planned(BOTH, ids).share).all()


@given(st.integers(1, 500), st.integers(1, 40))
def test_parts_cover_a_batch_in_order_and_keep_pairs_together(images, count):
    parts = mixing.chunks(images, count)
    assert [i for part in parts for i in range(images)[part]] == list(range(images))
    assert len(parts) <= count
    assert all(part.start % 2 == 0 for part in parts)
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 3


def test_pairs_that_would_part_between_ranks_are_refused():
    mixing.check_pairs(BOTH, batch=64, world=4)
    mixing.check_pairs(RegularizeConfig(), batch=63, world=1)
    with pytest.raises(ConfigError, match=r"train.batch=6 gives each of 2 ranks 3 images: regularize.mixup"):
        mixing.check_pairs(BOTH, batch=6, world=2)
