"""The image's entrypoint, run from a checkout: real trainings, real signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import fork_server
from tests.conftest import ROOT
from tests.docker.test_healthcheck import probe
from tests.faults.job import SMALL, lines

ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


class Container:
    """One start of the entrypoint as in a container: with a working directory and a state of its own.

    programs: the folder of its python3; forks do for what gets no signal.
    """

    def __init__(
        self, home: Path, *args: object, launch: str = "", programs: Path = Path(sys.executable).parent
    ) -> None:
        home.mkdir(exist_ok=True)
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        env = os.environ | {"PATH": path, "IMAGENET_EXPRESS_STATE": str(home / "state"), "LAUNCH_CONFIG": launch}
        self.home, self.log = home, home / "log"
        with open(self.log, "w") as log:
            argv = [str(ENTRYPOINT), *map(str, args)]
            self.process = psutil.Popen(argv, stdout=log, stderr=log, cwd=home, env=env, start_new_session=True)

    def end(self, *, seconds: float = 300) -> int:
        """Waits for its end and returns the exit code; asserts that none of its processes is left."""
        try:
            return int(self.process.wait(timeout=seconds))
        finally:
            left = [p for p in psutil.process_iter() if p.pid != os.getpid() and belongs(p, self.home)]
            for process in left:
                process.kill()
            assert not left, self.said

    def reach(self, step: int, folder: Path) -> None:
        deadline = time.monotonic() + 300
        while max((line["step"] for line in lines(folder, "train")), default=0) < step:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    @property
    def said(self) -> str:
        return self.log.read_text()


def belongs(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get("IMAGENET_EXPRESS_STATE") == str(home / "state")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def launches(process: psutil.Process) -> bool:
    try:
        return "accelerate.commands.launch" in process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one, too
        return False


def exit_json(folder: Path) -> dict:
    return json.loads((folder / "exit.json").read_text())


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Path:
    return fork_server.write_programs(tmp_path_factory.mktemp("programs"), "python3")


def small(shards: Path) -> list[object]:
    return ["train", *SMALL, "--data.shards", shards]


LAUNCHES = pytest.mark.parametrize("launch", ["", "cpu2"], ids=["one-process", "two-processes"])


@pytest.mark.slow
@LAUNCHES
def test_a_run_ends_with_0_in_the_preset_s_folder_and_one_on_missing_shards_with_65(launch, few_digits, tmp_path):
    home = tmp_path / "home"
    whole = Container(home, *small(few_digits), "--limit-steps", 3, launch=launch)
    assert whole.end() == 0, whole.said
    folder = home / "runs" / "demo"
    assert exit_json(folder)["code"] == 0
    assert [line["ranks"] for line in lines(folder, "start")] == [2 if launch else 1]
    # The run above left an exit.json with 0: it must not be taken for that of the next run.
    bad = Container(home, *small(tmp_path / "nowhere"), "--limit-steps", 3, launch=launch)
    assert bad.end() == 65, bad.said
    assert str(tmp_path / "nowhere") in bad.said


@pytest.mark.slow
@LAUNCHES
def test_a_signal_saves_and_ends_with_75_and_the_same_command_resumes(launch, few_digits, tmp_path):
    folder, step = tmp_path / "home" / "run", 0
    for name in ("SIGTERM", "SIGINT"):
        job = Container(tmp_path / "home", *small(few_digits), "--run.dir=run", "--train.epochs", 50, launch=launch)
        job.reach(step + 3, folder)
        assert f"step-{step:08d}" in job.said or not step
        assert probe(job.home / "state")[0] == 0
        job.process.send_signal(getattr(signal, name))
        assert job.end() == 75, job.said
        ended = exit_json(folder)
        assert (ended["code"], name in ended["reason"]) == (75, True)
        step = ended["step"]
        assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()


@pytest.mark.slow
def test_a_launcher_that_is_killed_does_not_end_the_container_before_its_ranks_have_saved(few_digits, tmp_path):
    folder = tmp_path / "home" / "run"
    job = Container(tmp_path / "home", *small(few_digits), "--run.dir", folder, "--train.epochs", 50, launch="cpu2")
    job.reach(4, folder)
    (launcher,) = job.process.children()
    launcher.kill()
    assert job.end() == 75, job.said
    assert "the end of its launcher" in exit_json(folder)["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_before_there_are_ranks_means_the_same_command_again(begun, few_digits, tmp_path):
    if begun:  # an earlier start's heartbeat is not this one's
        (tmp_path / "home" / "run" / "heartbeat").mkdir(parents=True)
        (tmp_path / "home" / "run" / "heartbeat" / "rank-00000.json").write_text("{}")
    job = Container(tmp_path / "home", *small(few_digits), "--run.dir", "run", launch="cpu2")
    deadline = time.monotonic() + 300
    while not any(launches(child) for child in job.process.children()):
        assert time.monotonic() < deadline, job.said
        time.sleep(0.02)
    job.process.terminate()
    assert job.end() == 75, job.said


def test_what_the_ranks_reject_comes_out_although_the_launcher_says_1(few_digits, forks, tmp_path):
    folder = tmp_path / "home" / "run"
    folder.mkdir(parents=True)
    (folder / "exit.json").write_text('{"code": 76, "reason": "an earlier start", "step": 5}')
    args = (*small(few_digits), "--run.dir", folder, "--train.batch", 47)
    odd = Container(tmp_path / "home", *args, launch="cpu2", programs=forks)
    assert odd.end() == 2, odd.said
    assert "train.batch=47" in exit_json(folder)["reason"]


REJECTED = {
    "unknown field": (["train", "demo", "--optim.speed", 3], "", 2, "unknown field --optim.speed"),
    "no shards": (["train", "demo"], "cpu2", 2, "data.shards is not set"),
    "unknown launch": (["train", "demo", "--data.shards", "x"], "3gpu", 2, "LAUNCH_CONFIG=3gpu"),
    "a launch without devices": (["train", "demo", "--data.shards", "x"], "", 2, "LAUNCH_ARGS="),
    "a folder in a file": (["train", "demo", "--data.shards", "x", "--run.dir", "log/run"], "cpu2", 74, "log/run"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_start_is_rejected_in_one_line_with_its_own_code(case, forks, tmp_path, monkeypatch):
    args, launch, code, words = REJECTED[case]
    if "LAUNCH_ARGS" in words:
        monkeypatch.setenv("LAUNCH_ARGS", "--num_processes 2")
        if any(Path("/dev").glob("nvidia*")):
            pytest.skip("there is a GPU here")
    rejected = Container(tmp_path / "home", *args, launch=launch, programs=forks)
    assert rejected.end() == code, rejected.said
    (line,) = rejected.said.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert sorted(path.name for path in rejected.home.iterdir()) in (["log"], ["log", "state"])


def test_everything_else_passes_through_with_its_arguments_and_its_code(tmp_path):
    script = "import sys; print(sys.argv[1:]); sys.exit(7)"
    other = Container(tmp_path / "home", "python3", "-c", script, "a b", "--help")
    assert other.end() == 7
    assert "['a b', '--help']" in other.said
    for argument, words in (("--help", "entrypoint.sh shard"), ("", "LAUNCH_CONFIG")):
        asked = Container(tmp_path / "home", *filter(None, [argument]))
        assert asked.end() == 0
        assert words in asked.said
    asked = Container(tmp_path / "home", "train", "--list")
    assert asked.end() == 0
    assert "torchvision" in asked.said


@pytest.mark.slow
def test_smoke_tells_versions_and_devices_and_trains_to_its_end(tmp_path):
    smoke = Container(tmp_path / "home", "smoke", "--limit-steps", 2)
    assert smoke.end() == 0, smoke.said
    assert '"torch": ' in smoke.said
    assert '"gpus": ' in smoke.said
    assert smoke.said.splitlines()[-1].startswith("val top1=")
    shown = Container(tmp_path / "home", "evaluate", "--help")
    assert shown.end() == 0
    assert "tools/evaluate.py" in shown.said
