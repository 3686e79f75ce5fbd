"""Whether a run is the same run: what may differ between a checkpoint and the configuration that goes on from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.errors import ConfigError
from pipeline.manifest import Dataset

from .checkpoint import Saved
from .config import Config, flatten
from .optim import learning_rate

# These change nothing of what is trained, or are meant to be changed: where the data lie, how they are read, what is
# recorded, what is done about trouble. data.shards may be another place of the same data; its fingerprint may not.
MAY_CHANGE = (
    "data.shards",
    "guard.",
    "loader.",
    "resume",
    "run.ddp_backend",
    "run.dir",
    "run.keep_checkpoints",
    "run.log_every",
    "run.record_ids",
    "run.save_every",
    "train.epochs",
    "train.eval_batch",
)


def what_must_stay(config: Config, dataset: Dataset) -> dict[str, Any]:
    """Fields and values that a checkpoint and what goes on from it have in common."""
    fixed = {name: value for name, value in flatten(config).items() if not name.startswith(MAY_CHANGE)}
    return fixed | {"the dataset's fingerprint": dataset.fingerprint}


def refuse_another_run(config: Config, dataset: Dataset, saved: Saved, *, steps_per_epoch: int) -> None:
    """Raises ConfigError that names every field whose value would make this another run, with both values."""
    before, now = saved.state["config"], what_must_stay(config, dataset)
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
    if config.train.epochs < saved.state["epoch"]:
        raise ConfigError(f"train.epochs={config.train.epochs} but {saved.path} has {saved.state['epoch']} behind it")
    for step in range(done):
        then, now = (
            learning_rate(config.optim, step=step, steps_per_epoch=steps_per_epoch, total_steps=steps_per_epoch * e)
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
    for name in {field.name for field in dataclasses.fields(config)} & saved.keys():
        value, kept = getattr(config, name), saved[name]
        if dataclasses.is_dataclass(value):
            kept = as_saved(value, kept)
        changes[name] = tuple(kept) if isinstance(kept, list) else kept
    return dataclasses.replace(config, **changes)
