"""Errors that a user can cause, each with the exit code that the command line gives it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

# The exit codes are an interface that launchers and job scripts build on: 0 done, 1 a check failed, and
CHECK_FAILED = 1
USAGE = 2
BAD_DATA = 65
IO_FAILED = 74


class ExpressError(Exception):
    """One line for the user: names the thing and the cure. `code` is the exit code of the process."""

    code = 1


class ConfigError(ExpressError):
    """An option, field or launch that cannot work."""

    code = USAGE


class DataError(ExpressError):
    """Input that is missing, damaged or not what it claims to be."""

    code = BAD_DATA


class BadSample(DataError):
    """A sample whose bytes or image are damaged. `sample`: its position in the split's index."""

    def __init__(self, message: str, *, sample: int) -> None:
        super().__init__(message)
        self.sample = sample


class StorageError(ExpressError):
    """The disk is full, or a folder cannot be read or written."""

    code = IO_FAILED


def leave(code: int) -> NoReturn:
    """Ends the process with `code`; one of several ranks without winding Python up.

    gloo's threads may still hold tensors then, and letting go of them without an interpreter ends the process by
    SIGABRT, once in some hundred times (pytorch/pytorch#179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
    sys.exit(code)
