"""Makes standard streams safe: closed ones, encodings that lack a character and readers that exit end no program."""

import io
import os
import sys


def prepare(*, outlive_readers: bool) -> None:
    """Repairs this process's standard streams. Call it first, before anything opens a file.

    outlive_readers: drop output that cannot be written (`| head`, a terminal that was closed, a full disk), for
    programs whose work matters more. Otherwise print() raises OSError. On stderr such output is always dropped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed by the parent process: the next opened file would get its number and be printed to
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (as long as the process)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # a notebook's
            continue
        stream.reconfigure(errors="backslashreplace")  # in ASCII, "×" becomes "\xd7"
        raw = getattr(stream.buffer, "raw", stream.buffer)  # unbuffered, with PYTHONUNBUFFERED
        if isinstance(raw, io.FileIO) and (outlive_readers or name == "stderr"):
            buffer = io.BufferedWriter(_Heedless(raw.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True))


def clear_line() -> None:
    """Clears the line of a progress bar, and the ^C that a terminal shows after it, before a message is printed."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)


class _Heedless(io.FileIO):
    """A raw stream that drops output which cannot be written: nobody reads it, or the log's disk is full."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            return len(memoryview(data))  # type: ignore[arg-type]
