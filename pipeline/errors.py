"""Errors that a user can cause, each with the exit code that the command line gives it."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NoReturn

LOG = logging.getLogger("imagenet_express")  # of the whole package

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
    One error can have attributes of its own: ExpressError(message, code=HANG).
    """

    code = CHECK_FAILED
    together = False
    here = True
    facts: Mapping[str, object] = MappingProxyType({})

    def __init__(self, message: str, **attributes: object) -> None:
        super().__init__(message)
        vars(self).update(attributes)


class ConfigError(ExpressError):
    """An option, field or launch that cannot work."""

    code = USAGE


class DataError(ExpressError):
    """Input that is missing, damaged or not what it claims to be."""

    code = BAD_DATA


class BadSample(DataError):
    """A sample whose bytes or image are damaged. `sample`: its position in the split's index."""

    sample: int


class StorageError(ExpressError):
    """The disk is full, or a folder cannot be read or written."""

    code = IO_FAILED

    @classmethod
    def of(cls, err: OSError | ExpressError, path: object) -> ExpressError:
        """`path`: what was read or written, if the error does not name it. An error of ours is returned as it is."""
        if isinstance(err, ExpressError):
            return err
        return cls(f"{os.fsdecode(err.filename or str(path))}: {err.strerror or err}")


def first_line(err: BaseException) -> str:
    """The first line of an exception's text, for a message; its class if it has none."""
    return next((line for line in str(err).splitlines() if line.strip()), type(err).__name__)


@contextlib.contextmanager
def reading(what: str, cure: str, *also: type[Exception]) -> Iterator[None]:
    """Raises DataError for whatever values of another form than expected raise, and for the exceptions of `also`."""
    expected: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError, RecursionError, *also)
    try:
        yield
    except expected as err:
        raise DataError(f"{what} cannot be read ({err}); {cure}") from err


def leave(code: int) -> NoReturn:
    """Ends the process with `code`. If it is one of several ranks, it skips Python's own clean-up.

    gloo's threads may still hold tensors, and freeing them after the interpreter has ended raises
    SIGABRT, once in some hundred times (pytorch/pytorch#179291).
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
    sys.exit(code)
