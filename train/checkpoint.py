"""Checkpoints: a folder with safetensors and JSON that exists whole or not at all. Nothing is ever unpickled.

`checkpoints/step-NNNNNNNN/` holds model.safetensors, optimizer.safetensors, state.json and, written last, record.json
with the sha256 of the others. `checkpoints/latest` holds the name of the newest.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from pipeline.errors import DataError
from pipeline.files import PARTIAL, atomic_write, fsync_path, write_json
from pipeline.shards import file_sha256

LATEST, RECORD, STATE = "latest", "record.json", "state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, *, keep: int) -> None:
        self.folder, self.keep = run / "checkpoints", keep

    def save(self, step: int, *, model: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any]) -> Path:
        """Publishes the checkpoint of `step`: temporary folder → fsync → rename; only then are old ones removed."""
        path = self.folder / f"step-{step:08d}"
        partial = path.with_name(path.name + PARTIAL)
        for stale in self.folder.glob(f"step-*{PARTIAL}"):  # of a killed run: as large as a checkpoint, and no use
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        try:
            _write(partial, model, optimizer, state | {"step": step})
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # or a full disk would stay full
            raise
        # Only a step that was saved before and went wrong stands here: a run resumes from its newest checkpoint alone.
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
        fsync_path(self.folder)
        with atomic_write(self.folder / LATEST) as file:
            file.write(f"{path.name}\n".encode())
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)
        return path

    def newest(self) -> Path | None:
        """The newest checkpoint, whole or not; None where there is none."""
        return found[-1] if (found := self._all()) else None

    def whole_after(self, path: Path) -> list[Path]:
        """Those of later steps than `path` that verify, oldest first."""
        return [later for later in self._all() if later.name > path.name and _is_whole(later)]

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.glob("step-*") if not p.name.endswith(PARTIAL))


def _write(folder: Path, model: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any]) -> None:
    tensors, numbers = _split_optimizer(optimizer)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.items()}
    # Serialised here and written by us: the library's own file writing hides "disk full" in an error of its own, and
    # its files are readable by their owner alone.
    for name, values in ((MODEL, weights), (OPTIMIZER, tensors)):
        with atomic_write(folder / name) as file:
            file.write(serialise(values))
    write_json(folder / STATE, state | {"optimizer": numbers})
    write_json(folder / RECORD, {name: file_sha256(folder / name) for name in (MODEL, OPTIMIZER, STATE)})


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except DataError:
        return False
    return True


def verify(path: Path) -> None:
    """Raises DataError unless every file of the checkpoint is what was written."""
    if not path.is_dir():
        raise DataError(f"{path}: no such checkpoint; name a folder checkpoints/step-NNNNNNNN")
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        damaged = [name for name, sha256 in record.items() if file_sha256(path / Path(name).name) != sha256]
        missing = {MODEL, OPTIMIZER, STATE} - set(record)
    except (OSError, ValueError, AttributeError) as err:
        raise DataError(f"{path}: not a whole checkpoint ({err}); resume from another one") from err
    if damaged or missing:
        raise DataError(f"{path}: {(damaged or sorted(missing))[0]} is damaged or missing; resume from another one")


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(model, optimizer, state) as they were saved. Raises DataError for a checkpoint that does not verify."""
    verify(path)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        optimizer = _join_optimizer(load_file(path / OPTIMIZER), state.pop("optimizer"))
        return load_file(path / MODEL), optimizer, state
    except (SafetensorError, ValueError, KeyError) as err:
        raise DataError(f"{path}: cannot be read ({err}); resume from another one") from err


def _split_optimizer(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors named "<parameter>.<name>", and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{parameter}.{name}"] = value
    return tensors, numbers


def _join_optimizer(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    return {"state": state}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads the state; groups stay as configured, since the schedule sets their lr at every step."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
