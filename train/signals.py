"""Requests to stop: a signal, a file in the run folder, or a launcher that has ended. A run stops at its next step.

A second signal ends the process at once; copies of one signal, which launchers and schedulers forward, do not count.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PREEMPTED, ExpressError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
COPY_SECONDS = 2.0  # a launcher's copy of a signal arrives within milliseconds
FILE_SECONDS = 1.0  # between two checks for the stop file
STOP_FILE = "stop"
FILE, ORPHAN = 100, 101  # reasons beside the signals' numbers, which are below
RANKS = 1 << 20  # a code and its rank are sent as one number, code · RANKS + rank


class Preempted(ExpressError):
    """Stopped on request, after saving a checkpoint."""

    code, together = PREEMPTED, True


# Without repr: signal.signal() computes the repr of the previous handler and all tensors it references, for a second.
@dataclass(repr=False)
class Stop:
    """This process's request to stop. `code` is 0 until there is one; `name` puts it into words."""

    code: int = 0
    at: float = 0.0  # of the first signal
    at_second: Callable[[str], None] = lambda reason: None  # called before a second signal ends the process at once
    running: bool = False  # False: a signal raises KeyboardInterrupt
    _looked: float = 0.0

    def install(self) -> None:
        """Installs the handlers; call it in the main thread."""
        mine, theirs = socket.socketpair()
        theirs.setblocking(False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup ignores it
                signal.signal(number, self._interrupt)
        # Python's handlers run only after the current C call, which may be a collective that never ends; through this
        # descriptor, the signal's number arrives at once.
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._sockets = (mine, theirs)
        threading.Thread(target=self._listen, args=(mine,), name="signals", daemon=True).start()

    def _interrupt(self, number: int, frame: Any) -> None:
        # Not counted here: the thread has counted it, and after a long C call it would look like a second signal.
        self.code = self.code or number
        if not self.running:
            self.running = True  # raise only once, so that the shutdown is not interrupted
            raise KeyboardInterrupt

    def _listen(self, mine: socket.socket) -> None:
        while numbers := mine.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self.request(number)

    def request(self, code: int) -> None:
        """Requests a stop. A second signal, after the copies of the first, ends the process at once."""
        self.code = self.code or code
        if code >= FILE:
            return
        now = time.monotonic()
        self.at = self.at or now
        # A terminal that closes sends SIGHUP more than once, and a launcher that gets it then sends SIGTERM.
        hung_up = code == signal.SIGHUP or (self.code == signal.SIGHUP and code == signal.SIGTERM)
        if now - self.at > COPY_SECONDS and not hung_up:
            with suppress(Exception):
                self.at_second(f"a second {name(code)}: ended at once, without saving")
            os._exit(128 + code)

    def look_for_file(self, folder: Path) -> None:
        """Requests a stop if the run folder holds a file named `stop`; checks once a second."""
        if (now := time.monotonic()) - self._looked >= FILE_SECONDS:
            self._looked = now
            if (folder / STOP_FILE).exists():
                self.request(FILE)

    def encoded(self, rank: int) -> int:
        """Encodes the request as one number; 0: none. All ranks follow the greatest number of all ranks."""
        return self.code * RANKS + rank if self.code else 0


def heed_no_more() -> None:
    """Ignores signals from now on: this process's exit code is settled.

    Launchers signal all ranks as soon as the first has ended.
    """
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def describe(encoded: int, *, world: int) -> str:
    """The meaning of `Stop.encoded`, with the rank if only one of several has the signal."""
    code, rank = divmod(encoded, RANKS)
    return name(code) + (f" at rank {rank}" if code < FILE and world > 1 else "")


def name(code: int) -> str:
    """A request in words."""
    others = {FILE: f"the file {STOP_FILE!r} in the run folder", ORPHAN: "the end of its launcher"}
    return others.get(code) or signal.Signals(code).name
