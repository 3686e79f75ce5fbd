"""Makes the files of pipeline/cuts.py for a data set that is finished: each image is read once, none is changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from simplejpeg import decode_jpeg

from .. import cuts, pool
from ..cut_jpeg import EXTRA, SLACK_OUT, cut_jpeg
from ..decode import Scratch
from ..errors import DataError
from ..files import Json, json_bytes
from ..huffman import SLACK, TABLES
from ..jpeg import LAYOUT, find_places, places_in
from ..manifest import Dataset, Split
from ..shards import Shard, crc32, file_sha256
from ..storage import Folder

CHECK_ONE_IN = 32  # images, chosen by their checksum: a cut is decoded and compared with the whole image


class Finder:
    """Finds the places of one image after another."""

    def __init__(self) -> None:
        self.layout, self.tables = np.zeros(LAYOUT, np.int64), np.zeros(TABLES, np.int32)
        self._clean, self._places, self._out = Scratch(), Scratch(), Scratch()

    def __call__(self, image: np.ndarray, width: int, height: int) -> np.ndarray:
        """(n, 4) uint16, valid until the next call; none if the image cannot be cut. image: its bytes."""
        most = places_in(width, height, 8, 8)
        places = self._places(8 * most).view(np.uint16).reshape(most, 4)
        clean = self._clean(len(image) + SLACK)
        return places[: find_places(image, 0, len(image), self.layout, self.tables, clean, places)]

    def is_exact(self, image: np.ndarray, places: np.ndarray, seed: int) -> bool:
        """Whether a cut has the pixels of the whole image, which was the latest. seed: of the rectangle."""
        try:
            whole = decode_jpeg(image, strict=True)
        except ValueError:  # libjpeg-turbo warns of something
            return False
        numbers, (height, width, _) = np.random.default_rng(seed), whole.shape
        (left, right), (top, bottom) = (np.sort(numbers.choice(side + 1, 2, replace=False)) for side in (width, height))
        limit, placed = len(image) + EXTRA, np.zeros(4, np.int64)
        out, clean = self._out(limit + SLACK_OUT), self._clean(len(image) + SLACK)
        box = np.array([left, top, right, bottom])
        end = cut_jpeg(image, 0, len(image), self.layout, self.tables, places, box, clean, out, 0, limit, placed)
        x, y, *_ = placed.tolist()
        with contextlib.suppress(ValueError):  # if it could not be cut, too
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
    folder.write(cuts.NAME, json_bytes({"version": 1, "fingerprint": dataset.fingerprint, "splits": splits}))
    return [file for files in splits.values() for file in files]


def _make_file(folder: Folder, split: Split, number: int, *, check_one_in: int) -> Json:
    shard, name = split.shards[number], cuts.file_name(split.name, number)
    path = folder.path / name
    try:
        table = cuts.table(path, shard)
    except DataError:
        rows = split.index[split.index["shard"] == number]
        table = _write_file(folder, name, shard, split.root / shard.name, rows, check_one_in)
    can_be_cut = int((table["count"] > 0).sum())
    return {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "cut": can_be_cut}


def _write_file(folder: Folder, name: str, shard: Shard, tar: Path, rows: np.ndarray, check_one_in: int) -> np.ndarray:
    find, total, table = Finder(), 0, np.zeros(len(rows), cuts.TABLE_DTYPE)
    with open(tar, "rb") as images, folder.publish(name) as file:
        file.write(cuts.header(shard))
        for i, row in enumerate(rows):
            data, crc = os.pread(images.fileno(), int(row["size"]), int(row["offset"])), int(row["crc32"])
            if crc32(data) != crc:
                raise DataError(f"{tar}: changed at byte {row['offset']}; copy the shard again")
            image = np.frombuffer(bytearray(data), np.uint8)  # not read-only, as in the loader: compiled once
            places = find(image, int(row["width"]), int(row["height"]))
            if len(places) and crc % check_one_in == 0 and not find.is_exact(image, places, crc):
                places = places[:0]
            table[i] = total, len(places), crc32(places.tobytes(), crc)
            file.write(places.tobytes())
            total += len(places)
        file.write(table.tobytes())
    return table
