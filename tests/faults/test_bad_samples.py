"""Damaged samples in training: replaced alike at any number of ranks and after a stop, limited over all ranks."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from pipeline import open_dataset
from pipeline.read import order
from tests.faults.job import BATCH, SMALL, STEPS, Job, global_ids, lines, run, traces
from tests.pipeline.test_bad_samples import damage, replaced

FLAGS = [*SMALL, "--train.epochs", 2, "--run.save-every", 4]


def ids_of(root, epoch: int) -> np.ndarray:
    """(STEPS, BATCH): those of whole shards."""
    sizes = np.array([shard.samples for shard in open_dataset(root).split("train").shards])
    return order.epoch_order(np.cumsum(sizes), seed=0, epoch=epoch, batch=BATCH)


@pytest.fixture(scope="module")
def broken(few_digits, tmp_path_factory):
    """(a damaged copy, its bad training samples): of rank 0 in step 3 and of rank 1 in step 7, with two neighbours.

    Two validation images are bad as well, the last one among them.
    """
    root = shutil.copytree(few_digits, tmp_path_factory.mktemp("broken") / "digits")
    steps = ids_of(root, 0)
    bad = {int(steps[2, 1]), int(steps[6, -1]), *((int(steps[6, -1]) + i) % 356 for i in (1, 2))}
    damage(root, bad)
    damage(root, [3, 89], split="val")
    return root, bad


@pytest.fixture(scope="module")
def clean(broken, tmp_path_factory):
    """An undisturbed run of it by two ranks."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    return run(folder, *FLAGS, "--data.shards", broken[0], "--loader.max-bad-samples", 6, ranks=2)


def test_ids_of_all_ranks_follow_the_rule_and_evaluation_counts_n_of_n(broken, clean):
    root, bad = broken
    for epoch in (0, 1):
        for step, ids in enumerate(ids_of(root, epoch)):
            assert global_ids(clean.folder)[epoch * STEPS + step + 1] == replaced(ids, bad, range(356))
    said = [line for line in clean.said.splitlines() if "bad sample" in line]
    assert len(said) == len({re.search(r"(\w+)-\d+\.tar: sample \d+", line)[0] for line in said}) == 6
    assert [(line["images"], line["bad_samples"]) for line in lines(clean.folder, "val")] == [(88, 2)] * 2
    assert clean.said.splitlines()[-1].endswith(" images=88 of 90")
    counts = [line["bad_samples"] for line in lines(clean.folder, "train")]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert counts[:3] == [0, 0, 1]


def test_a_run_that_stops_resumes_with_the_same_samples_without_reading_the_bad_ones(broken, clean, tmp_path):
    root, bad = broken
    args = [*FLAGS, "--data.shards", root, "--loader.max-bad-samples", 6]
    first = run(tmp_path / "run", *args, "--limit-steps", STEPS + 8, ranks=2)
    assert first.said.count("bad sample") == 6
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step-{STEPS + 8:08d}" / "state.json").read_text())
    assert (state["loader"]["bad"], state["val_bad"]) == (sorted(bad), [3, 89])
    second = run(tmp_path / "run", *args, ranks=2)
    assert "bad sample" not in second.said
    assert traces(tmp_path / "run") == traces(clean.folder)
    rejected = Job(tmp_path / "run", *args[:-1], 3, ranks=2)
    rejected.wait()
    assert f"4 bad samples, more than loader.max_bad_samples=3: {', '.join(map(str, sorted(bad)))}\n" in rejected.said


@pytest.mark.slow
def test_one_rank_reads_what_two_read(broken, clean, tmp_path):
    alone = run(tmp_path / "run", *FLAGS, "--data.shards", broken[0], "--loader.max-bad-samples", 6, ranks=1)
    assert global_ids(alone.folder) == global_ids(clean.folder)
    assert alone.said.count("bad sample") == 6


def test_ranks_stop_together_at_the_step_in_which_there_are_too_many(broken, tmp_path):
    """Step 3 finds one at rank 0, step 7 three at rank 1."""
    job = Job(tmp_path / "run", *FLAGS, "--data.shards", broken[0], "--loader.max-bad-samples", 2, ranks=2)
    job.wait()
    assert (job.exit["code"], job.exit["step"]) == (65, 6)
    assert {len(ids) for ids in global_ids(job.folder).values()} == {BATCH}
    assert max(global_ids(job.folder)) == 6
    (error,) = [line for line in job.said.splitlines() if line.startswith("error: ")]
    too_many = r"\d bad samples, more than loader.max_bad_samples=2: [\d, ]+; .*\.tar: sample \d+ .*checksum"
    assert re.search(too_many, error)
    assert len(re.findall(r"exitcode  : 65", job.said)) == 2  # torchrun's list of the ranks
