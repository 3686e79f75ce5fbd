"""The arguments of a step, and how it runs other programs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ExpressError
from pipeline.files import read_object, write_json
from tools.bench.alone import attempt
from tools.bench.harness import Json, how_it_ended
from train.environment import ROOT

Check = Callable[[], Any]


@dataclass
class Proof:
    """The arguments of a step."""

    device: str
    tiny: bool
    scratch: Path  # shared by all steps of a walk, so that a step reuses data of earlier ones
    shards: Path | None = None  # holds jpeg/ and keep/
    images: Path | None = None  # class folders of JPEGs or a tar of them, to make the shards from
    cifar: Path | None = None
    limit_seconds: float = 600.0
    answer: Path | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def batch(self, full: int) -> int:
        return max(2, full // 256) if self.tiny else full

    def seconds_left(self) -> float:
        """The time limit for a program that the step runs; leaves the step some time to report a timeout."""
        return max(1.0, self.limit_seconds - (time.monotonic() - self.began) - 3.0)

    def python(self, name: str, *arguments: object) -> str:
        """Runs a Python program on the step's device and returns its output.

        Raises ExpressError, with the program's name and last lines, if it fails or the step's time is over.
        """
        # passive: waiting threads that spin take cores from each other, and above all from other ranks' threads.
        on_cpu = {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive"}
        options = {"cwd": ROOT, "env": os.environ | ({} if self.on_gpu else on_cpu), "text": True}
        pipes, seconds = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, self.seconds_left()
        try:
            done = subprocess.run([sys.executable, *map(str, arguments)], timeout=seconds, **options, **pipes)
        except subprocess.TimeoutExpired as err:
            raise ExpressError(f"{name} took longer than {seconds:.0f} s: {tail(err.stdout)}") from err
        if done.returncode:
            raise ExpressError(f"{name} {how_it_ended(done.returncode)}: {tail(done.stdout)}")
        return done.stdout

    def new_run(self) -> Path:
        return self.scratch / f"run-{time.monotonic_ns()}"

    def earlier(self, step: str) -> Json | None:
        """The result of a step that has passed in this walk."""
        answer = read_object(self.scratch / f"{step}.json")
        return answer["result"] if answer.get("passed") else None

    def keep(self, result: Any) -> None:
        """Writes what is known so far: it stays if the step does not reach its end."""
        if self.answer:
            write_json(self.answer, {"result": result})


def tail(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return "\n".join(text.strip().splitlines()[-30:]) or "no output"


def reject_errors(found: dict[str, Json]) -> None:
    """Raises ExpressError if results hold errors."""
    if failed := [
        f"{name}: {result['error']}" for name, result in found.items() if isinstance(result, dict) and "error" in result
    ]:
        raise ExpressError("; ".join(failed))


def answers(proof: Proof, checks: Iterable[tuple[str, Check]]) -> Json:
    """Runs all checks and returns their results by name. If any has failed, raises ExpressError after the last one."""
    found = {}
    for name, check in checks:
        found[name] = attempt(check)
        proof.keep(found)
    reject_errors(found)
    return found
