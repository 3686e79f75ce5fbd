"""Chooses the checkpoint from which a run resumes, and checks that the settings fixed on resume are the same."""

import contextlib
import json
import socket
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.files import Json
from pipeline.manifest import Dataset
from pipeline.settings import MAY_CHANGE, REMOVED, check_removed, flatten, marked, updated

from . import preflight
from .checkpoint import RESUME_ANOTHER, STATE, Checkpoints, Saved, load
from .config import RESUME_NEWEST, Config
from .distributed import Agreement
from .optim import learning_rate
from .run_folder import LOCK, RunFolder, another

FREE = {*marked(Config, MAY_CHANGE), *REMOVED}  # fields whose values a checkpoint need not share


def choose(
    config: Config,
    fixed: Json,
    *,
    steps_per_epoch: int,
    folder: RunFolder,
    checkpoints: Checkpoints,
    agreement: Agreement,
) -> Saved | None:
    """Returns the checkpoint to resume from, which rank 0 chooses for all; None: start from scratch.

    fixed: the run's `invariants`.
    The folder is created and claimed only here, so that a run that was rejected earlier leaves no files. Raises
    ConfigError, DataError or StorageError, the same at all ranks.
    """
    saved, claim = None, Json()
    with agreement.alike(folder.path):
        if agreement.first:
            claim = folder.claim()
            saved = _choose(config.resume, checkpoints)
            if saved:
                check_same_run(fixed, saved)
                _check_same_rates(config, saved, steps_per_epoch)
            here = saved and saved.path.parent.resolve() == checkpoints.folder.resolve()
            checkpoints.set_aside_after(saved.state["step"] if saved and here else -1)
    path, claim = agreement.from_all((saved and saved.path, claim))[0]
    if not folder.private:
        _check_shared_folder(folder, claim, agreement)
    with agreement.alike(path):
        return saved or (load(path) if path else None)


def _check_shared_folder(folder: RunFolder, claim: Json, agreement: Agreement) -> None:
    """Raises ConfigError if a rank's run folder is not the one that rank 0 has claimed, which holds checkpoints and
    heartbeats."""
    seen = agreement.from_all((socket.gethostname(), preflight.sees(folder.path / LOCK, claim)))
    if apart := [host for host, there in seen if not there]:
        raise ConfigError(
            f"run.dir={folder.path}: host {apart[0]} does not see what host {seen[0][0]} writes there;"
            " choose a folder on storage that all hosts share"
        )


def _choose(asked: str, checkpoints: Checkpoints) -> Saved | None:
    saved, damaged = checkpoints.newest()
    for line in damaged:
        print("passed over:", line.removesuffix("; " + RESUME_ANOTHER))
    if asked and asked != RESUME_NEWEST:
        named = Path(asked)
        if named.resolve().parent != checkpoints.folder.resolve():
            return saved or load(named)  # a branch that was started in this folder resumes
        if saved and saved.path.name > named.name:
            # Going back would leave two runs' checkpoints in one folder, and the next start would take the other one's.
            raise ConfigError(
                f"--resume {asked}: {checkpoints.run} has {saved.path.name} already;"
                f" to branch off an earlier checkpoint, use {another(checkpoints.run)}"
            )
        return load(named)
    if damaged and not saved:
        print(f"{checkpoints.run}: no checkpoint is whole; starting from scratch")
    if asked and not saved:
        raise ConfigError(f"{checkpoints.run}: no checkpoint to resume from; start without --resume")
    return saved


def with_window(config: Config, dataset: Dataset, checkpoints: Checkpoints, agreement: Agreement) -> Config:
    """Returns `config` with data.window resolved: to that of the checkpoint to resume from, otherwise the data's."""
    if config.data.window >= 0:
        return config
    window = dataset.window
    if agreement.first:
        stored = [Path(config.resume)] if config.resume not in ("", RESUME_NEWEST) else []
        with contextlib.suppress(OSError):  # a folder that cannot be listed is named when it is claimed
            stored += checkpoints.all()
        for path in stored:  # the last one counts; `choose` verifies it
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                window = int(json.loads((path / STATE).read_bytes())["config"]["data.window"])
    return updated(config, {"data.window": agreement.from_all(window)[0]})


def invariants(config: Json, dataset: Dataset, *, precision: str) -> Json:
    """Returns the settings that must be equal in a checkpoint and the run that resumes from it.

    config: by flat names. precision: the value of train.precision after the launcher's is applied.
    """
    fixed = {name: value for name, value in config.items() if name not in FREE}
    return fixed | {"train.precision": precision, "the dataset's fingerprint": dataset.fingerprint}


def check_same_run(now: Json, saved: Saved) -> None:
    """Raises ConfigError if settings fixed on resume differ; names each field with both values."""
    before = saved.state["config"]
    check_removed(before, str(saved.path))
    before = flatten(Config()) | before  # fields that are new had their default
    names = sorted((before.keys() | now.keys()) - FREE)
    if differing := [name for name in names if before.get(name) != now.get(name)]:
        both = "; ".join(f"{name}={now.get(name)} but it was {before.get(name)}" for name in differing)
        raise ConfigError(
            f"{saved.path} is of another run: {both}. Give the value it was trained with, or start another"
            f" run with {another(saved.path.parent.parent)}"
        )


def _check_same_rates(config: Config, saved: Saved, steps_per_epoch: int) -> None:
    """Raises ConfigError if another number of epochs would have changed a rate up to now."""
    optim, epochs, done = config.scaled_optim(), config.train.epochs, saved.state["step"]
    before = saved.state.get("epochs", epochs)
    if before == epochs:
        return
    if epochs * steps_per_epoch < done:
        raise ConfigError(
            f"train.epochs={epochs} but {saved.path} has {done // steps_per_epoch} epochs and"
            f" {done % steps_per_epoch} steps behind it"
        )
    for step in range(done):
        then, now = (
            learning_rate(optim, step=step, steps_per_epoch=steps_per_epoch, total_steps=steps_per_epoch * e)
            for e in (before, epochs)
        )
        if then != now:
            raise ConfigError(
                f"train.epochs={epochs} but it was {before}: with optim.schedule={optim.schedule}"
                f" the rate of step {step + 1} of {saved.path} would have been another; keep it,"
                f" or train on from its weights with --model.init {saved.path} {another(saved.path.parent.parent)}"
            )
