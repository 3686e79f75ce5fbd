"""Two hosts as network namespaces joined by a cable that can be pulled: `make netns-test`, as root."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import Digits
from tests.cluster.test_preflight import the_line
from tests.cluster.two import Hosts, a_port
from tests.conftest import ROOT
from tests.faults.job import SMALL, Job, run, traces
from train.preflight import FINGERPRINT

pytestmark = pytest.mark.skipif(
    not os.environ.get("NETNS_TEST"), reason="make netns-test runs it: as root, with network namespaces, in minutes"
)
HANG = 6


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("hosts")) as two:
        yield two


@pytest.fixture(scope="module")
def flags(few_digits) -> list[object]:
    return [*SMALL, "--data.shards", few_digits, "--train.epochs", 3, "--guard.hang-seconds", HANG]


@pytest.fixture(scope="module")
def one_host(flags, tmp_path_factory) -> Path:
    """The same run by two processes of one host, undisturbed."""
    return run(tmp_path_factory.mktemp("whole") / "run", *flags, ranks=2).folder


def both_end(jobs: list[Job]) -> list[int]:
    return [job.wait(seconds=150) for job in jobs]


def test_two_hosts_train_with_the_ids_and_losses_of_one(hosts, flags, one_host, tmp_path):
    jobs = hosts.start(tmp_path / "run", *flags, port=a_port())
    assert both_end(jobs) == [0, 0], jobs[0].said + jobs[1].said
    assert traces(tmp_path / "run") == traces(one_host)
    where = {path.name: path.read_text() for path in (tmp_path / "run" / "heartbeat").glob("*.json")}
    assert "ie-a" in where["rank-00000.json"]
    assert "ie-b" in where["rank-00001.json"]


def test_a_short_cut_costs_nothing_but_time(hosts, flags, one_host, tmp_path):
    jobs = hosts.start(tmp_path / "run", *flags, port=a_port())
    assert jobs[0].wait_for(lambda: jobs[0].step >= 10)
    hosts.link("down")
    try:
        time.sleep(1)  # packets are being sent
        stood = jobs[0].step
        time.sleep(HANG / 3)
        assert jobs[0].step == stood
    finally:
        hosts.link("up")
    assert both_end(jobs) == [0, 0], jobs[0].said + jobs[1].said
    assert traces(tmp_path / "run") == traces(one_host)


def test_a_long_cut_ends_in_77_on_both_sides_and_the_job_resumes_exactly(hosts, flags, one_host, tmp_path):
    folder = tmp_path / "run"
    jobs = hosts.start(folder, *flags, port=a_port())
    assert jobs[0].wait_for(lambda: jobs[0].step >= 37)  # in the second epoch, after a checkpoint of its own
    hosts.link("down")
    try:
        cut = time.monotonic()
        assert all(both_end(jobs)), jobs[0].said + jobs[1].said
        assert time.monotonic() - cut < 60
    finally:
        hosts.link("up")
    assert jobs[0].exit["code"] == 77
    assert f"no step for {HANG} seconds" in jobs[0].exit["reason"]
    assert "check the network between ie-a and ie-b" in jobs[0].exit["reason"]
    for job in jobs:
        assert "exitcode: 77" in job.said.replace(" ", "").replace("exitcode:", "exitcode: "), job.said
        assert jobs[0].exit["reason"] in job.said
    stacks = sorted(path.name for path in (folder / "stacks").iterdir())
    assert stacks == ["rank-00000.txt", "rank-00001.txt"]
    jobs = hosts.start(folder, *flags, port=a_port())
    assert both_end(jobs) == [0, 0], jobs[0].said + jobs[1].said
    assert "resuming from" in jobs[0].said
    assert traces(folder) == traces(one_host)


def test_another_version_other_shards_and_another_command_are_rejected_by_the_hosts_name(hosts, flags, tmp_path):
    other_code = tmp_path / "checkout"
    for package in ("model", "pipeline", "train"):
        shutil.copytree(ROOT / package, other_code / package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(other_code / "train" / "optim.py", "a") as file:
        file.write("# another version\n")
    other_shards = tmp_path / "shards"
    build(Plan(Digits(side=36), Options(seed=1)), other_shards, workers=1)
    cases = [
        ({1: ["--data.shards", other_shards]}, {}, f"host ie-b differs from host ie-a: {FINGERPRINT}=", 65),
        ({1: ["--optim.lr", 0.013]}, {}, "host ie-b differs from host ie-a: optim.lr=0.013 but ", 2),
        ({0: ["--optim.lr", 0.013]}, {}, "host ie-b differs from host ie-a: optim.lr=", 2),
        ({1: ["--data.shards", tmp_path / "none"]}, {}, f"host ie-b: {tmp_path}/none: no such shard folder", 65),
        ({1: ["--optim.lrr", 1]}, {}, "lrr", 2),
        ({}, {1: other_code / "train" / "run.py"}, "host ie-b differs from host ie-a: the code of pipeline, model", 2),
    ]
    for others, scripts, said, code in cases:
        jobs = hosts.start(tmp_path / "run", *flags, port=a_port(), others=others, scripts=scripts)
        assert all(both_end(jobs)), said
        for job in jobs:
            assert said in the_line(job), job.said
            assert f"exitcode  : {code} " in job.said
        assert not (tmp_path / "run").exists()


def test_a_run_folder_that_the_other_host_does_not_share_is_rejected(hosts, flags, tmp_path):
    jobs = hosts.start(tmp_path / "run", *flags, port=a_port(), folders={1: tmp_path / "own"})
    assert all(both_end(jobs))
    for job in jobs:
        assert "host ie-b does not see what host ie-a writes there; choose a folder on storage" in the_line(job)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "own").exists()
