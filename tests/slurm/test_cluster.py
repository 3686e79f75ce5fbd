"""Sharding, training, stopping and staging on a real Slurm of two nodes: `make slurm-test`, about eight minutes.

All runs are compared with an undisturbed one of two processes on this machine, without Slurm.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_tool
from tests.faults.job import SMALL, losses, run, traces
from tests.slurm.cluster import PACKAGES, SLURMD_TIMEOUT, BatchJob, facts, missing, running, wait_until

pytestmark = [
    pytest.mark.skipif(
        "SLURM_TEST" not in os.environ, reason="starts a Slurm of its own, as root: run by make slurm-test"
    ),
    pytest.mark.timeout(600),  # one waits for a time limit of whole minutes
]
SCRIPTS = ROOT / "docker" / "slurm"


@pytest.fixture(scope="module")
def cluster():
    if found := missing():
        pytest.fail(f"not here: {', '.join(found)}; as root on Debian: apt-get install {' '.join(PACKAGES)}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with running(folder) as started:
            yield started
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The digits in several shards, because a damaged one must not be the first that is read."""
    out = tmp_path_factory.mktemp("digits")
    done = run_tool("tools/make_shards.py", "digits", "--samples-per-shard", 200, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def flags(shards: Path) -> list[object]:
    return [*SMALL, "--train.epochs", 2, "--data.shards", shards]


@pytest.fixture(scope="module")
def clean(shards, tmp_path_factory) -> Path:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))  # as many as the nodes have
    pinned = ("taskset", "--cpu-list", cores)
    return run(tmp_path_factory.mktemp("clean") / "run", *flags(shards), ranks=2, prefix=pinned).folder


@pytest.fixture
def job(cluster, shards, tmp_path):
    """Starts training jobs, which end with their test."""
    started = []

    def start(*args: object, **options) -> BatchJob:
        started.append(BatchJob(cluster, tmp_path / "run", *(args or flags(shards)), **options))
        return started[-1]

    yield start
    for each in started:
        cluster.call("scancel", "--quiet", each.id)
    wait_until(lambda: not cluster.call("squeue", "-h"), seconds=60, what=cluster.tell)


def ended(job: BatchJob) -> dict:
    return json.loads((job.run / "exit.json").read_text())


def same_files(left: Path, right: Path) -> bool:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return content(left) == content(right)


# Sharding


def test_an_array_of_slices_with_its_merge_gives_the_bytes_of_a_local_run(cluster, shards, tmp_path):
    out = tmp_path / "out"
    make = ["digits", "--samples-per-shard", 200, "--out", out]
    wide = ["--cpus-per-task", 3]  # of a node's four, so that both nodes are needed
    submit = [SCRIPTS / "shard.sh", "-n", 3, *wide, "--chdir", tmp_path, "--", *make]
    slices, merge = re.findall(r"(?:slices|merge) (\d+)", cluster.call(*submit))
    wait_until(lambda: facts(cluster, merge)["JobState"] == "COMPLETED", seconds=120, what=lambda: tell(tmp_path))
    of_slices = [facts(cluster, f"{slices}_{n}") for n in range(3)]
    assert [each["JobState"] for each in of_slices] == ["COMPLETED"] * 3, tell(tmp_path)
    assert {each["BatchHost"] for each in of_slices} == {"n1", "n2"}
    assert same_files(out, shards)


def test_a_slice_that_is_requeued_in_the_middle_resumes_and_the_merge_waits_for_it(cluster, tmp_path):
    make = ["digits", "--side", 260, "--encode", "jpeg", "--size", 256, "--samples-per-shard", 60, "--out"]
    assert run_tool("tools/make_shards.py", *make, tmp_path / "here", "--workers", 1).returncode == 0
    out = tmp_path / "out"
    submit = [SCRIPTS / "shard.sh", "-n", 2, "--chdir", tmp_path, "--", *make, out]
    slices, merge = re.findall(r"(?:slices|merge) (\d+)", cluster.call(*submit))
    wait_until(lambda: bool(list(out.glob("parts/*.npz"))), seconds=60, what=lambda: tell(tmp_path), each=0.02)
    cluster.call("scontrol", "requeue", f"{slices}_0")
    whole = [path.stem for path in out.glob("parts/*.tar.npz")]
    made = {name: (out / name).stat().st_mtime_ns for name in whole}
    assert made
    wait_until(lambda: facts(cluster, merge)["JobState"] == "COMPLETED", seconds=120, what=lambda: tell(tmp_path))
    assert facts(cluster, f"{slices}_0")["Restarts"] == "1"
    assert {name: (out / name).stat().st_mtime_ns for name in made} == made
    assert same_files(out, tmp_path / "here")


def test_a_slice_that_fails_ends_with_its_code_and_takes_the_merge_along(cluster, tmp_path):
    submit = [SCRIPTS / "shard.sh", "-n", 2, "--chdir", tmp_path, "--", "digits", "--side", 3, "--out", tmp_path / "o"]
    slices, merge = re.findall(r"(?:slices|merge) (\d+)", cluster.call(*submit))
    wait_until(
        lambda: facts(cluster, merge)["JobState"] == "CANCELLED", seconds=120, what=lambda: facts(cluster, merge)
    )
    assert facts(cluster, f"{slices}_0")["ExitCode"] == "2:0", tell(tmp_path)
    assert "error: --side 3" in tell(tmp_path)
    assert not (tmp_path / "o").exists()


def tell(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("shard-*.out")))


# Training


def test_two_nodes_train_from_staged_shards_as_two_processes_of_one_machine_do(job, clean, shards, tmp_path):
    staged = tmp_path / "local"
    two = job(env={"STAGE": str(staged)})
    assert two.wait() == 0, two.said
    assert ended(two)["code"] == 0
    config, alone = (json.loads((folder / "config.json").read_text()) for folder in (two.run, clean))
    assert config["shards"] == str(staged)
    # With another number of threads, sums are rounded in another order.
    assert config["threads"]["threads_a_rank"] == alone["threads"]["threads_a_rank"]
    assert traces(two.run) == traces(clean)
    # Both nodes have this machine's disk, and ask at once.
    assert two.said.count("MB copied") == 1
    assert two.said.count("holds it already") == 1
    assert two.restarts == 0


@pytest.mark.parametrize("how", [[], ["--batch"]], ids=["to steps", "to the script"])
def test_a_signal_saves_requeues_and_resumes_exactly(how, cluster, job, clean):
    it = job()
    it.wait_for(lambda: max(losses(it.run), default=0) >= 6)
    cluster.call("scancel", "--signal=TERM", *how, it.id)
    it.wait_for(lambda: it.facts["JobState"] == "PENDING" and it.restarts == 1)
    assert ended(it)["code"] == 75
    # Before the end: how many steps there are in the second after which a stop file is seen is up to the machine.
    assert 6 <= ended(it)["step"] < max(losses(clean)), it.said
    assert it.wait() == 0, it.said
    assert it.said.count("resuming from") == 1
    assert traces(it.run) == traces(clean)


def test_a_signal_by_which_srun_ends_the_ranks_costs_what_was_not_saved(cluster, job, clean):
    """With --full the signal reaches srun too, which then ends all ranks at once."""
    it = job()
    it.wait_for(lambda: max(losses(it.run), default=0) >= 6)
    cluster.call("scancel", "--signal=TERM", "--full", it.id)
    it.wait_for(lambda: it.facts["JobState"] == "PENDING" and it.restarts == 1)
    assert it.wait() == 0, it.said
    assert f"resuming from {it.run}/checkpoints/step-0000000" in it.said
    assert traces(it.run) == traces(clean)


def test_the_signal_before_the_time_limit_does_the_same(job, clean):
    """The ranks are suspended until the signal comes, so that they are still training."""
    it = job(time="3")  # minutes; the signal comes two before the end, or up to half a minute earlier
    it.wait_for(lambda: max(losses(it.run), default=0) >= 6)
    ranks = it.ranks()
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    it.wait_for(lambda: "SIGUSR1: the run is asked to save" in it.said)
    for rank in ranks:
        rank.resume()
    it.wait_for(lambda: it.restarts == 1)
    assert ended(it)["code"] == 75
    assert it.wait() == 0, it.said
    assert traces(it.run) == traces(clean)


def test_what_the_user_has_cancelled_does_not_come_back(cluster, job):
    it = job()
    it.wait_for(lambda: max(losses(it.run), default=0) >= 6)
    cluster.call("scancel", it.id)
    it.wait_for(lambda: it.facts["JobState"] == "CANCELLED")
    wait_until(lambda: not cluster.call("squeue", "-h"), seconds=60, what=cluster.tell)
    time.sleep(10)  # longer than a requeued job waits here
    assert it.facts["JobState"] == "CANCELLED"
    assert it.restarts == 0


@pytest.mark.parametrize(("code", "early"), [(2, False), (65, False), (65, True), (76, False)])
def test_what_would_fail_again_is_not_requeued_and_its_code_is_the_jobs(code, early, job, shards, tmp_path):
    args = flags(shards)
    if early:  # rejected before there is a run folder
        args += ["--data.shards", tmp_path / "nowhere"]
    elif code == 2:
        args += ["--optim.lrr", 1]
    elif code == 65:
        damaged = shutil.copytree(shards, tmp_path / "damaged")
        tar = damaged / "digits-train-000003.tar"
        tar.write_bytes(tar.read_bytes().replace(b"\xff\xd9", b"\xff\xd8"))  # the end of every JPEG
        args += ["--data.shards", damaged]
    if code == 76:
        args += ["--optim.lr", 1e30, "--optim.warmup-epochs", 0]
    it = job(*args, nodes=1 if code == 76 else 2)
    assert it.wait() == code, it.said
    assert it.restarts == 0
    assert it.facts["JobState"] == "FAILED"
    if code != 2:  # rejected before there is a run
        assert ended(it)["code"] == code


def test_a_lost_node_costs_what_was_not_saved_and_the_job_resumes_when_it_is_back(cluster, job, clean):
    it = job()
    it.wait_for(lambda: max(losses(it.run), default=0) >= 10)
    cluster.lose("n2")
    it.wait_for(lambda: it.facts["JobState"] == "PENDING" and it.restarts == 1)
    time.sleep(SLURMD_TIMEOUT)
    assert it.facts["JobState"] == "PENDING"  # it asks for two nodes
    cluster.start_node("n2")
    assert it.wait() == 0, it.said
    assert "resuming from" in it.said
    assert traces(it.run) == traces(clean)


# Staging


def test_a_full_disk_ends_the_job_with_74_and_one_line(cluster, job, shards, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        it = job(env={"STAGE": str(small / "shards"), "TRIES": "1"})
        assert it.wait() == 74, it.said
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert "MB are needed and 1 MB are free" in it.said
    assert not it.run.joinpath("exit.json").exists()
