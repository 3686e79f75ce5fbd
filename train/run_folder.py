"""The run folder: one run at a time, what it goes on from, and how it ended."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.files import locked, write_json

from . import watchdog

EXIT, LOCK = "exit.json", "run.lock"
WAIT_SECONDS = 20.0  # ranks whose launcher was killed live until they have saved


class RunFolder:
    """A run's claim on its folder, held by rank 0 until the process ends."""

    def __init__(self, path: Path, *, private: bool = False) -> None:
        """private: each rank has one of its own, as those that only look at a run do."""
        self.path, self.private = path, private
        self._lock = -1

    def claim(self, *, wait_seconds: float = WAIT_SECONDS) -> None:
        """Makes the folder and locks it. Raises ConfigError where another run holds it, OSError where it cannot."""
        if self._lock >= 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        deadline, told = time.monotonic() + wait_seconds, False
        while True:
            try:
                self._lock = locked(self.path / LOCK, wait_seconds=min(1.0, wait_seconds))
                break
            except StorageError:
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"{self.path}: {self._holder()} trains there; wait for its end, or choose another --run.dir"
                    ) from None
            if not told:
                print(f"{self.path}: waiting for {self._holder()} to end", flush=True)
                told = True
        os.ftruncate(self._lock, 0)
        os.pwrite(
            self._lock,
            json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time_ns()}).encode(),
            0,
        )
        os.fsync(self._lock)  # other hosts look for it, and NFS sends what is open when it likes
        watchdog.clean(self.path)
        self.forget_end()

    def claimed_by(self) -> str:
        """What the claim says of its holder; by it other hosts know the folder again."""
        return (self.path / LOCK).read_text()

    @property
    def is_ours(self) -> bool:
        return self._lock >= 0

    def _holder(self) -> str:
        try:
            holder = json.loads((self.path / LOCK).read_text())
            return f"process {holder['pid']} of {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another run"

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # exit.json: launchers turn every exit code into 1, this file keeps it

    def forget_end(self) -> None:
        """Of an earlier attempt: nobody must take its end for ours."""
        with contextlib.suppress(OSError):
            (self.path / EXIT).unlink()

    def write_end(self, *, code: int, reason: str, step: int, **more: Any) -> None:
        write_json(self.path / EXIT, {"code": code, "reason": reason, "step": step, **more})

    @property
    def has_end(self) -> bool:
        return (self.path / EXIT).exists()


# What a run has recorded, read without claiming its folder


def read_json(path: Path, *, cure: str) -> Any:
    """The content of a JSON file; None if it is missing. Raises DataError, with the cure, if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise DataError(f"{path}: cannot be read as JSON ({err}); {cure}") from err


def read_config(run: Path, *needed: str) -> dict[str, Any]:
    """config.json: a run's configuration and how it was started. Raises DataError if a `needed` name is missing."""
    path = run / "config.json"
    described = read_json(path, cure="copy the run folder again")
    if described is None:
        raise DataError(f"{run}: no run folder: it has no config.json")
    if not isinstance(described, dict) or any(name not in described for name in needed):
        raise DataError(f"{path}: not of a run: it must hold {', '.join(needed) or 'an object'}")
    return described


def read_metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """metrics.jsonl: its lines by kind, such as "train" and "val". Raises DataError."""
    path, number = run / "metrics.jsonl", 0
    lines: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            number += 1
            line = json.loads(text)
            lines[line["kind"]].append(line)
    except OSError as err:
        raise DataError(f"{path}: no such file; name the folder of a run, such as runs/demo") from err
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(f"{path}:{number}: not a record of a run; the file was changed or cut") from err
    return lines
