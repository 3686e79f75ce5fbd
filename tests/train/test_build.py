"""The objects that a run is built from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.build import pixel_type
from train.step import micro_batches


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [("bf16", "cuda:0", "float16"), ("fp16", "cuda:0", "float16"), ("no", "cuda:0", "float32"),
     ("bf16", "cpu", "float32"), ("no", "cpu", "float32")],
)  # fmt: skip
def test_half_precision_nets_on_a_gpu_are_given_float16_pixels(precision, device, dtype):
    assert pixel_type(precision, torch.device(device)) == dtype


@given(st.integers(1, 500), st.integers(1, 40))
def test_micro_batches_cover_a_batch_in_order_by_two_images_at_least(images, count):
    parts = micro_batches(images, count)
    assert [i for part in parts for i in range(images)[part]] == list(range(images))
    assert len(parts) <= count
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes[:-1], default=2) >= 2
    assert max(sizes) - min(sizes) <= 3
