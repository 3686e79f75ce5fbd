"""The registry of steps, in the order in which they run."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from . import grid, preflight, resident, training
from .base import Json, Proof, answers

GPU_TESTS = "tests/test_gpu.py"


def layers(proof: Proof) -> Json:
    """Step 3: forms of conv1, LRN, pooling and the optimisers, each by itself."""
    import torch

    from tools.bench.layers import items, milliseconds

    torch.backends.cudnn.benchmark = True  # as in training
    device = torch.device(proof.device)
    batch, seconds = (4, 0.02) if proof.tiny else (1024, 0.3)
    checks = (
        (name, partial(milliseconds, prepare, seconds, device))
        for name, prepare in items(device, batch, torch.bfloat16).items()
        if not (proof.tiny and "compiled" in name)
    )
    return answers(proof, checks)


def gpu_tests(proof: Proof) -> Json:
    """Step 4: all tests marked gpu; without a GPU they skip."""
    # addopts: the project's own need plugins that this machine may not have.
    options = ["-m", "gpu", "-q", "-rA", "-o", "addopts=", "-p", "no:cacheprovider"]
    lines = proof.python("pytest", "-m", "pytest", *options, GPU_TESTS).strip().splitlines()
    return {"summary": lines[-1], "tests": [line for line in lines if line.startswith(("PASSED", "SKIPPED"))]}


class Step(NamedTuple):
    """data: the option that it needs, "images" or "cifar". in_tiny: whether a tiny walk includes it; False if another
    step runs the same code with another number."""

    run: Callable[[Proof], Json]
    command: str  # A or B
    limit_seconds: float
    data: str = ""
    in_tiny: bool = True


# The most important figures come first; steps that take long or may crash come last.
STEPS = {
    "preflight": Step(preflight.preflight, "A", 60),
    "train-256": Step(partial(training.synthetic, full_batch=256), "A", 75),
    "train-1024": Step(partial(training.synthetic, full_batch=1024), "A", 60, in_tiny=False),
    "resident": Step(resident.resident, "A", 90),
    "profile": Step(training.profile, "A", 45),
    "layers": Step(layers, "A", 60),
    "tests": Step(gpu_tests, "A", 200),
    "loader": Step(partial(grid.loader_grid, alone=False), "B", 130, "images"),
    "fed-1024": Step(partial(training.fed, full_batch=1024), "B", 75, "images", in_tiny=False),
    "fed-256": Step(partial(training.fed, full_batch=256), "B", 60, "images"),
    "pixels": Step(preflight.real_pixels, "B", 30, "images", in_tiny=False),
    "region": Step(partial(grid.loader_grid, alone=True), "B", 60, "images"),
    "cifar-seed": Step(partial(training.cifar, recipe="seed"), "B", 100, "cifar"),
    "cifar-modern": Step(partial(training.cifar, recipe="modern"), "B", 100, "cifar"),
}
