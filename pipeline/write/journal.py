"""Records which shards are complete, in the folder `parts` beside the shards, until the manifest exists.

A record is written after its shard: if it exists, the shard is complete, and its images need not be read again.
"""

import io
import json
import zipfile
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, reading
from ..files import Json
from ..manifest import PARTS
from ..settings import flatten
from ..shards import Shard, dali_index_name
from ..storage import Folder
from .plan import Task
from .resize import Totals

PLAN = f"{PARTS}/plan.json"
LOCK = f"{PARTS}/lock"
NAMES = rf"{PARTS}(/lock|/[^/]+\.(npz|json|lock))?"  # a regular expression

Listed = list[dict[str, str]]  # images by name, each with its reason or its kind before


class ShardRecord(NamedTuple):
    """The result of one shard: its record, its rows of the index, and the images that were converted or left out."""

    shard: Shard
    rows: np.ndarray  # (n,) INDEX_DTYPE
    totals: Totals | None
    converted: Listed
    bad: Listed


def _name(task: Task) -> str:
    return f"{PARTS}/{task.name}.npz"


def save(folder: Folder, task: Task, record: ShardRecord) -> None:
    """Publishes the record: from now on the shard is whole."""
    meta = {"shard": asdict(record.shard), "converted": record.converted, "bad": record.bad, "digest": task.digest}
    arrays = record.totals._asdict() if record.totals else {}
    data = io.BytesIO()
    # Not compressed: it is 0.8 MB and exists until the manifest does; zlib would cost more than writing it.
    np.savez(data, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), rows=record.rows, **arrays)
    folder.write(_name(task), data.getbuffer())


def load(folder: Folder, task: Task) -> ShardRecord | None:
    """The record of the task's shard that has its full size; None if either is missing, damaged or of another task."""
    try:
        with np.load(io.BytesIO(folder.read(_name(task))), allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            same_task = meta.pop("digest") == task.digest
            totals = Totals(file["numbers"], file["image"]) if "image" in file else None
            record = ShardRecord(Shard(**meta.pop("shard")), file["rows"], totals, **meta)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    whole = folder.size(task.name) == record.shard.bytes and folder.size(dali_index_name(task.name)) is not None
    return record if whole and same_task else None


def check_plan(folder: Folder, plan: Json) -> None:
    """Raises ConfigError if the folder holds unfinished shards with other options.

    Images may be removed, repaired or added: each record has the digest of its images.
    """
    if folder.size(PLAN) is not None:
        with reading(f"{folder.path / PLAN}", "remove it, or choose another --out"):
            begun = json.loads(folder.read(PLAN)) | {"images": plan["images"]}
        reject_other(folder, begun, plan, "an unfinished sharding")


def reject_other(folder: Folder, begun: Json, plan: Json, what: str) -> None:
    """Raises ConfigError, naming both values, if the plans differ."""
    theirs, ours = flatten(begun), flatten(plan)
    # Options first: hashes of the images do not show what differs.
    for name in sorted(theirs.keys() | ours.keys(), key=lambda name: (name.startswith("images."), name)):
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"{folder.path}: holds {what} with {name}={theirs.get(name)}, but this one has {ours.get(name)};"
                " run it with the same options, remove it, or choose another --out"
            )
