"""Step 4: tests marked gpu, two ranks on one device, a kill and the same command again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from pipeline.errors import ExpressError

from .base import ROOT, Proof, tail
from .training import command, records, train

SAVED_AT = 7  # a step; the kill comes after it and before the next save


def gpu_tests(proof: Proof) -> dict[str, Any]:
    """All tests marked gpu; without a GPU they skip."""
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    # addopts: the project's own need plugins that this machine may not have.
    options = ["-m", "gpu", "-q", "-rA", "-o", "addopts=", "-p", "no:cacheprovider"]
    pytest = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(pytest, cwd=ROOT, capture_output=True, text=True, timeout=proof.seconds_left())
    if done.returncode:
        raise ExpressError(tail(done.stdout + done.stderr, lines=30))
    lines = done.stdout.strip().splitlines()
    return {"summary": lines[-1], "tests": [line for line in lines if line.startswith(("PASSED", "SKIPPED"))]}


def digits(proof: Proof) -> Path:
    from pipeline.write.build import Options, Plan, build
    from pipeline.write.sources import Digits

    out = proof.scratch / "digits"
    build(Plan(Digits(side=36), Options()), out, workers=1)  # returns at once if they are there
    return out


def demo_flags(proof: Proof, run: Path) -> list[object]:
    """Some steps on the digits; the same for every run here, so that they can be compared."""
    steps = 14 if proof.tiny else 60  # a GPU may take 20 of them before a kill arrives
    flags = ["demo", "--data.shards", digits(proof), "--run.dir", run, "--limit-steps", steps]
    flags += ["--train.epochs", 3, "--optim.lr", 0.01, "--optim.warmup-epochs", 0]
    flags += ["--run.log-every", 1, "--run.save-every", SAVED_AT, "--run.record-ids", "--run.ddp-backend", "gloo"]
    return [*flags, "--run.deterministic"]


def undisturbed(proof: Proof) -> Path:
    """A run of one rank, made by the first step that needs it."""
    run = proof.scratch / "undisturbed"
    if not (run / "exit.json").is_file():
        train(proof, *demo_flags(proof, run))
    return run


# Ranks


def two_ranks(proof: Proof) -> dict[str, Any]:
    """Two ranks on the one device, joined by gloo, see the ids and nearly the losses of one rank."""
    one, two = undisturbed(proof), proof.scratch / "two-ranks"
    train(proof, *demo_flags(proof, two), ranks=2)
    if recorded_ids(one) != recorded_ids(two):
        raise ExpressError("one rank and two ranks saw different ids")
    losses = list(zip(recorded_losses(one), recorded_losses(two), strict=True))[:20]
    difference = max(abs(a - b) for a, b in losses)
    return {
        "steps": len(recorded_ids(one)),
        "ids": "equal",
        f"largest_loss_difference_in_{len(losses)}_steps": difference,
    }


def recorded_ids(run: Path) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for path in sorted((run / "ids").glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(line["ids"])
    return steps


def recorded_losses(run: Path) -> list[float]:
    return [line["loss"] for line in records(run, "train")]


# A kill


def resume(proof: Proof) -> dict[str, Any]:
    """A run that is killed between two saves, and the same command again, against an undisturbed run."""
    whole, run = undisturbed(proof), proof.scratch / "killed"
    killed_after = train_and_kill(proof, demo_flags(proof, run), run)
    train(proof, *demo_flags(proof, run))
    expected, losses = recorded_losses(whole), recorded_losses(run)
    if killed_after >= len(expected):
        raise ExpressError(f"the run had ended, at step {killed_after}, before the kill arrived")
    if (expected, weights(whole)) != (losses, weights(run)):
        first = next((step for step, (a, b) in enumerate(zip(expected, losses), 1) if a != b), None)
        raise ExpressError(f"killed after step {killed_after}: not the undisturbed run's bits, from step {first} on")
    return {"killed_after_step": killed_after, "steps": len(losses), "weights_and_losses": "equal"}


def train_and_kill(proof: Proof, flags: list[object], run: Path) -> int:
    """Kills the run some steps after its first save; returns the last step that it has recorded."""
    saved = run / "checkpoints" / f"step-{SAVED_AT:08d}"
    with Popen(command(*flags), stdout=DEVNULL, stderr=DEVNULL, env=proof.environment()) as process:
        while process.poll() is None and not (saved.is_dir() and len(recorded_losses(run)) >= SAVED_AT + 3):
            time.sleep(0.001)
        process.kill()
    return len(recorded_losses(run))


def weights(run: Path) -> list[str]:
    from pipeline.shards import file_sha256

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return [file_sha256(newest / f"{name}.safetensors") for name in ("model", "optimizer")]
