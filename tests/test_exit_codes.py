"""Each exit code once by a real process; elsewhere most processes are forks (tests/fork_server.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import fork_server
from tests.conftest import ROOT, run_tool, the_error
from tests.faults.job import PLANTED, SCRIPT, SMALL, Job, losses


@pytest.fixture(autouse=True)
def started_for_real():
    with fork_server.real_processes():
        yield


@pytest.mark.parametrize(
    ("script", "args", "code"),
    [
        ("train/run.py", ["demo", "--train.epoch", 3], 2),
        ("tools/check_shards.py", ["/nowhere"], 65),
        ("tools/check_shards.py", ["{damaged}"], 1),
        ("tools/make_shards.py", ["digits", "--out", "/proc/nowhere"], 74),
    ],
)
def test_a_real_process_exits_with_its_code_and_one_line(script, args, code, few_digits, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in few_digits.iterdir():
        (damaged / path.name).symlink_to(path)
    (damaged / "digits-val-000000.tar").unlink()
    done = run_tool(script, *(str(arg).format(damaged=damaged) for arg in args))
    assert done.returncode == code
    if code != 1:
        the_error(done)


def test_a_real_process_that_is_stopped_by_a_signal_saves_and_exits_with_75(few_digits, tmp_path):
    args = [*SMALL, "--train.epochs", 50, "--data.shards", few_digits, "--run.dir", tmp_path / "run"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, args)], stdout=subprocess.DEVNULL, cwd="/")
    while max(losses(tmp_path / "run"), default=0) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ended["code"] == 75
    assert (tmp_path / "run" / "checkpoints" / f"step-{ended['step']:08d}").is_dir()


@pytest.mark.slow
def test_two_real_ranks_that_are_stopped_by_a_signal_save_and_exit_with_75_and_the_launcher_with_1(
    few_digits, tmp_path
):
    job = Job(tmp_path / "run", *SMALL, "--train.epochs", 50, "--data.shards", few_digits, ranks=2)
    assert job.wait_for(lambda: job.step >= 3)
    job.ranks()[1].send_signal(signal.SIGTERM)
    assert job.wait() == 1
    assert job.exit["code"] == 75
    assert set(re.findall(r"exitcode\s*:\s*(-?\d+)", job.said)) == {"75"}
    assert (tmp_path / "run" / "checkpoints" / f"step-{job.exit['step']:08d}").is_dir()


@pytest.mark.slow  # forked ones with 76 and 77: train/test_run.py, faults/test_stops.py
@pytest.mark.parametrize(("plant", "code", "words"), [("nan:0:2", 76, "at step 2"), ("sleep:0:4", 77, "")])
def test_a_real_process_with_a_fault_exits_with_its_code(plant, code, words, few_digits, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANT", plant)
    args = [*SMALL, "--data.shards", few_digits, "--run.dir", tmp_path / "run", "--guard.hang-seconds", 4]
    argv = [sys.executable, str(PLANTED), str(SCRIPT), *map(str, args)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/")
    assert done.returncode == code, done.stderr
    assert words in the_error(done)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == code


SEEN = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("COLOUR"), __name__, os.getsid(0) == os.getpid()]))
print(open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")[-1], file=sys.stderr)
sys.exit("a reason" if sys.stdin.read() else 7)
"""


@pytest.mark.parametrize(("given", "code"), [("", 7), ("text", 1)])
def test_a_forked_script_sees_what_a_real_one_sees(given, code, tmp_path):
    script = ROOT / "build" / f"seen-{os.getpid()}.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SEEN)
    options = {"cwd": tmp_path, "env": os.environ | {"COLOUR": "red"}, "start_new_session": True, "input": given}
    found = []
    try:
        for mode in (True, False):
            fork_server._Mode.real = mode
            argv = [sys.executable, str(script), "a b", "--c"]
            found.append(subprocess.run(argv, capture_output=True, text=True, **options))
    finally:
        script.unlink()
    real, forked = found
    assert real.returncode == forked.returncode == code
    assert real.stdout == forked.stdout
    assert real.stderr == forked.stderr


def test_a_forked_process_dies_by_its_signal_and_times_out(few_digits, tmp_path):
    fork_server._Mode.real = False
    argv = [sys.executable, str(PLANTED), str(SCRIPT), *map(str, SMALL), "--data.shards", str(few_digits)]
    env = os.environ | {"PLANT": "sleep:0:3"}
    process = subprocess.Popen([*argv, "--run.dir", str(tmp_path / "run")], env=env, stdout=subprocess.DEVNULL)
    while max(losses(tmp_path / "run"), default=0) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
