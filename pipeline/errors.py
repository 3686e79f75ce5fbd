"""Errors that a user can cause, each with the exit code that the command line gives it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

# The exit codes are an interface that launchers and job scripts build on.
DONE = 0
CHECK_FAILED = 1  # also a lost rank, and a crash
USAGE = 2
BAD_DATA = 65
IO_FAILED = 74
PREEMPTED = 75  # and saved
NON_FINITE = 76
HANG = 77


class ExpressError(Exception):
    """One line for the user: names the thing and the cure.

    code: exit code of the process. together: whether all ranks raise it at one step, so that one line is enough.
    here: False if another rank met it and reports it. facts: what exit.json says of it beside code and reason.
    """

    code = CHECK_FAILED
    together = False
    here = True
    facts: Mapping[str, object] = MappingProxyType({})


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
    """Ends the process with `code`. If it is one of several ranks, it skips Python's own clean-up.

    gloo's threads may still hold tensors, and freeing them after the interpreter has ended raises
    SIGABRT, once in some hundred times (pytorch/pytorch#179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
    sys.exit(code)
