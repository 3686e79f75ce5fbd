"""Finds images that a decoder got wrong without an error: one crop in N is decoded again, in the background.

Hardware JPEG decoders have returned wrong pixels in silence (pytorch/vision#9606, meta-pytorch/torchcodec#1634). The
reference is libjpeg-turbo on the whole image, from the bytes as stored. The consumer's stream is not waited for: a crop
is copied to pinned memory behind it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..errors import BadSample, ExpressError
from .backend import HostCopy, Output, Work
from .kernels import Cropper
from .portable import decode_whole
from .reader import Reader

TILE = 16  # pixels: a block that is wrong stands out in a tile; a mean over the crop would hide it
# Grey levels, of a tile's mean difference. On CPUs, DALI's decoder differs by 0 and its resizer by 0.3 at most (7,000
# crops of ImageNet); a block of other pixels by 30 and more. A GPU's decoders are not measured: gpu-proof records them.
TOLERANCE = 10.0
WAITING = 256  # crops, 150 MB at 224 pixels of float32; more are not checked, and counted
LOGGED = 10  # differences; the rest are counted

log = logging.getLogger("imagenet_express")


class _Entry(NamedTuple):
    sample: int
    size: tuple[int, int]  # width, height
    box: np.ndarray  # (4,) float64
    flip: np.ndarray  # (1,) bool
    mean: np.ndarray  # (3,) float32
    crop: HostCopy


class PixelCheck:
    """Compares chosen crops of a loader's backend with the reference.

    decoder: its name, for messages. describe: a sample's. Thread-safe counts: `checked`, `different`, `left_out`
    (crops that could not be checked in time). `error`: the first difference.
    """

    def __init__(
        self, output: Output, *, raw: bool, reader: Reader, describe: Callable[[int], str], decoder: str
    ) -> None:
        self.output, self.raw, self.decoder = output, raw, decoder
        self._reader, self._describe = reader, describe
        self._std = np.array(output.std, np.float32)[:, None, None]
        self._cropper = Cropper(output.crop, dtype="uint8", packed=False)
        self.checked = self.different = self.left_out = 0
        self.error: BadSample | None = None
        self._entries: queue.Queue[_Entry | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="express-check", daemon=True)
        self._thread.start()

    def add(self, work: Work, images: torch.Tensor) -> None:
        """Queues the chosen crops of a batch: (rows, 3, crop, crop), as the backend made them. Does not wait."""
        views = self.output.views
        for i in np.flatnonzero(work.checked).tolist():
            if self._entries.qsize() >= WAITING:
                self.left_out += 1
                continue
            sample = int(work.ids[i])
            row = i * views + sample % views
            place, size = work.placement, (int(work.width[i]), int(work.height[i]))
            of_row = place.box[row].copy(), place.flip[row : row + 1].copy(), work.mean[row].copy()
            self._entries.put(_Entry(sample, size, *of_row, HostCopy(images[row])))

    def close(self) -> None:
        """Checks what is waiting, and ends the thread."""
        self._entries.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._cropper.compile(raw=False)
        while (entry := self._entries.get()) is not None:
            try:
                difference = self._difference(entry)
            except (ExpressError, ValueError) as err:  # the loader reports what it cannot read or decode itself
                log.info("%s: not checked (%s)", self._describe(entry.sample), err)
                self.left_out += 1
                continue
            self.checked += 1
            if difference > TOLERANCE:
                self._report(entry.sample, difference)

    def _difference(self, entry: _Entry) -> float:
        """The largest mean difference of a tile, in grey levels."""
        (width, height), side = entry.size, self.output.crop
        stored = self._reader.stored(entry.sample)
        pixels = stored if self.raw else decode_whole(stored, width, height)
        ours, unused = np.empty(3 * side * side, np.uint8), np.zeros(3, np.float32)
        self._cropper(pixels, width, height, ours, 0, entry.box, entry.flip, unused, unused)
        theirs = entry.crop.read().float().numpy()
        if self.output.dtype != "uint8":
            theirs = theirs * self._std + entry.mean[:, None, None]
        return largest_tile_mean(np.abs(theirs - ours.reshape(3, side, side)).mean(0))

    def _report(self, sample: int, difference: float) -> None:
        self.different += 1
        message = (
            f"{self._describe(sample)}: {self.decoder} on {self.output.device} made other pixels than libjpeg-turbo,"
            f" by {difference:.0f} grey levels in a tile of {TILE} pixels (tolerance {TOLERANCE:g}); try"
            " --loader.hw-decoder-load 0, or --loader.backend portable"
        )
        self.error = self.error or BadSample(message, sample=sample)
        if self.different <= LOGGED:
            more = "; further ones are counted only" if self.different == LOGGED else ""
            log.warning("%s%s", message, more)


def largest_tile_mean(difference: np.ndarray) -> float:
    """The largest mean of a TILE × TILE tile of (H, W); those at the edges may be smaller. NaN counts as infinite."""
    sums, area = difference, np.ones_like(difference)
    for axis in (0, 1):
        starts = np.arange(0, difference.shape[axis], TILE)
        sums, area = (np.add.reduceat(each, starts, axis) for each in (sums, area))
    return float(np.nan_to_num(sums / area, nan=np.inf).max())
