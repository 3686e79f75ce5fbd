"""The parts that all benchmarks share: options, rounds of cells in processes of their own, JSON records, tables.

Imports only the standard library, pipeline's errors and files: tools/gpu_proof.py must start without any package.
"""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ExpressError
from pipeline.files import Json, write_json
from tools.cli import Parser
from train import environment

ALONE = Path(__file__).with_name("alone.py")
RUN = environment.ROOT / "train" / "run.py"
HELP = {
    "images": "class folders of JPEGs, of CIFAR-10 in train/ and test/, or a tar of them",
    "explain": "shards: find out instead what limits their loader, and what would help",
    "dir": "shards and runs; what is done stays",
    "epochs": "of modern; of the others 1 / 1.4 of it",
    "width": "of the net, 1 on a GPU",
    "rounds": "measurements of each, in turn",
    "blocks": "of each kind",
    "batches": "of one measurement",
    "repeat": "how often each image is taken",
    "seconds": "of each measurement",
    "batch": "images a batch",
    "device": "",
    "threads": "decoding threads",
    "workers": "processes",
    "step-rate": "images/s of a training step, for --explain; 0: unknown",
    "ffcv-python": "interpreter that has FFCV; without it FFCV is left out",
    "writers-python": "another Python, with litdata, mosaicml-streaming and webdataset",
    "simd-python": "interpreter that has Pillow-SIMD; without it Pillow-SIMD is left out",
}


def add_options(p: Parser, options: Json) -> None:
    """Adds options. options: name → default value, Path for a required path, None for an optional path, or a dict of
    argparse's arguments."""
    for name, default in options.items():
        if default in (Path, None):
            p.path(f"--{name}", "PATH", HELP[name], required=default is Path)
        elif isinstance(default, dict):
            p.add_argument(f"--{name}", **default)
        else:
            p.option(name, default, f"{HELP[name]} (%(default)s)")


def command_line(program: str) -> str:
    """As typed, with the names of files and folders instead of this machine's paths."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return shlex.join(["python", program, *words])


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Makes a temporary folder, which is removed even if SIGTERM or SIGHUP ends the process."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has chosen otherwise
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory("", "imagenet-express-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Starts a process, and ends it with all its children when the block is left."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)  # a process that hangs in a driver cannot be ended


# Records


class Record:
    """A benchmark's JSON, with five significant digits. Each `keep` rewrites it, so an interrupted benchmark leaves its
    measurements so far."""

    def __init__(self, args: Namespace, what: str) -> None:
        settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str) and k != "kind"}
        self._path, command = args.json, command_line("tools/bench")
        self.content = {"what": what, "command": command, "settings": settings, "environment": environment.describe()}

    def keep(self, **found: Any) -> None:
        self.content |= json.loads(json.dumps(found), parse_float=lambda number: float(f"{float(number):.5g}"))
        if self._path:
            write_json(self._path, self.content)


def table(records: Sequence[Json], *, missing: str = "") -> str:
    """Returns a Markdown table of records with the same fields. missing: the text for None."""

    def text(value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or missing
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"

    rules = ["---" if any(isinstance(record[name], str) for record in records) else "---:" for name in records[0]]
    lines = [records[0], rules, *(map(text, record.values()) for record in records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Cells


def run(
    function: str, *processes: list[Json], python: str | Path = sys.executable, **env: str
) -> Iterator[tuple[Json, ...]]:
    """Calls `function` ("module:name") in concurrent processes, each with its list of options.

    Yields a tuple of all processes' results of the first call as soon as it is complete, then of the second, and so on.
    The result of a call that failed, or that a process did not reach, is {"error": …}.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": os.environ | env}
    with ExitStack() as stack:
        started = []
        for calls in processes:
            command = [str(python), str(ALONE), function, *(json.dumps(options, default=str) for options in calls)]
            started.append(stack.enter_context(process(command, **pipes)))
        for _ in processes[0]:
            yield tuple(map(next_result, started))


def next_result(process: subprocess.Popen[str]) -> Json:
    message = ""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
        message = line.strip() or message
    code = process.wait()
    return {"error": message if code > 0 and message else f"its process {how_it_ended(code)}"}


def checked(result: Json, name: str) -> Json:
    """Raises ExpressError if the call failed."""
    if "error" in result:
        raise ExpressError(f"{name}: {result['error']}")
    return result


def run_once(function: str, options: Json, **env: str) -> Json:
    """The result of one call in a process of its own. Raises ExpressError if it fails."""
    ((result,),) = run(function, [options], **env)
    return checked(result, function)


def how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


@dataclass
class Cell:
    """A measured configuration: its rate is measured in each round, by one process or one process per rank."""

    what: dict[str, str]  # its names in the record
    function: str
    options: Json
    against: str = ""  # the cell that it is compared with
    ranks: int = 1
    python: str | Path = sys.executable
    results: list[list[Json]] = field(default_factory=list)  # [round][rank]

    def record(self) -> Json:
        rates = [sum(r["images"] / r["seconds"] for r in ranks) for ranks in self.results]
        found = {
            "images_per_second": statistics.median(rates),
            "rates": rates,
            "against": self.against,
            # Resident, of the largest worker.
            "megabytes_a_worker": max(ranks[0].get("megabytes", 0) for ranks in self.results),
            "versions": self.results[0][0]["versions"],
        }
        return self.what | {name: value for name, value in found.items() if value}


def measure(cell: Cell) -> None:
    """Measures a cell once more. Raises ExpressError that names it if that fails."""
    ranks = [{"rank": rank, "world": cell.ranks} if cell.ranks > 1 else {} for rank in range(cell.ranks)]
    (results,) = run(cell.function, *([cell.options | rank] for rank in ranks), python=cell.python)
    cell.results.append([checked(result, ", ".join(cell.what.values())) for result in results])


def interleave(cells: list[Cell], rounds: int, record: Record) -> list[Json]:
    """Measures each cell in each round, prints their rates and returns their records, which are kept after every
    round."""
    for number in range(1, rounds + 1):
        for cell in cells:
            measure(cell)
        results = [cell.record() for cell in cells]
        record.keep(results=results)
        print(f"round {number} of {rounds} done", file=sys.stderr, flush=True)
    print(table_of_rates(results))
    return results


def table_of_rates(results: list[Json]) -> str:
    """Returns a table of each cell's median rate, and its ratio to the cell `against`, or to ours on the same data."""
    found = {(r.get("data"), r.get("what", r.get("loader"))): r["images_per_second"] for r in results}
    rows = []
    for r, ((data, what), rate) in zip(results, found.items(), strict=True):
        other = found.get((data, r.get("against", "ours")))
        rows.append(
            {
                "data": data,
                "what": what,
                "img/s, median": rate,
                "times": other and rate / other,
                "that of": r.get("against"),
                "MB a worker": r.get("megabytes_a_worker"),
            }
        )
    return table(rows)
