"""Finds images that a decoder decodes wrongly without an error: one crop in N is decoded again, in the background.

Hardware JPEG decoders have silently returned wrong pixels (pytorch/vision#9606, meta-pytorch/torchcodec#1634). The
reference is libjpeg-turbo on the whole image, from the bytes as stored. The host does not wait for the consumer's
stream: the crop's copy to pinned memory is queued on it.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from ..decode import decode
from ..errors import LOG, BadSample
from .backend import HostCopy, Setup, Work
from .fetch import HEIGHT, WIDTH
from .kernels import crop_decoded
from .plan import Planned

TILE = 16  # pixels: a block that is wrong stands out in a tile; a mean over the crop would hide it
# Grey levels, of a tile's mean difference. On CPUs, DALI's decoder differs by 0 and its resizer by 0.3 at most (7,000
# crops of ImageNet); a block of other pixels by 30 and more. A GPU's decoders are not measured: gpu-proof records them.
TOLERANCE = 10.0
WAITING = 256  # queued crops, 150 MB at 224 pixels of float32; further ones are not checked but counted
LOGGED = 10  # differences; the rest are counted


class PixelCheck:
    """Compares chosen crops of a loader's backend with the reference.

    decoder: its name, for messages. left_out: crops that could not be checked in time. error: the first difference.
    """

    def __init__(self, setup: Setup, decoder: str) -> None:
        self.output, self.raw, self._reader, self.decoder = setup.output, setup.raw, setup.reader, decoder
        self.different = self.left_out = 0
        self.error: BadSample | None = None
        self._room = threading.Semaphore(WAITING)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="express-check")
        self._reader.stages.add(pixels_checked=0, pixels_different=0)

    def add(self, work: Work, images: torch.Tensor) -> None:
        """Queues the chosen crops of a batch: (rows, 3, crop, crop), as the backend made them. Does not wait."""
        views = self.output.views
        for i in np.flatnonzero(work.checked).tolist():
            if not self._room.acquire(blocking=False):
                self.left_out += 1
                continue
            image, view = Planned(*[column[i : i + 1] for column in work[:-1]]), int(work.ids[i]) % views
            self._pool.submit(self._check, image, view, HostCopy(images[i * views + view]))

    def close(self) -> None:
        """Checks what is waiting, and ends the thread."""
        self._pool.shutdown()

    def _check(self, image: Planned, view: int, crop: HostCopy) -> None:
        """The thread's task."""
        sample = int(image.ids[0])
        try:
            difference = self._difference(image, view, crop)
        except Exception as err:  # the loader itself reports images that it cannot read or decode
            LOG.info("%s: not checked (%s)", self._reader.describe(sample), err)
            self.left_out += 1
            return
        finally:
            self._room.release()
        self._reader.stages.add(pixels_checked=1)
        if difference > TOLERANCE:
            self._report(sample, difference)

    def _difference(self, image: Planned, view: int, crop: HostCopy) -> float:
        """The largest mean difference of a tile, in grey levels."""
        side = self.output.crop
        stored, (width, height) = self._reader.stored(int(image.ids[0])), image.rows[0, [WIDTH, HEIGHT]].tolist()
        pixels = stored.reshape(height, width, 3) if self.raw else decode(stored.data, size=(width, height))
        ours, unused, here = np.empty((1, 3, side, side), np.uint8), np.zeros(3, np.float32), slice(view, view + 1)
        crop_decoded(pixels, ours, image.box[:, here], image.flip[:, here], unused, unused)
        theirs = crop.read().float().numpy()
        if self.output.dtype != "uint8":
            theirs = theirs * np.array(self.output.std, np.float32)[:, None, None] + image.mean[0, view][:, None, None]
        return largest_tile_mean(np.abs(theirs - ours[0]).mean(0))

    def _report(self, sample: int, difference: float) -> None:
        self.different += 1
        self._reader.stages.add(pixels_different=1)
        message = (
            f"{self._reader.describe(sample)}: {self.decoder} on {self.output.device} made other pixels than"
            f" libjpeg-turbo, by {difference:.0f} grey levels in a tile of {TILE} pixels (tolerance {TOLERANCE:g}); try"
            " --loader.hw-decoder-load 0, or --loader.backend portable"
        )
        self.error = self.error or BadSample(message, sample=sample)
        if self.different <= LOGGED:
            more = "; further ones are counted only" if self.different == LOGGED else ""
            LOG.warning("%s%s", message, more)


def largest_tile_mean(difference: np.ndarray) -> float:
    """The largest mean over a TILE × TILE tile of (H, W); edge tiles may be smaller. NaN counts as infinite."""
    tiles = avg_pool2d(torch.from_numpy(difference)[None], TILE, ceil_mode=True, count_include_pad=False)
    return float(tiles.nan_to_num(nan=np.inf).max())
