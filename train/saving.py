"""Saving in the background: how a run learns of failed saves, and what it does about them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import StorageError

from .checkpoint import Checkpoints
from .distributed import Agreement
from .metrics import Record


class SaveFailed(StorageError):
    """A checkpoint or a record could not be written, `here` or by another rank, and the run must stop."""

    def __init__(self, message: str, *, here: bool = True) -> None:
        super().__init__(message)
        self.here = here


class Saver:
    """Checkpoints of a run, written by rank 0; all ranks learn of failed writes.

    on_error: whether a run stops, or continues and retries at its next save.
    """

    def __init__(
        self, checkpoints: Checkpoints, agreement: Agreement, *, on_error: Literal["stop", "continue"]
    ) -> None:
        self.checkpoints, self.agreement, self.on_error = checkpoints, agreement, on_error
        self._error = ""  # this rank's last

    def save(self, step: int, **what: Any) -> None:
        """At rank 0: copies the arguments of Checkpoints.save, and returns while they are being written."""
        self.settle()
        self.checkpoints.save(step, **what)

    def settle(self) -> None:
        """Waits for the previous save; prints its error."""
        self._error = ""
        try:
            self.checkpoints.wait()
        except OSError as err:
            kept = self.checkpoints.all()
            last = f"{kept[-1].name} is the last good checkpoint" if kept else "there is no checkpoint yet"
            self._report("save", err, self.checkpoints.folder, f"; {last}")

    def is_broken(self, record: Record) -> int:
        """1 if this rank has met an error that must stop the run. Prints any error."""
        if record.error is not None:
            err, record.error = record.error, None
            self._report("record", err, record.run)
        elif self.checkpoints.failed:
            self.settle()
        else:
            return 0
        return int(self.on_error == "stop")

    def _report(self, doing: str, err: OSError, place: Path, note: str = "") -> None:
        self._error = f"{err.filename or place}: {err.strerror or err}"
        print(f"could not {doing}: {self._error}{note}", file=sys.stderr, flush=True)

    def finish(self, step: int) -> None:
        """Waits until the last save is on the disk. Raises SaveFailed, at all ranks, if it could not be written."""
        self.settle()
        if self.agreement.largest(int(bool(self._error)))[0]:
            self.refuse(step)

    def refuse(self, step: int) -> None:
        """Raises SaveFailed; at all ranks together."""
        if self._error:
            raise SaveFailed(f"{self._error}; step {step} is not saved")
        raise SaveFailed(f"another rank could not write; step {step} is not saved", here=False)
