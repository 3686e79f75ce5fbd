"""How a process of a run ends: one line on stderr, exit.json and an exit code, all from one place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import streams
from pipeline.errors import CHECK_FAILED, DONE, HANG, PREEMPTED, ConfigError, ExpressError, StorageError, first_line

from . import signals, watchdog
from .environment import ROOT, launched, world_size
from .run_folder import EXIT, RunFolder

if TYPE_CHECKING:  # these import torch: a mistyped preset is reported before that
    from .config import Config
    from .trainer import Trainer

PAGE_SECONDS = 10.0  # time limit for writing the page
LOST_SECONDS = 1.0  # time that a rank gives another one to report an error, in exit.json or on the screen


class Interrupted(ExpressError):
    code, together = PREEMPTED, True


class LostRank(ExpressError):
    """Another rank ended; that rank reports the reason."""


@dataclass
class ExitReport:
    """A context manager around a run: turns an exception raised in it into `code`, a line on stderr and exit.json.

    An unexpected exception (a crash) is written to exit.json and propagates with its traceback.
    """

    code: int = DONE
    config: Config | None = None  # once it is parsed, with its folder
    folder: RunFolder | None = None
    trainer: Trainer | None = None  # once it is built

    def __enter__(self) -> ExitReport:
        return self

    def __exit__(self, kind: Any, err: BaseException | None, trace: Any) -> bool:
        known = self._as_express_error(err) if err else None
        if known:
            self.code = self._end(known)
        elif isinstance(err, Exception) and self.folder and (self.trainer or self.folder.is_ours):
            self.write(CHECK_FAILED, f"{type(err).__name__}: {err}")
        return known is not None

    def write(self, code: int, reason: str, **facts: Any) -> None:
        """Writes exit.json, if the folder can be written."""
        assert self.folder is not None
        with suppress(OSError):
            facts.setdefault("step", self.trainer.state.step if self.trainer else 0)
            self.folder.write_exit(code=code, reason=reason, **facts)

    def write_page(self) -> None:
        """Writes report.html in another process, which cannot change how this one ends."""
        if self.trainer and self.trainer.showcase.writes:
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(
                    [sys.executable, ROOT / "tools" / "report.py", self.trainer.folder.path],
                    timeout=PAGE_SECONDS,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                )

    def _as_express_error(self, err: BaseException) -> ExpressError | None:
        """Converts an exception to an ExpressError; returns None for a crash."""
        if isinstance(err, KeyboardInterrupt):  # signals.Stop raises it until training begins
            return Interrupted("stopped before training began; the same command starts again")
        if isinstance(err, OSError | ExpressError):
            return StorageError.of(err, self.folder.path if self.folder else "")
        text = str(err)
        if isinstance(err, RuntimeError) and is_lost_connection(err):
            lost = LostRank(f"another rank ended; its own line says why ({first_line(err)})")
            lost.__cause__ = err
            return lost
        if "does not have a deterministic implementation" in text:
            return ConfigError(f"run.deterministic=True: {text.split()[0]} has no kernel for it; choose a net without")
        if "more than 1 value per channel" in text and self.config:
            return ConfigError(
                f"train.batch={self.config.train.batch}, augment.crop={self.config.augment.crop}: a rank's images leave"
                " batch normalisation one value a channel; choose a larger batch or crop"
            )
        return None

    def _end(self, err: ExpressError) -> int:
        before_training = self.trainer is None or isinstance(err, Interrupted)
        if before_training:  # further signals, which launchers send when other ranks end, are ignored
            signals.heed_no_more()
        if self.folder and isinstance(err, LostRank) and (hang := watchdog.read_hang(self.folder.path)):
            # The other rank was lost because it hung, and the rank that noticed has reported it.
            watchdog.dump_stacks(self.folder.path, launched("RANK"), hang, error=err.__cause__)
            err = ExpressError(hang, code=HANG)
        if self.trainer:
            self.trainer.watchdog.close()
            with suppress(Exception):  # a save of an earlier step is worth waiting for
                self.trainer.saver.checkpoints.wait()
        if self.folder and os.path.isdir(self.folder.path):  # unlike is_dir, raises nothing
            self._write_end(err, self.folder, only_rank0=before_training)
        if launched("LOCAL_RANK") == 0 or not (before_training or err.together):  # one line if all ranks have it
            streams.clear_line()
            kind, rank = "" if err.code == PREEMPTED else "error: ", launched("RANK")
            print(f"{kind}{f'[rank {rank}] ' if rank else ''}{err}", file=sys.stderr)
        elif before_training:  # launchers end all ranks after the first: perhaps before local rank 0 has printed it
            time.sleep(LOST_SECONDS)
        if self.config is None and not isinstance(err, Interrupted) and world_size() > 1:
            from .preflight import report_rejection

            report_rejection(err)
        return err.code

    def _write_end(self, err: ExpressError, folder: RunFolder, *, only_rank0: bool) -> None:
        """Writes exit.json at the rank that has the error; does not touch a folder that another run holds."""
        if isinstance(err, signals.Preempted) or (launched("RANK") and (only_rank0 or err.together)):
            return  # written already, or another rank writes it
        with suppress(OSError, ExpressError):  # the folder may be what failed; line and code remain
            if self.trainer is None and not folder.is_ours:
                folder.claim(wait_seconds=0)
            if isinstance(err, LostRank):
                time.sleep(LOST_SECONDS)
                if (folder.path / EXIT).exists():
                    return
            self.write(err.code, str(err), **err.facts)


def is_lost_connection(err: RuntimeError) -> bool:
    """Whether a collective failed because its peer has exited; torch has no exception class for gloo's errors."""
    if world_size() == 1:
        return False
    from torch.distributed import DistError

    text = str(err).lower()
    gone = ("connection closed", "connection reset", "broken pipe", "connection refused", "timed out")
    return isinstance(err, DistError) or any(words in text for words in gone)
