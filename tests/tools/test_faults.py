"""The sharder is killed, run on a full disk and in slices; its files equal those of one clean run byte for byte.

FAULTS=50 kills it fifty times (`make faults`); five times otherwise.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import open_dataset
from tests.conftest import ROOT, run_tool, the_error
from tests.pipeline.archives import Mini

MAKE = "tools/make_shards.py"
KILLS = int(os.environ.get("FAULTS", 5))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(the command line of a short sharding without --out, the bytes that a clean run writes)."""
    root = tmp_path_factory.mktemp("job")
    args = ("digits", "--side", 130, "--encode", "jpeg", "--size", 128, "--samples-per-shard", 60)
    done = run_tool(MAKE, *args, "--out", root / "clean", "--workers", 1)
    assert done.returncode == 0, done.stderr
    return args, folder_bytes(root / "clean")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_at_random_moments_end_in_the_bytes_of_one_clean_run(job, tmp_path):
    args, clean = job
    out, rng, kills = tmp_path / "d", random.Random(0), 0
    command = [sys.executable, str(ROOT / MAKE), *map(str, args), "--out", str(out), "--workers", "2"]
    for _ in range(50 * KILLS):
        if kills == KILLS:
            break
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.2, 2.5))
        if process.poll() is None:
            process.kill()
            process.wait()
            kills += 1
        else:  # it finished: start from scratch, so that kills occur at all stages
            assert process.returncode == 0
            assert folder_bytes(out) == clean
            shutil.rmtree(out)
    assert kills == KILLS
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert folder_bytes(out) == clean


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_bytes(job, tmp_path, workers):
    args, clean = job
    assert run_tool(MAKE, *args, "--out", tmp_path / "d", "--workers", workers).returncode == 0
    assert folder_bytes(tmp_path / "d") == clean


def test_slices_and_a_merge_give_the_same_bytes(job, tmp_path):
    args, clean = job
    out = tmp_path / "d"
    first = run_tool(MAKE, *args, "--out", out, "--shards", "0:7")
    assert first.returncode == 0, first.stderr
    assert "shards 0:7 of 30 are whole" in first.stdout
    early = run_tool(MAKE, *args, "--out", out, "--merge")
    assert early.returncode == 65
    assert "23 of 30 shards are missing; make them first, with --shards 7:8" in the_error(early)
    others = [
        subprocess.Popen(
            [sys.executable, str(ROOT / MAKE), *map(str, args), "--out", str(out), "--shards", part, "--workers", "1"],
            stdout=subprocess.DEVNULL,
        )
        for part in ("7:16", "16:")
    ]
    assert [process.wait() for process in others] == [0, 0]
    assert not (out / "manifest.json").exists()
    assert run_tool(MAKE, *args, "--out", out, "--merge").returncode == 0
    assert folder_bytes(out) == clean


def test_what_is_whole_is_not_touched_again(job, tmp_path):
    args, _ = job
    out = tmp_path / "d"
    assert run_tool(MAKE, *args, "--out", out, "--shards", "0:5").returncode == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert len(before) == 5
    assert run_tool(MAKE, *args, "--out", out).returncode == 0
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    finished = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    again = run_tool(MAKE, *args, "--out", out)
    assert again.returncode == 0
    assert "train: 1,438 images" in again.stdout
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == finished


@pytest.mark.parametrize("finished", [False, True])
def test_other_options_are_rejected_with_both_values(job, tmp_path, finished):
    args, clean = job
    out = tmp_path / "d"
    if finished:
        out.mkdir()
        for name, data in clean.items():
            (out / name).write_bytes(data)
    else:
        run_tool(MAKE, *args, "--out", out, "--shards", "0:2")
    done = run_tool(MAKE, *args, "--out", out, "--quality", 70)
    assert done.returncode == 2
    what = "a finished dataset" if finished else "an unfinished sharding"
    assert f"holds {what} with options.encoding.quality=90, but this one has 70" in the_error(done)


def test_two_at_once_in_one_folder_do_not_harm_each_other(job, tmp_path):
    args, clean = job
    out = tmp_path / "d"
    command = [sys.executable, str(ROOT / MAKE), *map(str, args), "--out", str(out), "--workers", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    for code, text in zip(codes, said):
        assert code == 0 or (code == 74 and "another process is writing there" in text), text
    if 0 not in codes:
        assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert folder_bytes(out) == clean


@contextlib.contextmanager
def tmpfs(folder: Path, options: str):
    """A temporary filesystem, which ends with the block."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_with_74_and_the_run_resumes_later(job, tmp_path):
    args, clean = job
    with tmpfs(tmp_path / "small", "size=6m") as small:
        done = run_tool(MAKE, *args, "--out", small / "d", "--workers", 2)
        assert done.returncode == 74
        assert re.search(rf"{small}/d/\S+(tar|npz|idx): No space left on device; solve that, and run", the_error(done))
        assert not (small / "d" / "manifest.json").exists()
        whole = sorted((small / "d" / "parts").glob("*.npz"))
        assert whole
        subprocess.run(["mount", "-o", "remount,size=400m", str(small)], check=True)
        before = {p.name: p.stat().st_mtime_ns for p in (small / "d").glob("*.tar")}
        assert run_tool(MAKE, *args, "--out", small / "d", "--workers", 2).returncode == 0
        assert all((small / "d" / path.stem).stat().st_mtime_ns == before[path.stem] for path in whole)
        assert folder_bytes(small / "d") == clean


def test_a_read_only_folder_is_one_line_with_74(job, tmp_path):
    args, _ = job
    with tmpfs(tmp_path / "readonly", "ro") as readonly:
        done = run_tool(MAKE, *args, "--out", readonly / "d")
        assert done.returncode == 74
        assert "Read-only file system" in the_error(done)


def test_a_repaired_image_is_looked_at_again(image_folder, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "in")
    path = root / "train" / "cat" / "0.jpg"
    good = path.read_bytes()
    path.write_bytes(good[:900])
    args = (MAKE, "imagefolder", "--train", root / "train", "--out", tmp_path / "d", "--samples-per-shard", 4)
    done = run_tool(*args)
    assert done.returncode == 65
    assert "bad: train/cat/0.jpg: damaged or truncated image" in done.stdout
    path.write_bytes(good)
    done = run_tool(*args)
    assert done.returncode == 0, done.stderr
    clean = run_tool(*args[:4], "--out", tmp_path / "clean", "--samples-per-shard", 4)
    assert clean.returncode == 0
    assert folder_bytes(tmp_path / "d") == folder_bytes(tmp_path / "clean")


def test_bad_images_that_are_then_allowed_need_no_second_look(image_folder, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "in")
    (root / "train" / "cat" / "0.jpg").write_bytes(b"text")
    args = (MAKE, "imagefolder", "--train", root / "train", "--out", tmp_path / "d", "--samples-per-shard", 4)
    assert run_tool(*args).returncode == 65
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d").glob("*.tar")}
    assert run_tool(*args, "--max-bad-fraction", 0.1).returncode == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d").glob("*.tar")} == before
    assert open_dataset(tmp_path / "d").manifest["quarantine"] == [
        {"image": "train/cat/0.jpg", "reason": "not an image that Pillow reads"}
    ]


def test_the_archives_of_2012_are_killed_too(tmp_path):
    made = Mini(tmp_path / "in", 2012)
    args = (MAKE, "imagenet2012", "--src", made.root, "--no-md5", "--samples-per-shard", 3, "--encode", "raw")
    assert run_tool(*args, "--out", tmp_path / "clean", "--workers", 1).returncode == 0
    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:]), "--out", str(tmp_path / "d")]
    for seconds in (0.5, 0.8, 1.1, 1.4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        process.wait()
        timer.cancel()
    time.sleep(0.6)
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert folder_bytes(tmp_path / "d") == folder_bytes(tmp_path / "clean")
