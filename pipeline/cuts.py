"""The places of the MCUs of a data set's JPEGs, so that a loader cuts out those that a crop needs: docs/cuts.md.

A file for each shard lies beside the manifest, which does not name it: order, resume and fingerprint stay as they are.
`cuts.json` names all of them, and is written last. The tars themselves may lie elsewhere.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import DataError, reading
from .manifest import Dataset, Split
from .shards import Shard, crc32, file_sha256
from .storage import Folder

NAME = "cuts.json"
CURE = "make it again with tools/make_shards.py cuts"

# A file is a header, the packed places of all images, and a table with a row for each: where its places begin behind
# the header, their size (0: the image cannot be cut), and their checksum, continued from the image's.
MAGIC = b"IXCUTS02"
HEADER_BYTES = len(MAGIC) + 32
TABLE_DTYPE = np.dtype([("offset", "<u4"), ("size", "<u4"), ("crc32", "<u4")])


def header(shard: Shard) -> bytes:
    return MAGIC + bytes.fromhex(shard.sha256)


def file_name(split: str, number: int) -> str:
    """Tars that exist already may lie elsewhere, read-only, and share a name."""
    return f"{split}-{number:06d}.cuts"


def table(path: Any, shard: Shard, content: BinaryIO | None = None) -> np.ndarray:
    """(samples,) TABLE_DTYPE. Raises DataError if the file is not this shard's, or cut short.

    content: the file's, if it was read already.
    """
    with reading(f"{path}", CURE, OSError), content or open(path, "rb") as file:
        if file.read(HEADER_BYTES) != header(shard):
            raise ValueError("of another shard")
        start = file.seek(0, 2) - shard.samples * TABLE_DTYPE.itemsize
        if start < HEADER_BYTES:
            raise ValueError("cut short")
        file.seek(start)
        rows = np.frombuffer(file.read(), TABLE_DTYPE)
        if HEADER_BYTES + (rows["offset"].astype(np.int64) + rows["size"]).max(initial=0) > start:
            raise ValueError("cut short")
    return rows


def read(folder: Folder, name: str, shard: Shard, rows: np.ndarray) -> list[bytes]:
    """The packed places of each sample. rows: of the index. Raises DataError if any byte of them changed."""
    path = folder.path / name
    with reading(f"{path}", CURE, OSError):
        content = folder.read(name)
    found, data = table(path, shard, io.BytesIO(content)), content[HEADER_BYTES:]
    places = [data[offset : offset + size] for offset, size, _ in found.tolist()]
    if list(map(crc32, places, rows["crc32"].tolist())) != found["crc32"].tolist():
        raise DataError(f"{path}: damaged; {CURE}")
    return places


def open_cuts(dataset: Dataset, split: Split) -> list[tuple[Path, str]]:
    """The split's files in the order of its shards, and their sha256; none is read. Empty if there are none.

    For a dataset at a URL: where their copies are, or will be. Raises DataError if they are of another data set or have
    another size; StorageError.
    """
    remote = dataset.remote
    try:
        text = bytes(remote.get(NAME)) if remote else (dataset.root / NAME).read_bytes()
    except (DataError, FileNotFoundError):
        return []
    names = [file_name(split.name, number) for number in range(len(split.shards))]
    with reading(f"{dataset.place / NAME}", CURE, OSError):
        record = json.loads(text)
        if record["fingerprint"] != dataset.fingerprint:
            raise ValueError("of another data set")
        made = []
        for name, file in zip(names, record["splits"][split.name], strict=True):
            int(file["sha256"], 16)  # the name of a copy
            path = remote.copy(name, sha256=file["sha256"]) if remote else dataset.root / name
            if not remote and path.stat().st_size != file["bytes"]:
                raise ValueError(f"{name} has not {file['bytes']} bytes")
            made.append((path, file["sha256"]))
        return made


def faults(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it); every byte is read."""
    for split in dataset.splits.values():
        try:
            for path, sha256 in open_cuts(dataset, split):
                if file_sha256(path) != sha256:
                    yield path.name, f"its bytes changed since they were written; {CURE}"
        except DataError as err:
            yield NAME, str(err)
