"""What a run goes on from, and whether that is the same run: what may differ from how the checkpoint was trained."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, ExpressError, StorageError
from pipeline.manifest import Dataset

from . import preflight
from .checkpoint import Checkpoints, Saved, load
from .config import REMOVED, RESUME_NEWEST, Config, check_removed, flatten
from .distributed import Agreement
from .optim import learning_rate, scaled_to_batch
from .run_folder import LOCK, RunFolder

# These change nothing of what is trained, or are meant to be changed: where the data lie, how they are read, what is
# recorded, what is done about trouble. data.shards may be another place of the same data; its fingerprint may not.
MAY_CHANGE = (
    "data.shards",
    "guard.",
    "limit_steps",
    "loader.",
    "profile",
    "resume",
    "run.ddp_backend",
    "run.dir",
    "run.keep_checkpoints",
    "run.log_every",
    "run.record_ids",
    "run.save_every",
    "run.trackers",
    "train.accumulate",
    "train.epochs",
    "train.eval_batch",
    "train.stop_at",
)


def choose(
    config: Config,
    dataset: Dataset,
    *,
    folder: RunFolder,
    checkpoints: Checkpoints,
    agreement: Agreement,
    first: bool,
    precision: str,
    steps_per_epoch: int,
) -> Saved | None:
    """The checkpoint to go on from, which rank 0, the `first`, chooses for all; None: from the start.

    Only here the folder is made and claimed: what was refused before leaves nothing behind. Raises ConfigError,
    DataError or StorageError, the same at all ranks.
    """
    path: Path | None = None
    saved: Saved | None = None
    error: ExpressError | None = None
    if first:
        try:
            folder.claim()
            saved = _choose(config.resume, checkpoints)
            if saved:
                path = saved.path
                refuse_another_run(config, dataset, saved, precision=precision, steps_per_epoch=steps_per_epoch)
            here = saved is not None and saved.path.parent.resolve() == checkpoints.folder.resolve()
            checkpoints.set_aside_after(saved.state["step"] if saved and here else -1)
        except ExpressError as err:
            error = err
        except OSError as err:
            error = StorageError(f"{err.filename or folder.path}: {err.strerror or err}")
    path, claim, error = agreement.from_first((path, folder.claimed_by() if folder.is_ours else "", error))
    if error:
        raise error
    if not folder.private:
        _refuse_apart(folder, claim, agreement)
    return saved or (load(path) if path else None)


def _refuse_apart(folder: RunFolder, claim: str, agreement: Agreement) -> None:
    """Raises ConfigError where a rank's run folder is not the one that rank 0 has claimed: checkpoints are read there,
    and heartbeats heard."""
    seen = agreement.from_all((socket.gethostname(), preflight.sees(folder.path / LOCK, claim)))
    if apart := [host for host, there in seen if not there]:
        raise ConfigError(
            f"run.dir={folder.path}: host {apart[0]} does not see what host {seen[0][0]} writes there;"
            " choose a folder on storage that all hosts share"
        )


def _choose(asked: str, checkpoints: Checkpoints) -> Saved | None:
    saved, damaged = checkpoints.newest()
    for line in damaged:
        print(f"passed over: {line.removesuffix('; resume from another one')}", flush=True)
    if asked and asked != RESUME_NEWEST:
        named = Path(asked)
        if named.resolve().parent != checkpoints.folder.resolve():
            return saved or load(named)  # the branch that was begun there goes on
        if saved and saved.path.name > named.name:
            # Going back would leave two runs' checkpoints in one folder, and the next start would take the other one's.
            raise ConfigError(
                f"--resume {asked}: {checkpoints.run} goes on to {saved.path.name};"
                " to branch off an earlier checkpoint, choose another --run.dir"
            )
        return load(named)
    if damaged and not saved:
        print(f"{checkpoints.run}: no checkpoint is whole; starting anew", flush=True)
    if asked and not saved:
        raise ConfigError(f"{checkpoints.run}: no checkpoint to resume from; start without --resume")
    return saved


def what_must_stay(config: Config, dataset: Dataset, *, precision: str) -> dict[str, Any]:
    """Fields and values that a checkpoint and what goes on from it have in common.

    precision: what train.precision came to, with the launcher's word.
    """
    fixed = {name: value for name, value in flatten(config).items() if _is_fixed(name)}
    return fixed | {"train.precision": precision, "the dataset's fingerprint": dataset.fingerprint}


def _is_fixed(name: str) -> bool:
    return not name.startswith(MAY_CHANGE) and name.split(".")[-1] not in REMOVED


def refuse_another_run(config: Config, dataset: Dataset, saved: Saved, *, precision: str, steps_per_epoch: int) -> None:
    """Raises ConfigError that names every field whose value would make this another run, with both values."""
    before, now = saved.state["config"], what_must_stay(config, dataset, precision=precision)
    check_removed(before, str(saved.path))
    # Fields that are new had their default.
    before = {name: value for name, value in (flatten(Config()) | before).items() if _is_fixed(name)}
    differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if differing:
        both = "; ".join(f"{name}={now.get(name)} but it was {before.get(name)}" for name in differing)
        raise ConfigError(
            f"{saved.path} is of another run: {both}. Give the value it was trained with, or choose another --run.dir"
        )
    _refuse_other_rates(config, saved, steps_per_epoch)


def _refuse_other_rates(config: Config, saved: Saved, steps_per_epoch: int) -> None:
    """More or fewer epochs are the same run only where no rate up to now would have been another."""
    epochs, done = saved.state.get("epochs", config.train.epochs), saved.state["step"]
    if epochs == config.train.epochs:
        return
    if config.train.epochs * steps_per_epoch < done:
        behind = f"{done // steps_per_epoch} epochs and {done % steps_per_epoch} steps behind it"
        raise ConfigError(f"train.epochs={config.train.epochs} but {saved.path} has {behind}")
    optim = scaled_to_batch(config.optim, config.train.batch)
    for step in range(done):
        then, now = (
            learning_rate(optim, step=step, steps_per_epoch=steps_per_epoch, total_steps=steps_per_epoch * e)
            for e in (epochs, config.train.epochs)
        )
        if then != now:
            raise ConfigError(
                f"train.epochs={config.train.epochs} but it was {epochs}: with optim.schedule={config.optim.schedule}"
                f" the rate of step {step + 1} of {saved.path} would have been another; keep it,"
                " or choose another --run.dir"
            )


def as_saved(config: Any, saved: dict[str, Any]) -> Any:
    """A dataclass with the values, nested as its own are, that JSON kept of another one."""
    changes: dict[str, Any] = {}
    check_removed(saved, "configuration")
    for name in {field.name for field in dataclasses.fields(config)} & saved.keys():
        value, kept = getattr(config, name), saved[name]
        if dataclasses.is_dataclass(value):
            kept = as_saved(value, kept)
        changes[name] = tuple(kept) if isinstance(kept, list) else kept
    return dataclasses.replace(config, **changes)
