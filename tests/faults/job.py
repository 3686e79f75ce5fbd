"""A training run as people start it, and ways to hurt it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.conftest import ROOT

SCRIPT = ROOT / "train" / "run.py"
PLANTED = ROOT / "tests" / "faults" / "planted.py"
BATCH, STEPS = 12, 29  # in an epoch of 356 digits, with a batch that 2, 3 and 4 ranks can divide
SMALL = [
    "demo", "--model.width", "0.125", "--train.batch", BATCH, "--run.log-every", 1, "--run.save-every", 4,
    "--run.record-ids", "--run.no-report", "--loader.threads", 1,
]  # fmt: skip


class Job:
    """One start of a run by `accelerate launch`, or by torchrun with the given options."""

    def __init__(
        self,
        folder: Path,
        *args: object,
        ranks: int,
        script: Path = SCRIPT,
        launcher: tuple = (),
        prefix: tuple = (),
        **env: str,
    ) -> None:
        """prefix: a command that starts this one, such as `nice`."""
        self.folder = folder
        fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        many = ["--multi_gpu"] if ranks > 1 else []
        accelerate = ["-m", "accelerate.commands.launch", *many, "--num_processes", str(ranks), *fixed]
        argv = [
            *prefix,
            sys.executable,
            *(launcher or accelerate),
            str(script),
            *map(str, args),
            "--run.dir",
            str(folder),
        ]
        self.log = folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
        env = os.environ | {"ACCELERATE_USE_CPU": "true"} | env
        with open(self.log, "w") as log:
            self.process = psutil.Popen(argv, stdout=log, stderr=log, cwd="/", env=env, start_new_session=True)
        self.family: dict[int, psutil.Process] = {self.process.pid: self.process}

    @property
    def said(self) -> str:
        return self.log.read_text()

    def ranks(self) -> list[psutil.Process]:
        """The rank processes that exist, in order of rank."""
        found, children = {}, []
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends meanwhile, and the fork server reaps it
            children = self.process.children(recursive=True)
        for child in children:
            try:
                if SCRIPT.name in " ".join(child.cmdline()):
                    found[int(child.environ().get("RANK", "0"))] = child
                    self.family[child.pid] = child
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                pass
        return [found[rank] for rank in sorted(found)]

    def wait_for(self, condition: Callable[[], bool], *, seconds: float = 300, each: float = 0.002) -> bool:
        """Whether the condition came true before the job ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.said
            time.sleep(each)
        return True

    def wait(self, *, seconds: float = 300) -> int:
        """The launcher's exit code, after every process of the job has ended."""
        self.ranks()
        _, alive = psutil.wait_procs(self.family.values(), timeout=seconds)
        if alive:
            self.end()
        assert not alive, f"{alive} outlived {seconds} s\n{self.said}"
        while (code := self.process.poll()) is None:  # the fork server reports it a moment later
            time.sleep(0.001)
        return int(code)

    def end(self) -> None:
        """Kills what is left of the job."""
        self.ranks()
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.family.values(), timeout=20)

    # What it has done so far

    @property
    def step(self) -> int:
        return max((line["step"] for line in lines(self.folder, "train")), default=0)

    @property
    def exit(self) -> dict:
        return json.loads((self.folder / "exit.json").read_text())


def run(folder: Path, *args: object, ranks: int, **options) -> Job:
    """A run from start to end, undisturbed."""
    job = Job(folder, *args, ranks=ranks, **options)
    assert job.wait() == 0, job.said
    return job


def lines(folder: Path, kind: str) -> list[dict]:
    """The lines of metrics.jsonl; the last one may be incomplete."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in whole if line["kind"] == kind]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder, "train")}


def global_ids(folder: Path) -> dict[int, list[int]]:
    """Step → the ids of all ranks, in order of rank; each step once."""
    steps: dict[int, list[int]] = {}
    for path in sorted((folder / "ids").glob("rank-*.jsonl")):
        seen = set()
        for line in map(json.loads, path.read_text().splitlines()):
            assert line["step"] not in seen
            seen.add(line["step"])
            steps.setdefault(line["step"], []).extend(line["ids"])
    return steps


def traces(folder: Path) -> dict[str, object]:
    """All that must be equal to the last bit in two equal runs."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    weights = {
        name: hashlib.sha256((newest / f"{name}.safetensors").read_bytes()).hexdigest()
        for name in ("model", "optimizer")
    }
    val = [{k: line[k] for k in ("step", "top1", "loss", "images")} for line in lines(folder, "val")]
    rates = [line["lr"] for line in lines(folder, "train")]
    return {
        "weights": weights,
        "losses": losses(folder),
        "ids": global_ids(folder),
        "val": val,
        "rates": rates,
        "checkpoint": newest.name,
    }


def disturb(job: Job, rng: random.Random) -> str:
    """Waits for a moment and sends a signal; returns what was done, or "" if the job had ended before."""
    moment = rng.choice(["step", "step", "save", "evaluation"])
    if moment == "step":
        begun = job.step
        offset = rng.randint(1, 8)
        there = job.wait_for(lambda: job.step >= begun + offset)
    elif moment == "save":
        there = job.wait_for(lambda: any(job.folder.glob("checkpoints/*.partial")), each=0.0005)
    else:
        there = job.wait_for(lambda: job.step > 0 and job.step % STEPS == 0)
    time.sleep(rng.uniform(0, 0.05))
    ranks = job.ranks()
    if not there or not ranks or job.process.poll() is not None:
        return ""
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    at = rng.choice(["launcher", *range(len(ranks))])
    try:
        (job.process if at == "launcher" else ranks[at]).send_signal(number)
    except psutil.NoSuchProcess:
        return ""
    return f"{number.name} to {at if at == 'launcher' else f'rank {at}'} at {moment} {job.step}"


def quiet(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, cwd="/")
