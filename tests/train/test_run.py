"""The command as people start it: real processes, with one rank and two, killed, resumed and rejected."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import open_dataset
from pipeline.read import order
from tests.conftest import ROOT, run_tool, the_error
from tests.faults.job import PLANTED, SCRIPT, global_ids

# Losses agree exactly without dropout and at a small learning rate.
EXACT = [
    "--train.batch",
    "16",
    "--model.dropout",
    "0",
    "--optim.lr",
    "0.01",
    "--run.log-every",
    "1",
    "--run.record-ids",
]
TWO = {"ACCELERATE_USE_CPU": "true"}
TWICE = ["--train.epochs", 2, *EXACT]
STEPS = 22  # of an epoch of 356 digits in batches of 16


def command(
    *args: object, ranks: int = 1, script: Path = ROOT / "train" / "run.py", precision: str = "no"
) -> list[str]:
    multi = ["--multi_gpu", "--main_process_port", "0"] if ranks > 1 else []
    fixed = ["--num_machines", "1", "--mixed_precision", precision, "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *multi, "--num_processes", str(ranks), *fixed]
    return [*launch, str(script), *map(str, args)]


def launch(*args: object, ranks: int = 1, **options: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | (TWO if ranks > 1 else {})
    argv = command(*args, *([] if "script" in options else ["--run.no-report"]), ranks=ranks, **options)
    return subprocess.run(argv, capture_output=True, text=True, cwd="/", env=env)


def alone(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the script without a launcher, which would add output of its own; it writes no report page, for time."""
    argv = [sys.executable, str(ROOT / "train" / "run.py"), *map(str, args), "--run.no-report"]
    return subprocess.run(argv, capture_output=True, text=True, cwd="/", env=os.environ | env)


def metrics(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def one(few_digits, tmp_path_factory) -> Path:
    """An undisturbed run of two epochs by one rank."""
    run = tmp_path_factory.mktemp("one") / "run"
    done = launch("demo", "--data.shards", few_digits, "--run.dir", run, "--train.epochs", 2, *EXACT)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    for line in metrics(run, "val"):
        figures = f"top-1 {line['top1']:.2%}, top-5 {line['top5']:.2%}, loss {line['loss']:.4f}"
        assert f"epoch {line['epoch']}/2: val {figures}" in done.stdout.splitlines()
    val = metrics(run, "val")[-1]
    assert last == f"val top1={val['top1']:.4f} top5={val['top5']:.4f} images=90"
    return run


def test_a_run_leaves_its_records(one):
    assert [line["step"] for line in metrics(one, "train")] == list(range(1, 2 * STEPS + 1))
    assert [line["epoch"] for line in metrics(one, "val")] == [1, 2]
    train = metrics(one, "train")[-1]
    assert train["images_per_second"] > 0
    assert 0 <= train["data_wait"] <= 1
    assert 0 <= train["queue_depth"] <= 2
    after, evaluated = metrics(one, "train")[STEPS], metrics(one, "val")[0]["time"]
    began = after["time"] - 16 / after["images_per_second"]
    assert began > evaluated - 0.01  # an epoch's rate does not count the evaluation before it
    assert sorted(p.name for p in (one / "checkpoints").iterdir()) == [
        "best",
        "latest",
        "step-00000022",
        "step-00000044",
    ]
    assert json.loads((one / "exit.json").read_text()) == {"code": 0, "reason": "done", "step": 44}
    described = json.loads((one / "config.json").read_text())
    assert described["config"]["train"]["batch"] == 16
    assert described["environment"]["packages"]["torch"]
    assert list((one / "tensorboard").glob("events.out.tfevents*"))


def test_an_epoch_sees_distinct_samples_and_the_next_another_order(one):
    ids = global_ids(one)
    epochs = [[i for s in range(first, first + STEPS) for i in ids[s]] for first in (1, 1 + STEPS)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == STEPS * 16
    assert epochs[0] != epochs[1]


def test_two_ranks_see_the_same_ids_and_losses_as_one(one, few_digits, tmp_path):
    run = tmp_path / "run"
    done = launch("demo", "--data.shards", few_digits, "--run.dir", run, "--train.epochs", 1, *EXACT, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("images=90")
    assert json.loads((run / "config.json").read_text())["ranks"] == 2
    first_epoch = {s: ids for s, ids in global_ids(one).items() if s <= STEPS}
    assert global_ids(run) == first_epoch
    # One epoch and two have different schedules, but the warm-up of the first is the same.
    pairs = list(zip(metrics(one, "train")[:20], metrics(run, "train")[:20], strict=True))
    for a, b in pairs:
        assert a["lr"] == b["lr"] <= 0.01
        assert abs(a["loss"] - b["loss"]) < 1e-4
    assert len(pairs) == 20


FEW = ["--train.epochs", 3, "--run.log-every", 1, "--run.record-ids"]
# At this rate rounding is not amplified. At 0.01, He's initialisation turns 1e-7 into 1e-2 in 50 steps; torch's does
# not (test_recipes.py).
CALM = [*FEW, "--optim.lr", 0.003]


@pytest.fixture(scope="module")
def calm(digits, tmp_path_factory) -> Path:
    """66 steps by one rank, with dropout."""
    run = tmp_path_factory.mktemp("calm") / "run"
    done = launch("demo", "--data.shards", digits, "--run.dir", run, *CALM)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(run, "train")]
    assert losses[49] < losses[0] - 0.05  # it learns
    return run


def assert_losses_agree(a: Path, b: Path) -> None:
    """Within the required 1e-4 over 20 steps and 1e-3 over 50."""
    losses = [[line["loss"] for line in metrics(r, "train")] for r in (a, b)]
    differences = [abs(x - y) for x, y in zip(*losses, strict=True)]
    assert len(differences) == 3 * STEPS
    assert max(differences[:20]) < 1e-4
    assert max(differences[:50]) < 1e-3


SETUPS = [(4, "off"), (1, "norm"), (1, "model")]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "compiled"), SETUPS, ids=["4", "norm", "model"])
def test_with_dropout_losses_of_ranks_and_of_compiled_nets_agree(ranks, compiled, calm, digits, tmp_path):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", digits, "--run.dir", run, "--train.compile", compiled, *CALM]
    done = launch(*args, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert global_ids(run) == global_ids(calm)
    assert_losses_agree(calm, run)


def test_a_killed_run_resumes_with_the_ids_of_an_undisturbed_one(one, few_digits, tmp_path):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", few_digits, "--run.dir", run, "--train.epochs", 2, *EXACT]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = os.environ | {"PLANT": f"sleep:0:{STEPS + 6}"}  # so that it does not end before it is killed
    argv = command(SCRIPT, *args, script=PLANTED)
    process = subprocess.Popen(argv, **quiet, cwd="/", env=env, start_new_session=True)
    deadline, checkpoint = time.monotonic() + 300, run / "checkpoints" / "step-00000022"
    while not ((run / "planted").exists() and checkpoint.exists()):  # it is saved in the background
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = launch(*args)  # the same command
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {checkpoint}: 1 of 2 epochs done" in resumed.stdout
    assert global_ids(run) == global_ids(one)
    for field in ("step", "lr", "loss"):
        assert [m[field] for m in metrics(run, "train")] == [m[field] for m in metrics(one, "train")]
    finished = alone(*args, "--resume")
    assert finished.stdout.splitlines()[-1] == resumed.stdout.splitlines()[-1]


def test_a_run_that_is_killed_within_an_epoch_resumes_there_with_fewer_ranks(one, few_digits, tmp_path):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", few_digits, "--run.dir", run, "--train.epochs", 2, "--run.save-every", 5, *EXACT]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = os.environ | TWO | {"PLANT": "sleep:-1:33"}  # so that it does not end before it is killed
    process = subprocess.Popen(command(SCRIPT, *args, ranks=2, script=PLANTED), **quiet, cwd="/", env=env)
    checkpoint = run / "checkpoints" / "step-00000030"  # the eighth step of the second epoch
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ranks = psutil.Process(process.pid).children(recursive=True)  # each leads a session of its own
    for victim in (*ranks, process):
        victim.kill()
    process.wait()
    resumed = launch(*args, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resuming from .*: 1 of 2 epochs and \d+ of 22 steps done", resumed.stdout)
    assert global_ids(run) == global_ids(one)
    ours, theirs = metrics(run, "train"), metrics(one, "train")
    assert [m["step"] for m in ours] == [m["step"] for m in theirs]
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], abs=0.03)  # ranks round differently


def test_resuming_another_run_is_rejected_with_both_values(one, few_digits):
    for flag, value, message in (
        ("--train.batch", 32, "train.batch=32 but it was 16"),
        ("--run.seed", 5, "run.seed=5 but it was 0"),
        ("--model.width", 0.5, "model.width=0.5 but it was 0.25"),
        ("--optim.weight-decay", 0, r"optim.weight_decay=0.0 but it was 0.0005"),
    ):
        done = alone("demo", "--data.shards", few_digits, "--run.dir", one, "--train.epochs", 2, *EXACT, flag, value)
        assert done.returncode == 2
        assert re.search(message, the_error(done))


def test_going_back_in_a_run_folder_is_rejected_and_its_end_is_reported(one, few_digits, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    args = ["demo", "--data.shards", few_digits, "--train.epochs", 2, *EXACT]
    done = alone(*args, "--run.dir", run, "--resume", run / "checkpoints" / "step-00000022")
    assert done.returncode == 2
    assert "has step-00000044 already; to branch off" in the_error(done)
    # exit.json records this attempt, not the finished one before it.
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    branch = tmp_path / "branch"
    done = alone(*args, "--run.dir", branch, "--resume", run / "checkpoints" / "step-00000022")
    assert done.returncode == 0, done.stderr
    theirs = global_ids(one)
    assert global_ids(branch) == {step: theirs[step] for step in range(STEPS + 1, 2 * STEPS + 1)}


@pytest.mark.slow
def test_going_on_with_fewer_ranks_keeps_each_step_once(one, few_digits, tmp_path):
    run = tmp_path / "run"
    args = ["demo", "--data.shards", few_digits, "--run.dir", run, "--train.epochs", 2, *EXACT]
    done = launch(*args, ranks=2)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run / "checkpoints" / "step-00000044")
    done = launch(*args, "--resume")
    assert done.returncode == 0, done.stderr
    assert global_ids(run) == global_ids(one)


def test_a_bad_sample_of_one_rank_is_one_line_of_that_rank(few_digits, tmp_path):
    root = shutil.copytree(few_digits, tmp_path / "copy")
    split = open_dataset(root).split("train")
    bad = int(order.epoch_order(np.cumsum([s.samples for s in split.shards]), seed=0, epoch=0, batch=16)[3, 10])
    row = split.index[bad]
    path = root / split.shards[row["shard"]].name
    data = bytearray(path.read_bytes())
    data[row["offset"] + 300] ^= 1
    path.write_bytes(data)
    run = tmp_path / "run"
    done = launch("demo", "--data.shards", root, "--run.dir", run, "--train.batch", 16, ranks=2)
    assert done.returncode != 0
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ") and "checksum" in text]
    assert line.startswith("error: [rank 1] ")
    assert f"sample {bad} " in line
    assert json.loads((run / "exit.json").read_text())["code"] == 65
    assert 'train/run.py", line' not in done.stderr  # no traceback through our files


def test_gloo_asked_for_by_one_process_is_no_error(few_digits, tmp_path):
    args = [
        "--data.shards",
        few_digits,
        "--run.dir",
        tmp_path / "run",
        "--limit-steps",
        1,
        "--run.ddp-backend",
        "gloo",
    ]
    done = alone("demo", *args)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nope"], 2, "unknown preset 'nope'; presets: demo, seed, paper"),
        (["demo", "--train.epoch", "3"], 2, "unknown field --train.epoch (did you mean train.epochs?)"),
        (["demo", "--data.shards", "/nowhere"], 65, "/nowhere: no such shard folder"),
        (
            ["demo", "--data.shards", "{few_digits}", "--train.batch", "5000"],
            2,
            "train.batch=5000 is more than the 356",
        ),
        (
            ["demo", "--data.shards", "{few_digits}", "--overfit", "357"],
            2,
            "overfit=357: the split train has 356 images",
        ),
        (["demo", "--data.shards", "{few_digits}", "--augment.crop", "8"], 2, "augment.crop=8 is too small"),
        (["demo", "--data.shards", "{few_digits}", "--model.init", "a.onnx"], 65, "a.onnx: ONNX holds no trainable"),
        (["demo", "--data.shards", "{few_digits}", "--resume", "/nowhere"], 65, "/nowhere: no such checkpoint"),
        (["demo", "--data.shards", "{few_digits}", "--resume"], 2, "no checkpoint to resume from"),
        (
            ["demo", "--data.shards", "{few_digits}", "--data.val-split", "test"],
            65,
            "no split 'test'; it has train, val",
        ),
    ],
)
def test_bad_input_is_one_line_and_its_exit_code(few_digits, tmp_path, args, code, message):
    args = [a.format(few_digits=few_digits) for a in args]
    done = alone(*args, "--run.dir", tmp_path / "run")
    assert done.returncode == code
    assert message in the_error(done)


def test_a_run_folder_that_cannot_be_looked_at_is_one_line(few_digits, tmp_path):
    done = alone("demo", "--data.shards", few_digits, "--run.dir", tmp_path / ("x" * 300))
    assert done.returncode == 74
    assert the_error(done) == f"error: {tmp_path / ('x' * 300)}: File name too long"
    (tmp_path / "file").write_text("")
    done = alone("demo", "--data.shards", few_digits, "--run.dir", tmp_path / "file")
    assert done.returncode == 2
    cure = f"exists, but is no folder; use --run.dir {tmp_path}/file-2"
    assert the_error(done) == f"error: {tmp_path}/file: {cure}"


def test_each_epoch_tells_its_accuracy_and_the_end_the_best_which_evaluate_and_report_take(one, few_digits, tmp_path):
    """Uses the run of two epochs; it is over, so that only its last figures are counted again."""
    run = shutil.copytree(one, tmp_path / "my run")
    val = metrics(run, "val")
    best = max(val, key=lambda line: line["top1"])
    checkpoint = run / "checkpoints" / f"step-{best['step']:08d}"
    *_, shown, then, last = alone("demo", "--data.shards", few_digits, "--run.dir", run, *TWICE).stdout.splitlines()
    assert last.startswith(f"val top1={val[-1]['top1']:.4f} ")
    assert shown == f"best: top-1 {best['top1']:.2%} in epoch {best['epoch']}, {checkpoint}"
    assert then == f"next: python tools/evaluate.py '{run}' --data.shards {few_digits}"
    done = run_tool(*shlex.split(then.removeprefix("next: python ")))
    assert f"model   {checkpoint} (" in done.stdout
    assert f"top-1   {best['top1']:.2%} " in done.stdout
    shown = f"best: top-1 {best['top1']:.2%} on 90 validation images in epoch {best['epoch']}\n"
    assert shown in run_tool("tools/report.py", run).stdout


def test_a_second_experiment_is_offered_a_free_folder(one, few_digits, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    (tmp_path / "run-2").mkdir()
    done = alone("demo", "--data.shards", few_digits, "--run.dir", run, *TWICE, "--run.seed", 5)
    assert the_error(done).endswith(
        f"run.seed=5 but it was 0. Give the value it was trained with, or start another run with --run.dir {run}-3"
    )


def test_a_diverged_run_ends_with_its_own_code(few_digits, tmp_path):
    run = tmp_path / "run"
    done = alone("demo", "--data.shards", few_digits, "--run.dir", run, "--optim.lr", "1e6", "--train.batch", 16)
    assert done.returncode == 76
    assert "Traceback" not in done.stderr
    ended = json.loads((run / "exit.json").read_text())
    assert ended["code"] == 76
    assert len(ended["ids"]) == 16
    assert re.search(
        rf"error: the loss is \S+?(, a gradient is not finite)? at step {ended['step']}; tools/replay.py {run}"
        rf" {ended['step']} shows it again; try a lower optim.lr than 1000000.0",
        done.stderr,
    )


def test_a_batch_that_does_not_divide_over_the_ranks_is_rejected_once(few_digits, tmp_path):
    done = launch("demo", "--data.shards", few_digits, "--run.dir", tmp_path / "run", "--train.batch", 63, ranks=2)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ours == ["error: train.batch=63 does not divide over 2 ranks; use a multiple of 2, such as 64"]


def test_ranks_that_do_not_know_of_each_other_are_rejected(few_digits, tmp_path):
    done = alone("demo", "--data.shards", few_digits, "--run.dir", tmp_path / "run", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "WORLD_SIZE=2 but Accelerate runs 1 process" in the_error(done)
    assert not (tmp_path / "run").exists()
    done = alone("demo", LOCAL_RANK="2")
    assert done.returncode == 2
    assert "LOCAL_RANK=2: no launcher sets that; unset LOCAL_RANK" in the_error(done)


def test_it_also_starts_as_a_module_from_the_root():
    done = subprocess.run([sys.executable, "-m", "train.run", "nope"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "unknown preset 'nope'" in the_error(done)
