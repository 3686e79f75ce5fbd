"""Saves checkpoints in the background, and reports failed saves to all ranks."""

import sys
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import StorageError

from .checkpoint import Checkpoints
from .distributed import Agreement
from .metrics import Record


@dataclass
class Saver:
    """Writes a run's checkpoints at rank 0; failed writes are reported to all ranks.

    on_error: "stop" ends the run; "continue" retries at the next save.
    """

    checkpoints: Checkpoints
    agreement: Agreement
    on_error: Literal["stop", "continue"]
    _error: str = ""  # this rank's last

    def save(self, step: int, **what: Any) -> None:
        """Copies the arguments of Checkpoints.save and returns while they are being written. Call it at rank 0."""
        self.settle()
        self.checkpoints.save(step, **what)

    def settle(self) -> None:
        """Waits for the previous save; prints its error."""
        self._error = ""
        try:
            self.checkpoints.wait()
        except OSError as err:
            self._error = str(StorageError.of(err, self.checkpoints.folder))
            kept = self.checkpoints.all()
            last = f"{kept[-1].name} is the last good checkpoint" if kept else "there is no checkpoint yet"
            print(f"could not save: {self._error}; {last}", file=sys.stderr)

    def is_broken(self, record: Record) -> int:
        """Returns 1 if this rank has an error that must stop the run, otherwise 0. Prints any error."""
        if record.error is not None:
            self._error, record.error = str(StorageError.of(record.error, record.run)), None
            print(f"could not record: {self._error}", file=sys.stderr)
        elif self.checkpoints.failed:
            self.settle()
        else:
            return 0
        return int(self.on_error == "stop")

    def finish(self, step: int) -> None:
        """Waits until the last save is on the disk. Raises StorageError, at all ranks, if it could not be written."""
        self.settle()
        self.raise_failure(step)

    def raise_failure(self, step: int) -> None:
        """Raises StorageError, at all ranks together, if any rank has an error."""
        with self.agreement.alike(""):
            if self._error:
                raise StorageError(f"{self._error}; step {step} is not saved", together=True)
