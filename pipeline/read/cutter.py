"""Cuts JPEGs down to the MCUs that their crops need, a block of images at a time, before they are decoded."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from .. import jpeg
from ..cut_jpeg import EXTRA, cut_jpeg
from ..cuts import HEADER_BYTES, TABLE_DTYPE, file_name, open_cuts, table
from ..decode import Scratch
from ..errors import LOG, DataError, StorageError
from ..files import OpenFile
from ..huffman import SLACK
from ..jit import compiled
from ..manifest import Dataset, Split
from .byte_source import LocalShards
from .fetch import CRC32, HEIGHT, IN_MEMORY, SHARD, SIZE, WIDTH, Block, fetched
from .reader import Reader

WORTH = 0.8  # fraction of an image's pixels: above it, cutting costs as much as it saves
MCU = 16  # pixels, of most JPEGs; whole MCUs are decoded
FETCHED_AT_ONCE = 4  # files, from a URL


class Cut(NamedTuple):
    """An image's cut: `data`, empty if it was not cut, and its place in the image, in pixels."""

    data: ndarray
    left: int
    top: int
    width: int
    height: int


NOT_CUT = Cut(np.empty(0, np.uint8), 0, 0, 0, 0)


def pixels_under(box: ndarray, crop: int) -> ndarray:
    """Returns left, top, right and bottom of the source pixels of n images' crops, (n, 4) int64.

    box: (n, views, 4), see augment.Placement. crop: side of the crops, in pixels. The result may exceed the image.
    """
    place, size = box[..., :2], box[..., 2:]
    plain = ((size == crop) & (place == np.floor(place))).all(-1, keepdims=True)
    # The filter reaches one resampled pixel's width from that pixel's centre, which is half a width inside the box.
    spread = np.where(plain, 0.0, np.maximum(size / crop, 1.0) / 2 + 1)
    first, last = np.floor(place - spread).min(1), np.ceil(place + size + spread).max(1)
    return np.concatenate([first, last], axis=1).astype(np.int64)


class Cutter:
    """Cuts the images of a split. Counts images with missing or damaged places, which are decoded whole, as
    `cuts_missed`."""

    def __init__(self, paths: list[Path], split: Split, reader: Reader) -> None:
        """paths: of the shards' files. Those of a split at a URL are fetched when they are first needed."""
        self._source, self._out, self._split, self._reader = LocalShards(paths), Scratch(), split, reader
        self._pool = ThreadPoolExecutor(FETCHED_AT_ONCE, thread_name_prefix="express-cuts")
        ends = np.cumsum([shard.samples for shard in split.shards])
        self._table = np.zeros(ends[-1], TABLE_DTYPE)  # takes memory only as shards are first needed and fill it
        self._files = list(zip(paths, split.shards, np.split(self._table, ends[:-1])))
        self._unread = set(range(len(ends)))

    def places(self, ids: ndarray, rows: ndarray, pixels: ndarray) -> ndarray:
        """(n, 3) int64: offset, size and CRC-32 of the images' places; size 0 if they are better decoded whole.

        rows: see fetch.py. pixels: by pixels_under.
        """
        for shard in self._unread.intersection(rows[:, SHARD].tolist()):
            if not self._split.remote:
                self._read(shard)
                self._unread.discard(shard)
                continue
            with suppress(KeyError):  # another thread came first
                self._unread.remove(shard)
                self._files[shard][2]["size"] = 1  # until the file is read, its images count as missed
                self._pool.submit(self._read, shard)
        found, sides = self._table[ids], rows[:, [WIDTH, HEIGHT]]
        first, last = np.maximum(pixels[:, :2] // MCU, 0), -(-np.minimum(pixels[:, 2:], sides) // MCU)
        area = np.minimum(MCU * (last - first), sides).prod(1)
        size = np.where(area < WORTH * sides.prod(1), found["size"], 0)
        offset = HEADER_BYTES + found["offset"].astype(np.int64)
        return np.stack([offset, size, found["crc32"]], axis=1)

    def _read(self, shard: int) -> None:
        path, of, rows = self._files[shard]
        try:
            if remote := self._split.remote:
                remote.cached(file_name(self._split.name, shard), sha256=path.stem, stop=self._reader.closing)
            rows[:] = table(path, of)
        except (DataError, StorageError, OSError) as err:
            if not self._reader.closing.is_set():
                LOG.warning("%s", err)
            rows["size"] = 1  # byte, without its checksum: all images count as missed

    def __call__(self, block: Block, places: ndarray, pixels: ndarray, *, keep: bool = False) -> list[Cut]:
        """Cuts the images of a block that has been fetched. The cuts are valid until this thread's next call.

        keep: the cuts stay valid, and are made for a decoder with memory of its own, see `odd` of cut_jpeg.
        """
        size = block.rows[:, SIZE]
        with self._reader.stages("cut", int(size.sum())):
            wanted = zip(block.rows[:, SHARD].tolist(), places[:, 1].tolist(), strict=True)
            files = [self._opened(shard) if listed else None for shard, listed in wanted]
            fds = np.array([file.fd if file else IN_MEMORY for file in files], np.int64)
            room, found = int((2 * size + EXTRA).sum()), np.zeros((len(fds), 6), np.int64)
            out = np.empty(room, np.uint8) if keep else self._out(room)
            cut_images(block.buffer, block.at, block.rows, fds, places, pixels, keep, out, found)
        self._reader.stages.add(cuts_missed=int(((places[:, 1] > 0) & (found[:, 1] == 0)).sum()))
        return [Cut(out[start:end], *placed) for start, end, *placed in found.tolist()]

    def _opened(self, shard: int) -> OpenFile | None:
        try:
            return self._source.open(shard)
        except StorageError:  # without the file, images are decoded whole and training continues
            return None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._source.close()


def open_cutter(dataset: Dataset, split: Split, reader: Reader) -> Cutter | None:
    """Returns a Cutter; None if there are no cuts or, with a warning, if they cannot be used."""
    try:
        paths = [path for path, _ in open_cuts(dataset, split)]
        return Cutter(paths, split, reader) if paths else None
    except (DataError, StorageError, OSError) as err:
        LOG.warning("%s", err)
        return None


@compiled
def cut_images(
    buffer: ndarray, at: ndarray, rows: ndarray, fds: ndarray, places: ndarray, pixels: ndarray, odd: bool,
    out: ndarray, found: ndarray,
) -> None:  # fmt: skip
    """Cuts those images of a block that have a descriptor.

    odd: see cut_jpeg.
    found: (n, 6) int64, zeros: filled with the cut's first and last byte in `out` and its left, top, width and height.
    """
    header, entries, q = np.zeros(jpeg.HEADER, np.int32), np.empty(places[:, 1].max() + SLACK, np.uint8), 0
    for i in range(len(at)):
        image, (offset, size, crc) = buffer[at[i] : at[i] + rows[i, SIZE]], places[i]
        if (
            fds[i] == IN_MEMORY
            or not fetched(entries, 0, fds[i], offset, size, crc, True, rows[i, CRC32])
            or not jpeg.read_header(image, header)
            or header[jpeg.WIDTH] != rows[i, WIDTH]
            or header[jpeg.HEIGHT] != rows[i, HEIGHT]
        ):
            continue
        last = q + cut_jpeg(image, header, entries[: size + SLACK], pixels[i], odd, out[q:], found[i, 2:])
        found[i, 0], found[i, 1], q = q, last, last
