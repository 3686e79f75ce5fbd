"""The places of the MCUs of a data set's JPEGs, so that a loader cuts out those that a crop needs: docs/cuts.md.

A file for each shard lies beside the manifest, which does not name it: order, resume and fingerprint stay as they are.
`cuts.json` names all of them, and is written last. The tars themselves may lie elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, reading
from .manifest import Dataset, Split
from .shards import Shard, file_sha256

NAME = "cuts.json"
CURE = "make it again with tools/make_shards.py cuts"

# A file is a header, the entries of all images, and a table with a row for each.
MAGIC = b"IXCUTS01"
HEADER_BYTES = len(MAGIC) + 32
ENTRY_BYTES = 8
TABLE_DTYPE = np.dtype(
    [
        ("first", "<u4"),  # entry
        ("count", "<u4"),  # of entries; 0: the image cannot be cut
        ("crc32", "<u4"),  # of the entries, continued from the image's
    ]
)


def header(shard: Shard) -> bytes:
    return MAGIC + bytes.fromhex(shard.sha256)


def file_name(split: str, number: int) -> str:
    """Tars that exist already may lie elsewhere, read-only, and share a name."""
    return f"{split}-{number:06d}.cuts"


def table(path: Path, shard: Shard) -> np.ndarray:
    """(samples,) TABLE_DTYPE. Raises DataError if the file is not this shard's, or cut short."""
    with reading(f"{path}", CURE, OSError), open(path, "rb") as file:
        if file.read(HEADER_BYTES) != header(shard):
            raise ValueError("of another shard")
        start = file.seek(0, 2) - shard.samples * TABLE_DTYPE.itemsize
        file.seek(max(start, 0))
        rows = np.fromfile(file, TABLE_DTYPE)
        if (
            len(rows) != shard.samples
            or (rows["first"].astype(np.uint64) + rows["count"]).max(initial=0) * ENTRY_BYTES > start - HEADER_BYTES
        ):
            raise ValueError("cut short")
    return rows


@dataclass(frozen=True)
class Cuts:
    """A split's files, in the order of its shards, and the table of all its samples."""

    paths: list[Path]
    table: np.ndarray  # (samples,) TABLE_DTYPE


def open_cuts(dataset: Dataset, split: Split) -> Cuts | None:
    """None if there are none. Raises DataError if they are of another data set or damaged; entries are not read."""
    if not (dataset.root / NAME).is_file():
        return None
    rows, paths = np.zeros(split.samples, TABLE_DTYPE), []
    for number, (shard, file) in enumerate(zip(split.shards, _files(dataset, split.name), strict=True)):
        path = dataset.root / file_name(split.name, number)
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise DataError(f"{path}: missing, or not {file['bytes']} bytes; {CURE}")
        paths.append(path)
        rows[split.index["shard"] == number] = table(path, shard)
    return Cuts(paths, rows)


def _files(dataset: Dataset, split: str) -> list[dict[str, Any]]:
    """The records of a split's files in cuts.json."""
    path = dataset.root / NAME
    with reading(f"{path}", CURE, OSError):
        record = json.loads(path.read_bytes())
        if record["fingerprint"] != dataset.fingerprint:
            raise ValueError("of another data set")
        files = [{"bytes": int(file["bytes"]), "sha256": str(file["sha256"])} for file in record["splits"][split]]
        if len(files) != len(dataset.splits[split].shards):
            raise ValueError("of another number of shards")
        return files


def faults(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it); every byte is read."""
    for split in dataset.splits.values():
        try:
            found = open_cuts(dataset, split)
            for path, file in zip(found.paths if found else [], _files(dataset, split.name)):
                if file_sha256(path) != file["sha256"]:
                    yield path.name, f"its bytes changed since they were written; {CURE}"
        except DataError as err:
            yield NAME, str(err)
