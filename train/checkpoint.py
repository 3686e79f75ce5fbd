"""Checkpoints: a folder with safetensors and JSON that exists whole or not at all. Nothing is ever unpickled.

`checkpoints/step-NNNNNNNN/` holds model.safetensors, optimizer.safetensors, state.json, average.safetensors if weights
are averaged, and, written last, record.json with the sha256 of the others. `checkpoints/latest` and `checkpoints/best`
hold the names of the newest and of the best.
A checkpoint that does not verify is kept as `step-NNNNNNNN.damaged` until a later one is whole.
"""

import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import DataError, reading
from pipeline.files import PARTIAL, Json, fsync_path, write_json, write_text
from pipeline.shards import file_sha256

LATEST, BEST, RECORD, STATE = "latest", "best", "record.json", "state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
AVERAGE = "average.safetensors"
FILES = (MODEL, OPTIMIZER, STATE)
RESUME_ANOTHER = "name another checkpoint: RUN/checkpoints/step-NNNNNNNN"
DAMAGED = ".damaged"
KINDS: Json = {"step": int, "epoch": int, "best_top1": int | float, "config": dict, "loader": dict}
Weights = dict[str, Tensor]  # by name, as a state_dict
NAME = re.compile(r"step-(\d{8,})")


class Saved(NamedTuple):
    """The content of a checkpoint, as `Checkpoints.save` received it."""

    path: Path
    model: Weights
    optimizer: Weights  # by "<parameter>.<name>", for `restore_optimizer`
    state: Json
    average: Weights  # none: empty


@dataclass
class Checkpoints:
    """The checkpoints of one run folder. One process writes them, in the background.

    run: the run folder. keep: how many of the newest are kept, in addition to the best.
    """

    run: Path
    keep: int
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _pending: Future[None] | None = None
    _staging: dict[str, Weights] = field(default_factory=dict)  # the tensors of each file, on the host

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints"

    # Writing

    def save(
        self,
        step: int,
        *,
        model: Weights,
        optimizer: Json,
        state: Json,
        average: Weights | None = None,
    ) -> None:
        """Copies the arguments and publishes them in the background as the checkpoint of `step`.

        model, average: state_dicts; average: only if weights are averaged. optimizer: its `state_dict()`. state: JSON;
        the checkpoint of state["best_step"] is kept. An existing checkpoint of `step` is not rewritten: the run resumed
        from it or wrote it. Raises OSError if the previous save failed; `wait` raises the error of this one.
        """
        self.wait()
        if self.path(step).is_dir():  # saved during the evaluation, which has ended
            self._pending = self._writer.submit(self._remove_old, step, state.get("best_step"))
            return
        moments = {f"{p}.{name}": v for p, values in optimizer["state"].items() for name, v in values.items()}
        files = {MODEL: model, OPTIMIZER: moments} | ({AVERAGE: average} if average else {})
        # Copied into host memory that is reused: fresh pages cost more than the copy itself.
        for file, tensors in files.items():
            kept = self._staging.setdefault(file, {})
            for name, tensor in tensors.items():
                if name not in kept:
                    kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                kept[name].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._pending = self._writer.submit(self._publish, step, {**state, "step": step})

    def wait(self) -> None:
        """Returns when the last save is on the disk. Raises OSError, once, if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def failed(self) -> bool:
        """Whether a save has failed whose error `wait` has not raised yet."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def _publish(self, step: int, state: Json) -> None:
        """Temporary folder → fsync → rename; only then are old ones removed."""
        path = self.path(step)
        partial = path.with_name(path.name + PARTIAL)
        for stale in self.folder.glob(f"step-*{PARTIAL}"):  # left by a killed run, as large as a checkpoint
            _remove(stale)
        partial.mkdir(parents=True)
        try:
            for name, tensors in self._staging.items():
                write_tensors(partial / name, tensors)
            write_json(partial / STATE, state)
            write_json(partial / RECORD, {file.name: file_sha256(file) for file in partial.iterdir()})
            fsync_path(partial)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # otherwise a full disk would stay full
            raise
        fsync_path(self.folder)
        write_text(self.folder / LATEST, f"{path.name}\n")
        self._remove_old(step, state.get("best_step"))

    def _remove_old(self, step: int, best: int | None) -> None:
        kept = self.all()[-self.keep :]
        if best is not None and self.path(best).is_dir():
            kept.append(self.path(best))
            write_text(self.folder / BEST, f"{kept[-1].name}\n")
        for old in [p for p in self.all() if p not in kept] + [
            p for p in self.folder.glob(f"step-*{DAMAGED}") if _step(p) <= step
        ]:
            gone = old.with_name(old.name + PARTIAL)  # a half-removed folder must not look like a damaged checkpoint
            os.rename(old, gone)
            _remove(gone)

    # Reading

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def all(self) -> list[Path]:
        """The paths of all published checkpoints, oldest first, including damaged ones."""
        return sorted((p for p in self.folder.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()), key=_step)

    def newest(self, *, before: float = math.inf) -> tuple[Saved | None, list[str]]:
        """Returns the newest checkpoint of a step below `before` that verifies, and an error for each newer one."""
        damaged = list[str]()
        for path in reversed(self.all()):
            if _step(path) < before:
                try:
                    return load(path), damaged
                except DataError as err:
                    damaged.append(str(err))
        return None, damaged

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints of later steps, all damaged, so that this run can use their names."""
        for path in self.all():
            if _step(path) > step:
                aside = path.with_name(path.name + DAMAGED)
                _remove(aside)
                os.rename(path, aside)


def find(path: Path, which: str = BEST) -> tuple[Path, Saved]:
    """Returns the run folder and the checkpoint. path: either of them. which: best or latest, if it is a run folder."""
    if (path / RECORD).is_file():
        return path.resolve().parent.parent, load(path)
    checkpoints = Checkpoints(path, keep=1)
    if not checkpoints.folder.is_dir():
        raise DataError(f"{path}: neither a run nor a checkpoint: it has no checkpoints/ and no {RECORD}")
    named = checkpoints.folder / which
    if named.is_file():
        return path, load(checkpoints.folder / named.read_text(errors="replace").strip())
    saved, damaged = checkpoints.newest()  # a run that was not evaluated yet has no best
    if saved is None:
        raise DataError(damaged[-1] if damaged else f"{path}: has no checkpoint yet; train on, or name another run")
    return path, saved


def _remove(path: Path) -> None:
    """Removes a file, a folder or a link, not what the link points to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _step(path: Path) -> int:
    match = NAME.match(path.name)
    return int(match[1]) if match else -1


def write_tensors(path: Path, tensors: Weights, metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous tensors as a safetensors file, from their own memory and without the interpreter's lock.

    Raises OSError if it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # the library's files can be read by their owner only
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as err:  # the library's word for a full disk
        raise OSError(0, str(err), str(path)) from err
    path.chmod(mode)
    fsync_path(path)


def load(path: Path) -> Saved:
    """The checkpoint as it was saved. Raises DataError if it does not verify."""
    with reading(f"{path}:", RESUME_ANOTHER, SafetensorError, OSError):
        files = verified(path)
        state = json.loads(files[STATE])
        for name, kind in KINDS.items():
            if not isinstance(state[name], kind):
                raise ValueError(f"{STATE}: {name}={state[name]!r}")
        return Saved(
            path,
            deserialise(files[MODEL]),
            deserialise(files[OPTIMIZER]),
            state,
            deserialise(files[AVERAGE]) if AVERAGE in files else {},
        )


def verified(path: Path) -> dict[str, bytes]:
    """Returns {file name: bytes} of a checkpoint. Raises DataError if a file's sha256 is not the recorded one; OSError;
    ValueError, TypeError or AttributeError for a malformed record."""
    if not path.is_dir():
        raise DataError(f"{path}: no such checkpoint; name a folder checkpoints/step-NNNNNNNN")
    try:
        record = json.loads((path / RECORD).read_bytes())
        files = {name: (path / name).read_bytes() for name in (*FILES, *[AVERAGE] * (AVERAGE in record))}
        damaged = [name for name, data in files.items() if hashlib.sha256(data).hexdigest() != record[name]]
    except KeyError as err:
        raise DataError(f"{path}: {RECORD} does not list {err.args[0]}; {RESUME_ANOTHER}") from err
    except FileNotFoundError as err:
        raise DataError(f"{path}: {Path(err.filename).name} is missing; {RESUME_ANOTHER}") from err
    if damaged:
        raise DataError(f"{path}: {damaged[0]} is damaged; {RESUME_ANOTHER}")
    return files


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Weights) -> None:
    """Loads the optimiser's state. Its groups stay as configured, since the schedule sets their lr at every step.

    Momenta get the memory format of their parameters, which files do not record: torch's fused updates assume that both
    are equal, and would silently permute the momenta of a channels-last net.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = dict[int, Weights]()
    for key, value in saved.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
