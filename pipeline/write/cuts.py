"""Makes the files of pipeline/cuts.py, while a shard is written or for a finished dataset."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

import numpy as np
from simplejpeg import decode_jpeg

from .. import cuts, pool
from ..cut_jpeg import EXTRA, cut_jpeg
from ..decode import Scratch
from ..errors import DataError
from ..files import Json, json_bytes
from ..huffman import SLACK
from ..jpeg import HEADER, find_places, pack
from ..manifest import Dataset, Split
from ..shards import Shard, crc32
from ..storage import Folder, folder_at

CHECKS = {
    "some": 32,
    "all": 1,
}  # one image in N, chosen by checksum: its cut is decoded and compared with the whole image

_header = np.zeros(HEADER, np.int32)  # with the tables of the latest image: most have the same
_memory = Scratch()


def find(data: bytes, *, check_one_in: int = CHECKS["some"]) -> bytes:
    """Returns the packed places of an image; empty if it cannot be cut."""
    crc, image = crc32(data), _memory(len(data))
    image[:] = np.frombuffer(data, np.uint8)  # a copy is not read-only, as in the loader: compiled once
    places = pack(find_places(image, _header)).tobytes()
    return b"" if places and crc % check_one_in == 0 and not is_exact(image, _header, places, crc) else places


def is_exact(image: np.ndarray, header: np.ndarray, places: bytes, seed: int) -> bool:
    """Whether a cut has the pixels of the whole image. header: by find_places. places: by pack. seed: draws the box."""
    with contextlib.suppress(ValueError):  # libjpeg-turbo warns of something, or it could not be cut
        whole, numbers = decode_jpeg(image, strict=True), np.random.default_rng(seed)
        box = np.sort(numbers.integers(0, whole.shape[1::-1], (2, 2)), axis=0) + [[0], [1]]
        out, placed = np.empty(2 * len(image) + EXTRA, np.uint8), np.zeros(4, np.int64)
        packed = np.frombuffer(bytearray(places + bytes(SLACK)), np.uint8)
        end = cut_jpeg(image, header, packed, box.reshape(-1), False, out, placed)
        (x, y), (right, bottom) = box
        left, top, *_ = placed.tolist()
        cut = decode_jpeg(out[:end], strict=True)[y - top : bottom - top, x - left : right - left]
        return np.array_equal(cut, whole[y:bottom, x:right])
    return False


def write_file(folder: Folder, name: str, shard: Shard, rows: np.ndarray, places: list[bytes]) -> None:
    """Writes a shard's file. rows: the shard's index. places: for each sample, by `find`."""
    table = np.zeros(len(rows), cuts.TABLE_DTYPE)
    table["size"] = list(map(len, places))
    table["offset"] = np.cumsum(table["size"]) - table["size"]
    table["crc32"] = list(map(crc32, places, rows["crc32"].tolist()))
    folder.write(name, b"".join([cuts.header(shard), *places, table.tobytes()]))


def make_cuts(
    dataset: Dataset,
    *,
    workers: int,
    check_one_in: int = CHECKS["some"],
    progress: Callable[[int], None] = lambda images: None,
) -> list[Json]:
    """Makes all files that are missing or damaged, and cuts.json last.

    progress: called with numbers of images. Returns each file's name, size, sha256, and number of images that can be
    cut. Raises DataError for a shard that differs from the manifest.
    """
    remote = dataset.remote
    folder = folder_at(str(dataset.place), allow_http=bool(remote and remote.allow_http))
    workers = 1 if remote else workers  # forks could not use the connection
    splits = dict[str, list[Json]]()
    for split in dataset.splits.values():
        make = partial(_make_file, folder, split, check_one_in=check_one_in)
        files = splits[split.name] = []
        with pool.run(make, range(len(split.shards)), workers=workers, place=dataset.root) as made:
            for shard, file in zip(split.shards, made, strict=True):
                files.append(file)
                progress(shard.samples)
    record = json_bytes({"version": 2, "fingerprint": dataset.fingerprint, "splits": splits})
    if folder.size(cuts.NAME) is None or folder.read(cuts.NAME) != record:
        folder.write(cuts.NAME, record)
    return [file for files in splits.values() for file in files]


def _make_file(folder: Folder, split: Split, number: int, *, check_one_in: int) -> Json:
    shard, rows = split.shards[number], split.rows(number)
    name = cuts.file_name(split.name, number)
    try:
        places = cuts.read(folder, name, shard, rows)
    except DataError:
        places = [find(image, check_one_in=check_one_in) for image in _images(split, shard, rows)]
        write_file(folder, name, shard, rows, places)
    content = folder.read(name)
    return {
        "name": name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "cut": sum(map(bool, places)),
    }


def _images(split: Split, shard: Shard, rows: np.ndarray) -> Iterator[bytes]:
    tar = (split.remote or split.root) / shard.name
    if split.remote:
        from ..remote import PATIENCE  # needs a library that only URLs need

        opened: BinaryIO = io.BytesIO(split.remote.get(shard.name, size=shard.bytes, patience=PATIENCE))
    else:
        opened = open(tar, "rb")  # noqa: SIM115 (below)
    with opened as file:
        for offset, size, crc in rows[["offset", "size", "crc32"]].tolist():
            file.seek(offset)
            image = file.read(size)
            if crc32(image) != crc:
                raise DataError(f"{tar}: changed at byte {offset}; copy the shard again")
            yield image
