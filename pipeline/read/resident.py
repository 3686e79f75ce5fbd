"""The resident backend: a rank's images are decoded once and stay in memory; a batch is one gather from there.

On a CPU the portable backend's kernel crops them, on a GPU the kernel in resident_gpu.py. Both give the same pixels as
the portable backend: docs/resident.md.
"""

import dataclasses
import math
from collections import deque
from concurrent.futures import Future
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import psutil
import torch
from numpy import ndarray
from torch import Tensor

from ..decode import decode
from ..errors import BadSample, ConfigError
from ..manifest import Split
from ..progress import Progress
from .backend import Setup, Work, undecodable
from .fetch import ALL_ROWS, IN_MEMORY, SIZE, Block, fetch_images
from .plan import Plan
from .portable import Portable
from .reader import ReadBatch

SMALL = 128  # the short side that an error suggests


@dataclasses.dataclass(eq=False)
class Images:
    """The images of a split that a rank holds; shared by all loaders of a process that read the same images."""

    ids: range
    shape: tuple[int, int, int]  # height, width, 3
    device: torch.device
    bad: dict[int, BadSample]  # errors of unreadable images, by id: raised when a plan contains them
    pixels: Tensor  # (images, height, width, 3) uint8; empty until they are loaded

    @property
    def bytes(self) -> int:
        return len(self.ids) * math.prod(self.shape)

    def numbers(self, ids: ndarray) -> ndarray:
        """The positions of images in `pixels`. Raises BadSample for one that cannot be read."""
        for sample in self.bad.keys() & ids.tolist() if self.bad else ():
            raise self.bad[sample]
        # An image that another rank holds is only a replacement in evaluation, which is not delivered.
        return np.clip(ids - self.ids.start, 0, len(self.ids) - 1)


# Both splits of a run are counted before one is loaded; a loader that replaces another one reuses its images.
_known: WeakValueDictionary[tuple[Any, ...], Images] = WeakValueDictionary()


class Resident(Portable):
    """See backend.Engine."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        plan, config, device = setup.plan, setup.config, setup.output.device
        self._plan, self._at_once, self._may_be_bad = plan, self.images_a_task, config.max_bad_samples
        self.images_a_task = plan.batch_per_rank  # as many tasks as threads
        device = device if device.type == "cuda" else torch.device("cpu")
        key = plan.split.root, plan.split.index_sha256, plan.held, device
        self._images = images = _known.get(key) or Images(
            plan.held, image_shape(plan.split), device, {}, torch.empty(0)
        )
        others = sum(i.bytes for i in _known.values() if i is not images and not len(i.pixels) and i.device == device)
        free, fraction = free_memory(device, setup.ranks), config.resident_memory
        if not len(images.pixels):
            check_fits(images, plan, others, free, fraction)
        _known[key] = images
        self._memory = f"{gigabytes(images.bytes + others)} of {device}, {gigabytes(free)} were free"

    def load(self) -> None:
        if not len(self._images.pixels):
            self._images.pixels = self._loaded()
        self._reader.done = True

    def next(self) -> tuple[Work, Tensor]:
        self.load()
        if self._images.device.type == "cpu":
            return super().next()
        from .resident_gpu import gather  # Triton takes a while to import

        work = self.source()
        return work, gather(self._images.pixels, self._images.numbers(work.ids), work, self.output)

    def decoder(self) -> str:
        """The decoder, with the memory of both splits: a run logs it before it loads them."""
        return f"{super().decoder()}; all are decoded once and take {self._memory}"

    def _loaded(self) -> Tensor:
        """Loads all images, in stored order. Raises BadSample for a bad one unless max_bad_samples allows some."""
        images, plan = self._images, self._plan
        stored = dataclasses.replace(plan, train=False, batch=self._at_once * plan.world)
        stored.held = images.ids
        pixels = torch.empty((len(images.ids), *images.shape), dtype=torch.uint8, device=images.device)
        steps = self._reader.follow(((0, step) for step in range(len(stored))), stored)
        tasks: deque[Future[ndarray]] = deque()

        def keep(most: int) -> None:
            """Waits until at most `most` tasks are left."""
            while len(tasks) > most:
                some = torch.from_numpy(tasks.popleft().result())
                pixels[progress.done : progress.done + len(some)].copy_(some)
                progress.update(len(some))

        with Progress(f"loading {plan.split.name}", len(pixels), enabled=plan.rank == 0) as progress:
            progress.update(0)  # time counts from here
            for _ in range(len(stored)):  # not until `steps` ends, which would drop fetched images
                tasks.append(self._pool.submit(self._pixels, self._reader.read(stored.ids(*next(steps)))))
                keep(2 * self.threads)
            keep(0)
        assert progress.done == len(pixels)
        if progress.enabled:
            progress.print_line()
        return pixels

    def _pixels(self, batch: ReadBatch) -> ndarray:
        """A thread's task: (n, height, width, 3), zeros for images that cannot be read."""
        try:
            return self._whole(batch)
        except BadSample as err:
            if not self._may_be_bad:
                raise
            if len(batch.ids) > 1:
                return np.concatenate([self._pixels(self._reader.read(sample[None])) for sample in batch.ids])
            self._images.bad[err.sample] = err
            return np.zeros((1, *self._images.shape), np.uint8)

    def _whole(self, batch: ReadBatch) -> ndarray:
        out = np.empty((len(batch.ids), *self._images.shape), np.uint8)
        block = self._reader.fetch(batch, 0, len(out), lambda block: fetch_images(*block, ALL_ROWS))
        for i, (at, size) in enumerate(zip(block.at.tolist(), batch.rows[:, SIZE].tolist(), strict=True)):
            image = block.buffer[at : at + size]
            try:
                out[i] = image.reshape(out[i].shape) if self.raw else decode(image.data, size=out[i].shape[1::-1])
            except Exception as err:  # whatever it is, it needs the sample's name
                raise undecodable(batch, i, err, self._reader) from err
        return out

    def _decode(self, work: Work, crops: ndarray, start: int, end: int) -> None:
        """A thread's task: images [start, end) of the batch."""
        images, here = self._images, np.full(end - start, IN_MEMORY)
        at = images.numbers(work.ids[start:end]) * math.prod(images.shape)
        block = Block(images.pixels.numpy().reshape(-1), at, here, work.rows[start:end], False)
        self._crop(work, crops, block, start, end)


def bytes_held(plan: Plan) -> int:
    """The bytes of a rank's images. Raises ConfigError if they are of several sizes."""
    return len(plan.held) * math.prod(image_shape(plan.split))


def image_shape(split: Split) -> tuple[int, int, int]:
    """(height, width, 3) of all images. Raises ConfigError if they differ."""
    height, width = (split.column(side) for side in ("height", "width"))
    if height.min() < height.max() or width.min() < width.max():
        raise ConfigError(
            f"loader.backend=resident: the images of the split {split.name} are {width.min()} to {width.max()} pixels"
            f" wide and {height.min()} to {height.max()} high, not of one size; shard the data with"
            " tools/make_shards.py … --encode jpeg --size 256 --square, or use --loader.backend auto"
        )
    return int(height[0]), int(width[0]), 3


def free_memory(device: torch.device, ranks: int) -> int:
    """This rank's fraction of the free bytes of a GPU, or of the host; ranks: of this machine, which share them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // -(-ranks // torch.cuda.device_count())
    return psutil.virtual_memory().available // ranks


def check_fits(images: Images, plan: Plan, others: int, free: int, fraction: float) -> None:
    """Raises ConfigError, with what would fit, if the images do not. others: bytes of other splits."""
    needed, room, short = images.bytes + others, int(fraction * free), min(images.shape[:2])
    if needed <= room:
        return
    cures = ["--loader.backend auto"]
    if needed * (SMALL / short) ** 2 <= room:
        cures.append(f"shards made with --size {SMALL}")
    ranks = max(plan.world, -(-plan.samples * math.prod(images.shape) // max(room - others, 1)))
    if plan.train and ranks <= plan.samples:
        more = f"{ranks} ranks with " if ranks > plan.world else ""
        cures.append(f"{more}--data.partitions {ranks}")
    raise ConfigError(
        f"loader.backend=resident: a rank's images take {gigabytes(needed)}, but only {gigabytes(room)} of"
        f" {images.device} may be used (loader.resident_memory={fraction:g} of the {gigabytes(free)} that are free);"
        f" use {', or '.join(reversed(cures))}"
    )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.3g} GB"
