"""Progress: a bar that fits their terminal, or a line now and then."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

import pytest

from pipeline import progress
from pipeline.progress import Progress
from pipeline.streams import clear_line

NOTE = "loss 6.9078, lr 0.00123, wait 100%, 79.9 GB, run ends in 101:02:05"  # as loop.log writes it


@contextmanager
def terminal() -> Iterator[Callable[[], list[str]]]:
    """The lines that a terminal of 120 columns shows."""
    outside, inside = os.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    with open(inside, "w", buffering=1) as stderr, redirect_stderr(stderr):
        written = []

        def lines() -> list[str]:
            stderr.flush()
            written.append(read_all(outside, inside))
            return shown("".join(written))

        yield lines
    os.close(outside)


def read_all(outside: int, inside: int) -> str:
    """The text written to a terminal, which passes it on a moment later: up to a bell, which is rung now."""
    os.write(inside, b"\a")
    written = b""
    while not written.endswith(b"\a"):
        written += os.read(outside, 1 << 16)
    return written[:-1].decode()


def shown(text: str) -> list[str]:
    """The lines of a screen of any width after `text` was written to it."""
    lines, column = [""], 0
    for part in text.replace("\x1b[K", "\0"):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            column = 0
        elif part == "\0":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_the_bar_of_a_long_run_fits_120_columns_with_its_whole_note():
    with terminal() as screen:
        with Progress("epoch 90/90", 1_281_167) as bar:
            bar.update(1_153_600, NOTE)
            bar.bar.refresh()
            (line,) = screen()
        assert len(line) <= 120
        assert line.startswith("epoch 90/90: |")
        assert line.endswith(NOTE)
        assert screen() == [""]


def test_a_message_takes_the_line_of_the_bar_and_of_the_c_that_was_typed():
    with terminal() as screen:
        bar = Progress("sharding", 100)
        bar.update(10)
        print("^C", end="", file=sys.stderr)
        clear_line()
        print("error: interrupted", file=sys.stderr)
        bar.close()
        assert screen() == ["error: interrupted", ""]


@pytest.mark.parametrize("enabled", [True, False])
def test_off_a_terminal_no_line_appears_twice(enabled, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with Progress("sharding", 4, enabled=enabled) as bar:
        for _ in range(4):
            bar.update(1, "2 bad")
    clear_line()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" img,")[0] for line in lines] == [f"sharding: {n}/4" for n in range(1, 5)] * enabled
    assert all(line.endswith(" left, 2 bad") for line in lines)
