"""Batches of images for training and evaluation: the plan, the reader and the DALI graph put together.

    loader = Loader("shards/", batch=256)
    for epoch in range(90):
        for images, labels, ids in loader:
            ...

What a batch holds is a function of (dataset, seed, epoch, step, batch) alone; the state is `{"epoch", "step"}`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..cores import usable_cores
from ..errors import ConfigError, DataError
from ..manifest import Dataset, open_dataset
from . import order
from .augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, Placement, place
from .dali import Graph, PixelType
from .reader import ReadBatch, Reader

Backend = Literal["auto", "dali-gpu", "dali-cpu"]


class Batch(NamedTuple):
    """One rank's part of a global batch, on the loader's device."""

    images: torch.Tensor  # (n, 3, crop, crop), the loader's dtype
    labels: torch.Tensor  # (n,) int64
    ids: torch.Tensor  # (n,) int64: positions in the split's index


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made; nothing here changes what they hold."""

    backend: Backend = "auto"
    """auto takes dali-gpu where the net is on a CUDA device, dali-cpu elsewhere."""
    threads: int = 0
    """Decoding threads of a rank; 0: the cores it may use, divided by the ranks of this machine."""
    read_threads: int = 8
    """Reads in flight."""
    prefetch_batches: int = 2
    """Batches decoded ahead of the consumer; as many again are read ahead of decoding."""
    verify: bool = True
    """Compare each sample's checksum when it is read."""

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "dali-gpu", "dali-cpu"):
            raise ConfigError(f"loader.backend={self.backend}: choose auto, dali-gpu or dali-cpu")
        for name, least in (("threads", 0), ("read_threads", 1), ("prefetch_batches", 1)):
            if not least <= getattr(self, name) <= 1024:
                raise ConfigError(f"loader.{name}={getattr(self, name)}: choose {least} to 1024")


class _Pending(NamedTuple):
    """A batch on its way: planned, being read, being decoded."""

    ids: np.ndarray
    placement: Placement
    read: ReadBatch


class Loader:
    """Iterates one epoch of `Batch`es from where its state stands; iterate again for the next epoch.

    shards: a folder made by tools/make_shards.py, or an opened Dataset.
    batch: the global batch size; each rank gets batch / world images a step. In evaluation it only bounds memory.
    train: shuffled, augmented, whole global batches. Otherwise: stored order, centre crops, every sample exactly once
        over all ranks, so that ranks may differ by one sample and by one batch.
    partitions, window: how far the shuffle reaches; 1 and 0, the defaults, shuffle over everything (docs/order.md).
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
        self.dataset = shards if isinstance(shards, Dataset) else open_dataset(shards)
        self.split = self.dataset.split(split)
        self.batch, self.train, self.seed, self.rank, self.world = batch, train, seed, rank, world
        self.partitions, self.window = partitions, window
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if dtype not in get_args(PixelType):
            raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(get_args(PixelType))}")
        self.dtype, self.channels_last = dtype, channels_last
        self.augment = augment or AugmentConfig()
        self.config = config or LoaderConfig()
        self.samples = self.split.samples
        self.backend = choose_backend(self.config.backend, self.device)
        if train:
            order.check_batch(batch, samples=self.samples, world=world, partitions=partitions)
        elif batch < 1:
            raise ConfigError(f"batch={batch}: must be at least 1")
        self._part = max(1, batch // world)
        self._threads = self.config.threads or threads_per_rank(local_world or world)
        index = self.split.index
        self._width, self._height = index["width"].astype(np.int64), index["height"].astype(np.int64)
        self._labels = index["label"].astype(np.int64)
        self._reader = Reader(self.split, threads=self.config.read_threads, verify=self.config.verify)
        self._graph = self._make_graph()
        self._epoch = self._step = 0
        self._pipeline: Any = None
        self._order: tuple[int, np.ndarray] | None = None
        self._wait_seconds = 0.0
        self._closed = False

    # What an epoch is

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        if self.train:
            return order.steps_per_epoch(self.samples, batch=self.batch)
        mine = order.evaluation_range(self.samples, rank=self.rank, world=self.world)
        return -(-len(mine) // self._part)

    def ids(self, epoch: int, step: int) -> np.ndarray:
        """The samples of this rank at a step: a function of its arguments and the loader's configuration."""
        if not self.train:
            mine = order.evaluation_range(self.samples, rank=self.rank, world=self.world)
            return np.array(mine[step * self._part : (step + 1) * self._part], dtype=np.int64)
        if self._order is None or self._order[0] != epoch:
            sizes = np.array([shard.samples for shard in self.split.shards])
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
        return order.train_ids(self._order[1], step=step, batch=self.batch, rank=self.rank, world=self.world)

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
        self._stop_pipeline()

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
        """Seconds that the consumer has waited for batches since the last call."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return {"wait_seconds": seconds}

    def close(self) -> None:
        """Ends all threads and closes all files. The loader cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            self._stop_pipeline()
            self._reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> Batch:
        if self._closed:
            raise ConfigError("this loader is closed; make a new one")
        if self._pipeline is None:
            self._start_pipeline()
        try:
            (images,) = self._pipeline.run(*self._stream())
        except BaseException as err:
            # What is in flight no longer fits the state: whoever iterates again gets this very batch.
            explained = self._explain(err) if isinstance(err, RuntimeError) else err
            self._stop_pipeline()
            if explained is err:
                raise
            raise explained from err
        done = self._decoding.popleft()
        batch = self._deliver(images, done.ids)
        self._retire(done.read)
        return batch

    def _retire(self, read: ReadBatch) -> None:
        """Gives a decoded batch's bytes back for reuse: at once on the CPU, after its decoding on a GPU."""
        if self.backend != "dali-gpu":
            read.release()
            return
        # The batch was returned before it was decoded; what the consumer's stream reaches now comes after that.
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        self._spent.append((event, read))
        while self._spent and self._spent[0][0].query():  # type: ignore[no-untyped-call]
            self._spent.popleft()[1].release()

    def _stream(self) -> tuple[Any, ...]:
        # On the consumer's stream DALI's output needs no host synchronisation.
        return (torch.cuda.current_stream(self.device),) if self.backend == "dali-gpu" else ()

    def _deliver(self, images: Any, ids: np.ndarray) -> Batch:
        pixels = torch.utils.dlpack.from_dlpack(images.as_tensor())  # no copy: DALI gives this memory away
        if self.channels_last:
            pixels = pixels.permute(0, 3, 1, 2)
        meta = torch.from_numpy(np.stack([self._labels[ids], ids]))
        if self.device.type == "cuda":
            meta = meta.pin_memory().to(self.device, non_blocking=True)
            pixels = pixels.to(self.device, non_blocking=True)
        return Batch(pixels, meta[0], meta[1])

    # The machinery behind it

    def _make_graph(self) -> Graph:
        shorter = np.minimum(self._width, self._height)
        a = self.augment
        mean, std = (self.dataset.mean, self.dataset.std)
        if a.statistics == "imagenet":
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        return Graph(
            crop=a.crop,
            presized=bool((shorter == a.resize).all()),
            mean=mean,
            std=std if a.normalize == "mean-std" else (1.0, 1.0, 1.0),
            dtype=self.dtype,
            channels_last=self.channels_last,
            device=self.device.index if self.backend == "dali-gpu" else None,
        )

    def _start_pipeline(self) -> None:
        self._reading: deque[_Pending] = deque()
        self._decoding: deque[_Pending] = deque()
        self._spent: deque[tuple[torch.cuda.Event, ReadBatch]] = deque()
        self._upcoming = self._coordinates(self._epoch, self._step)
        depth = self.config.prefetch_batches
        self._pipeline = self._graph.pipeline(self._feed, batch=self._part, threads=self._threads, depth=depth)

    def _stop_pipeline(self) -> None:
        if self._pipeline is None:
            return
        self._pipeline = None  # its threads end before the buffers they decode from may go
        for pending in (*self._reading, *self._decoding):
            for task in pending.read.tasks:
                task.cancel()

    def _coordinates(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """All steps from here on. Without an end: the next epoch's first batches are ready when this one ends."""
        while True:
            yield from ((epoch, s) for s in range(step, len(self)))
            epoch, step = epoch + 1, 0

    def _feed(self) -> tuple[Any, ...]:
        """DALI's source: the inputs of the next batch, whose bytes were asked for long ago."""
        while len(self._reading) <= self.config.prefetch_batches:
            self._reading.append(self._plan(*next(self._upcoming)))
        pending = self._reading.popleft()
        images = pending.read.wait()
        self._decoding.append(pending)
        ids = pending.ids
        return self._graph.inputs(images, pending.placement, self._width[ids], self._height[ids])

    def _plan(self, epoch: int, step: int) -> _Pending:
        ids = self.ids(epoch, step)
        read = self._reader.read(ids)
        placement = place(
            self.augment, ids, self._width[ids], self._height[ids], seed=self.seed, epoch=epoch, train=self.train
        )
        return _Pending(ids, placement, read)

    def _explain(self, err: RuntimeError) -> Exception:
        """A decoder's failure with the sample's name: DALI says neither which image nor where it is."""
        for pending in self._decoding:
            for sample, image in zip(pending.ids.tolist(), pending.read.images, strict=True):
                if reason := self._graph.why_not_decoded(image):
                    return DataError(
                        f"{self._reader.describe(sample)}: cannot be decoded ({reason});"
                        " shard the data again with --encode jpeg, or without this image"
                    )
        return err


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


def choose_backend(backend: Backend, device: torch.device) -> Backend:
    """What `auto` means on this device; refuses what cannot work there."""
    if backend == "auto":
        return "dali-gpu" if device.type == "cuda" else "dali-cpu"
    if backend == "dali-gpu" and device.type != "cuda":
        raise ConfigError(f"loader.backend=dali-gpu needs a CUDA device, not {device}; use dali-cpu or auto")
    return backend


def threads_per_rank(local_world: int) -> int:
    """The cores that this process may use, shared by the ranks of this machine."""
    return max(1, usable_cores() // local_world)
