"""Checkpoints: a folder with safetensors and JSON that exists whole or not at all. Nothing is ever unpickled.

`checkpoints/step-NNNNNNNN/` holds model.safetensors, optimizer.safetensors, state.json, where weights are averaged
average.safetensors, and, written last, record.json with the sha256 of the others. `checkpoints/latest` and
`checkpoints/best` hold the names of the newest and of the best.
What did not verify is kept aside as `step-NNNNNNNN.damaged` until a later one is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from torch import Tensor

from pipeline.errors import DataError
from pipeline.files import PARTIAL, atomic_write, fsync_path, write_json

LATEST, BEST, RECORD, STATE = "latest", "best", "record.json", "state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
AVERAGE = "average.safetensors"
FILES = (MODEL, OPTIMIZER, STATE)
DAMAGED = ".damaged"
NAME = re.compile(r"step-(\d{8,})")
CHUNK = 4 << 20
# The names that safetensors' own reader knows types by; it reads all that is written here.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint held, as `Checkpoints.save` was given it."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    average: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Checkpoints:
    """The checkpoints of one run folder. One process writes them; a save goes on behind its back.

    run: the run folder. keep: how many of the newest stay, beside the best.
    """

    run: Path
    keep: int
    stalls: list[float] = field(default_factory=list)  # seconds that the caller of `save` waited
    _writer: threading.Thread | None = None
    _error: Exception | None = None
    _staging: dict[str, Tensor] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints"

    # Writing

    def save(
        self,
        step: int,
        *,
        model: dict[str, Tensor],
        optimizer: dict[str, Any],
        state: dict[str, Any],
        average: dict[str, Tensor] | None = None,
    ) -> None:
        """Copies what is given and publishes it in the background as the checkpoint of `step`.

        optimizer: its `state_dict()`. average: of the weights, if there is one. state: JSON; where it holds
        "best_step", that step's checkpoint is kept. One that stands already is left as it is: the run went on from it,
        or has made it. Raises OSError where the save before this one failed; `wait` tells of this one.
        """
        self.wait()
        if self.path(step).is_dir():  # saved in the middle of the evaluation, which is over now
            try:
                self._remove_old(step, state.get("best_step"))
            except OSError as err:
                self._error = err
            return
        started = time.perf_counter()
        tensors, numbers = _split_optimizer(optimizer)
        staged = self._stage({MODEL: model, OPTIMIZER: tensors} | ({AVERAGE: average} if average else {}))
        state = {**state, "step": step, "optimizer": numbers}
        self._writer = threading.Thread(target=self._write, args=(step, staged, state), name="checkpoint")
        self._writer.start()
        self.stalls.append(time.perf_counter() - started)

    def wait(self) -> None:
        """Returns when what was saved is on the disk. Raises OSError, once, where that failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether a save has failed that `wait` has not told of yet."""
        return self._error is not None

    def _stage(self, files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies on the host, in memory that is kept: fresh pages cost more than the copy itself."""
        staged: dict[str, dict[str, Tensor]] = {}
        for file, tensors in files.items():
            staged[file] = {name: self._stage_one(f"{file}/{name}", t.detach()) for name, t in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def _stage_one(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._staging.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._staging[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def _write(self, step: int, staged: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            self._publish(step, staged, state)
        except Exception as err:  # told where `wait` is called: a thread's own end would go unseen
            self._error = err

    def _publish(self, step: int, staged: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Temporary folder → fsync → rename; only then are old ones removed."""
        path = self.path(step)
        partial = path.with_name(path.name + PARTIAL)
        for stale in self.folder.glob(f"step-*{PARTIAL}"):  # of a killed run: as large as a checkpoint, and no use
            _remove(stale)
        partial.mkdir(parents=True)
        try:
            record = {name: _write_tensors(partial / name, tensors) for name, tensors in staged.items()}
            record[STATE] = _write_hashed(partial / STATE, [json.dumps(state, indent=1).encode()])
            write_json(partial / RECORD, record)
            fsync_path(partial)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # or a full disk would stay full
            raise
        fsync_path(self.folder)
        self._point(LATEST, path.name)
        self._remove_old(step, state.get("best_step"))

    def _remove_old(self, step: int, best: int | None) -> None:
        kept = {path.name for path in self.all()[-self.keep :]}
        if best is not None and self.path(best).is_dir():
            kept.add(self.path(best).name)
            self._point(BEST, self.path(best).name)
        aside = [p for p in self.folder.glob(f"step-*{DAMAGED}") if _step(p) <= step]
        for old in [p for p in self.all() if p.name not in kept] + aside:
            gone = old.with_name(old.name + PARTIAL)  # half removed, it must not look like a damaged one
            os.rename(old, gone)
            _remove(gone)

    def _point(self, name: str, target: str) -> None:
        with atomic_write(self.folder / name) as file:
            file.write(f"{target}\n".encode())

    # Reading

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def all(self) -> list[Path]:
        """All that were published, oldest first, whole or not."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()), key=_step)

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest that verifies, and a line for each newer one that does not."""
        damaged: list[str] = []
        for path in reversed(self.all()):
            try:
                return load(path), damaged
            except DataError as err:
                damaged.append(str(err))
        return None, damaged

    def newest_before(self, step: int) -> Path | None:
        """The newest that verifies of a step before `step`."""
        whole = (path for path in reversed(self.all()) if _step(path) < step and _is_whole(path))
        return next(whole, None)

    def set_aside_after(self, step: int) -> None:
        """Takes the names of damaged ones of later steps away, so that this run can give them anew."""
        for path in self.all():
            if _step(path) > step:
                aside = path.with_name(path.name + DAMAGED)
                _remove(aside)
                os.rename(path, aside)


def _remove(path: Path) -> None:
    """Whatever it is; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _step(path: Path) -> int:
    match = NAME.match(path.name)
    return int(match[1]) if match else -1


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """A safetensors file from the tensors' own memory; returns its sha256.

    The library's writer copies everything twice, holds the interpreter's lock meanwhile, and hides "disk full" in an
    error of its own. Format: https://huggingface.co/docs/safetensors (8 bytes of length, JSON header, data).
    """
    header: dict[str, Any] = {}
    views: list[memoryview] = []
    offset = 0
    for name, tensor in sorted(tensors.items()):
        view = _bytes(tensor)
        header[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(view)],
        }
        views.append(view)
        offset += len(view)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _write_hashed(path, [len(text).to_bytes(8, "little"), text, *views])


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _write_hashed(path: Path, parts: list[Any]) -> str:
    """Writes and hashes in one pass, a chunk at a time: neither holds the interpreter's lock."""
    sha256 = hashlib.sha256()
    with atomic_write(path) as file:
        for part in parts:
            for chunk in _chunks(memoryview(part)):
                sha256.update(chunk)
                file.write(chunk)
    return sha256.hexdigest()


def _chunks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except DataError:
        return False
    return True


def load(path: Path) -> Saved:
    """A checkpoint as it was saved. Raises DataError for one that does not verify."""
    files = verified(path)
    try:
        state = json.loads(files[STATE])
        optimizer = _join_optimizer(deserialise(files[OPTIMIZER]), state.pop("optimizer"))
        _require(state, step=int, epoch=int, best_top1=float, config=dict, loader=dict)
        average = deserialise(files[AVERAGE]) if AVERAGE in files else {}
        return Saved(path, deserialise(files[MODEL]), optimizer, state, average)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise DataError(f"{path}: cannot be read ({err}); resume from another one") from err


def verified(path: Path) -> dict[str, bytes]:
    """The bytes of its files, which are what was written. Raises DataError otherwise."""
    if not path.is_dir():
        raise DataError(f"{path}: no such checkpoint; name a folder checkpoints/step-NNNNNNNN")
    try:
        record = json.loads((path / RECORD).read_bytes())
        names = FILES + ((AVERAGE,) if AVERAGE in record else ())
        files = {name: (path / name).read_bytes() for name in names}
        damaged = [name for name, data in files.items() if hashlib.sha256(data).hexdigest() != record[name]]
    except KeyError as err:
        raise DataError(f"{path}: {RECORD} does not tell of {err.args[0]}; resume from another one") from err
    except FileNotFoundError as err:
        raise DataError(f"{path}: {Path(err.filename).name} is missing; resume from another one") from err
    except (OSError, ValueError, TypeError, AttributeError) as err:
        raise DataError(f"{path}: not a whole checkpoint ({err}); resume from another one") from err
    if damaged:
        raise DataError(f"{path}: {damaged[0]} is damaged; resume from another one")
    return files


def _require(state: dict[str, Any], **kinds: type) -> None:
    for name, kind in kinds.items():
        if not isinstance(state[name], kind if kind is not float else int | float):
            raise ValueError(f"{STATE}: {name}={state[name]!r}")


def _split_optimizer(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors named "<parameter>.<name>", and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, values in optimizer["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{parameter}.{name}"] = value
    return tensors, numbers


def _join_optimizer(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    return {"state": state}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads the state; groups stay as configured, since the schedule sets their lr at every step.

    In the memory format of the parameters, which files do not keep: torch's fused updates take both for granted, and
    would mix up the momenta of a channels-last net without a word.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {name: _like(value, parameters[i]) for name, value in own.items()} for i, own in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _like(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
