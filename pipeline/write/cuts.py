"""Makes the files of pipeline/cuts.py for a data set that is finished: each image is read once, none is changed."""

import contextlib
import os
from collections.abc import Callable
from functools import partial

import numpy as np
from simplejpeg import decode_jpeg

from .. import cuts, pool
from ..cut_jpeg import EXTRA, cut_jpeg
from ..errors import DataError
from ..files import Json, json_bytes
from ..huffman import SLACK
from ..jpeg import HEADER, find_places, pack
from ..manifest import Dataset, Split
from ..shards import crc32, file_sha256
from ..storage import Folder

CHECK_ONE_IN = 32  # images, chosen by their checksum: a cut is decoded and compared with the whole image


def is_exact(image: np.ndarray, header: np.ndarray, places: bytes, seed: int) -> bool:
    """Whether a cut has the pixels of the whole image. header: by find_places. places: by pack. seed: of the box."""
    with contextlib.suppress(ValueError):  # libjpeg-turbo warns of something, or it could not be cut
        whole, numbers = decode_jpeg(image, strict=True), np.random.default_rng(seed)
        height, width, _ = whole.shape
        (left, right), (top, bottom) = (np.sort(numbers.choice(n + 1, 2, replace=False)) for n in (width, height))
        out, placed = np.empty(2 * len(image) + EXTRA, np.uint8), np.zeros(4, np.int64)
        packed = np.frombuffer(bytearray(places + bytes(SLACK)), np.uint8)
        end = cut_jpeg(image, header, packed, np.array([left, top, right, bottom]), out, placed)
        x, y, *_ = placed.tolist()
        cut = decode_jpeg(out[:end], strict=True)[top - y : bottom - y, left - x : right - x]
        return np.array_equal(cut, whole[top:bottom, left:right])
    return False


def make_cuts(
    dataset: Dataset, *, workers: int, check_all: bool = False, progress: Callable[[int], None] = lambda images: None
) -> list[Json]:
    """Makes all that are missing, and cuts.json last. check_all: compare the pixels of a cut of every image.

    progress: called with numbers of images. Returns each file's name, size, sha256, and images that can be cut.
    Raises DataError for a shard that is not what the manifest says.
    """
    folder = Folder(dataset.root)
    splits: dict[str, list[Json]] = {}
    for split in dataset.splits.values():
        make = partial(_make_file, folder, split, check_one_in=1 if check_all else CHECK_ONE_IN)
        files = splits[split.name] = []
        with pool.run(make, range(len(split.shards)), workers=workers, place=dataset.root) as made:
            for shard, file in zip(split.shards, made, strict=True):
                files.append(file)
                progress(shard.samples)
    folder.write(cuts.NAME, json_bytes({"version": 2, "fingerprint": dataset.fingerprint, "splits": splits}))
    return [file for files in splits.values() for file in files]


def _make_file(folder: Folder, split: Split, number: int, *, check_one_in: int) -> Json:
    name = cuts.file_name(split.name, number)
    path = folder.path / name
    try:
        table = cuts.table(path, split.shards[number])
    except DataError:
        table = _write_file(folder, name, split, number, check_one_in)
    can_be_cut = int((table["size"] > 0).sum())
    return {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "cut": can_be_cut}


def _write_file(folder: Folder, name: str, split: Split, number: int, check_one_in: int) -> np.ndarray:
    shard, rows = split.shards[number], split.index[split.index["shard"] == number]
    tar, total, table = split.root / shard.name, 0, np.zeros(len(rows), cuts.TABLE_DTYPE)
    header = np.zeros(HEADER, np.int32)
    with open(tar, "rb") as images, folder.publish(name) as file:
        file.write(cuts.header(shard))
        for i, (offset, size, crc) in enumerate(rows[["offset", "size", "crc32"]].tolist()):
            data = os.pread(images.fileno(), size, offset)
            if crc32(data) != crc:
                raise DataError(f"{tar}: changed at byte {offset}; copy the shard again")
            image = np.frombuffer(bytearray(data), np.uint8)  # not read-only, as in the loader: compiled once
            places = pack(find_places(image, header))
            if places and crc % check_one_in == 0 and not is_exact(image, header, places, crc):
                places = b""
            table[i] = total, len(places), crc32(places, crc)
            file.write(places)
            total += len(places)
        file.write(table.tobytes())
    return table
