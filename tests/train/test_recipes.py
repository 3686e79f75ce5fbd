"""The parts of recipes in real runs: micro-batches, ranks, averaged weights, overflows, growing crops, limits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import AlexNet, ModelConfig
from tests.conftest import the_error
from tests.faults.job import PLANTED, SCRIPT, global_ids, quiet, traces
from tests.train.test_run import STEPS, alone, launch, metrics
from train.ema import average_of, update_average

HERE = Path(__file__).parent
FEW = ["--train.batch", 16, "--run.log-every", 1, "--run.record-ids"]
# Torch's initialisation, whose rounding is not amplified at 0.01 (docs/model.md).
RATE = ["--optim.lr", 0.01, "--optim.warmup-epochs", 0, "--model.weight-init", "torch"]
FIFTY = ["--train.epochs", 3, "--limit-steps", 50]
SMOOTH = ["--regularize.label-smoothing", 0.1]
QUICK = ["--train.batch", 16, "--model.width", 0.125, "--loader.threads", 1]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run, "train")]


@pytest.fixture(scope="module")
def whole(few_digits, tmp_path_factory) -> Path:
    """50 steps by one rank in one pass each, with dropout."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = alone("demo", "--data.shards", few_digits, "--run.dir", run, *FIFTY, *FEW, *RATE, *SMOOTH)
    assert done.returncode == 0, done.stderr
    assert sum(losses(run)[-10:]) < sum(losses(run)[:10])
    return run


@pytest.mark.parametrize(
    ("ranks", "parts"),
    [(1, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 4), (2, 1), (4, 2)))],
)
def test_ranks_and_parts_of_a_batch_change_nothing_but_rounding(ranks, parts, whole, few_digits, tmp_path):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", few_digits, "--run.dir", run, *FIFTY, *FEW, *RATE, *SMOOTH]
    done = launch(*args, "--train.accumulate", parts, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert global_ids(run) == global_ids(whole)
    assert [m["lr"] for m in metrics(run, "train")] == [m["lr"] for m in metrics(whole, "train")]
    differences = [abs(a - b) for a, b in zip(losses(run), losses(whole), strict=True)]
    assert len(differences) == 50
    assert max(differences[:20]) < 1e-4
    assert max(differences) < 1e-3


def test_all_that_a_recipe_keeps_survives_a_stop_to_the_last_bit(few_digits, tmp_path):
    recipe = [
        *("demo", "--data.shards", few_digits, "--train.epochs", 4, *FEW, *QUICK, *SMOOTH),
        *("--regularize.ema", 0.9, "--optim.name", "lars", "--optim.lars-clip", "--optim.lr", 0.1),
        *("--model.norm", "bn", "--optim.clip-norm", 1, "--optim.schedule", "plateau", "--optim.plateau-patience", 1),
        *("--train.accumulate", 2, "--train.conv1-epochs", 2, "--augment.colour", 0.1, "--train.colour-epochs", 1),
    ]
    undisturbed, stopped = tmp_path / "a", tmp_path / "b"
    assert alone(*recipe, "--run.dir", undisturbed).returncode == 0
    for limit in (10, 44, 57):  # within epochs, and at the end of one
        done = alone(*recipe, "--run.dir", stopped, "--limit-steps", limit)
        assert done.returncode == 0, done.stderr
        assert json.loads((stopped / "exit.json").read_text()) == {"code": 0, "reason": "done", "step": limit}
    done = alone(*recipe, "--run.dir", stopped)
    assert done.returncode == 0, done.stderr
    assert traces(stopped) == traces(undisturbed)
    ends = [sorted((run / "checkpoints").glob("step-*"))[-1] / "average.safetensors" for run in (undisturbed, stopped)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    averages = [
        [{k: line[k] for k in ("step", "top1", "loss")} for line in metrics(run, "val of average")]
        for run in (undisturbed, stopped)
    ]
    assert averages[0] == averages[1]
    assert len(averages[0]) == 4
    # The first convolution is frozen from the third epoch on, everything else still trains.
    second, last = (
        load_file(undisturbed / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (44, 88)
    )
    resting = {name for name in last if torch.equal(last[name], second[name])}
    assert resting == {"features.conv1.weight", "features.conv1.bias"}


def test_an_average_follows_the_weights():
    torch.manual_seed(0)
    net = AlexNet(ModelConfig("small", width=0.1, norm="bn"), classes=3, crop=32)
    average = average_of(net)
    wanted = {n: t.detach().clone().double() for n, t in net.state_dict().items()}
    for number in range(1, 30):
        with torch.no_grad():
            for t in net.state_dict().values():
                t.add_(torch.randn_like(t) if t.is_floating_point() else 1)
        update_average(average, net, 0.9, number)
        decay = min(0.9, (1 + number) / (10 + number))
        for name, t in net.state_dict().items():
            wanted[name] = decay * wanted[name] + (1 - decay) * t if t.is_floating_point() else t.double()
    for name, t in average.state_dict().items():
        torch.testing.assert_close(t.double(), wanted[name], rtol=1e-5, atol=1e-5)
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())


def test_the_better_of_weights_and_average_is_kept_and_both_are_logged(few_digits, tmp_path):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", few_digits, "--run.dir", run, "--train.epochs", 3, "--regularize.ema", 0.5]
    done = alone(*args, *QUICK, "--run.keep-checkpoints", 1)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"val of averaged weights top1=\S+ top5=\S+ images=90", done.stdout.splitlines()[-2])
    assert re.fullmatch(r"val top1=\S+ top5=\S+ images=90", done.stdout.splitlines()[-1])
    tops = {}
    for kind in ("val", "val of average"):
        for line in metrics(run, kind):
            tops[line["step"]] = max(tops.get(line["step"], 0), line["top1"])
    best = max(tops, key=lambda step: tops[step])
    assert (run / "checkpoints" / "best").read_text().strip() == f"step-{best:08d}"


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_overflows_of_scaled_gradients_are_skipped_counted_and_the_schedule_waits(ranks, few_digits, tmp_path):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", few_digits, "--run.dir", run, "--train.epochs", 1, *FEW, *QUICK]
    args += ["--limit-steps", 20, "--regularize.ema", 0.9, "--optim.clip-norm", 5, "--model.width", 0.05]
    done = launch(SCRIPT, *args, ranks=ranks, script=HERE / "scaled.py", precision="fp16")
    assert done.returncode == 0, done.stderr
    lines = metrics(run, "train")
    skipped = [b["overflows"] - a["overflows"] for a, b in zip([{"overflows": 0}, *lines], lines)]
    count = sum(skipped)
    assert 1 < count < 12
    assert set(skipped) == {0, 1}
    # Each update uses the next learning rate, however many steps were skipped before it.
    peak, warmup = 0.02, 3 * STEPS
    updates = 0
    for line, skip in zip(lines, skipped):
        assert line["lr"] == pytest.approx(peak * (updates + 1) / warmup)
        updates += 1 - skip
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["overflows"], state["updates"]) == (20, count, 20 - count)
    assert 2.0**8 < state["scaler"]["scale"] < 2.0**19
    weights = load_file(checkpoint / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize(("compress", "least", "most"), [("none", 0, 1e-6), ("bf16", 1e-4, 1e-2)])
def test_gradients_are_sent_as_asked_for(compress, least, most, tmp_path):
    done = launch(compress, tmp_path / "run", ranks=2, script=HERE / "gradients.py")
    assert done.returncode == 0, done.stderr
    found = re.search(r"error (\S+) rounding (\S+)", done.stdout)
    assert found
    error, rounding = map(float, found.groups())
    assert error < 1e-6
    assert least <= rounding < most


def test_the_launchers_own_accumulation_is_rejected(few_digits, tmp_path):
    args = ["demo", "--data.shards", few_digits, "--run.dir", tmp_path / "run"]
    done = alone(*args, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert done.returncode == 2
    assert "gradient_accumulation_steps=4: use --train.accumulate 4 instead" in the_error(done)


def test_gradients_that_are_infinite_for_ever_end_a_scaled_run(few_digits, tmp_path, monkeypatch):
    monkeypatch.setenv("INFINITE", "1")
    args = ["demo", "--data.shards", few_digits, "--run.dir", tmp_path / "run", *QUICK]
    done = quiet(HERE / "scaled.py", SCRIPT, *args)
    assert done.returncode == 76
    assert "a gradient is not finite at step 7" in the_error(done)


def test_crops_grow_with_the_epochs(few_digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    net = ["--model.name", "modern", "--model.norm", "bn", "--model.width", 0.1]
    args = ["demo", "--data.shards", few_digits, "--run.dir", run, *net, "--train.epochs", 3, "--train.batch", 89]
    args += ["--augment.resize", 128, "--augment.crop", 112, "--loader.threads", 1]
    grow = ["--train.crop-sizes", 72, 96, "--train.crop-until", 1, 2]
    monkeypatch.setenv("PLANT", "sides:0:0")
    done = quiet(PLANTED, SCRIPT, *args, *grow, "--profile", 2, "--limit-steps", 8)
    assert done.returncode == 0, done.stderr
    assert "profile of 2 steps: waiting for data " in done.stdout
    table = (run / "profile" / "table.txt").read_text()
    assert "aten::" in table
    trace = json.loads((run / "profile" / "trace.json").read_text())
    assert len(trace["traceEvents"]) > 100
    rest = quiet(PLANTED, SCRIPT, *args, *grow)
    assert rest.returncode == 0, rest.stderr
    seen = re.findall(r"step (\d+) sees (\d+) x (\d+)", done.stdout + rest.stdout)
    sides = {int(step): (int(height), int(width)) for step, height, width in seen}
    assert sides == {step: [(72, 72), (96, 96), (112, 112)][(step - 1) // 4] for step in range(1, 13)}
    done = alone(*args, "--train.crop-sizes", 16, 96, *grow[3:])
    assert done.returncode == 2
    assert "train.crop_sizes=16 is too small for model.name=modern" in the_error(done)


def test_a_run_ends_where_its_figures_are_good_enough_and_the_same_command_says_so_again(few_digits, tmp_path):
    run = tmp_path / "run"
    args = [
        "demo",
        "--data.shards",
        few_digits,
        "--run.dir",
        run,
        *QUICK,
        "--train.stop-at",
        0.3,
        "--train.eval-every",
        2,
    ]
    done = alone(*args)
    assert done.returncode == 0, done.stderr
    epochs = [line["epoch"] for line in metrics(run, "val")]
    assert epochs == list(range(2, epochs[-1] + 1, 2))
    assert epochs[-1] < 12
    tops = [line["top1"] for line in metrics(run, "val")]
    assert tops[-1] >= 0.3 > max(tops[:-1], default=0)
    again = alone(*args)
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("limit", "shown"), [(3, "no profile: it begins after 5 steps"), (8, "profile of 3 steps: ")])
def test_a_profile_that_is_cut_short_says_so(limit, shown, few_digits, tmp_path):
    args = ["demo", "--data.shards", few_digits, "--run.dir", tmp_path / "run", *QUICK, "--limit-steps", limit]
    done = alone(*args, "--profile", 50)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert (tmp_path / "run" / "profile").exists() == (limit == 8)


def test_a_limit_within_an_epoch_is_evaluated_and_saved_there(few_digits, tmp_path):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", few_digits, "--run.dir", run, *QUICK]
    for limit in (5, 5, 30):
        done = alone(*args, "--limit-steps", limit)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("val top1=")
        assert (run / "checkpoints" / f"step-{limit:08d}").is_dir()
        assert metrics(run, "val")[-1]["step"] == limit
    assert [line["step"] for line in metrics(run, "val")] == [22, 30]  # the first was in the middle of an epoch


def test_a_limit_leaves_the_schedule_of_evaluations_alone(few_digits, tmp_path):
    plateau = ["--optim.schedule", "plateau", "--optim.plateau-patience", 1, "--optim.lr", 1e-9]
    args = ["demo", "--data.shards", few_digits, *QUICK, *plateau, "--optim.warmup-epochs", 0, "--train.eval-every", 2]
    args += ["--train.batch", 64, "--train.epochs", 6, "--run.log-every", 1, "--model.width", 0.05]
    assert alone(*args, "--run.dir", tmp_path / "a").returncode == 0
    done = alone(*args, "--run.dir", tmp_path / "b", "--limit-steps", 15)  # the end of an epoch that is not evaluated
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "b", "val")[-1]["step"] == 15
    assert alone(*args, "--run.dir", tmp_path / "b").returncode == 0
    rates = [[line["lr"] for line in metrics(tmp_path / run, "train")] for run in "ab"]
    assert rates[0] == rates[1]
    assert rates[0][-1] < 1e-9  # it has fallen


def test_a_stop_in_the_evaluation_at_the_limit_leaves_it_to_the_next_start(few_digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", few_digits, *QUICK, "--limit-steps", STEPS, "--run.dir", run]
    monkeypatch.setenv("PLANT", "evaluation:0:0")
    assert quiet(PLANTED, SCRIPT, *args).returncode == 75
    assert json.loads((run / "exit.json").read_text())["step"] == STEPS
    assert not metrics(run, "val")
    done = alone(*args)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(run, "val")] == [STEPS]
    assert (run / "checkpoints" / "best").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.accumulate", 33], "train.accumulate=33: a rank has 64 images a step"),
        (["--train.precision", "tf32"], "train.precision=tf32: needs an NVIDIA GPU"),
        (["--train.precision", "fp16"], "train.precision=fp16"),
        (
            ["--model.name", "fig1", "--model.drop", "conv4"],
            "model.drop=conv4: model.name=fig1 has no such convolution",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_rejected_before_anything_is_written(args, message, few_digits, tmp_path):
    done = alone("demo", "--data.shards", few_digits, "--run.dir", tmp_path / "run", *args)
    assert done.returncode == 2
    assert message in the_error(done)
    assert not (tmp_path / "run").exists()
