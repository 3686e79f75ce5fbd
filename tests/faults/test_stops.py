"""Signals, stop files, hangs, non-finite losses, other numbers of ranks, two runs in one folder: real processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import psutil
import pytest

from tests.conftest import ROOT, the_error
from tests.faults.job import PLANTED, SCRIPT, SMALL, STEPS, Job, global_ids, lines, losses, quiet, run, traces
from tests.pipeline.test_progress import read_all, shown


@pytest.fixture(scope="module")
def clean(few_digits, tmp_path_factory):
    """An undisturbed run of two epochs by two ranks."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    return run(folder, *SMALL, "--train.epochs", 2, "--data.shards", few_digits, ranks=2).folder


def two(few_digits) -> list[object]:
    return [*SMALL, "--train.epochs", 2, "--data.shards", few_digits]


SIGNALS = [
    signal.SIGTERM,
    *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGINT)),
]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_one_rank_stops_all_at_one_step_and_resuming_is_exact(number, clean, few_digits, tmp_path):
    folder = tmp_path / "run"
    job = Job(folder, *two(few_digits), ranks=2)
    assert job.wait_for(lambda: job.step >= 6)
    job.ranks()[1].send_signal(number)
    seen = job.step
    job.wait()
    assert job.exit["code"] == 75
    assert job.exit["reason"] == f"stopped by {number.name} at rank 1"
    assert seen <= job.exit["step"] <= seen + 2  # the step in progress, and one that was recorded meanwhile
    assert (folder / "checkpoints" / f"step-{job.exit['step']:08d}").is_dir()
    saved = job.exit["step"]
    assert max(global_ids(folder)) == saved
    assert 'train/run.py", line' not in job.said  # no traceback through our files
    again = run(folder, *two(few_digits), ranks=2)
    assert f"resuming from {folder}/checkpoints/step-{saved:08d}" in again.said
    assert traces(folder) == traces(clean)


def test_a_stop_file_stops_the_run_once(clean, few_digits, tmp_path):
    """It is looked for every second, in which a fast machine trains all steps: one of them takes four."""
    folder = tmp_path / "run"
    job = Job(folder, SCRIPT, *two(few_digits), ranks=2, script=PLANTED, PLANT="busy:0:6")
    assert job.wait_for(lambda: job.step >= 3)
    (folder / "stop").touch()
    job.wait()
    assert job.exit["code"] == 75
    assert "stop" in job.exit["reason"]
    assert not (folder / "stop").exists()
    run(folder, *two(few_digits), ranks=2)
    assert traces(folder) == traces(clean)


def test_one_process_without_launcher_ends_with_75_and_a_second_signal_ends_it_at_once(few_digits, tmp_path):
    folder = tmp_path / "run"
    argv = [sys.executable, str(SCRIPT), *map(str, two(few_digits)), "--run.dir", str(folder)]
    env = os.environ | {"PLANT": "sleep:0:12"}
    for planted, code in (([], 75), ([str(PLANTED)], 128 + signal.SIGTERM)):
        process = psutil.Popen([argv[0], *planted, *argv[1:]], stderr=subprocess.PIPE, text=True, cwd="/", env=env)
        while not (folder / "planted").exists() if planted else max(losses(folder), default=0) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        if planted:  # it sleeps within a step that would never end
            time.sleep(2.5)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == code, said
        assert "Traceback" not in said
    assert json.loads((folder / "exit.json").read_text())["reason"].startswith("a second SIGTERM")


def test_a_signal_within_a_long_call_is_one_signal(few_digits, tmp_path):
    """Python's own handler runs only after the call, seconds after the signal was recorded."""
    folder = tmp_path / "run"
    argv = [sys.executable, str(PLANTED), str(SCRIPT), *map(str, two(few_digits)), "--run.dir", str(folder)]
    env = os.environ | {"PLANT": "busy:0:6"}
    process = psutil.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/", env=env)
    while not (folder / "planted").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert json.loads((folder / "exit.json").read_text())["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True], ids=["torchrun", "nohup"])
def test_a_terminal_that_closes_stops_the_run_unless_nohup_ignores_it(nohup, few_digits, tmp_path):
    """Within a long step, so that what comes after the first SIGHUP could pass for a second signal."""
    folder, planted = tmp_path / "run", 6
    one = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launcher = f"accelerate.commands.launch {one}" if nohup else "torch.distributed.run --standalone --nproc_per_node 1"
    args = [PLANTED, SCRIPT, *SMALL, "--train.epochs", 1, "--data.shards", few_digits, "--run.dir", folder]
    terminal, inside = os.openpty()
    os.set_blocking(terminal, False)
    process = psutil.Popen(
        [*["nohup"] * nohup, sys.executable, "-m", *launcher.split(), *map(str, args)],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        cwd=tmp_path,
        env=os.environ | {"PLANT": f"busy:0:{planted}", "ACCELERATE_USE_CPU": "true"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(inside)
    said = b""
    while not (folder / "planted").exists():
        assert process.poll() is None, said
        with contextlib.suppress(OSError):  # nothing to read, or nohup has left the terminal
            said += os.read(terminal, 1 << 16)
        time.sleep(0.01)
    rank = next(child for child in process.children(recursive=True) if SCRIPT.name in " ".join(child.cmdline()))
    os.close(terminal)
    time.sleep(2.5)  # later than a copy of a signal
    for number in [signal.SIGHUP, signal.SIGHUP, *[signal.SIGTERM] * (not nohup)]:
        rank.send_signal(number)
        time.sleep(0.05)
    process.wait(timeout=90)
    ended = json.loads((folder / "exit.json").read_text())
    if nohup:
        assert ended == {"code": 0, "reason": "done", "step": STEPS}
        assert process.returncode == 0
    else:
        assert ended == {"code": 75, "reason": "stopped by SIGHUP", "step": planted}
        assert (folder / "checkpoints" / f"step-{planted:08d}" / "record.json").exists()


def test_ctrl_c_leaves_one_clean_line_on_the_terminal(few_digits, tmp_path):
    terminal, inside = os.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    args = [*SMALL, "--train.epochs", 50, "--data.shards", few_digits, "--run.dir", tmp_path / "run"]
    argv = [sys.executable, str(SCRIPT), *map(str, args)]
    process = subprocess.Popen(argv, stdin=inside, stdout=inside, stderr=inside, cwd="/")
    while max(losses(tmp_path / "run"), default=0) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.write(inside, b"^C")  # as a terminal does before it sends the signal
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75
    written = read_all(terminal, inside)
    os.close(inside)
    os.close(terminal)
    step = json.loads((tmp_path / "run" / "exit.json").read_text())["step"]
    assert "img/s" in written
    assert shown(written)[-2:] == [
        f"stopped by SIGINT; step {step} is saved, and the same command resumes from there",
        "",
    ]


def test_a_rejected_start_is_printed_once_even_if_local_rank_0_is_late(tmp_path):
    """Launchers end all ranks as soon as the first has ended."""
    job = Job(tmp_path / "run", SCRIPT, "demoo", ranks=2, script=PLANTED, PLANT="late:0:0")
    assert job.wait() == 1
    assert job.said.count("error: ") == 1
    assert "\nerror: unknown preset 'demoo' (did you mean demo?)" in f"\n{job.said}"


def test_a_launcher_that_is_killed_takes_its_ranks_along_and_leaves_the_folder_free(clean, few_digits, tmp_path):
    folder = tmp_path / "run"
    job = Job(folder, *two(few_digits), ranks=2)
    assert job.wait_for(lambda: job.step >= 5)
    ranks = job.ranks()
    job.process.kill()
    again = run(
        folder, *two(few_digits), ranks=2
    )  # started at once: it waits until the processes of the first have ended
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert "resuming from" in again.said
    assert traces(folder) == traces(clean)


def test_a_second_run_in_one_folder_is_rejected_and_the_first_continues(few_digits, tmp_path):
    folder = tmp_path / "run"
    env = os.environ | {"PLANT": "sleep:0:4"}
    argv = [sys.executable, str(PLANTED), str(SCRIPT), *map(str, two(few_digits)), "--run.dir", str(folder)]
    first = psutil.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", env=env)
    try:
        while not losses(folder):
            assert first.poll() is None
            time.sleep(0.02)
        second = quiet(SCRIPT, *two(few_digits), "--run.dir", folder)
        assert second.returncode == 2
        assert f"{folder}: process {first.pid} of {socket.gethostname()} trains there" in the_error(second)
        assert first.is_running()
        assert not (folder / "exit.json").exists()  # the first has not ended
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize(("victim", "world"), [(1, 2), pytest.param(0, 3, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_killed_and_the_others_end_with_77(victim, world, few_digits, tmp_path):
    folder = tmp_path / "run"
    job = Job(folder, *two(few_digits), "--guard.hang-seconds", 4, ranks=world)
    assert job.wait_for(lambda: job.step >= 5)
    ranks = job.ranks()
    ranks[victim].suspend()
    stopped = time.monotonic()
    others = [r for i, r in enumerate(ranks) if i != victim]
    while any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in others):
        assert time.monotonic() - stopped < 4 + 60, job.said
        time.sleep(0.02)
    job.wait()
    assert not ranks[victim].is_running()
    assert job.exit["code"] == 77
    assert f"rank {victim} (process {ranks[victim].pid} on {socket.gethostname()}) gives no sign" in job.exit["reason"]
    stacks = sorted(p.name for p in (folder / "stacks").iterdir())
    assert stacks == [f"rank-{i:05d}.txt" for i in range(world) if i != victim]
    for path in (folder / "stacks").iterdir():
        assert "in train" in path.read_text()
        assert "Thread" in path.read_text()
    codes = set(re.findall(r"exitcode\s*:\s*(-?\d+)", job.said))
    assert codes <= {"77", "-9"}
    assert "77" in codes
    run(folder, *two(few_digits), ranks=world)


def test_a_rank_that_hangs_by_itself_is_named_with_what_it_was_doing(few_digits, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANT", "sleep:1:7")
    job = Job(tmp_path / "run", SCRIPT, *two(few_digits), "--guard.hang-seconds", 4, ranks=2, script=PLANTED)
    job.wait()
    assert job.exit["code"] == 77
    assert re.search(r"the others wait for rank 1 \(process \d+ on .*\), in the forward pass of step 7", job.said)
    assert "faulty" in (tmp_path / "run" / "stacks" / "rank-00001.txt").read_text()


@pytest.mark.parametrize(
    ("policy", "rank"),
    [("stop", 1), ("skip", -1), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("stop", -1), ("skip", 1)))],
)
def test_planted_bad_numbers_are_met_by_all_ranks_alike(policy, rank, clean, few_digits, tmp_path, monkeypatch):
    bad = 11  # three steps after a checkpoint
    monkeypatch.setenv("PLANT", f"nan:{rank}:{bad}")
    folder = tmp_path / "run"
    args = [SCRIPT, *two(few_digits), "--guard.on-bad-numbers", policy]
    job = Job(folder, *args, ranks=2, script=PLANTED)
    code = job.wait()
    undisturbed = losses(clean)
    before = {step: loss for step, loss in losses(folder).items() if step < bad}
    assert before == {step: loss for step, loss in undisturbed.items() if step < bad}
    ids = global_ids(clean)[bad]
    if policy == "stop":
        assert code != 0
        assert (job.exit["code"], job.exit["step"], job.exit["loss"]) == (76, bad, "nan")
        assert job.exit["ids"] == ids
        assert set(re.findall(r"exitcode\s*:\s*(-?\d+)", job.said)) <= {"76", "-15"}
        assert not list((folder / "checkpoints").glob(f"step-{bad:08d}"))
    else:
        assert code == 0, job.said
        (left_out,) = lines(folder, "left out")
        assert (left_out["bad_step"], left_out["ids"]) == (bad, ids)
        assert global_ids(folder) == global_ids(clean)
        after = losses(folder)
        assert bad not in after
        assert after.keys() | {bad} == undisturbed.keys()
        assert after[bad + 1] != undisturbed[bad + 1]
        assert all(loss == loss for loss in after.values())


@pytest.mark.slow
def test_a_run_that_has_skipped_a_step_is_killed_and_resumes_exactly(few_digits, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANT", "nan:-1:11")
    args = [SCRIPT, *two(few_digits), "--guard.on-bad-numbers", "skip"]
    whole = run(tmp_path / "whole", *args, ranks=2, script=PLANTED)
    killed = Job(tmp_path / "killed", *args, ranks=2, script=PLANTED)
    assert killed.wait_for(lambda: killed.step >= 14)
    killed.ranks()[0].kill()
    killed.wait()
    run(killed.folder, *args, ranks=2, script=PLANTED)
    assert traces(killed.folder) == traces(whole.folder)


def test_replay_shows_the_loss_of_any_step_and_of_the_bad_one(clean, few_digits, tmp_path, monkeypatch):
    replay = ROOT / "tools" / "replay.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = [sys.executable, *launcher, str(replay), str(clean), "57"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", env=env)
    assert done.returncode == 0, done.stderr
    assert f"loss {losses(clean)[57]:.9g} (recorded {losses(clean)[57]:.9g}: equal)" in done.stdout
    alone = quiet(replay, clean, 57, "--json", tmp_path / "step.json")
    assert alone.returncode == 0, alone.stderr
    replayed = json.loads((tmp_path / "step.json").read_text())
    assert replayed["ids"] == global_ids(clean)[57]
    assert replayed["loss"] == pytest.approx(losses(clean)[57], abs=1e-4)
    monkeypatch.setenv("PLANT", "nan:0:11")
    folder = tmp_path / "run"
    stopped = quiet(PLANTED, SCRIPT, *two(few_digits), "--run.dir", folder)
    assert stopped.returncode == 76
    again = quiet(PLANTED, replay, folder, 11)
    assert "loss nan (recorded nan: equal)" in again.stdout, again.stderr
    assert "after step 8" in again.stdout
    for step, message in (("0", "steps count from 1"), ("59", "the run has 58 steps")):
        rejected = quiet(replay, folder, step)
        assert rejected.returncode == 2
        assert message in the_error(rejected)
    assert "no run folder" in the_error(quiet(replay, tmp_path / "nowhere", 3))


def test_replay_lowers_the_rate_where_the_runs_evaluations_did(few_digits, tmp_path):
    plateau = ["--optim.schedule", "plateau", "--optim.plateau-patience", 1, "--optim.lr", 1e-5, "--optim.factor", 0.01]
    plateau += ["--optim.warmup-epochs", 0]
    folder = tmp_path / "run"
    args = [SCRIPT, *two(few_digits), *plateau, "--train.epochs", 5, "--train.eval-every", 2, "--run.dir", folder]
    for limit in (["--limit-steps", STEPS], []):  # an evaluation of epoch 1, which the schedule does not see
        done = quiet(*args, *limit)
        assert done.returncode == 0, done.stderr
    assert [line["epoch"] for line in lines(folder, "val")] == [1, 2, 4, 5]
    rate = {line["epoch"]: line["lr"] for line in lines(folder, "train")}
    assert rate[2] == rate[4] > rate[5]
    shutil.rmtree(folder / "checkpoints")  # so that it passes all of the run's evaluations
    again = quiet(ROOT / "tools" / "replay.py", folder, 5 * STEPS - 1)
    assert again.returncode == 0, again.stdout
    assert "after step 0" in again.stdout
    assert ": equal)" in again.stdout


# An initialisation that does not amplify rounding: see tests/train/test_run.py
CALM = ["--optim.lr", 0.003, "--model.dropout", 0.5]


@pytest.mark.parametrize("most", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_resume_with_the_same_ids_and_rates(most, digits, few_digits, tmp_path):
    args = [*two(digits if most == 4 else few_digits), *CALM]
    whole = run(tmp_path / "whole", *args, ranks=most).folder
    folder, begun = tmp_path / "run", 0
    changes = []
    for ranks, until in ((most, 10), *[(most // 2, 22)] * (most > 2), (1, 34), (most, None)):
        job = Job(folder, *args, ranks=ranks)
        if until is not None:
            assert job.wait_for(lambda job=job, until=until: job.step >= until)
            job.ranks()[0].send_signal(signal.SIGTERM)
        job.wait()
        assert job.exit["code"] == (0 if until is None else 75), job.said
        changes.append(begun)
        begun = job.exit["step"]
    assert global_ids(folder) == global_ids(whole)
    assert traces(folder)["rates"] == traces(whole)["rates"]
    ours, theirs = losses(folder), losses(whole)
    since = changes[1]  # the first change of ranks: rounding grows from there (docs/model.md)
    for step in range(1, min(since + 50, len(theirs)) + 1):
        assert abs(ours[step] - theirs[step]) < (1e-4 if step <= since + 20 else 1e-3), (changes, step)


@pytest.mark.slow
def test_torchrun_resumes_with_fewer_nodes_and_restarts_what_was_killed(few_digits, tmp_path):
    """Two agents on one machine stand for two nodes; one of them is killed with its rank."""
    folder = tmp_path / "run"
    args = [*two(few_digits), *CALM]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (
        "-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc_per_node", "1", "--max-restarts", "3",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "elastic",
        "--rdzv_conf", "last_call_timeout=3,timeout=60",
    )  # fmt: skip
    agents = [Job(folder, *args, ranks=1, launcher=launcher)]
    time.sleep(1.0)  # the first holds the rendezvous
    agents.append(Job(folder, *args, ranks=1, launcher=launcher))
    assert agents[0].wait_for(lambda: agents[0].step >= 6)
    described = json.loads((folder / "config.json").read_text())
    assert described["ranks"] == 2
    agents[1].ranks()
    agents[1].end()
    assert agents[0].wait() == 0, agents[0].said
    assert json.loads((folder / "config.json").read_text())["ranks"] == 1
    whole = run(tmp_path / "whole", *args, ranks=2).folder
    assert global_ids(folder) == global_ids(whole)
    assert traces(folder)["rates"] == traces(whole)["rates"]


def test_what_may_change_changes_and_what_may_not_is_rejected_by_field(clean, few_digits, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "run")
    same = [*two(few_digits), "--run.dir", folder]
    allowed = [
        "--loader.prefetch-batches",
        3,
        "--guard.hang-seconds",
        99,
        "--run.log-every",
        7,
        "--train.eval-batch",
        64,
    ]
    done = quiet(SCRIPT, *same, *allowed)
    assert done.returncode == 0, done.stderr
    rejected = quiet(SCRIPT, *same, "--run.seed", 5, "--model.dropout", 0.25)
    assert rejected.returncode == 2
    line = the_error(rejected)
    assert "model.dropout=0.25 but it was 0.5" in line
    assert "run.seed=5 but it was 0" in line


def test_more_epochs_are_rejected_if_they_would_have_changed_a_rate(few_digits, tmp_path):
    large = [*SMALL, "--train.batch", 89, "--data.shards", few_digits]  # four steps an epoch
    cosine = [*large, "--optim.warmup-epochs", 0, "--run.dir", tmp_path / "cosine"]
    assert quiet(SCRIPT, *cosine, "--train.epochs", 1).returncode == 0
    longer = quiet(SCRIPT, *cosine, "--train.epochs", 2)
    assert longer.returncode == 2
    line = the_error(longer)
    assert "train.epochs=2 but it was 1: with optim.schedule=cosine the rate of step 2 " in line
    run = tmp_path / "cosine"
    weights = f"--model.init {run / 'checkpoints' / 'step-00000004'} --run.dir {run}-2"
    assert line.endswith(f"; keep it, or train on from its weights with {weights}")
    args = [*large, "--optim.schedule", "constant", "--run.dir", tmp_path / "run"]
    assert quiet(SCRIPT, *args, "--train.epochs", 1).returncode == 0
    more = quiet(SCRIPT, *args, "--train.epochs", 2)
    assert more.returncode == 0, more.stderr
    assert "1 of 2 epochs done" in more.stdout
    fewer = quiet(SCRIPT, *args, "--train.epochs", 1)
    assert fewer.returncode == 2
    assert "train.epochs=1 but" in the_error(fewer)
