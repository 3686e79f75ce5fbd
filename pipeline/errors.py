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
    """An error whose message is one line for the user: what is wrong and what to do.

    code: exit code of the process. together: whether all ranks raise it at the same step, so that one line is enough.
    facts: fields of exit.json beside code and reason.
    Keyword arguments set these attributes for one error: ExpressError(message, code=HANG).
    """

    code = CHECK_FAILED
    together = False
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
        """Converts an OSError; returns an ExpressError unchanged. path: used if the error names no file."""
        if isinstance(err, ExpressError):
            return err
        return cls(f"{os.fsdecode(err.filename or str(path))}: {err.strerror or err}")


def first_line(err: BaseException) -> str:
    """The first line of an exception's text, for a message; the name of its class if the text is empty."""
    return next((line for line in str(err).splitlines() if line.strip()), type(err).__name__)


@contextlib.contextmanager
def reading(what: str, cure: str, *also: type[Exception]) -> Iterator[None]:
    """Turns exceptions that values of an unexpected form raise, and those of `also`, into DataError."""
    expected: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError, RecursionError, *also)
    try:
        yield
    except expected as err:
        raise DataError(f"{what} cannot be read ({err}); {cure}") from err


def leave(code: int) -> NoReturn:
    """Ends the process with `code`. If it is one of several ranks, it skips Python's own clean-up.

    gloo's threads may still hold tensors, and freeing them after the interpreter has ended raises
    SIGABRT, about once in a hundred runs (pytorch/pytorch#179291).
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
    sys.exit(code)
