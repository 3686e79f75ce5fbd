"""Runs are killed at seeded moments; the same command then ends in the bits of an undisturbed run.

FAULTS=50 kills fifty times (`make faults`); five times otherwise.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.faults.job import SMALL, Job, disturb, run, traces

KILLS = int(os.environ.get("FAULTS", 5))
WORLDS = (2, 3, 4)
EPOCHS = ["--train.epochs", 3]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", WORLDS)
def test_kills_at_any_moment_end_in_the_bits_of_an_undisturbed_run(ranks, few_digits, tmp_path):
    args = [*SMALL, *EPOCHS, "--data.shards", few_digits]
    undisturbed = traces(run(tmp_path / "clean", *args, ranks=ranks).folder)
    rng = random.Random(ranks)
    quota = KILLS // len(WORLDS) + (WORLDS.index(ranks) < KILLS % len(WORLDS))
    done: list[str] = []
    folder = tmp_path / "run-0"
    while len(done) < quota:
        job = Job(folder, *args, ranks=ranks)
        what = disturb(job, rng)
        code = job.wait()
        if what:
            done.append(what)
        if (folder / "exit.json").exists() and job.exit["code"] == 0:  # the run ended before the signal came
            assert code in (0, 1, -15, -9), (what, job.said)
            assert traces(folder) == undisturbed, done
            folder = tmp_path / f"run-{len(done)}-{rng.random()}"
    run(folder, *args, ranks=ranks)
    assert traces(folder) == undisturbed, done
    print(*done, sep="\n")
