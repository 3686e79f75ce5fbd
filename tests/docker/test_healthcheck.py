"""The health probe's result for heartbeats that are recent, old, of another run, or missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROBE = ROOT / "docker" / "healthcheck.py"


def probe(state: Path, *args: object) -> tuple[int, str]:
    env = os.environ | {"IMAGENET_EXPRESS_STATE": str(state)}
    done = subprocess.run([sys.executable, str(PROBE), *map(str, args)], capture_output=True, text=True, env=env)
    assert not done.stderr
    return done.returncode, done.stdout.strip()


@pytest.fixture
def training(tmp_path):
    """Writes the state of a training of age `began`, in seconds. beats: rank → (host, seconds since its heartbeat)."""

    def start(began: float, **beats: tuple[str, float]) -> Path:
        folder = tmp_path / "a run"
        (folder / "heartbeat").mkdir(parents=True)
        for rank, (host, age) in beats.items():
            beat = {"host": host, "time": time.time() - age}
            (folder / "heartbeat" / f"rank-{rank}.json").write_text(json.dumps(beat))
        (folder / "heartbeat" / "rank-00009.json").write_text("{")
        (tmp_path / "state").write_text(f"{time.time() - began:.0f} {folder}\n")
        return tmp_path / "state"

    return start


HERE = socket.gethostname()
CASES = {
    "young": (500, {"r0": (HERE, 3)}, 0, "healthy: the youngest heartbeat"),
    "one of two is young": (500, {"r0": (HERE, 400), "r1": (HERE, 3)}, 0, "healthy"),
    "old": (500, {"r0": (HERE, 400)}, 1, "unhealthy: the youngest heartbeat is of 40"),
    "young elsewhere": (500, {"r0": ("elsewhere", 3), "r1": (HERE, 400)}, 1, "unhealthy"),
    "not begun": (500, {}, 0, "healthy: training has not begun; started 50"),
    "of an earlier start": (50, {"r0": (HERE, 400)}, 0, "healthy: training has not begun"),
    "never begun": (700, {}, 1, "unhealthy: training has not begun"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_youngest_heartbeat_of_this_host_and_this_start_decides(case, training):
    began, beats, code, words = CASES[case]
    got, said = probe(training(began, **beats))
    assert (got, said.startswith(words)) == (code, True), said


def test_a_container_without_training_is_healthy(tmp_path):
    assert probe(tmp_path / "none") == (0, "healthy: no training was started here")


def test_limits_can_be_set_as_a_liveness_probe_does(training):
    state = training(500, r0=(HERE, 30))
    assert probe(state, "--age", 20)[0] == 1
    assert probe(state, "--age", 40)[0] == 0
