"""What is whole already. Beside the shards stands a folder `parts` with a record for each, until the manifest is there.

A record is written after its shard: where it is, the shard is whole, and nobody need look at its images again.
"""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import ConfigError, StorageError
from ..files import atomic_write, locked, write_json
from ..shards import Shard
from .pixels import Sums

FOLDER = "parts"
PLAN = "plan.json"
LOCK = "lock"
LOCK_SECONDS = 10.0


class Part(NamedTuple):
    """What became of one shard."""

    shard: Shard
    rows: np.ndarray  # (n,) INDEX_DTYPE
    sums: Sums | None
    converted: list[dict[str, str]]
    bad: list[dict[str, str]]


def path_of(out: Path, shard: str) -> Path:
    return out / FOLDER / f"{shard}.npz"


def save(out: Path, part: Part) -> None:
    """Publishes the record: from now on the shard is whole."""
    meta = {"shard": asdict(part.shard), "converted": part.converted, "bad": part.bad}
    arrays: dict[str, Any] = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8), "rows": part.rows}
    if part.sums is not None:
        arrays |= part.sums.arrays()
    # Not compressed: it is 0.8 MB, gone when the manifest is there, and zlib would cost more than writing it.
    with atomic_write(path_of(out, part.shard.name)) as file:
        np.savez(file, **arrays)


def load(out: Path, shard: str) -> Part | None:
    """The record of a shard that is there at its full size; None where either is missing or damaged."""
    try:
        with np.load(path_of(out, shard), allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            sums = Sums.restored(file) if "image" in file else None
            part = Part(Shard(**meta["shard"]), file["rows"], sums, meta["converted"], meta["bad"])
        whole = (out / shard).stat().st_size == part.shard.bytes and (out / shard).with_suffix(".idx").is_file()
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return part if whole else None


def claim(out: Path, plan: dict[str, Any]) -> None:
    """Makes the folder and says whose it is. Raises ConfigError where another plan has begun there."""
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    while not (out / FOLDER / PLAN).is_file():
        try:
            write_json(out / FOLDER / PLAN, plan)
        except StorageError:  # another slice is writing the same
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    begun = json.loads((out / FOLDER / PLAN).read_text(encoding="utf-8"))
    refuse_other(out, begun, plan, "an unfinished sharding")


def lock(out: Path, *, shared: bool) -> BinaryIO:
    """While the file that is returned is open nobody else works in the folder; slices may share it.

    Raises StorageError where somebody does, and FileNotFoundError where the folder has been finished meanwhile.
    """
    return open(locked(out / FOLDER / LOCK, shared=shared), "rb")


def refuse_other(out: Path, begun: dict[str, Any], plan: dict[str, Any], what: str) -> None:
    """Raises ConfigError, naming both values, where the plans differ."""
    theirs, ours = flat(begun), flat(json.loads(json.dumps(plan)))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"{out}: holds {what} with {name}={theirs.get(name)} where this one has {ours.get(name)};"
                " run it with the same options, remove it, or choose another --out"
            )


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}"""
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
    return found


def remove(out: Path) -> None:
    shutil.rmtree(out / FOLDER, ignore_errors=True)
