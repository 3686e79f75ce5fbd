"""Benchmarks: which results they keep, what they skip on a second start, what an interruption leaves."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import ConfigError, ExpressError
from pipeline.files import read_object
from tests.conftest import ROOT, picture, run_tool, the_error

sys.path.append(str(ROOT))
from tools.bench import __main__ as bench
from tools.bench import feed, fig1, harness, layers, loader, plots
from tools.bench.alone import attempt, call
from tools.bench.peers import sharders


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
@pytest.mark.timeout(900)
def test_accuracy_trains_each_recipe_once_and_draws_them(tiny_cifar, tmp_path):
    args = ["tools/bench/__main__.py", "accuracy", "--images", tiny_cifar, "--dir", tmp_path / "runs", "--epochs", 1]
    first = run_tool(*args, "--only", "seed", "--json", tmp_path / "accuracy.json")
    assert first.returncode == 0, first.stderr
    assert list(json.loads((tmp_path / "accuracy.json").read_text())["results"]) == ["seed"]
    before = (tmp_path / "runs" / "seed" / "metrics.jsonl").read_bytes()
    for only in (["--only", "modern"], []):  # the file keeps the other recipes' results
        done = run_tool(*args, *only, "--json", tmp_path / "accuracy.json")
        assert done.returncode == 0, done.stderr
        held = json.loads((tmp_path / "accuracy.json").read_text())["results"].keys()
        assert held == ({"modern", "seed"} if only else {"modern", "seed", "paper"})
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


def test_images_without_the_two_folders_are_an_error(tmp_path):
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


def test_the_plots_of_the_results_page_are_those_of_its_json_files(tmp_path):
    page = (plots.RESULTS.parent / "results.md").read_text()
    plots.draw(tmp_path)
    drawn = {path.name: Image.open(path) for path in tmp_path.iterdir()}
    assert drawn.keys() == set(re.findall(r"!\[[^]]*\]\(results/(.*?)\)", page))
    for name, now in drawn.items():
        kept = Image.open(plots.RESULTS / name)
        if kept.info["Software"] == now.info["Software"]:  # the version of Matplotlib
            assert kept.size == now.size
            differ = np.abs(np.asarray(kept, int) - np.asarray(now, int)) > 64  # processors may round differently
            assert differ.sum() < 20, f"{name}: run python tools/bench/plots.py"


def test_the_feed_is_measured_with_a_real_pipeline(shards):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert 0 < feed.microseconds(shards["jpeg"], batch=4, batches=3) < 100_000


def test_every_benchmark_explains_itself(capsys):
    parser = bench.make_parser()
    for kind in bench.BENCHMARKS:
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([kind, "--help"])
        assert "--json FILE" in capsys.readouterr().out


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
    monkeypatch.setattr(layers, "conv1_as_blocks", lambda *_, **__: 1 / 0)
    device, found = torch.device("cpu"), {}
    for name, prepare in layers.items(device, 1, torch.bfloat16).items():
        found[name] = attempt(partial(layers.milliseconds, prepare, 0.0, device))
    failed = {name for name, result in found.items() if "error" in result}
    assert failed == {"conv1 padding 2 48 channels", "conv1 padding 0 48 channels"}
    assert all(result["milliseconds"] > 0 for name, result in found.items() if name not in failed)
    for form in ("eager", "compiled", "in a compiled model"):
        for scale in ("saves the scale", "computes it again"):
            assert f"lrn1 {form}, {scale}" in found
    assert {"pool after lrn2", "optimiser sgd", "optimiser velocity", "optimiser lars"} <= found.keys()


# The harness

SLEEPING = """
import sys
sys.path.insert(0, {root!r})
from tools.bench import harness
with harness.scratch_folder() as scratch:
    print(scratch, flush=True)
    harness.run_once("subprocess:run", {{"args": ["sleep", "600"]}})
"""


def child_of(pid: int) -> int:
    children, found = Path(f"/proc/{pid}/task/{pid}/children"), []
    while not found:
        time.sleep(0.05)
        found = children.read_text().split()
    return int(found[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_benchmark_removes_its_scratch_and_its_processes(number):
    command = [sys.executable, "-c", SLEEPING.format(root=str(ROOT))]
    benchmark = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    scratch = Path(benchmark.stdout.readline().strip())
    assert scratch.is_dir()
    measuring = child_of(benchmark.pid)
    sleeping = child_of(measuring)
    benchmark.send_signal(number)
    benchmark.communicate(timeout=60)
    assert benchmark.returncode
    assert not scratch.exists()
    assert not Path(f"/proc/{measuring}").exists()
    assert not Path(f"/proc/{sleeping}/fd/0").exists()  # nobody may have reaped it


@pytest.mark.parametrize(
    ("number", "send"), [(signal.SIGINT, os.killpg), pytest.param(signal.SIGTERM, os.kill, marks=pytest.mark.slow)]
)
def test_an_interrupted_loader_benchmark_leaves_the_finished_rounds_and_nothing_else(
    number, send, image_folder, tmp_path
):
    """Ctrl-C, which a terminal sends to the whole process group, and SIGTERM, which schedulers send to one process."""
    scratch, written = tmp_path / "scratch", tmp_path / "written.json"
    scratch.mkdir()
    argv = [sys.executable, "tools/bench", "loader", "--images", image_folder / "train", "--only", "decode"]
    argv = [*map(str, argv), "--rounds", "1000", "--seconds", "0.1", "--json", str(written)]
    env = os.environ | {"TMPDIR": str(scratch)}
    benchmark = subprocess.Popen(argv, cwd=ROOT, env=env, start_new_session=True)
    while "results" not in read_object(written):
        assert benchmark.poll() is None
        time.sleep(0.05)
    assert list(scratch.iterdir())
    send(benchmark.pid, number)
    assert benchmark.wait(60)
    assert not list(scratch.iterdir())
    results = read_object(written)["results"]
    assert [(r["data"], r["loader"]) for r in results] == [
        ("jpeg", "decode alone (libjpeg-turbo)"),
        ("keep", "decode alone (libjpeg-turbo)"),
    ]
    assert all(len(r["rates"]) >= 1 and min(r["rates"]) > 0 for r in results)
    assert not list(tmp_path.glob("*.partial"))


def test_sharders_count_the_images_and_leave_nothing(image_folder, tmp_path):
    for peer in (sharders.ours, sharders.copy_files):
        found = call(peer, {"images": str(image_folder / "train"), "out": str(tmp_path / "out"), "workers": 2})
        assert found["images"] == 12
        assert found["seconds"] > 0
        assert not list(tmp_path.iterdir())


def test_ffcv_alone_needs_its_interpreter(tmp_path):
    args = bench.make_parser().parse_args(["loader", "--images", "x", "--only", "ffcv"])
    with pytest.raises(ConfigError, match=r"--only ffcv: .* --ffcv-python"):
        loader.run(args, None, tmp_path)


COUNTED = """
def counted(images, seconds, world=1, rank=0):
    return {"images": images, "seconds": seconds, "megabytes": 7.0}
"""


@pytest.fixture
def counted(tmp_path, monkeypatch) -> str:
    (tmp_path / "counting.py").write_text(COUNTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "counting:counted"


def test_cells_are_recorded_after_every_round_with_the_sum_of_their_ranks(tmp_path, monkeypatch, counted, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "loader", "--images", "/data/sample.tar"])
    args = argparse.Namespace(json=tmp_path / "x.json", kind="loader", rounds=2, images=Path("/data/sample.tar"))
    record, written = harness.Record(args, "rates"), []
    monkeypatch.setattr(harness, "write_json", lambda path, value: written.append(json.loads(json.dumps(value))))
    one = harness.Cell({"what": "one"}, counted, {"images": 100, "seconds": 2.0})
    both = harness.Cell({"what": "both"}, counted, {"images": 100, "seconds": 2.0}, "one", ranks=2)
    results = harness.interleave([one, both], 2, record)
    assert [len(content["results"][0]["rates"]) for content in written] == [1, 2]
    assert results[1] == {
        "what": "both", "images_per_second": 100.0, "rates": [100.0, 100.0], "against": "one",
        "megabytes_a_worker": 7.0,
    }  # fmt: skip
    assert written[0]["command"] == "python tools/bench loader --images sample.tar"
    assert written[0]["settings"] == {"rounds": 2}
    assert "|  | both | 100 | 2 | one | 7 |" in capsys.readouterr().out


def test_a_cell_that_fails_is_named_with_its_last_line(counted):
    cell = harness.Cell({"data": "jpeg", "loader": "x"}, counted, {"images": 1})
    with pytest.raises(ExpressError, match=r"jpeg, x: TypeError: counted\(\) missing .* 'seconds'"):
        harness.measure(cell)
    with pytest.raises(ExpressError, match=r"^os:abort: its process was ended by SIGABRT"):
        harness.run_once("os:abort", {})
