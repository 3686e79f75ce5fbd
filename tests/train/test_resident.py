"""Runs on the resident backend: the bits of the same run on the portable one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.job import SMALL, Job, run, traces

ARGS = [*SMALL, "--train.epochs", 2, "--data.partitions", 4]


def chain(folder: Path, backend: str, shards: Path, ranks: dict[int, int]) -> dict[str, object]:
    """A run that resumes at other numbers of ranks. ranks: {step at which each ends: ranks}."""
    for last, world in ranks.items():
        flags = ["--loader.backend", backend, "--data.shards", shards, "--limit-steps", last]
        run(folder, *ARGS, *flags, ranks=world)
    return traces(folder)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_ends_in_the_bits_of_an_undisturbed_portable_one(ranks, few_digits, tmp_path):
    args = [*ARGS, "--data.shards", few_digits]
    portable = run(tmp_path / "portable", *args, "--loader.backend", "portable", ranks=ranks)
    resident = [*args, "--loader.backend", "resident"]
    job = Job(tmp_path / "resident", *resident, ranks=ranks)
    assert job.wait_for(lambda: job.step > 6), job.said
    job.end()
    job.wait()
    done = run(job.folder, *resident, ranks=ranks)
    assert "resuming from" in done.said
    assert "loader: resident" in done.said
    assert traces(done.folder) == traces(portable.folder)


@pytest.mark.slow
def test_a_run_that_continues_with_fewer_ranks_has_the_bits_of_the_portable_one(few_digits, tmp_path):
    found = {
        backend: chain(tmp_path / backend, backend, few_digits, {10: 4, 21: 2, 58: 1})
        for backend in ("portable", "resident")
    }
    assert found["resident"] == found["portable"]
    assert len(found["portable"]["ids"]) == 58


def test_a_run_that_does_not_fit_ends_before_anything_is_loaded(few_digits, tmp_path):
    flags = ["--loader.backend", "resident", "--loader.resident-memory", 1e-9, "--data.shards", few_digits]
    job = Job(tmp_path / "run", *ARGS, *flags, ranks=1)
    assert job.wait() != 0
    assert "error: loader.backend=resident: a rank's images take 0.00035 GB, but only 2" in job.said
    assert "loading" not in job.said
