"""Trains an AlexNet on shards.

    accelerate launch train/run.py demo --data.shards shards/digits
    accelerate launch train/run.py seed --data.shards /data/shards --train.batch 1024 --optim.lr 0.08

The same command again goes on from the newest checkpoint that verifies. SIGTERM, SIGUSR1, SIGINT or a file named
`stop` in the run folder: saves at the next step and ends with 75.

The last line on success: val top1=… top5=… images=… (fractions, and how many images were counted).
Exit codes of each process, and in exit.json: 0 done, 1 a check failed or a rank was lost, 2 usage, 65 bad data,
74 I/O failed or disk full, 75 stopped and saved, 76 bad numbers, 77 hang.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = str(Path(__file__).resolve().parent.parent)
if not __package__:  # started as a file: the packages lie beside this folder, not inside it
    sys.path[0] = ROOT

from pipeline.errors import ConfigError, ExpressError, StorageError, leave

if TYPE_CHECKING:  # imported where they are needed: a mistyped preset is answered before torch is loaded
    from train.config import Config
    from train.run_folder import RunFolder
    from train.signals import Stop
    from train.trainer import Run


PARENT = os.getppid()  # the launcher, where there is one; it may be gone before the run stands


def main(argv: list[str]) -> int:
    """Parses, trains and tells the end; returns the process's exit code."""
    from train.signals import Stop

    stop = Stop()
    stop.install()
    try:
        from train.cli import parse

        try:
            config = parse(argv)
        except ExpressError as err:
            return refuse(err)
        return start(config, stop)
    except KeyboardInterrupt:
        return fail(Interrupted(NOT_BEGUN), only_rank0=True)
    finally:
        stop.ended()


def refuse(err: ExpressError) -> int:
    """For a command line that cannot be."""
    from train.signals import heed_no_more

    heed_no_more()
    code = fail(err, only_rank0=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from train.preflight import tell_refusal

        tell_refusal(err)
    return code


def start(config: Config, stop: Stop) -> int:
    from train.run_folder import RunFolder

    folder = RunFolder(Path(config.run.dir))
    try:
        return attempt(config, folder, stop)
    except KeyboardInterrupt:
        return end(folder, None, Interrupted(NOT_BEGUN))


NOT_BEGUN = "stopped before it went on with training; the same command starts again"


def attempt(config: Config, folder: RunFolder, stop: Stop) -> int:
    """From building the run to its end; returns the exit code."""
    from train.distributed import make_accelerator
    from train.preflight import open_alike
    from train.trainer import Run

    run = None
    try:
        dataset = open_alike(config)
        accelerator = make_accelerator(config)
        run = Run(config, accelerator, dataset, folder=folder, stop=stop, parent=PARENT)
        stop.at_second = lambda reason: folder.write_end(code=1, reason=reason, step=step_of(run))
        result = run.train()
        run.close()
        if accelerator.is_main_process:
            folder.write_end(code=0, reason="done", step=run.state.step)
            print(result, flush=True)
        return 0
    except OSError as err:
        return end(folder, run, StorageError(f"{os.fsdecode(err.filename or folder.path)}: {err.strerror or err}"))
    except ExpressError as err:
        return end(folder, run, err)
    except Exception as err:
        known = what_torch_means(err, config)
        if known is None:
            tell_of_crash(folder, run, err)
            raise
        return end(folder, run, known)


class Interrupted(ExpressError):
    code = 75


class LostRank(ExpressError):
    code = 1


def what_torch_means(err: Exception, config: Config) -> ExpressError | None:
    """An error of torch's that is no bug of ours, in the run's own words."""
    text = str(err)
    if isinstance(err, RuntimeError) and is_lost_connection(err):
        lost = LostRank(f"another rank ended; its own line says why ({text.splitlines()[0]})")
        lost.__cause__ = err
        return lost
    if "does not have a deterministic implementation" in text:
        return ConfigError(f"run.deterministic=True: {text.split()[0]} has no kernel for it; choose a net without")
    if "more than 1 value per channel" in text:
        return ConfigError(
            f"train.batch={config.train.batch}, augment.crop={config.augment.crop}: a rank's images leave batch"
            " normalisation one value a channel; choose a larger batch or crop"
        )
    return None


def step_of(run: Run | None) -> int:
    return run.state.step if run else 0


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_lost_connection(err: RuntimeError) -> bool:
    """Whether a collective failed because its peer went away; torch has no class of error for gloo's."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    from torch.distributed import DistError

    text = str(err).lower()
    gone = ("connection closed", "connection reset", "broken pipe", "connection refused", "timed out")
    return isinstance(err, DistError) or any(words in text for words in gone)


def end(folder: RunFolder, run: Run | None, err: ExpressError) -> int:
    """Tells people by one line and machines by exit.json."""
    from train import watchdog
    from train.nonfinite import LossNotFinite
    from train.saving import SaveFailed
    from train.signals import Preempted, heed_no_more

    if run is None:  # refused: what the other ranks' ends bring about changes nothing
        heed_no_more()
    if isinstance(err, LostRank) and (hang := watchdog.read_hang(folder.path)):
        # The peer was lost because it hung: whoever noticed has said so.
        watchdog.dump_stacks(folder.path, rank(), hang, error=err.__cause__)
        err = Hang(hang)
    if run is not None:
        run.watchdog.close()
        with contextlib.suppress(Exception):  # a save of an earlier step is worth waiting for
            run.checkpoints.wait()
    # What all ranks end by together is told once, and what all meet before the run stands.
    together = run is None or isinstance(err, Preempted | LossNotFinite | SaveFailed)
    write_end(folder, run, err)
    return fail(err, only_rank0=together)


def write_end(folder: RunFolder, run: Run | None, err: ExpressError) -> None:
    """exit.json, by the rank that knows: a folder that another run holds is left alone."""
    from train.nonfinite import LossNotFinite
    from train.saving import SaveFailed
    from train.signals import Preempted

    if isinstance(err, Preempted) or (rank() and run is None) or not folder.path.is_dir():
        return  # written already, or told by rank 0
    with contextlib.suppress(OSError, ExpressError):  # the folder may be what failed: line and exit code still tell it
        if run is None and not folder.is_ours:
            folder.claim(wait_seconds=0)
        if isinstance(err, LostRank):
            time.sleep(LOST_SECONDS)  # the rank that ended knows more, if it was not killed
            if folder.has_end:
                return
        more = {"loss": repr(err.loss), "ids": err.ids} if isinstance(err, LossNotFinite) and err.ids else {}
        if (rank() and more) or (isinstance(err, SaveFailed) and not err.here):
            return  # another rank writes it
        step = err.step if isinstance(err, LossNotFinite) and err.step else step_of(run)
        folder.write_end(code=err.code, reason=str(err), step=step, **more)


LOST_SECONDS = 1.0


class Hang(ExpressError):
    code = 77


def tell_of_crash(folder: RunFolder, run: Run | None, err: Exception) -> None:
    """Of what nobody has thought of: exit.json names it, the traceback follows."""
    if run is not None or folder.is_ours:
        with contextlib.suppress(OSError):
            folder.write_end(code=1, reason=f"{type(err).__name__}: {err}", step=step_of(run))


def fail(err: ExpressError, *, only_rank0: bool) -> int:
    """One line on stderr, with the rank where only one may have met it."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank == 0 or not only_rank0:
        kind = "" if err.code == 75 else "error: "
        print(f"{kind}{f'[rank {rank()}] ' if rank() else ''}{err}", file=sys.stderr, flush=True)
    return err.code


if __name__ == "__main__":
    try:
        leave(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before the run stood, or a second time
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
