"""The reference backend: threads over libjpeg-turbo, and one compiled kernel for the crop. Runs wherever torch does.

A thread decodes an image into its own buffer, which the next image reuses, and writes the crop straight into the
batch. What libjpeg-turbo refuses (PNG, CMYK, a slightly damaged JPEG) Pillow decodes.
"""

from __future__ import annotations

import io
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg

from ..errors import ConfigError
from ..manifest import Statistics
from .augment import AugmentConfig, place
from .backend import Output, Work, check_raw_sizes, normalised, to_device, undecodable
from .fetch import fetch_images
from .jpeg import ROWS_BELOW, cut_short
from .kernels import Cropper
from .loader import mean_image_crop
from .reader import new_buffer

IMAGES_A_TASK = 64  # at most: a task costs 50 µs, with the waking of its thread
BYTES_A_BLOCK = 2 << 20  # stored bytes that are fetched at once; fewer cost more calls, more leave the cache


class _Job(NamedTuple):
    work: Work
    crops: np.ndarray
    tasks: list[Future[None]]


def kernel_type(dtype: str, *, on_cpu: bool) -> str:
    """A CPU normalises in the kernel's one pass; elsewhere a quarter of the bytes goes to the device."""
    return "float32" if on_cpu and dtype != "uint8" else "uint8"


def prepare(crop: int, dtype: str, *, on_cpu: bool) -> None:
    """Compiles what a Portable needs for encoded images, or loads what an earlier process compiled."""
    cut_short(np.zeros(1, np.uint8), 0, 1, 1, 1, 1)
    Cropper(crop, dtype=kernel_type(dtype, on_cpu=on_cpu), packed=True).compile(raw=False)


class Portable:
    """See work.Engine. raw: images are stored as pixels. describe: a sample's name for a message."""

    def __init__(self, output: Output, *, raw: bool, threads: int, depth: int, describe: Callable[[int], str]) -> None:
        self.output, self.raw, self.threads, self.depth, self._describe = output, raw, threads, depth, describe
        stored = kernel_type(output.dtype, on_cpu=output.device.type == "cpu")
        self._in_kernel = stored == "float32"
        self._cropper = Cropper(output.crop, dtype=stored, packed=output.channels_last)
        self._cropper.compile(raw=raw)
        self._std = torch.tensor(output.std, dtype=torch.float32, device=output.device)[:, None, None]
        self._inverse_std = (1 / np.array(output.std, np.float64)).astype(np.float32)
        self._buffers = Buffers(pinned=output.device.type == "cuda")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="express-decode")
        self._local = threading.local()
        self._jobs: deque[_Job] = deque()
        self._source: Callable[[], Work] | None = None

    def start(self, source: Callable[[], Work]) -> None:
        self._source = source

    def next(self) -> tuple[Work, torch.Tensor]:
        self._fill(1)
        job = self._jobs.popleft()
        try:
            self._fill(self.depth)  # the threads go on while the consumer works on this batch
            for task in job.tasks:
                task.result()
        except BaseException:
            self._jobs.appendleft(job)  # for stop() to wait for
            raise
        job.work.read.release()
        return job.work, self._delivered(job)

    def stop(self) -> None:
        tasks = [task for job in self._jobs for task in job.tasks]
        running = [task for task in tasks if not task.cancel()]
        wait(running)
        self._jobs.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def decoder(self) -> str:
        return "none: pixels are stored" if self.raw else "libjpeg-turbo"

    def _fill(self, depth: int) -> None:
        assert self._source is not None
        while len(self._jobs) < depth:
            self._jobs.append(self._begin(self._source()))

    def _begin(self, work: Work) -> _Job:
        side, rows, n = self.output.crop, len(work.placement.box), len(work.ids)
        shape = (rows, side, side, 3) if self.output.channels_last else (rows, 3, side, side)
        crops = self._buffers.take(shape, np.float32 if self._in_kernel else np.uint8)
        step = min(IMAGES_A_TASK, -(-n // self.threads))
        tasks = [self._pool.submit(self._decode, work, crops, a, min(a + step, n)) for a in range(0, n, step)]
        return _Job(work, crops, tasks)

    def _decode(self, work: Work, crops: np.ndarray, start: int, end: int) -> None:
        """A thread's task: images [start, end) of the batch."""
        if self.raw:
            return self._crop_raw(work, crops, start, end)
        ends = np.cumsum(work.read.size[start:end])
        while start < end:
            fits = int(np.searchsorted(ends, ends[0] - work.read.size[start] + BYTES_A_BLOCK, "right"))
            n = max(1, fits)
            self._decode_block(work, crops, start, start + n)
            start, ends = start + n, ends[n:]

    def _crop_raw(self, work: Work, crops: np.ndarray, a: int, b: int) -> None:
        width, height, views = work.width[a:b], work.height[a:b], self.output.views
        check_raw_sizes(work, a, b, self._describe)  # the kernel checks no bounds
        out, mean, scale = crops.reshape(-1), work.mean.reshape(-1), self._inverse_std
        box, flip = work.placement.box.reshape(-1), work.placement.flip
        with work.read.files(a, b, in_turn=True) as files:
            done = self._cropper.stored(files, width, height, views, out, a * views, box, flip, mean, scale)
        if done < b - a:
            work.read.refuse(a + done)

    def _decode_block(self, work: Work, crops: np.ndarray, a: int, b: int) -> None:
        """Images [a, b): their bytes are fetched by one call and stay in the processor's cache."""
        width, height, rows = work.width[a:b], work.height[a:b], self._rows_needed(work, a, b)
        cut = np.zeros(b - a, np.bool_)
        with work.read.files(a, b) as files:
            done = fetch_images(*files, width, height, rows, cut)
        if done < b - a:
            work.read.refuse(a + done)
        out, mean, scale, views = crops.reshape(-1), work.mean.reshape(-1), self._inverse_std, self.output.views
        box, flip, crop, number = work.placement.box.reshape(-1), work.placement.flip, self._cropper, a * views
        columns = (files.at, files.at + files.size, cut, rows, width, height)
        sizes = zip(*(column.tolist() for column in columns), strict=True)
        for i, (start, end, is_cut, needed, w, h) in enumerate(sizes, a):
            image = files.buffer[start:end]
            try:
                pixels = self._top(image, w, h, needed) if is_cut else self._decoded(image, w, h)
            except Exception as err:  # Pillow's decoders raise whatever they like
                raise undecodable(work, i, err, self._describe) from err
            for number in range(i * views, (i + 1) * views):
                crop(pixels, w, h, out, number, box, flip, mean, scale)

    def _rows_needed(self, work: Work, start: int, end: int) -> np.ndarray:
        """(n,) int64: how many rows of images [start, end), from the top, their crops are made of."""
        views = self.output.views
        _, top, _, size = work.placement.box[start * views : end * views].T
        taps = np.maximum(size / self.output.crop, 1)
        rows: np.ndarray = np.ceil(top + size + taps).astype(np.int64).reshape(-1, views).max(1) + ROWS_BELOW
        return rows

    def _top(self, image: np.ndarray, width: int, height: int, rows: int) -> np.ndarray:
        """The first rows of an image that was cut short, or all of it where that is refused, as _decoded()."""
        try:  # not strict: the rest of the image is what it would complain of
            pixels = decode_jpeg(image, buffer=self._scratch(3 * height * width), strict=False)
        except ValueError:
            cut_short(image, 0, len(image), width, rows, height)  # as it was, for Pillow
            return self._decoded(image, width, height)
        return _flat(pixels, width, rows)

    def _decoded(self, image: np.ndarray, width: int, height: int) -> np.ndarray:
        """(height · width · 3,) uint8, valid until this thread's next call."""
        return decode_whole(image, width, height, self._scratch(3 * height * width))

    def _scratch(self, size: int) -> np.ndarray:
        """This thread's buffer, of at least `size` bytes."""
        buffer: np.ndarray | None = getattr(self._local, "pixels", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.pixels = np.empty(size + size // 4, np.uint8)
        return buffer

    def _delivered(self, job: _Job) -> torch.Tensor:
        images = torch.from_numpy(job.crops)
        images = images.permute(0, 3, 1, 2) if self.output.channels_last else images
        dtype = getattr(torch, self.output.dtype)
        if self._in_kernel or (self.output.dtype == "uint8" and self.output.device.type == "cpu"):
            return images.to(dtype)
        images = images.to(self.output.device, non_blocking=True)
        if self.output.device.type == "cuda":
            self._buffers.keep_until_copied(job.crops)
        if self.output.dtype == "uint8":
            return images
        mean = to_device(job.work.mean, images.device)[:, :, None, None]
        return normalised(images, mean, self._std, dtype)


def decode_whole(image: np.ndarray, width: int, height: int, buffer: np.ndarray | None = None) -> np.ndarray:
    """(height · width · 3,) uint8, RGB, in `buffer` if there is one. Raises what decoders raise; ValueError for an
    image of another size."""
    try:
        pixels = decode_jpeg(image, buffer=buffer)
    except ValueError:
        pixels = np.array(Image.open(io.BytesIO(image.data)).convert("RGB"))
    return _flat(pixels, width, height)


def _flat(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape != (height, width, 3):
        raise ValueError(f"{pixels.shape[1]}×{pixels.shape[0]} pixels, but the index says {width}×{height}")
    return pixels.reshape(-1)


class Buffers:
    """Memory for batches, used again once nobody holds a tensor of it: fresh pages cost more than their filling."""

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._free: list[np.ndarray] = []
        self._copying: deque[tuple[Any, np.ndarray]] = deque()

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at = next((i for i, memory in enumerate(self._free) if len(memory) >= size), None)
        memory = new_buffer(size, pinned=self.pinned) if at is None else self._free.pop(at)
        array: np.ndarray = memory[:size].view(dtype).reshape(shape)
        # A tensor on the array holds the array: when the last one is gone, so is the array, and the memory is free.
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array

    def keep_until_copied(self, view: np.ndarray) -> None:
        """Holds a pinned batch until the device has it."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copying.append((event, view))


class Viewer:
    """Cuts and normalises decoded images, one at a time: their centre, or ten views where augment.views is 10."""

    def __init__(self, augment: AugmentConfig, statistics: Statistics) -> None:
        self.augment = augment
        self._cropper = Cropper(augment.crop, dtype="float32", packed=False)
        self._cropper.compile(raw=False)
        self._image: np.ndarray | None = None
        mean, std = statistics.mean, statistics.std if augment.normalize == "mean-std" else (1.0, 1.0, 1.0)
        if augment.normalize == "mean-image":
            if statistics.mean_image is None:
                raise ConfigError("augment.normalize=mean-image: the statistics hold no mean image")
            self._image, mean = mean_image_crop(statistics.mean_image, augment), (0.0, 0.0, 0.0)
        self._mean = np.tile(np.array(mean, np.float32), augment.views)
        self._scale = (1 / np.array(std, np.float64)).astype(np.float32)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(views, 3, crop, crop) float32. pixels: (height, width, 3) uint8, RGB."""
        height, width, _ = pixels.shape
        ids, size = np.zeros(1, np.int64), (np.array([width]), np.array([height]))
        placement = place(self.augment, ids, *size, seed=0, epoch=0, train=False)
        views, crop = self.augment.views, self.augment.crop
        out = np.empty(views * 3 * crop * crop, np.float32)
        flat, box = np.ascontiguousarray(pixels).reshape(-1), placement.box.reshape(-1)
        for number in range(views):
            self._cropper(flat, width, height, out, number, box, placement.flip, self._mean, self._scale)
        crops = out.reshape(views, 3, crop, crop)
        return crops if self._image is None else crops - self._image
