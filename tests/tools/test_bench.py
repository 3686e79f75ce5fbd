"""Benchmarks that train: what they keep, what they do not do twice, and how they choose."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, picture, run_tool, the_error

sys.path.append(str(ROOT))
from tools.bench import fig1, layers


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory):
    """260 training and 20 test images of 32 pixels, in two classes."""
    root, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    for split, count in (("train", 130), ("test", 10)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(rng, 32, 32).save(folder / f"{i:04d}.jpg")
    return root


@pytest.mark.slow
def test_accuracy_trains_each_recipe_once_and_draws_them(tiny_cifar, tmp_path):
    args = ["tools/bench/__main__.py", "accuracy", "--images", tiny_cifar, "--dir", tmp_path / "runs", "--epochs", 1]
    first = run_tool(*args, "--only", "seed", "--json", tmp_path / "accuracy.json")
    assert first.returncode == 0, first.stderr
    assert list(json.loads((tmp_path / "accuracy.json").read_text())["results"]) == ["seed"]
    before = (tmp_path / "runs" / "seed" / "metrics.jsonl").read_bytes()
    for only in (["--only", "modern"], []):  # what the file holds of the others stays
        done = run_tool(*args, *only, "--json", tmp_path / "accuracy.json")
        assert done.returncode == 0, done.stderr
        held = list(json.loads((tmp_path / "accuracy.json").read_text())["results"])
        assert held == (["modern", "seed"] if only else ["modern", "seed", "paper"])
    assert (tmp_path / "runs" / "seed" / "metrics.jsonl").read_bytes() == before
    written = json.loads((tmp_path / "accuracy.json").read_text())
    for result in written["results"].values():
        assert result["last"]["images"] == 20
        assert result["environment"]["packages"]["torch"]
        assert result["command"].startswith("train/run.py ")
    assert len(written["results"]["modern"]["top1_of_average_by_epoch"]) == 1
    other = run_tool(*args, "--only", "seed", "--width", 0.25)
    assert other.returncode == 2
    assert "seed: was run with model.width=0.375, not 0.25; remove it" in other.stderr
    assert set(written["results"]["seed"]["seconds_to"]) == {"60%", "70%", "75%", "80%", "85%"}
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_images_without_the_two_folders_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    done = run_tool("tools/bench/__main__.py", "accuracy", "--images", tmp_path, "--dir", tmp_path / "runs")
    assert done.returncode == 65
    assert "has no train/ and test/" in the_error(done)


def result(rate: float, epochs: int, top1: float) -> dict:
    return {"rate": rate, "epochs": epochs, "reached": top1 >= 0.75, "last": {"top1": top1}}


def test_the_best_rate_needs_the_fewest_epochs_and_of_those_the_greatest_accuracy():
    found = {str(r["rate"]): r for r in (result(0.001, 9, 0.2), result(0.03, 5, 0.76), result(0.01, 5, 0.77))}
    assert fig1.fastest(found) == {"rate": 0.01, "epochs": 5, "top1": 0.77}
    assert fig1.fastest({"0.1": result(0.1, 60, 0.7)}) is None
    both = {"relu": found | {"0.003": result(0.003, 5, 0.1)}}
    text = fig1.table(both, {"relu": fig1.fastest(found), "tanh": None})
    assert "> 9" in text
    assert text.splitlines()[1].endswith("5")


def test_every_benchmark_explains_itself():
    for kind in ("loader", "shards", "train", "saves", "order", "accuracy", "fig1"):
        argv = [sys.executable, str(ROOT / "tools" / "bench"), kind, "--help"]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0
        assert "--json FILE" in done.stdout


@pytest.mark.parametrize(("side", "padding"), [(224, 0), (224, 2), (227, 0), (227, 2)])
def test_conv1_by_48_channels_has_equal_sums_and_gradients(side, padding):
    x, weight = (
        torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, side, side), (8, 3, 11, 11))
    )
    ours, theirs = (form(x, weight, padding) for form in (layers.conv1_as_blocks, layers.conv1))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)
    gradients = [torch.autograd.grad(out.square().sum(), (x, weight)) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-8)


@pytest.mark.slow
def test_each_layer_is_measured_and_one_that_fails_costs_only_itself(monkeypatch):
    monkeypatch.setattr(layers, "conv1_as_blocks", None)
    found = layers.measure("cpu", batch=1, seconds=0.0, dtype=torch.bfloat16)
    failed = {name for name, result in found.items() if "error" in result}
    assert failed == {"conv1 padding 2 48 channels", "conv1 padding 0 48 channels"}
    assert all(result["milliseconds"] > 0 for name, result in found.items() if name not in failed)
    for form in ("eager", "compiled", "in a compiled model"):
        for scale in ("saves the scale", "computes it again"):
            assert found[f"lrn1 {form}, {scale}"]["times_copy"] > 0
    assert {"pool after lrn2", "optimiser sgd", "optimiser velocity", "optimiser lars"} <= found.keys()
