"""Runs on the resident backend: the bits of the same run on the portable one."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline import Loader
from pipeline.read import resident
from pipeline.settings import updated
from tests.faults.job import SCRIPT, SMALL, Job, run, traces
from train.build import reason_for_memory
from train.config import Config
from train.run_folder import read_json
from train.step import Stepper

WITH_A_GPU = Path(__file__).with_name("with_a_gpu.py")
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
    saved = job.folder / "checkpoints"
    assert job.wait_for(lambda: job.step > 6 and any(re.fullmatch(r"step-\d+", p.name) for p in saved.glob("*")))
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
    assert re.search(r"error: loader\.backend=resident: a rank's images take 0\.00035 GB, but only \d", job.said)
    assert "loading" not in job.said


def test_an_error_of_one_rank_while_the_run_is_built_is_the_error_of_all(few_digits, tmp_path):
    """Another process may hold the memory of one GPU. Local rank 0 prints one line, whichever rank has the error."""
    args = [SCRIPT, *ARGS, "--loader.backend", "resident", "--data.shards", few_digits]
    job = Job(tmp_path / "run", *args, script=WITH_A_GPU, ranks=2, FREE="1000000000 1000")
    assert job.wait() != 0
    (line,) = re.findall(r"^error: .*$", job.said, re.MULTILINE)
    assert re.match(
        r"error: loader\.backend=resident: a rank's images take .* but only 8e-07 GB of cpu may be used", line
    )
    assert not job.folder.exists()


# What `auto` chooses on GPUs

IMAGES, WEIGHTS = 356 * 36 * 36 * 3, 1_000_000  # bytes that a rank holds of the digits; and of the net below
EXACTLY = 2 * IMAGES + WEIGHTS  # what must be free: the images take half of what the velocities leave


@pytest.mark.parametrize(
    ("settings", "here", "elsewhere", "device", "chosen"),
    [
        ({}, EXACTLY, EXACTLY, "cuda:0", True),
        ({}, EXACTLY - 1, EXACTLY, "cuda:0", False),
        ({}, EXACTLY, EXACTLY - 1, "cuda:0", False),  # another rank has less
        ({}, 0, 0, "cuda:0", False),
        ({}, EXACTLY, EXACTLY, "cpu", False),
        ({"train.epochs": 2}, EXACTLY, EXACTLY, "cuda:0", False),
        ({"limit_steps": 100}, EXACTLY, EXACTLY, "cuda:0", False),
        ({"loader.backend": "portable"}, EXACTLY, EXACTLY, "cuda:0", False),
        ({"loader.resident_memory": 0.25}, EXACTLY, EXACTLY, "cuda:0", False),
        ({"loader.resident_memory": 0.25}, 2 * EXACTLY, 2 * EXACTLY, "cuda:0", True),
    ],
)
def test_auto_keeps_images_that_fit_in_half_of_what_a_step_leaves(
    settings, here, elsewhere, device, chosen, few_digits, monkeypatch
):
    passes, config = [], updated(Config(), {"train.epochs": 3} | settings)

    def settle_buckets(loader, crop):
        passes.append(crop)
        if not here:
            raise torch.OutOfMemoryError("a step needs all of it")

    net = nn.Linear(250_000, 1, bias=False)
    accelerator = SimpleNamespace(device=torch.device(device), no_sync=contextlib.nullcontext)
    stepper = SimpleNamespace(net=net, bare=net, accelerator=accelerator, settle_buckets=settle_buckets)
    agreement = SimpleNamespace(largest=lambda images, lacking: [images, max(lacking, WEIGHTS - elsewhere)])
    # Nothing else may be read from the device before a step's peak is allocated.
    monkeypatch.setattr(resident, "free_memory", lambda device, ranks: here if passes else 10**18)
    with Loader(few_digits, batch=8) as loader:
        reason = reason_for_memory(config, stepper, agreement, loader)
    assert reason.startswith("auto: images take 0.00138 GB of the ") == bool(reason) == chosen
    assert passes in ([], [config.augment.crop])


def test_auto_takes_no_memory_for_images_that_would_not_fit_anyway(few_digits, monkeypatch):
    stepper = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cuda:0")))  # without a pass
    agreement = SimpleNamespace(largest=lambda *values: list(values))
    monkeypatch.setattr(resident, "free_memory", lambda device, ranks: 2 * IMAGES - 1)
    with Loader(few_digits, batch=8) as loader:
        assert reason_for_memory(updated(Config(), {"train.epochs": 3}), stepper, agreement, loader) == ""


def test_auto_leaves_images_of_several_sizes_where_they_are(shards):
    stepper = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cuda:0")))
    with Loader(shards["keep"], batch=4) as loader:
        assert reason_for_memory(updated(Config(), {"train.epochs": 3}), stepper, None, loader) == ""


def test_a_pass_without_enough_memory_leaves_no_trace(few_digits):
    def runs_out(loss):
        loss.backward()
        raise torch.OutOfMemoryError

    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    stepper = Stepper.__new__(Stepper)
    stepper.config, stepper.bare, stepper.net = Config(), net, net
    stepper.accelerator = SimpleNamespace(backward=runs_out, process_index=0)
    stepper.optimizer = torch.optim.SGD(net.parameters())
    with Loader(few_digits, batch=8) as loader, pytest.raises(torch.OutOfMemoryError):
        stepper.settle_buckets(loader, 32)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("free", "backend"), [("9e9 9e9", "resident"), ("9e9 9", "portable")])
def test_ranks_choose_alike_and_compute_what_they_would_compute_anyway(free, backend, few_digits, tmp_path):
    free = " ".join(str(int(float(each))) for each in free.split())
    args = [*SMALL, "--train.epochs", 3, "--data.partitions", 4, "--data.shards", few_digits]
    portable = run(tmp_path / "portable", *args, "--loader.backend", "portable", ranks=2)
    auto = run(tmp_path / "auto", SCRIPT, *args, script=WITH_A_GPU, ranks=2, FREE=free)
    described = read_json(auto.folder / "config.json", cure="")
    assert (described["backend"], described["config"]["loader"]["backend"]) == (backend, "auto")
    assert described["backend_reason"] in auto.said
    assert ("loading train" in auto.said) == (backend == "resident")
    assert traces(auto.folder) == traces(portable.folder)
