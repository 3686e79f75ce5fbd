"""Batches of images for training and evaluation: the plan, the reader and a backend put together.

    loader = Loader("shards/", batch=256)
    for epoch in range(90):
        for images, labels, ids in loader:
            ...

What a batch holds is a function of (dataset, seed, epoch, step, batch) alone; the state is `{"epoch", "step"}`.
"""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..cores import threads_per_rank
from ..errors import ConfigError
from ..geometry import centre_offset
from ..manifest import Dataset, Statistics, open_dataset
from ..settings import Bounds, Fraction, InHelp, PerHost, validate
from . import fetch, order, rng
from .augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, Placement, colour_shift, place
from .backend import Engine, Output, PixelType, Work, to_device
from .reader import Reader

if TYPE_CHECKING:
    from .pixel_check import PixelCheck

PLAN_IMAGES = 4096  # planned at once: 1 ms, 0.3 µs an image, where batches of 128 one by one cost 5 µs an image
Backend = Literal["auto", "dali-gpu", "dali-cpu", "portable", "synthetic"]


class Batch(NamedTuple):
    """One rank's part of a global batch, on the loader's device."""

    images: torch.Tensor  # (n, 3, crop, crop), the loader's dtype; (n, 10, 3, crop, crop) with augment.views=10
    labels: torch.Tensor  # (n,) int64
    ids: torch.Tensor  # (n,) int64: positions in the split's index


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made; nothing here changes what they hold."""

    backend: InHelp[Backend] = "auto"
    """auto takes dali-gpu where the net is on a CUDA device and DALI is installed, portable elsewhere; never synthetic,
    which delivers noise without reading an image, to measure the network alone."""
    threads: PerHost[Annotated[int, Bounds(ge=0, le=1024)]] = 0
    """Decoding threads of a rank; 0: the cores it may use, divided by the ranks of this machine."""
    read_threads: PerHost[Annotated[int, Bounds(ge=1, le=1024)]] = 32
    """Reads in flight."""
    prefetch_batches: PerHost[Annotated[int, Bounds(ge=1, le=1024)]] = 2
    """Batches decoded ahead of the consumer; as many again are read ahead of decoding."""
    verify: PerHost[bool] = True
    """Compare each sample's checksum when it is read."""
    decode: Literal["auto", "region", "whole"] = "auto"
    """What DALI decodes of an image that needs no resizing: the crop's region alone, or all of it. auto takes whole on
    a GPU, whose decoder of regions is unsafe (nvImageCodec issue 55) or falls back to the CPU, and region elsewhere."""
    verify_pixels: Annotated[int, Bounds(ge=-1)] = -1
    """One crop in so many is decoded again by libjpeg-turbo, in the background, and compared; 0: none, -1: 250 on a
    GPU, none on CPUs."""
    verify_action: Literal["log", "stop"] = "log"
    """What a crop that differs brings about: a line in the log and a count in the metrics, or the end of the run."""
    hw_decoder_load: Fraction = 0.65
    """Fraction of JPEGs that DALI gives to a GPU's hardware decoder; the GPU's cores decode the rest."""

    def __post_init__(self) -> None:
        validate(self)


class _Planned(NamedTuple):
    """Consecutive steps of an epoch: what is in all their Works, one after another."""

    epoch: int
    steps: range
    ids: np.ndarray
    width: np.ndarray
    height: np.ndarray
    placement: Placement
    mean: np.ndarray
    checked: np.ndarray


class Loader:
    """Iterates one epoch of `Batch`es from where its state stands; iterate again for the next epoch.

    shards: a folder made by tools/make_shards.py, or an opened Dataset.
    batch: the global batch size; each rank gets batch / world images a step. In evaluation it only bounds memory.
    train: shuffled, augmented, whole global batches. Otherwise: stored order, centre crops, every sample exactly once
        over all ranks, so that ranks may differ by one sample and by one batch.
    partitions, window: how far the shuffle reaches; 1 and 0, the defaults, shuffle over everything (docs/order.md).
    first: only so many samples, the first as stored; 0: all.
    statistics: to normalise with; the dataset's own unless given, as for a net that was trained on another one.
    device: where batches are delivered. dtype: uint8 is not normalised; the others are (x - mean) / std.
    channels_last: memory format of `images`; the shape is (n, 3, crop, crop) either way.

    Raises ConfigError for options that cannot work, DataError for a damaged dataset or sample, StorageError where
    reading fails.
    """

    def __init__(
        self,
        shards: str | Path | Dataset,
        *,
        batch: int,
        split: str = "train",
        train: bool = True,
        seed: int = 0,
        partitions: int = 1,
        window: int = 0,
        first: int = 0,
        statistics: Statistics | None = None,
        rank: int = 0,
        world: int = 1,
        local_world: int | None = None,
        device: str | torch.device = "cpu",
        dtype: PixelType = "float32",
        channels_last: bool = False,
        augment: AugmentConfig | None = None,
        config: LoaderConfig | None = None,
    ) -> None:
        if partitions < 1 or window < 0:
            raise ConfigError(f"partitions={partitions}, window={window}: at least 1 and 0")
        if not 0 <= rank < world:
            raise ConfigError(f"rank={rank} of world={world}: ranks count from 0")
        if dtype not in get_args(PixelType):
            raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(get_args(PixelType))}")
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.augment = augment or AugmentConfig()
        self.config = config or LoaderConfig()
        self.dtype, self.channels_last = dtype, channels_last
        self.backend, self.backend_reason = choose_backend(self.config.backend, self.device)
        # A second of imports on two cores; the index is opened and the first epoch shuffled meanwhile.
        importing = _in_background(self._import_backend)
        self.dataset = shards if isinstance(shards, Dataset) else open_dataset(shards)
        self.split = self.dataset.split(split)
        self._measured = statistics or self.dataset
        self.batch, self.train, self.seed, self.rank, self.world = batch, train, seed, rank, world
        self.partitions, self.window, self.first = partitions, window, first
        if not 0 <= first <= self.split.samples:
            raise ConfigError(f"first={first}: the split {split} has {self.split.samples} samples")
        self.samples = first or self.split.samples
        if train:
            order.check_batch(batch, samples=self.samples, world=world, partitions=partitions)
        elif batch < 1:
            raise ConfigError(f"batch={batch}: must be at least 1")
        self._part = max(1, batch // world)
        self.threads = self.config.threads or threads_per_rank(local_world or world)
        index = self.split.index
        self._width, self._height = index["width"].astype(np.int64), index["height"].astype(np.int64)
        self._labels = index["label"].astype(np.int64)
        self._reader = Reader(
            self.split,
            threads=self.config.read_threads,
            # So that the batches that are read ahead keep all threads busy; fewer, larger tasks cost less.
            samples_a_task=max(1, min(32, self._part * self.config.prefetch_batches // self.config.read_threads)),
            verify=self.config.verify,
            always_ahead=self.backend not in ("portable", "synthetic"),
            pinned=self.backend == "dali-gpu",
        )
        self._views = 1 if train else self.augment.views
        self._mean, self._std = self._statistics()
        self._mean_image = self._mean_image_crop() if self.augment.normalize == "mean-image" else None
        self._covariance = self.dataset.covariance if train and self.augment.colour else None
        self._order: tuple[int, np.ndarray] | None = None
        if len(self):
            self.ids(0, 0)
        importing.result()
        self._engine = self._make_engine()
        self._check_every = self.config.verify_pixels
        if self._check_every < 0:
            self._check_every = 250 if self.device.type == "cuda" else 0
        if self.backend == "synthetic":
            self._check_every = 0  # noise is no crop of anything
        self._check: PixelCheck | None = None  # made with the first batch, as it starts a thread
        self._reported = (0, 0)
        self._running = False
        self._planned: _Planned | None = None
        self._epoch = self._step = 0
        self._wait_seconds = 0.0
        self._closed = False

    # What an epoch is

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        if self.train:
            return order.steps_per_epoch(self.samples, batch=self.batch)
        mine = order.evaluation_range(self.samples, rank=self.rank, world=self.world)
        return -(-len(mine) // self._part)

    @property
    def common_steps(self) -> int:
        """Batches that every rank has in an epoch: in evaluation some may have one more."""
        return len(self) if self.train else -(-(self.samples // self.world) // self._part)

    def ids(self, epoch: int, step: int, *, whole: bool = False) -> np.ndarray:
        """The samples of this rank at a step: a function of its arguments and the loader's configuration.

        whole: those of all ranks, in order; of training.
        """
        if not self.train:
            mine = order.evaluation_range(self.samples, rank=self.rank, world=self.world)
            return np.array(mine[step * self._part : (step + 1) * self._part], dtype=np.int64)
        if self._order is None or self._order[0] != epoch:
            ends = np.cumsum([shard.samples for shard in self.split.shards])
            sizes = np.diff(np.minimum(ends, self.samples), prepend=0)
            self._order = (
                epoch,
                order.epoch_order(
                    sizes,
                    seed=self.seed,
                    epoch=epoch,
                    batch=self.batch,
                    partitions=self.partitions,
                    window=self.window,
                ),
            )
        rank, world = (0, 1) if whole else (self.rank, self.world)
        return order.train_ids(self._order[1], step=step, batch=self.batch, rank=rank, world=world)

    def describe(self, sample: int) -> str:
        """Where a sample of `ids` lies: shard, key, offset."""
        return self._reader.describe(sample)

    # State: what was consumed

    def state_dict(self) -> dict[str, Any]:
        """The next batch's coordinates, and what they are coordinates of. What was only prefetched does not count."""
        return {"epoch": self._epoch, "step": self._step, "of": self._identity()}

    def _identity(self) -> dict[str, Any]:
        """All that the ids of a step depend on, beside the step: ranks, threads and backend are not among it."""
        return {
            "fingerprint": self.dataset.fingerprint,
            "split": self.split.name,
            "seed": self.seed,
            "batch": self.batch,
            "partitions": self.partitions,
            "window": self.window,
            "first": self.first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as if all batches before these coordinates had been consumed. O(1); another world size is fine.

        Raises ConfigError where the state is of another dataset, seed, batch, partitions or window, with both values.
        """
        saved = state.get("of", {})
        for name, mine in self._identity().items():
            if saved.get(name, mine) != mine:
                raise ConfigError(f"{name}={mine} but the loader's state is of {name}={saved[name]}; use that one")
        if not {"epoch", "step"} <= state.keys():
            raise ConfigError(f"loader state {state}: epoch and step are missing")
        epoch, step = state["epoch"], state["step"]
        if epoch < 0 or not 0 <= step < len(self):
            raise ConfigError(f"loader state epoch={epoch} step={step}: an epoch has {len(self)} steps here")
        self._epoch, self._step = epoch, step
        self._stop()

    # Iteration

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        while self._epoch == epoch and len(self):  # a rank of a tiny evaluation may have nothing to do
            started = time.perf_counter()
            batch = self._next()
            self._wait_seconds += time.perf_counter() - started
            self._step += 1
            if self._step == len(self):
                self._epoch, self._step = epoch + 1, 0
            yield batch

    def stats(self) -> dict[str, float]:
        """Since the last call: seconds that the consumer has waited for batches; if pixels are checked, crops that were
        checked, and crops that differed."""
        stats, self._wait_seconds = {"wait_seconds": self._wait_seconds}, 0.0
        if self._check_every:
            now = (self._check.checked, self._check.different) if self._check else (0, 0)
            checked, different = (a - b for a, b in zip(now, self._reported))
            stats |= {"pixels_checked": checked, "pixels_different": different}
            self._reported = now
        return stats

    def decoder(self) -> str:
        """Which decoder is in use, and on a GPU what keeps it from using the hardware: a line for the log."""
        return self._engine.decoder()

    def close(self) -> None:
        """Ends all threads and closes all files. The loader cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            self._stop()
            self._engine.close()
            if self._check:
                self._check.close()
            self._reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> Batch:
        if self._closed:
            raise ConfigError("this loader is closed; make a new one")
        if self._check and self._check.error and self.config.verify_action == "stop":
            raise self._check.error
        try:
            if not self._running:
                self._start()
            work, images = self._engine.next()
        except BaseException:
            # What is in flight no longer fits the state: whoever iterates again gets this very batch.
            self._stop()
            raise
        if self._check_every:
            self._check_pixels(work, images)
        return self._deliver(work, images)

    def _check_pixels(self, work: Work, images: torch.Tensor) -> None:
        if self._check is None:
            from .pixel_check import PixelCheck

            self._check = PixelCheck(
                self._output,
                raw=self.dataset.encoding == "raw",
                reader=self._reader,
                describe=self._reader.describe,
                decoder=f"{self.backend} ({self.decoder()})",
            )
        self._check.add(work, images)

    def _deliver(self, work: Work, images: torch.Tensor) -> Batch:
        meta = to_device(np.stack([self._labels[work.ids], work.ids]), self.device)
        images = images.to(self.device, non_blocking=True)
        if self._mean_image is not None:
            images = images - self._mean_image  # from uint8 to float32 in one pass
            if self._covariance is not None:
                images.sub_(to_device(work.mean, self.device)[:, :, None, None])
            images = images.to(getattr(torch, self.dtype))
        if self._views > 1:
            images = images.view(-1, self._views, *images.shape[1:])
        return Batch(images, meta[0], meta[1])

    # The machinery behind it

    def _statistics(self) -> tuple[np.ndarray, tuple[float, ...]]:
        """What to subtract from every pixel, (3,) float32, and what to divide by."""
        a = self.augment
        imagenet = a.statistics == "imagenet"
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (self._measured.mean, self._measured.std)
        if a.normalize == "mean-image":
            mean = (0.0, 0.0, 0.0)  # the image's is subtracted in its place
        return np.array(mean, np.float32), std if a.normalize == "mean-std" else (1.0, 1.0, 1.0)

    def _mean_image_crop(self) -> torch.Tensor | None:
        """(1, 3, crop, crop) float32 on the device, in the images' memory format: another one would be read across."""
        if self.dtype == "uint8":
            return None
        image = self._measured.mean_image
        if image is None:
            raise ConfigError("augment.normalize=mean-image: the statistics hold no mean image")
        crop = torch.from_numpy(mean_image_crop(image, self.augment))[None].to(self.device)
        return crop.contiguous(memory_format=torch.channels_last) if self.channels_last else crop

    def _import_backend(self) -> None:
        fetch.prepare()
        if self.backend == "portable":
            from . import portable

            portable.prepare(self.augment.crop, self._decoded_type(), on_cpu=self.device.type == "cpu")

    def _decoded_type(self) -> PixelType:
        # The mean image is subtracted at the end, on the device, whoever decodes.
        return "uint8" if self.augment.normalize == "mean-image" else self.dtype

    def _make_engine(self) -> Engine:
        if self.augment.colour and self.train and self.dtype == "uint8":
            raise ConfigError(
                "augment.colour needs dtype float32, float16 or bfloat16: uint8 batches hold plain pixels"
            )
        c, crop, depth = self.config, self.augment.crop, self.config.prefetch_batches
        raw, describe = self.dataset.encoding == "raw", self._reader.describe
        decode_on = torch.device("cpu") if self.backend == "dali-cpu" else self.device
        output = Output(crop, self._views, self._decoded_type(), self.channels_last, self._std, decode_on)
        self._output = output
        if self.backend == "synthetic":
            from .synthetic import Synthetic

            return Synthetic(output, rows=self._part * self._views)
        if self.backend == "portable":
            from .portable import Portable

            return Portable(output, raw=raw, threads=self.threads, depth=depth, describe=describe)
        from .dali import Dali, Graph

        presized = bool((np.minimum(self._width, self._height) == self.augment.resize).all())
        resized = not presized or (self.train and self.augment.scale_jitter is not None)
        whole = self.backend == "dali-gpu" if c.decode == "auto" else c.decode == "whole"
        graph = Graph(output, "raw" if raw else "image", resized, whole, c.hw_decoder_load)
        return Dali(graph, rows=self._part * self._views, threads=self.threads, depth=depth, describe=describe)

    def _start(self) -> None:
        self._reading: deque[Work] = deque()
        self._upcoming = self._coordinates(self._epoch, self._step)
        self._running = True
        self._engine.start(self._source)

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        self._engine.stop()
        for work in self._reading:
            work.read.cancel()

    def _coordinates(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """All steps from here on. Without an end: the next epoch's first batches are ready when this one ends."""
        while True:
            yield from ((epoch, s) for s in range(step, len(self)))
            epoch, step = epoch + 1, 0

    def _source(self) -> Work:
        """The next batch, whose bytes were asked for long ago."""
        while len(self._reading) <= self.config.prefetch_batches:
            self._reading.append(self._plan(*next(self._upcoming)))
        if self._reader.is_slow():
            for work in self._reading:  # planned while it was not
                work.read.ahead()
        return self._reading.popleft()

    def _plan(self, epoch: int, step: int) -> Work:
        if not (self._planned and self._planned.epoch == epoch and step in self._planned.steps):
            self._planned = self._plan_steps(epoch, step)
        p = self._planned
        start = (step - p.steps.start) * self._part
        images = slice(start, min(start + self._part, len(p.ids)))
        crops = slice(images.start * self._views, images.stop * self._views)
        read = self._reader.read(p.ids[images])
        placement = Placement(*(column[crops] for column in p.placement))
        width, height, checked = p.width[images], p.height[images], p.checked[images]
        return Work(p.ids[images], width, height, placement, p.mean[crops], checked, read)

    def _plan_steps(self, epoch: int, step: int) -> _Planned:
        """Many steps at once: of a single batch's plan most would be NumPy's calls, and not its work."""
        steps = range(step, min(step + max(1, PLAN_IMAGES // self._part), len(self)))
        ids = np.concatenate([self.ids(epoch, s) for s in steps])
        width, height = self._width[ids], self._height[ids]
        placement = place(self.augment, ids, width, height, seed=self.seed, epoch=epoch, train=self.train)
        mean = np.broadcast_to(self._mean, (len(placement.box), 3))
        if self._covariance is not None:
            mean = mean - colour_shift(self.augment, ids, self._covariance, seed=self.seed, epoch=epoch)
        checked = np.zeros(len(ids), np.bool_)
        if self._check_every:
            chosen = rng.bits(ids, seed=self.seed, epoch=epoch, stream=rng.CHECK)
            checked = chosen % np.uint64(self._check_every) == 0
        return _Planned(epoch, steps, ids, width, height, placement, np.ascontiguousarray(mean), checked)


class LoaderDataset(IterableDataset[Batch]):
    """A loader for frameworks that want a DataLoader: DataLoader(LoaderDataset(loader), batch_size=None).

    Raises ConfigError in a worker process: the loader has threads of its own, and workers would repeat its batches.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise ConfigError("num_workers must be 0 with LoaderDataset: the loader has threads of its own")
        return iter(self.loader)


def mean_image_crop(image: np.ndarray, augment: AugmentConfig) -> np.ndarray:
    """(3, crop, crop) float32, of the mean image's centre: for every crop the same, as in the 2012 code.

    image: (resize, resize, 3). Raises ConfigError for one of another size.
    """
    if len(image) != augment.resize:
        raise ConfigError(
            f"augment.resize={augment.resize} but the mean image was measured at {len(image)} pixels;"
            f" shard the data with --size {augment.resize}, or use normalize=mean"
        )
    offset = int(centre_offset(len(image), augment.crop))
    crop = image[offset : offset + augment.crop, offset : offset + augment.crop]
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def _in_background(work: Callable[[], None]) -> Future[None]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def choose_backend(backend: Backend, device: torch.device) -> tuple[Backend, str]:
    """What `auto` means on this device, and why; refuses what cannot work there."""
    if backend == "dali-gpu" and device.type != "cuda":
        raise ConfigError(f"loader.backend=dali-gpu needs a CUDA device, not {device}; use portable, dali-cpu or auto")
    if backend == "synthetic":
        return backend, "noise: no image is read"
    if backend != "auto":
        return backend, "asked for"
    if device.type != "cuda":
        return "portable", f"auto: batches go to {device.type}, where it is the fastest"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "portable", "auto: NVIDIA DALI is not installed"
    return "dali-gpu", "auto: batches go to a CUDA device and DALI is installed"
