"""The places of the MCUs in a dataset's JPEGs, with which a loader cuts out those that a crop needs: docs/cuts.md.

Each shard has one file, beside the manifest. The manifest does not name it, so order, resume and fingerprint do not
change. `cuts.json` names all of these files and is written last. The tars themselves may lie elsewhere.
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

# A file is a header, the packed places of all images, and a table with a row for each image: the offset of its places
# after the header, their size (0: the image cannot be cut), and their CRC-32, which continues the image's.
MAGIC = b"IXCUTS02"
HEADER_BYTES = len(MAGIC) + 32
TABLE_DTYPE = np.dtype([("offset", "<u4"), ("size", "<u4"), ("crc32", "<u4")])


def header(shard: Shard) -> bytes:
    return MAGIC + bytes.fromhex(shard.sha256)


def file_name(split: str, number: int) -> str:
    """Numbered, since existing tars may lie in several folders and share a name."""
    return f"{split}-{number:06d}.cuts"


def table(path: Any, shard: Shard, content: BinaryIO | None = None) -> np.ndarray:
    """Returns a file's table, (samples,) TABLE_DTYPE. Raises DataError if the file is not this shard's or is truncated.

    content: the file's content, if it was read already.
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
    """Returns each sample's packed places. rows: the shard's index. Raises DataError if a checksum is wrong."""
    path = folder.path / name
    with reading(f"{path}", CURE, OSError):
        content = folder.read(name)
    found, data = table(path, shard, io.BytesIO(content)), content[HEADER_BYTES:]
    places = [data[offset : offset + size] for offset, size, _ in found.tolist()]
    if list(map(crc32, places, rows["crc32"].tolist())) != found["crc32"].tolist():
        raise DataError(f"{path}: damaged; {CURE}")
    return places


def open_cuts(dataset: Dataset, split: Split) -> list[tuple[Path, str]]:
    """Returns path and sha256 of each of the split's files, in the order of its shards; [] if there are none.

    Reads none of them. For a dataset at a URL, the paths are those of local copies, which need not exist yet.
    Raises DataError if the files are of another dataset or have another size; StorageError.
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
            int(file["sha256"], 16)  # must be hexadecimal: a copy has it as its name
            path = remote.copy(name, sha256=file["sha256"]) if remote else dataset.root / name
            if not remote and path.stat().st_size != file["bytes"]:
                raise ValueError(f"{name} has not {file['bytes']} bytes")
            made.append((path, file["sha256"]))
        return made


def faults(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Yields (file, what is wrong with it). Reads every byte."""
    for split in dataset.splits.values():
        try:
            for path, sha256 in open_cuts(dataset, split):
                if file_sha256(path) != sha256:
                    yield path.name, f"its bytes changed since they were written; {CURE}"
        except DataError as err:
            yield NAME, str(err)
