"""Crops and flips from coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv

from pipeline.errors import ConfigError
from pipeline.geometry import centre_offset, resized
from pipeline.read.augment import AugmentConfig, place
from pipeline.write.resize import resize

SIDES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20)


@given(
    SIDES,
    st.booleans(),
    st.sampled_from(
        [{}, {"square": False}, {"scale_jitter": (0.08, 1.0)}, {"scale_jitter": (1.0, 1.0)}, {"views": 10}]
    ),
    st.integers(0, 99),
    st.integers(10, 64),
    st.integers(0, 9),
)
def test_every_crop_lies_inside_its_image(sides, train, fields, epoch, resize, less):
    width, height = np.array(sides).T
    config = AugmentConfig(resize=resize, crop=resize - less, **fields)
    box, flip = place(config, np.arange(len(sides)), np.array(sides), seed=0, epoch=epoch, train=train)
    views = 1 if train else config.views
    assert box.shape == (len(sides), views, 4)
    assert flip.shape == (len(sides), views)
    box = box.reshape(-1, 4)
    for axis, length in enumerate((np.repeat(width, views), np.repeat(height, views))):
        assert (box[:, axis] >= 0).all()
        assert (box[:, 2 + axis] > 0).all()
        assert (box[:, axis] + box[:, 2 + axis] <= length * (1 + 1e-9)).all()
    if not (train and config.scale_jitter):  # a whole number of pixels of the resized image
        w, h = resized(np.repeat(width, views), np.repeat(height, views), resize)
        left, top = box[:, 0] * w / np.repeat(width, views), box[:, 1] * h / np.repeat(height, views)
        assert np.allclose(left, np.rint(left), atol=1e-6)
        assert np.allclose(top, np.rint(top), atol=1e-6)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(8, 300))
def test_resized_sizes_and_centre_crops_are_torchvisions(width, height, short):
    expected = tv._compute_resized_output_size((height, width), [short])
    w, h = resized(width, height, short)
    assert [max(1, int(h)), max(1, int(w))] == [max(1, e) for e in expected]
    side = min(width, height)
    rows = torch.arange(height)[:, None].expand(height, width)[None].float()
    cropped = tv.center_crop(rows, [side, side])
    assert cropped[0, 0, 0] == centre_offset(height, side)


def test_square_crops_take_all_33_places_of_the_paper_and_no_other():
    n = 5000
    config = AugmentConfig(square=True)
    p = place(config, np.arange(n), np.tile([500, 256], (n, 1)), seed=0, epoch=0, train=True)
    margin = (500 - 256) // 2
    assert set((p.box[..., 0] - margin).flatten().tolist()) == set(range(33))
    assert set(p.box[..., 1].flatten().tolist()) == set(range(33))
    assert (p.box[..., 2:] == 224).all()


def test_half_of_the_images_are_flipped_and_none_in_evaluation():
    n = 4000
    size = np.full((n, 2), 300)
    flips = [place(AugmentConfig(), np.arange(n), size, seed=0, epoch=e, train=True).flip for e in (0, 1)]
    for flip in flips:
        assert 0.45 < flip.mean() < 0.55
    assert 0.4 < (flips[0] == flips[1]).mean() < 0.6
    assert not place(AugmentConfig(flip=False), np.arange(n), size, seed=0, epoch=0, train=True).flip.any()
    assert not place(AugmentConfig(), np.arange(n), size, seed=0, epoch=0, train=False).flip.any()


def test_a_placement_does_not_depend_on_the_batch_it_is_computed_in():
    size = np.random.default_rng(0).integers(200, 900, (64, 2))
    everything = place(AugmentConfig(), np.arange(64), size, seed=5, epoch=6, train=True)
    part = place(AugmentConfig(), np.arange(64)[9:12], size[9:12], seed=5, epoch=6, train=True)
    for a, b in zip(everything, part):
        assert (a[9:12] == b).all()


def test_bilinear_resize_of_the_sharder_is_torchvisions():
    pixels = np.random.default_rng(0).integers(0, 256, (301, 407, 3), dtype=np.uint8)
    ours = resize(pixels, 256, square=True).astype(int)
    theirs = np.asarray(tv.center_crop(tv.resize(Image.fromarray(pixels), 256), 256))
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 300}, "augment.crop=300 is larger than augment.resize=256"),
        ({"resize": 0}, "augment.resize=0"),
        ({"normalize": "max"}, "augment.normalize=max"),
        ({"statistics": "mine"}, "augment.statistics=mine"),
    ],
)
def test_impossible_views_are_rejected_by_field_and_value(fields, message):
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**fields)
