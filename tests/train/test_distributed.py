"""The start of a run's process."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from train.config import Config, RunConfig
from train.distributed import make_accelerator


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_looks_for_the_fastest_kernels_unless_a_run_is_deterministic(tmp_path, monkeypatch, deterministic):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    run = RunConfig(dir=str(tmp_path), deterministic=deterministic, trackers=())
    make_accelerator(dataclasses.replace(Config(), run=run))
    assert torch.backends.cudnn.benchmark is not deterministic
