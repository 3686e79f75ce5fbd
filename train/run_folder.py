"""The run folder: one run at a time, its config.json, and how it ended."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.files import Json, locked, read_object, write_json

from . import watchdog

CONFIG, EXIT, LOCK, SHOWCASE = "config.json", "exit.json", "run.lock", "showcase.json"
WAIT_SECONDS = 20.0  # ranks whose launcher was killed run until they have saved


def another(run: Path) -> str:
    """Returns the option that starts a new run instead of the one in the folder `run`."""
    names = (f"{run}-{number}" for number in itertools.count(2))
    return f"--run.dir {shlex.quote(next(name for name in names if not os.path.lexists(name)))}"


@dataclasses.dataclass
class RunFolder:
    """A run's claim on its folder, held by rank 0 until the process ends.

    private: each rank has a folder of its own, for tools that only replay a run. is_ours: whether it is claimed.
    """

    path: Path
    private: bool = False
    is_ours: bool = False

    def claim(self, *, wait_seconds: float = WAIT_SECONDS) -> Json:
        """Creates and locks the folder; returns the lock file's content, by which other hosts recognise the folder.

        Raises ConfigError if another run holds it, OSError if it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError(f"{self.path}: exists, but is no folder; use {another(self.path)}") from None
        for waited, seconds in ((False, min(1.0, wait_seconds)), (True, wait_seconds)):
            try:
                lock = locked(self.path / LOCK, wait_seconds=seconds)
                break
            except StorageError:
                if waited or not wait_seconds:
                    raise ConfigError(
                        f"{self.path}: {self._holder()} trains there; wait for its end, or use {another(self.path)}"
                    ) from None
                print(f"{self.path}: waiting for {self._holder()} to end")
        self.is_ours = True  # until the process ends, which closes the descriptor
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time_ns()}
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(holder).encode(), 0)
        os.fsync(lock)  # other hosts read it, and NFS may delay the content of an open file
        watchdog.clean(self.path)
        with contextlib.suppress(OSError):  # must not be mistaken for the exit of this attempt
            (self.path / EXIT).unlink()
        return holder

    def _holder(self) -> str:
        holder = read_object(self.path / LOCK)
        return f"process {holder['pid']} of {holder['host']}" if holder else "another run"

    def write_exit(self, **facts: Any) -> None:
        """Writes exit.json, at every end of a run: launchers turn every exit code into 1, this file keeps it.

        facts: code, reason, step, and what an error adds.
        """
        write_json(self.path / EXIT, facts)


# The records of a run, read without claiming its folder


def read_json(path: Path, *, cure: str) -> Any:
    """The content of a JSON file; None if it is missing. Raises DataError, with the cure, if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise DataError(f"{path}: cannot be read as JSON ({err}); {cure}") from err


def read_config(run: Path, *needed: str) -> Json:
    """config.json: a run's configuration and how it was started. Raises DataError if a `needed` name is missing."""
    path = run / CONFIG
    described = read_json(path, cure="copy the run folder again")
    if described is None:
        raise DataError(f"{run}: no run folder: it has no {CONFIG}")
    if not isinstance(described, dict) or any(name not in described for name in needed):
        raise DataError(f"{path}: not of a run: it must hold {', '.join(needed) or 'an object'}")
    return described


def read_metrics(run: Path) -> dict[str, list[Json]]:
    """metrics.jsonl: its lines by kind, such as "train" and "val". Raises DataError."""
    path, number = run / "metrics.jsonl", 0
    lines: dict[str, list[Json]] = collections.defaultdict(list)
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            number += 1
            line = json.loads(text)
            lines[line["kind"]].append(line)
    except OSError as err:
        raise DataError(f"{path}: {err.strerror}; name the folder of a run, such as runs/demo") from err
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"{path}:{number}: not a record of a run; resume the run, which repairs the file, or remove the line"
        ) from err
    return lines
