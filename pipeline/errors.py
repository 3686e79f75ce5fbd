"""Errors that a user can cause, each with the exit code that the command line gives it."""

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


class StorageError(ExpressError):
    """The disk is full, or a folder cannot be read or written."""

    code = IO_FAILED
