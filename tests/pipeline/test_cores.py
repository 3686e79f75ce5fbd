"""Usable cores, and how ranks divide them."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from pipeline import cores


def test_a_control_groups_quota_limits_the_cores(tmp_path):
    root, process = tmp_path / "cgroup", tmp_path / "self"
    (root / "pod" / "job").mkdir(parents=True)
    process.write_text("0::/pod/job\n")
    assert cores.cgroup_quota(root, process) is None
    (root / "pod" / "job" / "cpu.max").write_text("max 100000\n")
    assert cores.cgroup_quota(root, process) is None
    (root / "pod" / "cpu.max").write_text("250000 100000\n")
    assert cores.cgroup_quota(root, process) == 2.5
    process.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    (root / "cpu" / "job").mkdir(parents=True)
    (root / "cpu" / "job" / "cpu.cfs_quota_us").write_text("-1")
    (root / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000")
    assert cores.cgroup_quota(root, process) is None
    (root / "cpu" / "job" / "cpu.cfs_quota_us").write_text("150000")
    assert cores.cgroup_quota(root, process) == 1.5
    assert cores.cgroup_quota(root, tmp_path / "nowhere") is None
    assert 1 <= cores.usable_cores() <= os.cpu_count()


def test_ranks_share_the_cores_near_their_gpus():
    node0, node1 = list(range(8)), list(range(8, 16))
    allowed = range(16)
    assert cores.divide([node0, node0, node1, node1], allowed) == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]
    ]  # fmt: skip
    assert cores.divide([node0, node1], range(4, 12)) == [[4, 5, 6, 7], [8, 9, 10, 11]]  # a scheduler's limits
    assert cores.divide([node0, None], allowed) is None  # unknown: nobody is pinned
    assert cores.divide([node0, node1], range(8)) is None  # no core of the second node is ours
    assert cores.divide([node0] * 9, allowed) is None  # more ranks than cores


@given(
    st.lists(st.sampled_from([tuple(range(6)), tuple(range(6, 16))]), min_size=1, max_size=6),
    st.sets(st.integers(0, 15)),
)
def test_no_core_is_given_to_two_ranks(near, allowed):
    shares = cores.divide(near, sorted(allowed))
    if shares is not None:
        given_away = [core for share in shares for core in share]
        assert len(given_away) == len(set(given_away))
        assert set(given_away) <= allowed
        assert all(set(share) <= set(cores_) for share, cores_ in zip(shares, near))


def test_the_cores_near_a_device_are_read_from_the_system(tmp_path):
    device = tmp_path / "0000:3b:00.0"
    device.mkdir()
    assert cores.near_device("0000:3B:00.0", tmp_path) is None
    (device / "local_cpus").write_text("00000001,00000d0f\n")
    (device / "numa_node").write_text("-1\n")  # one node only
    assert cores.near_device("0000:3B:00.0", tmp_path) is None
    (device / "numa_node").write_text("0\n")
    assert cores.near_device("0000:3B:00.0", tmp_path) == [0, 1, 2, 3, 8, 10, 11, 32]


def test_a_pinned_rank_has_its_cores_for_itself():
    code = (
        "import os; from pipeline import cores; c = sorted(os.sched_getaffinity(0))[:1]; cores.pin(c);"
        "print(sorted(os.sched_getaffinity(0)) == c, cores.threads_per_rank(4))"
    )
    import subprocess
    import sys

    from tests.conftest import ROOT

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["True", "1"]
