"""Trains an AlexNet on shards.

    accelerate launch train/run.py demo --data.shards shards/digits
    accelerate launch train/run.py seed --data.shards /data/shards --train.batch 1024 --optim.lr 0.08

The last line on success: val top1=… top5=… images=… (fractions, and how many images were counted).
Exit codes of each process: 0 done, 2 usage, 65 bad data, 74 I/O failed, 76 loss not finite.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = str(Path(__file__).resolve().parent.parent)
if not __package__:  # started as a file: the packages lie beside this folder, not inside it
    sys.path[0] = ROOT

from pipeline.errors import ConfigError, ExpressError, StorageError

if TYPE_CHECKING:  # imported where they are needed: a mistyped preset is answered before torch is loaded
    from accelerate import Accelerator

    from train.config import Config
    from train.loop import Run


def main(argv: list[str]) -> int:
    """Parses, trains and tells the end; returns the process's exit code."""
    from train.config import parse
    from train.presets import PRESETS

    try:
        config = parse(argv, PRESETS, prog="train/run.py")
    except ExpressError as err:
        return fail(err, only_rank0=True)
    return start(config)


def start(config: Config) -> int:
    from train.loop import Run
    from train.tracking import EXIT, write_exit

    run, folder = None, Path(config.run.dir)
    if rank() == 0:
        with contextlib.suppress(OSError):  # of an earlier attempt: nobody must take its end for ours
            (folder / EXIT).unlink()
    try:
        accelerator = make_accelerator(config)
        run = Run(config, accelerator)
        result = run.train()
    except OSError as err:
        return end(folder, run, StorageError(f"{err.filename or folder}: {err.strerror or err}"))
    except ExpressError as err:
        return end(folder, run, err)
    except RuntimeError as err:
        if not is_lost_connection(err):
            raise
        return end(folder, run, LostRank(f"another rank ended; its own line says why ({str(err).splitlines()[0]})"))
    except KeyboardInterrupt:
        return end(folder, run, Interrupted("interrupted; --resume goes on from the last whole epoch, if there is one"))
    if accelerator.is_main_process:
        write_exit(folder, code=0, reason="done", step=run.state.step)
    run.close()
    if accelerator.is_main_process:
        print(result, flush=True)
    return 0


class Interrupted(ExpressError):
    code = 130


class LostRank(ExpressError):
    code = 1


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_lost_connection(err: RuntimeError) -> bool:
    """Whether a collective failed because its peer went away; torch has no class of error for gloo's."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    from torch.distributed import DistError

    text = str(err).lower()
    gone = ("connection closed", "connection reset", "broken pipe", "connection refused")
    return isinstance(err, DistError) or any(words in text for words in gone)


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate's part: devices, precision, processes. Refuses a launch whose ranks do not know of each other."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import ProjectConfiguration

    precision = {"launcher": None, "fp32": "no"}.get(config.train.precision, config.train.precision)
    handlers: list[Any] = []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.run.ddp_backend != "auto" and world > 1:  # one process joins no group
        handlers.append(InitProcessGroupKwargs(backend=config.run.ddp_backend))
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with="tensorboard",
            project_config=ProjectConfiguration(config.run.dir, logging_dir=config.run.dir),
            kwargs_handlers=handlers,
        )
    except ValueError as err:
        chosen = f"train.precision={config.train.precision}, run.ddp_backend={config.run.ddp_backend}"
        raise ConfigError(f"{chosen}: {err}") from err
    if world != accelerator.num_processes:
        raise ConfigError(
            f"WORLD_SIZE={world} but Accelerate runs {accelerator.num_processes} process: each rank would train alone;"
            f" on CPUs use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {world} train/run.py …"
        )
    return accelerator


def end(folder: Path, run: Run | None, err: ExpressError) -> int:
    """Tells people by one line and machines by exit.json."""
    from train.tracking import EXIT, write_exit

    # A lost rank's neighbours know less than it does: its own exit.json stands.
    if folder.is_dir() and (rank() == 0 or not (folder / EXIT).exists()) and not isinstance(err, LostRank):
        with contextlib.suppress(OSError):  # the folder may be what failed: the line and the exit code still tell it
            write_exit(folder, code=err.code, reason=str(err), step=run.state.step if run else 0)
    # Before the run stands, all ranks of a machine meet the same error: one line is enough.
    return fail(err, only_rank0=run is None)


def fail(err: ExpressError, *, only_rank0: bool) -> int:
    """One line on stderr, with the rank where only one may have met it."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank == 0 or not only_rank0:
        print(f"error: {f'[rank {rank()}] ' if rank() else ''}{err}", file=sys.stderr, flush=True)
    return err.code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before the run stood, or a second time
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
