"""Makes the files of pipeline/cuts.py for a data set that is finished: each image is read once, none is changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from simplejpeg import decode_jpeg

from .. import cuts, pool
from ..cut_jpeg import EXTRA, SLACK_OUT, cut_jpeg
from ..decode import Scratch
from ..errors import DataError
from ..files import json_bytes
from ..huffman import SLACK, TABLES
from ..jpeg import LAYOUT, find_places, places_in
from ..manifest import Dataset, Split
from ..shards import crc32, file_sha256
from ..storage import Folder

CHECK_ONE_IN = 32  # images, chosen by their checksum: a cut is decoded and compared with the whole image


@dataclass
class CutFile:
    """A file as cuts.json names it, and how many of its images can be cut."""

    name: str
    bytes: int
    sha256: str
    cut: int


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

    def check(self, image: np.ndarray, places: np.ndarray, seed: int) -> bool:
        """Whether a cut has the pixels of the whole image, which was the latest. seed: of the rectangle."""
        whole = decode_jpeg(image, strict=True)
        numbers, (height, width, _) = np.random.default_rng(seed), whole.shape
        (left, right), (top, bottom) = (np.sort(numbers.choice(side + 1, 2, replace=False)) for side in (width, height))
        limit, placed = len(image) + EXTRA, np.zeros(4, np.int64)
        out, clean = self._out(limit + SLACK_OUT), self._clean(len(image) + SLACK)
        box = np.array([left, top, right, bottom])
        end = cut_jpeg(image, 0, len(image), self.layout, self.tables, places, box, clean, out, 0, limit, placed)
        if end == 0:
            return False
        x, y, *_ = placed.tolist()
        cut = decode_jpeg(out[:end], strict=True)[top - y : bottom - y, left - x : right - x]
        return np.array_equal(cut, whole[top:bottom, left:right])


def make_cuts(
    dataset: Dataset, *, workers: int, check_all: bool = False, progress: Callable[[int], None] = lambda images: None
) -> list[CutFile]:
    """Makes all that are missing, and cuts.json last. check_all: compare the pixels of a cut of every image.

    progress: called with numbers of images. Raises DataError for a shard that is not what the manifest says.
    """
    folder, made = Folder(dataset.root), []
    splits: dict[str, list[dict[str, object]]] = {}
    for split in dataset.splits.values():
        make = partial(_make_file, folder, split, check_one_in=1 if check_all else CHECK_ONE_IN)
        with pool.run(make, range(len(split.shards)), workers=workers, place=dataset.root) as files:
            for shard, file in zip(split.shards, files, strict=True):
                made.append(file)
                splits.setdefault(split.name, []).append(asdict(file))
                progress(shard.samples)
    folder.write(cuts.NAME, json_bytes({"version": 1, "fingerprint": dataset.fingerprint, "splits": splits}))
    return made


def _make_file(folder: Folder, split: Split, number: int, *, check_one_in: int) -> CutFile:
    shard, name = split.shards[number], cuts.file_name(split.name, number)
    rows = split.index[split.index["shard"] == number]
    path = folder.path / name
    try:
        table = cuts.table(path, shard, len(rows))
    except DataError:
        table = _write_file(folder, split, number, rows, name, check_one_in)
    return CutFile(name, path.stat().st_size, file_sha256(path), int((table["count"] > 0).sum()))


def _write_file(
    folder: Folder, split: Split, number: int, rows: np.ndarray, name: str, check_one_in: int
) -> np.ndarray:
    shard, find, total = split.shards[number], Finder(), 0
    table = np.zeros(len(rows), cuts.TABLE_DTYPE)
    with open(split.root / shard.name, "rb") as tar, folder.publish(name) as file:
        file.write(cuts.header(shard, len(rows), 0).tobytes())
        for i, row in enumerate(rows):
            data = os.pread(tar.fileno(), int(row["size"]), int(row["offset"]))
            crc = int(row["crc32"])
            if crc32(data) != crc:
                raise DataError(f"{split.root / shard.name}: changed at byte {row['offset']}; copy the shard again")
            image = np.frombuffer(bytearray(data), np.uint8)  # not read-only, as in the loader: compiled once
            places = find(image, int(row["width"]), int(row["height"]))
            if len(places) and crc % check_one_in == 0 and not _is_exact(find, image, places, crc):
                places = places[:0]
            table[i] = total, len(places), crc32(places.tobytes(), crc)
            file.write(places.tobytes())
            total += len(places)
        file.write(table.tobytes())
        file.seek(0)
        file.write(cuts.header(shard, len(rows), total).tobytes())
    return table


def _is_exact(find: Finder, image: np.ndarray, places: np.ndarray, seed: int) -> bool:
    with contextlib.suppress(ValueError):  # libjpeg-turbo warns of something in the whole image or in the cut
        return find.check(image, places, seed)
    return False
