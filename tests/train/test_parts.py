"""What a run is put together from."""

from __future__ import annotations

import pytest
import torch

from train.parts import pixel_type


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [("bf16", "cuda:0", "float16"), ("fp16", "cuda:0", "float16"), ("no", "cuda:0", "float32"),
     ("bf16", "cpu", "float32"), ("no", "cpu", "float32")],
)  # fmt: skip
def test_half_precision_nets_on_a_gpu_are_given_float16_pixels(precision, device, dtype):
    assert pixel_type(precision, torch.device(device)) == dtype
