"""Standard streams that end no program: closed ones, encodings that lack a character, readers that are gone."""

import io
import os
import sys


def prepare(*, outlive_readers: bool) -> None:
    """Mends this process's standard streams; to be called first, before anything opens a file.

    outlive_readers: whether output that cannot be written (`| head`, a terminal that was closed, a full disk) is
    dropped, for programs whose work matters more. Otherwise print() raises OSError. Messages on stderr are dropped
    always.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed by whoever started us: the next file would get its number, and be printed into
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
    """Removes a bar, and the ^C that a terminal shows behind it, from the line before a message is printed."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)


class _Heedless(io.FileIO):
    """Drops what cannot be written: nobody reads it, or the disk of a log is full."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            return len(memoryview(data))  # type: ignore[arg-type]
