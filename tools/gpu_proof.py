"""Measures and checks on a GPU what no other machine can: two commands that fit a quarter of an hour.

    python tools/gpu_proof.py --steps A --out results
    python tools/gpu_proof.py --steps B --shards SHARDS --out results
    python tools/gpu_proof.py --device cpu --tiny          all steps without a GPU, to check the script
    python tools/gpu_proof.py --tables docs/results.md     the page's GPU tables, from its results/gpu-*.json

A, at most 5 minutes, no data: preflight, training on synthetic batches, layers, tests marked gpu.
B, at most 4 minutes: the loader grid, training fed from shards, CIFAR-10. docs/gpu-proof.md prepares its data.

Each step is a process with a time limit and writes gpu-STEP.json at once, so an early end leaves the earlier answers.
Exit codes: 0 all steps passed, 1 a step failed or had no time left, 2 usage.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

# No optional package is imported here, so that a missing package affects only the steps that need it.
from pipeline.errors import ConfigError, ExpressError
from pipeline.files import read_object, write_json
from tools import cli
from tools.bench.alone import end_with_parent
from tools.bench.harness import Json, command_line, how_it_ended, process, scratch_folder
from tools.bench.proof import tables
from tools.bench.proof.base import Proof
from tools.bench.proof.steps import STEPS
from train import environment

DEADLINE_SECONDS = {"A": 300.0, "B": 240.0}
TINY_LIMITS = 2.0  # factor for a tiny walk's limits, which are set for a machine with a GPU and 16 cores
LEAST_SECONDS = 10.0  # with less time left, a step is not started
TAIL_LINES = 40
ENVIRONMENT = "environment"  # no step of the registry: hardware and versions, which take an import of torch
NO_TIME = "no time left"


def parser() -> cli.Parser:
    p = cli.Parser(description=__doc__)
    steps = f"A, B, or of {', '.join(STEPS)} (default: all)"
    p.add_argument("--steps", nargs="+", choices=["A", "B", *STEPS], default=["A", "B"], metavar="STEP", help=steps)
    p.option("device", "cuda:0", "(%(default)s)")
    p.flag("tiny", "a few images and seconds: to see it run, not for figures")
    p.path("--shards", "DIR", "holds jpeg/, keep/ and, or it is made from jpeg/, raw/")
    p.path("--images", "PATH", "instead: class folders of JPEGs or a tar of them")
    p.path("--cifar", "PATH", "CIFAR-10: a folder of train/ and test/, or a tar")
    p.add_argument("--deadline", type=float, metavar="SECONDS", help="for all steps together (A: 300, B: 240)")
    p.option("out", Path("runs/gpu-proof"), "folder for the JSON (%(default)s)")
    p.path("--tables", "PAGE", "write the tables into this page, and run no step")
    # With --one the script runs itself for one step: its name, the result file, the scratch folder, the time limit.
    p.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    return p


def main() -> None:
    args = parser().parse_args()
    if args.tables:
        tables.update(args.tables)
    elif args.one:
        answer(args, *args.one)
    else:
        walk(args)


# One step, in a process of its own


def answer(args: argparse.Namespace, name: str, file: str, scratch: str, limit: str) -> None:
    """Runs one step and writes its result."""
    end_with_parent()
    path = Path(file)
    if name == ENVIRONMENT:
        write_json(path, environment.describe())
        return
    proof = Proof(
        args.device, args.tiny, Path(scratch), args.shards, args.images, args.cifar,
        limit_seconds=float(limit), answer=path,
    )  # fmt: skip
    try:
        result = {"passed": True, "result": STEPS[name].run(proof)}
    except Exception as err:  # any error is the step's result, beside the results that it has kept
        result = read_object(path) | {"passed": False, "error": f"{type(err).__name__}: {err}"}
    write_json(path, result)


# All steps


def walk(args: argparse.Namespace) -> None:
    """Runs the steps one after the other. Raises ExpressError if one failed or had no time left."""
    started = time.monotonic()
    names = [
        name
        for name, step in STEPS.items()
        if name in args.steps or (step.command in args.steps and (step.in_tiny or not args.tiny))
    ]
    deadline = args.deadline
    if deadline is None:
        deadline = sum(DEADLINE_SECONDS[command] for command in {STEPS[name].command for name in names})
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with scratch_folder() as scratch:
        where = run_process(ENVIRONMENT, scratch, limit=60.0)
        if args.device.startswith("cuda") and where["answer"].get("gpus") == []:
            raise ConfigError(f"--device {args.device}: no CUDA device here; --device cpu --tiny runs the same steps")
        common = {
            "device": args.device,
            "tiny": args.tiny,
            "command": command_line("tools/gpu_proof.py"),
            "environment": where["answer"] or {"error": where["ended"]},
        }
        data = {"images": args.shards or args.images, "cifar": args.cifar}
        for name in names:
            left = deadline - (time.monotonic() - started)
            reason = why_skipped(name, args, left)
            record = {"passed": None, "skipped": reason} if reason else run_step(name, args, scratch, seconds_left=left)
            given = data.get(STEPS[name].data)
            record |= {"data": given.name if given else "made pictures", **common}
            path = args.out / f"gpu-{name}.json"
            if not reason or not path.exists():  # a skipped step leaves an earlier answer alone
                write_json(path, {"step": name, **record})
            verdict = f"skipped: {reason}" if reason else f"{tables.verdict(record)} ({record['seconds']} s)"
            print(f"{name}: {verdict}", flush=True)
            if record["passed"] is False or reason == NO_TIME:
                failed.append(name)
    print(f"{time.monotonic() - started:.0f} s of {deadline:.0f}; {args.out}/gpu-*.json", flush=True)
    if failed:
        raise ExpressError(f"{len(failed)} of {len(names)} steps failed or had no time left: {', '.join(failed)}")


def why_skipped(name: str, args: argparse.Namespace, seconds_left: float) -> str:
    step = STEPS[name]
    if step.data == "images" and not (args.shards or args.images or args.tiny):
        return "needs --shards or --images"
    if step.data == "cifar" and not args.cifar:
        return "needs --cifar"
    return NO_TIME if seconds_left < min(LEAST_SECONDS, step.limit_seconds) else ""


def run_step(name: str, args: argparse.Namespace, scratch: Path, *, seconds_left: float) -> Json:
    """Runs a step; returns its record, whether it returned, crashed or was ended."""
    limit = min(STEPS[name].limit_seconds * (TINY_LIMITS if args.tiny else 1), seconds_left)
    ran = run_process(name, scratch, limit=limit)
    record = {"seconds": ran["seconds"], "limit_seconds": round(limit, 1)}
    if "passed" in ran["answer"]:
        return record | ran["answer"] | ({"after_the_answer": ran["ended"]} if ran["ended"] else {})
    # The figures that the step has kept stay.
    failure = {"passed": False, "error": ran["ended"] or "returned without an answer", "output_tail": ran["tail"]}
    return record | failure | ran["answer"]


def run_process(name: str, scratch: Path, *, limit: float) -> Json:
    """Runs this script for one step, for at most `limit` seconds, then ends all processes that it has started."""
    path, log = scratch / f"{name}.json", scratch / f"{name}.log"
    command = [sys.executable, *sys.argv, "--one", name, str(path), str(scratch), str(limit)]
    started, ended = time.monotonic(), ""
    with open(log, "wb") as output, process(command, stdout=output, stderr=subprocess.STDOUT) as step:
        try:
            if code := step.wait(limit):
                ended = how_it_ended(code)
        except subprocess.TimeoutExpired:
            ended = f"took longer than its limit of {limit:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:]
    return {"answer": read_object(path), "ended": ended, "tail": lines, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    cli.run(main)
