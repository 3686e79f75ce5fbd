"""JPEGs cut down to what their crops need, a block of images at a time, before they are decoded."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from .. import jpeg
from ..cut_jpeg import EXTRA, SLACK_OUT, cut_jpeg
from ..cuts import ENTRY_BYTES, HEADER_BYTES, Cuts
from ..decode import Scratch
from ..errors import StorageError
from ..huffman import SLACK, TABLES
from ..jit import compiled
from .byte_source import LocalShards, OpenFile
from .checksum import crc32
from .fetch import COLUMNS, CRC32, HEIGHT, OFFSET, SHARD, SIZE, WIDTH, Block, fetched

WORTH = 0.8  # fraction of an image's pixels: above it, cutting costs as much as it saves


class Cut(NamedTuple):
    """What an image was cut to: `data`, or none if it was not cut, and its place in the image, in pixels."""

    data: np.ndarray
    left: int
    top: int
    width: int
    height: int


class _Tables(threading.local):
    """Of this thread, whose images mostly have the same Huffman codes."""

    def __init__(self) -> None:
        self.numbers = np.zeros(TABLES, np.int32)


class Cutter:
    """Cuts the images of a split. crop: side of the crops, in pixels."""

    def __init__(self, cuts: Cuts, crop: int) -> None:
        self.crop, self._table = crop, cuts.table
        self._source = LocalShards(cuts.paths)
        self._clean, self._out, self._places, self._tables = Scratch(), Scratch(), Scratch(), _Tables()

    def rows(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Offset and size of the images' places, in the form of `rows`, the images' own: see fetch.py."""
        table, found = self._table[ids], np.zeros((len(ids), len(COLUMNS)), np.int64)
        found[:, OFFSET] = HEADER_BYTES + ENTRY_BYTES * table["first"].astype(np.int64)
        found[:, SIZE], found[:, CRC32] = ENTRY_BYTES * table["count"].astype(np.int64), table["crc32"]
        found[:, SHARD] = rows[:, SHARD]
        return found

    def pixels(self, box: np.ndarray) -> np.ndarray:
        """(n, 4) int64: left, top, right and bottom of the pixels that the crops of n images are made of.

        box: (n, views, 4), see augment.Placement. May exceed the image.
        """
        place, size = box[..., :2], box[..., 2:]
        plain = ((size == self.crop) & (place == np.floor(place))).all(-1, keepdims=True)
        spread = np.where(plain, 0.0, np.maximum(size / self.crop, 1.0) + 1)
        first, last = np.floor(place - spread).min(1), np.ceil(place + size + spread).max(1)
        found: np.ndarray = np.concatenate([first, last], axis=1).astype(np.int64)
        return found

    def worthwhile(self, rows: np.ndarray, places: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """(n,) bool: which images have places, and crops that need much less than all of them."""
        size = rows[:, [WIDTH, HEIGHT]]
        area = (np.minimum(pixels[:, 2:], size) - np.maximum(pixels[:, :2], 0)).prod(1)
        found: np.ndarray = (places[:, SIZE] > 0) & (area < WORTH * size.prod(1))
        return found

    def __call__(self, block: Block, places: np.ndarray, pixels: np.ndarray, chosen: np.ndarray) -> list[Cut]:
        """Cuts the chosen images of a block that has been fetched; valid until this thread's next call."""
        files: list[OpenFile | None] = []
        for shard, wanted in zip(places[:, SHARD].tolist(), chosen.tolist(), strict=True):
            try:
                files.append(self._source.open(shard) if wanted else None)
            except StorageError:  # a file that is lost costs the cuts, not the training
                files.append(None)
        fds = np.array([file.fd if file else -1 for file in files], np.int64)
        size = block.rows[:, SIZE]
        out = self._out(int(size.sum()) + EXTRA * len(size) + SLACK_OUT)
        clean, entries = self._clean(int(size.max()) + SLACK), self._places(int(places[:, SIZE].max()))
        found = np.zeros((len(size), 6), np.int64)
        memory = entries, clean, self._tables.numbers, out
        cut_images(block.buffer, block.at, block.rows, fds, places, pixels, *memory, found)
        return [Cut(out[start:end], *placed) for start, end, *placed in found.tolist()]

    def close(self) -> None:
        self._source.close()


@compiled
def cut_images(
    buffer: np.ndarray, at: np.ndarray, rows: np.ndarray, fds: np.ndarray, places: np.ndarray, pixels: np.ndarray,
    entries: np.ndarray, clean: np.ndarray, tables: np.ndarray, out: np.ndarray, found: np.ndarray,
) -> None:  # fmt: skip
    """Cuts those images of a block that have a descriptor.

    found: (n, 6) int64, zeros: filled with the cut's first and last byte in `out` and its left, top, width and height.
    """
    layout, q = np.zeros(jpeg.LAYOUT, np.int64), 0
    for i in range(len(at)):
        size, start, end = places[i, SIZE], at[i], at[i] + rows[i, SIZE]
        if fds[i] < 0 or not fetched(entries, 0, fds[i], places[i, OFFSET], size, 0, False):
            continue
        crc = np.uint32(rows[i, CRC32])
        if np.int64(crc32(crc, np.uintp(entries.ctypes.data), np.uint32(size))) != places[i, CRC32]:
            continue
        if not jpeg.read_layout(buffer, start, end, layout, tables):
            continue
        if layout[jpeg.WIDTH] != rows[i, WIDTH] or layout[jpeg.HEIGHT] != rows[i, HEIGHT]:
            continue
        four = entries[:size].view(np.uint16).reshape(-1, 4)
        limit = q + rows[i, SIZE] + EXTRA
        last = cut_jpeg(
            buffer, start, end, layout, tables, four, pixels[i], clean, out, q, limit, found[i, 2:]
        )  # fmt: skip
        if last:
            found[i, 0], found[i, 1], q = q, last, last
