"""The reference backend: threads over libjpeg-turbo, and one compiled kernel for the crop. Runs wherever torch does.

A thread decodes an image into its own buffer, which the next image reuses, and writes the crop straight into the
batch.
"""

import contextlib
from collections import deque
from concurrent.futures import Future, wait
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from simplejpeg import decode_jpeg

from ..decode import Scratch, decode
from ..manifest import Statistics
from .augment import AugmentConfig, normalisation, place
from .backend import Engine, Held, Setup, Work, check_raw_sizes, to_device, undecodable
from .buffers import Buffers
from .cutter import NOT_CUT, Cut, pixels_under
from .fetch import HEIGHT, SIZE, WIDTH, Block, fetch_images, not_plain_jpegs
from .kernels import crop_decoded, crop_images, decoded_block
from .truncate_jpeg import ROWS_BELOW, cut_short

IMAGES_A_TASK = 64  # at most: a task costs 50 µs, including the wake-up of its thread
BYTES_A_BLOCK = 2 << 20  # stored bytes fetched by one call: less costs more calls, more does not fit into the cache


class _Job(NamedTuple):
    work: Work
    crops: ndarray
    tasks: list[Future[None]]


def kernel_type(dtype: str, device: torch.device) -> str:
    """Returns the kernel's output type: for a CPU the kernel normalises; for other devices uint8, a quarter of the
    bytes to copy."""
    return "float32" if device.type == "cpu" and dtype != "uint8" else "uint8"


class Portable(Engine):
    """See backend.Engine."""

    def __init__(self, setup: Setup) -> None:
        output, threads = self.output, self.threads = setup.output, setup.threads
        self.raw, self.depth, self._reader = setup.raw, setup.config.prefetch_batches, setup.reader
        self.images_a_task = min(IMAGES_A_TASK, self._reader.source.at_once(threads))
        self.made = kernel_type(output.dtype, output.device)
        self._std = torch.tensor(output.std, dtype=torch.float32, device=output.device)[:, None, None]
        self._inverse_std = (1 / np.array(output.std, np.float64)).astype(np.float32)
        self._buffers, self._copying = Buffers(pinned=output.device.type == "cuda"), Held()
        self._scratch = Scratch()
        self._pool, self._cutter = setup.pool, setup.cutter
        self._jobs: deque[_Job] = deque()

    def next(self) -> tuple[Work, torch.Tensor]:
        self._reader.stages.add(queued=sum(all(task.done() for task in job.tasks) for job in self._jobs))
        while len(self._jobs) <= self.depth:  # the threads continue while the consumer works on this batch
            self._jobs.append(self._begin(self.source()))
        for task in self._jobs[0].tasks:  # if one fails, the job stays queued, so that stop() waits for it
            task.result()
        job = self._jobs.popleft()
        return job.work, self._delivered(job)

    def stop(self) -> None:
        wait([task for job in self._jobs for task in job.tasks if not task.cancel()])
        self._jobs.clear()

    def decoder(self) -> str:
        return "none: pixels are stored" if self.raw else "libjpeg-turbo"

    def _begin(self, work: Work) -> _Job:
        side, n, rows = self.output.crop, len(work.ids), work.flip.size
        shape = (rows, side, side, 3) if self.output.channels_last else (rows, 3, side, side)
        crops = self._buffers.take(shape, self.made)
        step = min(self.images_a_task, -(-n // self.threads))
        tasks = [self._pool.submit(self._decode, work, crops, a, min(a + step, n)) for a in range(0, n, step)]
        return _Job(work, crops, tasks)

    def _decode(self, work: Work, crops: ndarray, start: int, end: int) -> None:
        """A thread's task: images [start, end) of the batch."""
        if self.raw:
            check_raw_sizes(work, start, end, self._reader)  # the compiled code checks no bounds
            self._reader.fetch(work.read, start, end, lambda b: self._crop(work, crops, b, start, end), in_turn=True)
            return
        # A block ends with the image that takes it to BYTES_A_BLOCK.
        number = (np.cumsum(work.rows[start:end, SIZE]) - 1) // BYTES_A_BLOCK
        bounds = [start, *(np.flatnonzero(np.diff(number)) + start + 1).tolist(), end]
        for a, b in pairwise(bounds):
            self._decode_block(work, crops, a, b)

    def _crop(self, work: Work, crops: ndarray, block: Block, a: int, b: int, pitch: int = 0) -> int:
        """Crops images [a, b), whose pixels are in the block."""
        form = self.output.crop, self.output.channels_last, pitch
        out = crops.reshape(-1), a * self.output.views, work.box[a:b], work.flip[a:b], work.mean.reshape(-1)
        return crop_images(*block, *form, *out, self._inverse_std)

    def _decode_block(self, work: Work, crops: ndarray, a: int, b: int) -> None:
        """Decodes and crops images [a, b); their bytes are fetched by one call and stay in the processor's cache."""
        rows, cuts = work.rows[a:b], [NOT_CUT] * (b - a)
        size = int(rows[:, SIZE].sum())
        pixels = pixels_under(work.box[a:b], self.output.crop)
        left = pixels[:, 3] + ROWS_BELOW
        if self._cutter:
            places = self._cutter.places(work.ids[a:b], rows, pixels)
            left = np.where(places[:, 1] > 0, rows[:, HEIGHT], left)
        block = self._reader.fetch(work.read, a, b, lambda block: fetch_images(*block, left))
        if self._cutter:
            cuts = self._cutter(block, places, pixels)
        # decode() checks the others in detail.
        plain = (left < rows[:, HEIGHT]) | ~not_plain_jpegs(block.buffer, block.at, rows)
        columns = (block.at, block.at + rows[:, SIZE], plain, left, rows[:, WIDTH], rows[:, HEIGHT])
        sizes = np.stack(columns, axis=1).tolist()
        with self._reader.stages("decode", size):
            for i, (start, end, is_plain, left_rows, width, height) in enumerate(sizes):
                cut, image = cuts[i], block.buffer[start:end]
                try:
                    decoded = self._cut(cut, 3 * width * height)
                    if decoded is None:
                        cut, decoded = NOT_CUT, self._decoded(image, width, height, left_rows, is_plain)
                except Exception as err:  # whatever it is, it needs the sample's name
                    raise undecodable(work, a + i, err, self._reader) from err
                crop = decoded_block(decoded, rows[i : i + 1], -3 * (cut.top * cut.width + cut.left))
                self._crop(work, crops, crop, a + i, a + i + 1, cut.width)

    def _cut(self, cut: Cut, size: int) -> ndarray | None:
        """Decodes a cut into flat memory of the whole image's `size`, since taps of weight zero may read beyond its
        pixels. Returns None if the image was not cut or the cut is damaged: the whole image is decoded then."""
        memory = self._scratch(size)
        with contextlib.suppress(ValueError):
            if len(cut.data) and decode_jpeg(cut.data, buffer=memory, strict=True).shape == (cut.height, cut.width, 3):
                return memory
        return None

    def _decoded(self, image: ndarray, width: int, height: int, rows: int, is_plain: bool) -> ndarray:
        """Returns flat pixels, only of the first `rows` rows if the image was cut short; valid until this thread's next
        call. is_plain: whether it is a plain JPEG of this size, by header and end."""
        if is_plain:
            memory = self._scratch(3 * height * width)  # of all rows, as taps of weight zero may read below the last
            try:  # not strict if it was cut: the rest of the image would count as an error
                if decode_jpeg(image, buffer=memory, strict=rows == height).shape == (rows, width, 3):
                    return memory
            except ValueError:
                pass
            cut_short(image, width, rows, height)  # restores the original height
        return decode(image.data, size=(width, height)).reshape(-1)

    def _delivered(self, job: _Job) -> torch.Tensor:
        images = torch.from_numpy(job.crops)
        images = images.permute(0, 3, 1, 2) if self.output.channels_last else images
        dtype = getattr(torch, self.output.dtype)
        if self.output.device.type == "cpu":
            return images.to(dtype)
        images = self._reader.stages.copied(images, self.output.device)
        if self.output.device.type == "cuda":
            self._copying.hold(job.crops, self.output.device)
        if self.output.dtype == "uint8":
            return images
        mean = to_device(job.work.mean.reshape(-1, 3), images.device)[:, :, None, None]
        return images.float().sub_(mean).div_(self._std).to(dtype)  # the memory format stays


class Viewer:
    """Cuts and normalises decoded images, one at a time: their centre, or ten views if augment.views is 10."""

    def __init__(self, augment: AugmentConfig, statistics: Statistics) -> None:
        self.augment = augment
        normal = normalisation(augment, statistics)
        self._image, self._mean = normal.image, np.tile(normal.mean, augment.views)
        self._scale = (1 / np.array(normal.std, np.float64)).astype(np.float32)

    def __call__(self, pixels: ndarray) -> ndarray:
        """(views, 3, crop, crop) float32. pixels: (height, width, 3) uint8, RGB."""
        height, width, _ = pixels.shape
        box, flip = place(
            self.augment, np.zeros(1, np.int64), np.array([[width, height]]), seed=0, epoch=0, train=False
        )
        crop = self.augment.crop
        crops = np.empty((self.augment.views, 3, crop, crop), np.float32)
        crop_decoded(pixels, crops, box, flip, self._mean, self._scale)
        return crops if self._image is None else crops - self._image
