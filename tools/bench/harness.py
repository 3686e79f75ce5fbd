"""What all benchmarks share: options, rounds of cells in processes of their own, the JSON record, tables, scratch.

The standard library and pipeline's errors and files alone: tools/gpu_proof.py must start without any package.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ExpressError
from pipeline.files import write_json
from train import environment

Json = dict[str, Any]  # an object of JSON values
ALONE = Path(__file__).with_name("alone.py")
RUN = environment.ROOT / "train" / "run.py"
HELP = {
    "rounds": "measurements of each, in turn",
    "seconds": "of each measurement",
    "batch": "images a batch",
    "device": "",
    "threads": "decoding threads",
    "workers": "processes",
    "ffcv-python": "interpreter that has FFCV; without it FFCV is left out",
    "simd-python": "interpreter that has Pillow-SIMD; without it Pillow-SIMD is left out",
}


def add_options(p: argparse.ArgumentParser, **defaults: Any) -> None:
    for name, default in defaults.items():
        p.add_argument(f"--{name}", type=type(default), default=default, help=f"{HELP[name]} (%(default)s)")


def add_images(p: argparse.ArgumentParser, *pythons: str) -> None:
    p.add_argument("--images", type=Path, required=True, help="class folders of JPEGs, or a tar of them")
    for name in pythons:
        p.add_argument(f"--{name}", type=Path, metavar="FILE", help=HELP[name])


def command_line(program: str) -> str:
    """As typed, with the names of files and folders instead of this machine's paths."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return shlex.join(["python", program, *words])


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder in `parent`, removed also if the process is ended by SIGTERM or loses its terminal."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has chosen otherwise
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory("", "imagenet-express-", parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is ended, with all that it has started, when the block is left."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)  # a process that hangs in a driver cannot be ended


# Records


def read_json(path: Path) -> Json:
    """The object in a file; empty if it was not written, or not to its end."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class Record:
    """A benchmark's JSON. Each `keep` writes it, so an early end leaves what was measured until then."""

    def __init__(self, args: argparse.Namespace, what: str) -> None:
        settings = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str) and k != "kind"}
        self._path = args.json
        self.content = {"what": what, "command": command_line("tools/bench"), "settings": settings}
        self.content["environment"] = environment.describe()

    def keep(self, **found: Any) -> None:
        self.content |= found
        if self._path:
            write_json(self._path, self.content)


def markdown(header: list[str], rows: Iterable[Iterable[str]], *, left: int = 1) -> str:
    """left: how many columns hold text; the others hold numbers."""
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rules, *rows))


# Cells


def run(
    function: str, *options: Mapping[str, Any], name: str = "", python: str | Path = sys.executable, **env: str
) -> list[Json]:
    """The results of `function` ("module:name"), called at once in a process for each of `options`.

    Raises ExpressError with the last line of a process that fails; name: the cell's, for that message.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    results, call = [], [str(python), str(ALONE), function]
    with ExitStack() as stack:
        calls = [process([*call, json.dumps(each, default=str)], env=os.environ | env, **pipes) for each in options]
        for started in [stack.enter_context(each) for each in calls]:
            printed, errors = started.communicate()
            if started.returncode:
                raise ExpressError(f"{name or function}: {(errors.strip().splitlines() or ['no message'])[-1]}")
            results.append(json.loads(printed.splitlines()[-1]))
    return results


@dataclass
class Cell:
    """Something whose rate is measured again in each round, in a process of its own or one for each rank."""

    what: dict[str, str]  # its names in the record
    function: str
    options: Json
    against: str = ""  # the cell that it is compared with
    ranks: int = 1
    python: str | Path = sys.executable
    results: list[list[Json]] = field(default_factory=list)  # of each round: of each rank

    def measure(self) -> None:
        ranks = [{"rank": rank, "world": self.ranks} if self.ranks > 1 else {} for rank in range(self.ranks)]
        options = [self.options | rank for rank in ranks]
        self.results.append(run(self.function, *options, name=", ".join(self.what.values()), python=self.python))

    def record(self) -> Json:
        rates = [round(sum(r["images"] / r["seconds"] for r in ranks), 1) for ranks in self.results]
        found = {**self.what, "images_per_second": round(statistics.median(rates), 1), "rates": rates}
        first = self.results[0][0]
        if "cpu_seconds" in first:
            cpu = [statistics.mean(r["cpu_seconds"] / r["images"] for r in ranks) for ranks in self.results]
            found["cpu_microseconds_an_image"] = round(statistics.median(cpu) * 1e6, 1)
        if "megabytes" in first:  # resident, of the largest worker
            found["megabytes_a_worker"] = round(max(ranks[0]["megabytes"] for ranks in self.results), 1)
        optional = {"against": self.against, "versions": first.get("versions")}
        return found | {name: value for name, value in optional.items() if value}


def interleave(cells: list[Cell], rounds: int, record: Record) -> list[Json]:
    """Measures each cell in each round; returns their records, which are kept after every round."""
    for number in range(1, rounds + 1):
        for cell in cells:
            cell.measure()
        results = [cell.record() for cell in cells]
        record.keep(results=results)
        print(f"round {number} of {rounds} done", file=sys.stderr, flush=True)
    return results


def table(results: list[Json]) -> str:
    """Each cell's median rate, and how many times that of the cell that it is compared with."""
    rates, rows = {r["what"]: r["images_per_second"] for r in results}, []
    for r in results:
        other = rates.get(r.get("against"))
        ratio = f"{r['images_per_second'] / other:.2f} × {r['against']}" if other else ""
        rows.append([r["what"], f"{r['images_per_second']:,.1f}", ratio, str(r.get("megabytes_a_worker", ""))])
    return markdown(["what", "img/s, median", "against", "MB a worker"], rows)
