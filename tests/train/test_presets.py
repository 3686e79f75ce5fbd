"""Every preset, unchanged, on real ImageNet images at full size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import ImageFolder
from tests.faults.job import lines
from tests.train.test_run import alone
from train.networks import create_net
from train.presets import FINETUNE, PRESETS


@pytest.fixture(scope="module")
def sample(imagenet_sample, tmp_path_factory) -> Path:
    """64 real images of 64 classes as shards."""
    out = tmp_path_factory.mktemp("sample")
    build(Plan(ImageFolder(imagenet_sample), Options()), out, workers=1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_runs_at_full_size_on_imagenet(preset, sample, tmp_path):
    run = tmp_path / "run"
    args = [preset, "--data.shards", sample, "--run.dir", run, "--train.batch", 16, "--limit-steps", 20]
    if preset == FINETUNE:
        torch.save(create_net(PRESETS[preset].model, classes=7, crop=224).state_dict(), tmp_path / "weights.pth")
        args += ["--model.init", tmp_path / "weights.pth"]
    done = alone(*args, "--run.log-every", 1, "--run.keep-checkpoints", 1, "--data.val-split", "train")
    assert done.returncode == 0, done.stderr
    train = lines(run, "train")
    assert [line["step"] for line in train] == list(range(1, 21))
    assert all(math.isfinite(line["loss"]) for line in train)
    described = json.loads((run / "config.json").read_text())["config"]
    crop = PRESETS[preset].augment.crop
    assert described["augment"]["crop"] == crop
    assert done.stdout.splitlines()[-1].startswith("val top1=")
