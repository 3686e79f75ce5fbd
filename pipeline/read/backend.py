"""The interface between the loader and its backends: a planned batch, and the form in which it is delivered."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from ..errors import BadSample
from .config import LoaderConfig
from .cutter import Cutter
from .fetch import HEIGHT, SIZE, WIDTH
from .plan import Plan
from .reader import ReadBatch, Reader

PixelType = Literal["uint8", "float32", "float16", "bfloat16"]


class Work(NamedTuple):
    """A batch of n images that is planned and being read, with `views` crops of each image."""

    ids: ndarray  # (n,) int64
    rows: ndarray  # (n, 7) int64: rows of the index, see fetch.py
    box: ndarray  # (n, views, 4) float64, see augment.Placement
    flip: ndarray  # (n, views) bool
    mean: ndarray  # (n, views, 3) float32: values to subtract, including the colour shift
    checked: ndarray  # (n,) bool: the images whose pixels are compared with the reference decoder's
    kept: ndarray  # (n,) bool: False for replacements of bad samples in evaluation, which are not delivered
    read: ReadBatch


def works(plan: Plan, reader: Reader, epoch: int, step: int, *, ahead: int) -> Generator[Work, None, None]:
    """Yields all batches from a step on; their bytes are requested `ahead` batches before they are yielded."""
    reading: deque[Work] = deque()
    try:
        for at in reader.follow(plan.coordinates(epoch, step), plan):
            planned = plan.step(*at, reader.rows)
            reading.append(Work(*planned, reader.read(planned.ids, planned.rows)))
            if len(reading) <= ahead:
                continue
            if reader.is_slow:
                for work in reading:  # planned before storage was slow
                    reader.ahead(work.read)
            yield reading.popleft()
    finally:
        for work in reading:
            for task in work.read.tasks:
                task.cancel()


@dataclass(frozen=True)
class Output:
    """The form of every batch that a backend delivers."""

    crop: int
    views: int  # crops an image
    dtype: PixelType  # uint8: not normalised
    channels_last: bool
    std: tuple[float, ...]  # (3,) divisors
    device: torch.device


@dataclass(frozen=True)
class Setup:
    """The arguments of an engine."""

    output: Output
    reader: Reader
    plan: Plan
    config: LoaderConfig
    raw: bool  # images are stored as pixels
    threads: int
    pool: ThreadPoolExecutor  # with `threads` threads
    ranks: int  # on this machine
    cutter: Cutter | None  # cuts what crops need out of JPEGs

    @property
    def most_crops(self) -> int:
        """The number of crops in the largest batch."""
        return self.plan.batch_per_rank * self.plan.views


class Engine(Protocol):
    """A backend: decodes the planned images and makes the planned crops. It draws no random numbers."""

    source: Callable[[], Work]

    def start(self, source: Callable[[], Work]) -> None:
        """`source` returns the next batch; the engine calls it when it can begin to decode that batch."""
        self.source = source

    def load(self) -> None:
        """Loads the data that the backend keeps in memory, if any. Without this call, the first next() loads it."""
        return

    def next(self) -> tuple[Work, Tensor]:
        """The next batch and its (n · views, 3, crop, crop) crops. Raises DataError for an image it cannot decode."""

    def stop(self) -> None:
        """Discards the batches in flight. After it returns, nothing accesses their memory."""
        return

    def close(self) -> None:
        """Frees what it holds; after stop()."""
        return

    def decoder(self) -> str:
        """Which decoder turns stored bytes into pixels, for a log line."""


def undecodable(work: Work | ReadBatch, number: int, reason: object, reader: Reader) -> BadSample:
    """Returns the error for image `number` of a batch, which a backend's decoder rejected."""
    sample = int(work.ids[number])
    return BadSample(
        f"{reader.describe(sample)}: cannot be decoded ({reason});"
        " shard the data again with --encode jpeg, or without this image",
        sample=sample,
    )


def check_raw_sizes(work: Work, start: int, end: int, reader: Reader) -> None:
    """Raises BadSample if one of images [start, end) does not have exactly the bytes of its width × height pixels."""
    size, width, height = work.rows[start:end, [SIZE, WIDTH, HEIGHT]].T
    for i in np.flatnonzero(size != 3 * width * height)[:1].tolist():
        reason = f"{size[i]} bytes, but {width[i]}×{height[i]} pixels have {3 * width[i] * height[i]}"
        raise undecodable(work, start + i, reason, reader)


def to_device(array: ndarray, device: torch.device) -> Tensor:
    """Copies an array to the device without blocking the host: for a GPU through pinned memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """An asynchronous copy of a tensor to the host, from a GPU to pinned memory; does not wait for the GPU."""

    def __init__(self, values: Tensor) -> None:
        on_gpu = values.device.type == "cuda"
        self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=on_gpu)
        self._values.copy_(values, non_blocking=on_gpu)
        # Completes after all work that is now queued on the device's current stream.
        self._event = torch.cuda.current_stream(values.device).record_event() if on_gpu else None

    def read(self) -> Tensor:
        """Returns the values on the host. Waits for the copy, not for work that was queued after it."""
        if self._event:
            self._event.synchronize()
        return self._values


class Held:
    """Keeps host memory alive that a GPU still reads, until the work now queued on the GPU's stream is done."""

    def __init__(self) -> None:
        self._held: deque[tuple[Any, object]] = deque()

    def hold(self, memory: object, device: torch.device) -> None:
        self._held.append((torch.cuda.current_stream(device).record_event(), memory))
        while self._held and self._held[0][0].query():
            self._held.popleft()
