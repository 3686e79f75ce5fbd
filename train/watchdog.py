"""Ends a run that makes no step, and names the rank that keeps the others waiting.

Each rank's watchdog is a thread that writes a heartbeat into the run folder, `heartbeat/rank-NNNNN.json`: step, phase,
host, process. A rank that makes no step for `hang_seconds` reads all heartbeats, names the ranks that are silent or
behind, writes its threads' stacks to `stacks/` and exits with code 77, as all ranks do that are alive. A stopped
process of the same host is killed, since it holds memory, devices and perhaps the run's lock.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import errors
from pipeline.files import Json, read_object

from .signals import ORPHAN, Stop

HEARTBEAT, STACKS, HANG = "heartbeat/rank-{:05d}.json", "stacks/rank-{:05d}.txt", "hang.json"
LOOK_SECONDS = 0.5
DUMP_SECONDS = 2.0  # time that the first rank to notice waits for the others' stacks
ORPHAN_SECONDS = 20.0  # time that a rank without a launcher may take to save
PAUSE_SECONDS = 1.0
SAVING_FACTOR = 10  # a disk may be slow, and what is being written would be lost
DATA, FORWARD, BACKWARD, EVALUATING, SAVING = PHASES = (
    "waiting for data", "in the forward pass", "in the backward pass", "evaluating", "saving",
)  # fmt: skip
# The heartbeat of a rank whose file cannot be read
UNKNOWN: Json = {"step": 0, "phase": DATA, "host": "an unknown host", "pid": "unknown", "started": "", "time": 0}


@dataclass
class Watchdog:
    """Watches this process and, through the run folder, the others.

    stop: requested once when the launcher has ended. on_hang: called with the reason before the process ends.
    parent: the launcher's process id; 0: none.
    """

    folder: Path
    rank: int
    world: int
    hang_seconds: float
    stop: Stop
    parent: int = 0
    on_hang: Callable[[str], None] = lambda reason: None
    step: int = 0
    phase: str = DATA
    _at: float = field(default_factory=time.monotonic)
    _orphan_at: float = 0.0
    _seen: dict[int, tuple[float, float]] = field(default_factory=dict)  # rank → its last beat, and when it was new
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        with suppress(OSError):
            (self.folder / HEARTBEAT).parent.mkdir(exist_ok=True)
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def tick(self, step: int, phase: str) -> None:
        """Records progress: the rank is at `step`, and `phase` of it begins."""
        self.step, self.phase, self._at = step, phase, time.monotonic()

    def close(self) -> None:
        """Stops the watchdog. If it is handling a hang, waits for it: it may have to kill a silent rank."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * DUMP_SECONDS)

    # The thread

    @property
    def beat_seconds(self) -> float:
        return min(max(self.hang_seconds / 10, LOOK_SECONDS), 10.0) if self.hang_seconds else 10.0

    def _watch(self) -> None:
        before, beat_at = time.monotonic(), 0.0
        while not self._ended.wait(LOOK_SECONDS):
            now = time.monotonic()
            if (paused := now - before - LOOK_SECONDS) > PAUSE_SECONDS:
                # The whole process was suspended, as schedulers may do: the pause does not count as a hang.
                self._at += paused
                self._seen.clear()
            before = now
            stalled = now - self._at
            if now - beat_at >= self.beat_seconds:
                beat_at = now
                self._beat()
            self._look_after_launcher(now, stalled)
            if not self.hang_seconds:
                continue
            if stalled > self.hang_seconds / 2:
                self._listen(now)
            if stalled > min(LOOK_SECONDS * 4, self.hang_seconds / 2) and (reason := read_hang(self.folder)):
                self._end(reason)
            if stalled > self.hang_seconds * (SAVING_FACTOR if self.phase == SAVING else 1):
                self._declare(now)

    def _look_after_launcher(self, now: float, stalled: float) -> None:
        if self.parent and os.getppid() != self.parent:
            if not self._orphan_at:
                self._orphan_at = now
                self.stop.request(ORPHAN)
            elif now - self._orphan_at > ORPHAN_SECONDS and stalled > ORPHAN_SECONDS:
                self._end(f"rank {self.rank} has lost its launcher and makes no step")

    def _beat(self) -> None:
        beat = {
            "rank": self.rank,
            "step": self.step,
            "phase": self.phase,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "time": round(time.time(), 3),
        }
        path = self.folder / HEARTBEAT.format(self.rank)
        partial = path.with_suffix(".partial")
        with suppress(OSError):  # a full disk is reported by the save that fails
            partial.write_text(json.dumps(beat) + "\n")
            os.replace(partial, path)

    def _listen(self, now: float) -> dict[int, Json]:
        """Reads all ranks' heartbeats, and remembers when each was new."""
        beats = {}
        for rank in range(self.world):
            beats[rank] = UNKNOWN | read_object(self.folder / HEARTBEAT.format(rank))
            if self._seen.get(rank, (None,))[0] != beats[rank]["time"]:
                self._seen[rank] = (beats[rank]["time"], now)
        return beats

    def _declare(self, now: float) -> None:
        """Declares a hang and ends the run: this rank is the first to notice, or one of the first."""
        beats = self._listen(now)
        patience = min(max(3 * self.beat_seconds, 1.5), self.hang_seconds / 3)
        silent = [rank for rank, (_, at) in self._seen.items() if rank != self.rank and now - at > patience]
        reason = describe(beats, silent, seconds=self.hang_seconds, step=self.step)
        with suppress(OSError), open(self.folder / HANG, "x") as file:
            json.dump({"reason": reason}, file)
        reason = read_hang(self.folder) or reason
        dump_stacks(self.folder, self.rank, reason)
        reachable = [r for r in beats if r not in silent]
        deadline = time.monotonic() + DUMP_SECONDS
        while time.monotonic() < deadline and not all((self.folder / STACKS.format(r)).exists() for r in reachable):
            time.sleep(0.05)
        for rank in silent:
            _kill(beats[rank])
        self._end(reason)

    def _end(self, reason: str) -> None:
        dump_stacks(self.folder, self.rank, reason)
        with suppress(Exception):
            print(f"error: [rank {self.rank}] {reason}", file=sys.stderr)
            self.on_hang(reason)
        os._exit(errors.HANG)


def describe(beats: dict[int, Json], silent: list[int], *, seconds: float, step: int) -> str:
    """Names the ranks without a heartbeat, or else those that are behind the others."""
    since = f"no step for {seconds:g} seconds after step {step}"
    if silent:
        return f"{since}: {', '.join(_who(r, beats[r]) for r in silent)} gives no sign of life"
    steps = {rank: (beat["step"], PHASES.index(beat["phase"])) for rank, beat in beats.items()}
    step, phase = slowest = min(steps.values())
    behind = [rank for rank, at in steps.items() if at == slowest]
    place = f"{PHASES[phase]} of step {step + 1}" if phase < 3 else f"{PHASES[phase]} after step {step}"
    if len(behind) == len(beats):
        hosts = list(dict.fromkeys(beat["host"] for beat in beats.values()))
        network = f"; check the network between {' and '.join(hosts[:2])}" if len(hosts) > 1 else ""
        return f"{since}: {'all ranks are' if len(beats) > 1 else 'it is'} {place}{network}"
    return f"{since}: the others wait for {', '.join(_who(r, beats[r]) for r in behind)}, {place}"


def _who(rank: int, beat: Json) -> str:
    return f"rank {rank} (process {beat['pid']} on {beat['host']})"


def dump_stacks(folder: Path, rank: int, reason: str, *, error: BaseException | None = None) -> None:
    """Writes the stacks of all threads to `stacks/rank-NNNNN.txt`, once, after the traceback of `error`."""
    path = folder / STACKS.format(rank)
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with open(path, "x") as file:
            print(reason, file=file)
            if error is not None:
                traceback.print_exception(error, file=file)
            file.flush()  # the next call bypasses Python's buffer
            faulthandler.dump_traceback(file, all_threads=True)


def read_hang(folder: Path) -> str:
    """Returns the reason of a hang that a rank has declared; "" if there is none."""
    return read_object(folder / HANG).get("reason", "")


def clean(folder: Path) -> None:
    """Removes the files of an earlier start, so that they do not count for this one."""
    for path in [folder / HANG, *folder.glob("heartbeat/rank-*"), *folder.glob("stacks/rank-*")]:
        with suppress(OSError):
            path.unlink()


def _started(pid: int) -> str:
    """Returns the kernel's start time of a process, which distinguishes it from a process with a reused id."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _kill(beat: Json) -> None:
    """Sends SIGKILL to a heartbeat's process if it runs on this host: a stopped process handles no other signal."""
    pid, ours = beat["pid"], beat["host"] == socket.gethostname() and beat["pid"] != os.getpid()
    if ours and beat["started"] and _started(pid) == beat["started"]:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            print(f"killed process {pid}, which had stopped responding", file=sys.stderr)
