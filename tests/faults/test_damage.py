"""Damaged checkpoints, full disks, unwritable folders: the newest intact checkpoint is used and reported."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.shards import file_sha256
from tests.conftest import the_error
from tests.faults.job import SCRIPT, SMALL, lines, losses, quiet, traces
from train.checkpoint import Checkpoints

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "record.json")
KEPT = ["--run.keep-checkpoints", 3, "--train.epochs", 1]


@pytest.fixture(scope="module")
def clean(few_digits, tmp_path_factory):
    """One epoch by one process: checkpoints of steps 24, 28 and 29."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    done = quiet(SCRIPT, *SMALL, *KEPT, "--data.shards", few_digits, "--run.dir", folder)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in Checkpoints(folder, keep=3).all()] == [f"step-{n:08d}" for n in (24, 28, 29)]
    return folder


def again(folder: Path, few_digits: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return quiet(SCRIPT, *SMALL, *KEPT, "--data.shards", few_digits, "--run.dir", folder, *args)


def damages(path: Path):
    """Kinds of damage to a file, as (name, function that does it)."""
    data = path.read_bytes()
    for eighth in range(8):
        yield f"cut at {eighth}/8", lambda n=eighth: path.write_bytes(data[: len(data) * n // 8])
    for place in (0, 7, len(data) // 3, len(data) // 2, len(data) - 2):
        for bit in (0, 5):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            yield f"bit {bit} of byte {place}", lambda b=bytes(flipped): path.write_bytes(b)
    yield "removed", path.unlink


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_the_newest_checkpoint_leads_to_the_one_before(name, clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "run")
    path = folder / "checkpoints" / "step-00000029" / name
    whole = path.read_bytes()
    for what, hurt in damages(path):
        hurt()
        saved, passed_over = Checkpoints(folder, keep=3).newest()
        assert saved is not None
        assert saved.path.name == "step-00000028", what
        assert len(passed_over) == 1, what
        assert "step-00000029" in passed_over[0]
        path.write_bytes(whole)
    assert Checkpoints(folder, keep=3).newest()[0].path.name == "step-00000029"


def test_a_run_passes_a_damaged_checkpoint_over_says_so_and_ends_as_before(clean, few_digits, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "run")
    before = traces(clean)
    for name in FILES:
        path = folder / "checkpoints" / "step-00000029" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        done = again(folder, few_digits)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stdout.splitlines() if line.startswith("passed over: ")]
        assert len(said) == 1
        assert "step-00000029" in said[0]
        assert "resuming from" in done.stdout
        assert traces(folder) == before
        assert not list(folder.glob("checkpoints/*.damaged"))  # an intact one has replaced it


def test_where_no_checkpoint_is_whole_the_run_starts_anew_and_keeps_them_aside_until_one_is(
    clean, few_digits, tmp_path
):
    folder = shutil.copytree(clean, tmp_path / "run")
    for path in (folder / "checkpoints").glob("step-*/record.json"):
        path.unlink()
    must = again(folder, few_digits, "--resume")
    assert must.returncode == 2
    assert "no checkpoint to resume from" in must.stderr.splitlines()[-1]
    done = again(folder, few_digits)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed over: ") == 3
    assert "no checkpoint is whole; starting from scratch" in done.stdout
    assert traces(folder) == traces(clean)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_checkpoint_executes_nothing_under_any_name(clean, few_digits, tmp_path):
    """Pickles in place of every file that we read, once with a record that holds their checksums."""
    folder = shutil.copytree(clean, tmp_path / "run")
    fired = tmp_path / "fired"
    bomb = pickle.dumps(Bomb(fired))
    newest = folder / "checkpoints" / "step-00000029"
    for name in FILES[:3]:
        whole, record = (newest / name).read_bytes(), (newest / "record.json").read_bytes()
        (newest / name).write_bytes(bomb)
        (newest / "record.json").write_text(json.dumps(json.loads(record) | {name: file_sha256(newest / name)}))
        assert Checkpoints(folder, keep=3).newest()[0].path.name == "step-00000028"
        (newest / name).write_bytes(whole)
        (newest / "record.json").write_bytes(record)
    for path in [folder / "config.json", folder / "exit.json", folder / "run.lock", folder / "checkpoints" / "latest"]:
        path.write_bytes(bomb)
    for name in FILES:
        (newest / name).write_bytes(bomb)
    (folder / "heartbeat" / "rank-00000.json").write_bytes(bomb)
    done = again(folder, few_digits)
    assert done.returncode == 0, done.stderr
    assert "step-00000028" in done.stdout
    for path in folder.glob("checkpoints/*/*"):
        path.write_bytes(bomb)
    done = again(folder, few_digits)
    assert done.returncode == 0, done.stderr
    assert not fired.exists()
    os.mkdir(fired)
    with pytest.raises(FileExistsError):
        pickle.loads(bomb)  # the pickle does what it should when it is loaded


@contextlib.contextmanager
def tmpfs(folder: Path, size: str):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def checkpoint_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in (folder / "checkpoints" / "step-00000029").iterdir())


def test_a_disk_that_fills_in_mid_save_ends_with_74_and_the_last_good_checkpoint_stays(clean, few_digits, tmp_path):
    with tmpfs(tmp_path / "small", str(int(checkpoint_bytes(clean) * 2.5))) as small:
        done = again(small / "run", few_digits)
        assert done.returncode == 74
        assert "No space left on device" in done.stderr.splitlines()[-1]
        ended = json.loads((small / "run" / "exit.json").read_text())
        assert ended["code"] == 74
        assert [p.name for p in (small / "run" / "checkpoints").glob("step-*")] != []
        saved, passed_over = Checkpoints(small / "run", keep=3).newest()
        assert saved is not None
        assert not passed_over
        assert saved.state["step"] in (4, 8)
        assert not list((small / "run").glob("checkpoints/*.partial"))
        subprocess.run(["mount", "-o", "remount,size=400m", str(small)], check=True)
        done = again(small / "run", few_digits)
        assert done.returncode == 0, done.stderr
        assert f"resuming from {saved.path}" in done.stdout
        assert traces(small / "run") == traces(clean)


def test_a_run_that_may_continues_without_saving_and_says_so(clean, few_digits, tmp_path):
    with tmpfs(tmp_path / "small", str(int(checkpoint_bytes(clean) * 2.5))) as small:
        done = again(small / "run", few_digits, "--guard.on-save-error", "continue")
        assert losses(small / "run") == losses(clean)
        assert done.stderr.count("could not save: ") > 3
        assert "is the last good checkpoint" in done.stderr
        assert lines(small / "run", "val")
        assert done.returncode == 74  # all steps are done, but the last save failed
        saved, _ = Checkpoints(small / "run", keep=3).newest()
        assert saved is not None
        assert saved.state["step"] in (4, 8)


def test_a_run_folder_that_cannot_be_written_is_one_line_with_74(few_digits, tmp_path):
    with tmpfs(tmp_path / "small", "8m") as small:
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        done = again(small / "run", few_digits)
        assert done.returncode == 74
        assert "Read-only file system" in the_error(done)
        done = again(tmp_path / "file", few_digits)
    (tmp_path / "blocked").write_text("")
    done = again(tmp_path / "blocked" / "run", few_digits)
    assert done.returncode == 74
    assert "blocked" in the_error(done)


def test_a_branch_resumes_by_the_same_command(clean, few_digits, tmp_path):
    begun = clean / "checkpoints" / "step-00000024"
    branch = tmp_path / "branch"
    done = again(branch, few_digits, "--resume", begun)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {begun}" in done.stdout
    assert traces(branch)["weights"] == traces(clean)["weights"]
    done = again(branch, few_digits, "--resume", begun)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {branch / 'checkpoints' / 'step-00000029'}" in done.stdout
