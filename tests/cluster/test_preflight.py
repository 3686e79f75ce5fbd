"""All ranks compare data, settings and versions before they join (train/preflight.py): two local launchers."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.write.build import Options, Plan, build
from pipeline.write.sources import Digits
from tests.cluster.two import a_port, machines
from tests.conftest import ROOT
from tests.faults.job import SMALL, Job
from train import preflight
from train.preflight import FINGERPRINT, verdict

FACTS = {FINGERPRINT: "1", "torch": "2.14.1", "optim.lr": 0.01, "train.batch": 64}


def ranks(*facts: dict, per_host: int = 1) -> list[dict]:
    return [{"rank": i, "host": f"h{i // per_host}", "facts": f} for i, f in enumerate(facts)]


@given(st.integers(1, 40), st.integers(1, 8))
def test_alike_is_fine_at_any_size(world, per_host):
    assert verdict(ranks(*[copy.deepcopy(FACTS) for _ in range(world)], per_host=per_host)) == (0, "")


@given(st.data(), st.integers(2, 12), st.sampled_from(sorted(FACTS)))
def test_one_that_differs_is_named_with_both_values(data, world, name):
    odd = data.draw(st.integers(0, world - 1))
    facts = [copy.deepcopy(FACTS) for _ in range(world)]
    facts[odd][name] = "another"
    code, reason = verdict(ranks(*facts))
    assert code == (65 if name == FINGERPRINT else 2)
    assert reason.startswith(f"host h{odd or 1} differs from host h0")
    both = (FACTS[name], "another") if odd == 0 else ("another", FACTS[name])
    assert f": {name}={both[0]} but {both[1]}; start the same command" in reason
    assert (f"(as {world - 2} other host" in reason) == (odd == 0 and world > 2)


def test_a_field_that_one_version_lacks_and_ranks_of_one_host_are_named():
    fewer = {n: v for n, v in FACTS.items() if n != "optim.lr"}
    assert ": optim.lr=None but 0.01;" in verdict(ranks(FACTS, fewer))[1]
    code, reason = verdict(ranks(FACTS, {**FACTS, "torch": "2.10"}, per_host=2))
    assert code == 2
    assert reason.startswith("rank 1 of host h0 differs from rank 0 of host h0: torch=2.10 but 2.14.1")
    many = dict.fromkeys("abcdef", "x")
    assert "; d=x but None and 2 more; " in verdict(ranks({}, many))[1]


def test_an_error_of_one_host_is_reported_with_its_name_and_of_all_without():
    bad = {"rank": 1, "host": "h1", "error": "/data: no such shard folder", "code": 65}
    assert verdict([*ranks(FACTS), bad]) == (65, "host h1: /data: no such shard folder")
    assert verdict([{**bad, "rank": i, "host": f"h{i}"} for i in range(3)]) == (65, "/data: no such shard folder")


def test_the_code_digest_is_of_every_line(monkeypatch, tmp_path):
    for package in ("model", "pipeline", "train"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(preflight.environment, "ROOT", tmp_path)
    before = preflight.code_digest()
    with open(tmp_path / "pipeline" / "read" / "rng.py", "a") as file:
        file.write("# \n")
    after = preflight.code_digest()
    assert before != after
    monkeypatch.setattr(preflight.environment, "ROOT", ROOT)
    assert preflight.code_digest() == before


def test_the_interface_of_an_address_is_found_and_the_loopback_is_none():
    assert preflight.interface_to("127.0.0.1", 1) is None
    assert preflight.interface_to("no.such.host.invalid", 1) is None


def test_a_host_that_knows_itself_as_the_loopback_takes_the_default_routes_interface(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "debian"}.items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(preflight, "interface_to", lambda host, port: None if host == "debian" else "eth0")
    preflight.name_interface()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth0", "=eth0")


@pytest.mark.parametrize(
    ("world", "found", "given", "gloo", "nccl"),
    [
        (4, "eth1", {}, "eth1", "=eth1"),
        (4, "eth1", {"NCCL_SOCKET_IFNAME": "ib0"}, "eth1", "ib0"),
        (4, "eth1", {"GLOO_SOCKET_IFNAME": "eth2"}, "eth2", "=eth2"),
        (4, "eth1", {"GLOO_SOCKET_IFNAME": "eth2", "NCCL_SOCKET_IFNAME": "^docker"}, "eth2", "^docker"),
        (4, None, {}, None, None),  # the loopback, or an address that cannot be resolved
        (2, "eth1", {}, None, None),  # a single host
    ],
)  # fmt: skip
def test_gloo_and_nccl_get_the_interface_to_rank_0_unless_it_is_set(monkeypatch, world, found, given, gloo, nccl):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what name_interface sets is removed after the test
        monkeypatch.delenv(name)
    job = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (job | given).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(preflight, "interface_to", lambda host, port: found)
    preflight.name_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == gloo
    assert os.environ.get("NCCL_SOCKET_IFNAME") == nccl


# Two launchers


@pytest.fixture(scope="module")
def other_digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("other")
    build(Plan(Digits(side=36), Options(seed=1)), out, workers=1)
    return out


def start(folder: Path, of_first: list, of_second: list, **env: str) -> list[Job]:
    """The jobs of two hosts; the environment is set for the second only."""
    port = a_port()
    launchers = [machines(host, address="127.0.0.1", port=port) for host in range(2)]
    first = Job(folder, *of_first, ranks=2, launcher=launchers[0])
    return [first, Job(folder, *of_second, ranks=2, launcher=launchers[1], **env)]


def the_line(job: Job) -> str:
    """Our one error line, without the lines that launchers add."""
    (line,) = [line for line in job.said.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("packages", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_differs_between_hosts_is_rejected_by_both_before_anything_is_written(
    packages, few_digits, other_digits, tmp_path
):
    shown = tmp_path / "site" / "numpy-0.1.dist-info"
    shown.mkdir(parents=True)
    (shown / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    own, other = ([*SMALL, "--data.shards", shards, "--train.epochs", 1] for shards in (few_digits, other_digits))
    cases = [
        (other, {}, [f"{FINGERPRINT}=", " but "]),
        ([*own, "--optim.lr", 0.013], {}, ["optim.lr=0.013 but 0.0"]),
        ([*SMALL, "--data.shards", tmp_path / "nowhere"], {}, ["nowhere: no such shard folder"]),
        ([*own, "--optim.lrr", 0.02], {}, ["lrr"]),
    ]
    if packages:  # real processes, which see another installation
        cases = [(own, {"PYTHONPATH": str(shown.parent)}, ["numpy=0.1 but "])]
    for second, env, said in cases:
        jobs = start(tmp_path / "run", own, second, **env)
        codes = [job.wait(seconds=120) for job in jobs]
        assert all(codes), said
        for words in said:
            assert words in the_line(jobs[0]), jobs[0].said
            assert words in the_line(jobs[1]), jobs[1].said
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_own_affairs_of_a_host_are_left_to_it(few_digits, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(few_digits, elsewhere)
    own = [*SMALL, "--train.epochs", 1]
    jobs = start(
        tmp_path / "run",
        [*own, "--data.shards", few_digits],
        [*own, "--data.shards", elsewhere, "--loader.threads", 2, "--loader.no-verify"],
    )
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said + jobs[1].said


@pytest.mark.slow
def test_a_rejection_is_reported_although_launchers_end_the_ranks_that_wait(tmp_path):
    """Two ranks a host: when one has ended, its launcher sends SIGTERM to the other, which may be rank 0."""
    folder, port = tmp_path / "run", a_port()
    folder.mkdir()
    args = [*SMALL, "--data.shards", tmp_path / "nowhere"]
    launchers = [machines(host, address="127.0.0.1", port=port, per_host=2) for host in range(2)]
    jobs = [Job(folder, *args, ranks=4, launcher=launcher) for launcher in launchers]
    assert all(job.wait() for job in jobs)
    for job in jobs:
        assert "nowhere: no such shard folder" in the_line(job)
        assert "stopped before" not in job.said
    assert jobs[0].exit["code"] == 65
