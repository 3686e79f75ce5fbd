"""Batches of images for training and evaluation: the plan, the reader and a backend put together.

    loader = Loader("shards/", batch=256)
    for epoch in range(90):
        for images, labels, ids in loader:
            ...

The content of a batch is a function of (dataset, seed, epoch, step, batch) alone; the state is `{"epoch", "step"}`.
"""

import dataclasses
import os
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from operator import index
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..cores import threads_per_rank
from ..errors import BadSample, ConfigError
from ..files import Json
from ..manifest import Dataset, Statistics, open_dataset
from . import fetch, make_backend
from .augment import AugmentConfig, normalisation
from .backend import Output, PixelType, Setup, Work, to_device, works
from .bad_samples import BadSamples
from .config import LoaderConfig, choose_backend
from .cutter import open_cutter
from .pixel_check import PixelCheck
from .plan import Plan


class Batch(NamedTuple):
    """One rank's slice of a global batch."""

    images: Tensor  # (n, 3, crop, crop), the loader's dtype; (n, 10, 3, crop, crop) with augment.views=10
    labels: Tensor  # (n,) int64, on the loader's device as the images
    ids: Tensor  # (n,) int64, on the CPU: positions in the split's index


class Loader(AbstractContextManager["Loader"]):
    """An iterable over the `Batch`es from its state to the end of the epoch; iterate again for the next epoch.

    shards: a folder made by tools/make_shards.py, its URL (docs/remote.md), or an opened Dataset.
    batch: the global batch size; each rank gets batch / world images a step. In evaluation it only bounds memory.
    train: True: shuffled, augmented, full global batches. False: stored order, centre crops, every sample exactly once
        over all ranks; ranks may differ by one sample and by one batch. Default: whether split is "train".
    partitions, window: how far the shuffle reaches (docs/order.md); 1 and 0 shuffle over everything. window=-1: 16 for
        shards at a URL, otherwise 0; `load_state_dict` then sets it to the saved one.
    first: use only the first `first` samples in stored order; 0: all.
    statistics: to normalise with. Default: the dataset's own; pass those of another dataset that a net was trained on.
    device: where batches are delivered. dtype: uint8 is not normalised; the others are (x - mean) / std.
    channels_last: memory format of `images`; the shape is (n, 3, crop, crop) either way.

    Raises ConfigError for options that cannot work, DataError for a damaged dataset or sample, StorageError if
    reading fails.
    """

    def __init__(
        self,
        shards: str | Path | Dataset,
        *,
        batch: int,
        split: str = "train",
        train: bool | None = None,
        seed: int = 0,
        partitions: int = 1,
        window: int = -1,
        first: int = 0,
        statistics: Statistics | None = None,
        rank: int = 0,
        world: int = 1,
        local_world: int | None = None,
        device: str | torch.device = "cpu",
        dtype: PixelType = "float32",
        channels_last: bool = False,
        augment: AugmentConfig = AugmentConfig(),
        config: LoaderConfig = LoaderConfig(),
    ) -> None:
        if dtype not in get_args(PixelType):
            raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(get_args(PixelType))}")
        train = split == "train" if train is None else train
        self.augment, self.config = augment, config
        if augment.colour and train and dtype == "uint8":
            raise ConfigError(
                "augment.colour needs dtype float32, float16 or bfloat16: uint8 batches hold plain pixels"
            )
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.backend, self.backend_reason = choose_backend(config.backend, self.device)
        # The mean image is subtracted at the end, on the device, with every backend.
        decoded: PixelType = "uint8" if augment.normalize == "mean-image" else dtype
        # Imports take a second on two cores; meanwhile the index is opened and the first epoch is shuffled.
        importing = ThreadPoolExecutor(1).submit(make_backend.prepare, self.backend, decoded, self.device)
        self.dataset = shards if isinstance(shards, Dataset) else open_dataset(shards)
        self.split = self.dataset.split(split)
        normal = normalisation(augment, statistics or self.dataset)
        self.plan = Plan(
            split=self.split,
            augment=augment,
            batch=index(batch),
            train=train,
            seed=index(seed),
            partitions=partitions,
            window=self.dataset.window if window < 0 else window,
            first=first,
            rank=rank,
            world=world,
            mean=normal.mean,
            covariance=self.dataset.covariance if train and augment.colour else None,
            check_every=config.check_every(self.backend, self.device),
        )
        self.bad = BadSamples(config.max_bad_samples, self.plan.partition)
        self.plan.bad = self.bad.found
        self.samples, self._open_window = self.plan.samples, window < 0
        ranks = local_world or world  # on this machine
        self.threads = config.threads or threads_per_rank(ranks)
        ahead = self.plan.batch_per_rank * config.prefetch_batches
        self._reader = make_backend.reader(
            self.dataset,
            self.split,
            threads=config.read_threads,
            # Small enough that the batches read ahead keep all threads busy; fewer, larger tasks cost less.
            images_a_task=max(1, min(32, ahead // config.read_threads)),
            verify=config.verify,
            always_ahead=self.backend.startswith("dali"),
            pinned=self.backend == "dali-gpu",
        )
        self.cost = self._reader.cost(self.plan)  # of an epoch from a URL, a line for the log
        self._mean_image: Tensor | None = None
        if normal.image is not None and dtype != "uint8":
            # In the images' memory format: subtracting another format would be slow.
            layout = torch.channels_last if channels_last else torch.contiguous_format
            self._mean_image = torch.from_numpy(normal.image)[None].to(self.device, memory_format=layout)
        if len(self):
            self.ids(0, 0)
        importing.result()
        decode_on = torch.device("cpu") if self.backend == "dali-cpu" else self.device
        output = Output(augment.crop, self.plan.views, decoded, channels_last, normal.std, decode_on)
        raw = self.dataset.encoding == "raw"
        encoded = self.backend not in ("resident", "synthetic") and not raw
        self._cutter = open_cutter(self.dataset, self.split, self._reader) if encoded else None
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="express-decode")
        self._setup = Setup(output, self._reader, self.plan, config, raw, self.threads, pool, ranks, self._cutter)
        self._engine = make_backend.make(self.backend, self._setup)
        self.load = self._engine.load  # see Engine.load; without it, the first batch waits
        self._check = None
        if self.plan.check_every:  # decoder() takes time on a GPU
            self._check = PixelCheck(self._setup, f"{self.backend} ({self.decoder()})")
        self._works: Generator[Work, None, None] | None = None  # while batches are in flight
        self._epoch = self._step = self._planned_without = 0
        self._process = os.getpid()

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self.plan)

    @property
    def common_steps(self) -> int:
        """Batches that every rank has in an epoch; in evaluation, some ranks may have one more."""
        plan = self.plan
        return len(plan) if plan.train else -(-(plan.samples // plan.world) // plan.batch_per_rank)

    def ids(self, epoch: int, step: int, *, whole: bool = False) -> np.ndarray:
        """Returns the ids of this rank's samples at a step; depends only on its arguments and the loader's settings.

        whole: return the ids of all ranks, in order; in training only.
        """
        return self.plan.ids(epoch, step, whole=whole).copy()

    def describe(self, sample: int) -> str:
        """Names a sample of `ids`: shard, key, offset."""
        return self._reader.describe(sample)

    def state_dict(self) -> Json:
        """Returns the next batch's epoch and step, with dataset and settings. Prefetched batches are not counted."""
        # Everything that determines the ids of a step, except the step; ranks, threads and backend do not.
        of = {"fingerprint": self.dataset.fingerprint, "split": self.split.name}
        of |= {name: getattr(self.plan, name) for name in ("seed", "batch", "partitions", "window", "first")}
        return {"epoch": self._epoch, "step": self._step, "of": of, "bad": sorted(self.bad.found)}

    def load_state_dict(self, state: Json) -> None:
        """Resumes as if all batches before the state's epoch and step had been consumed. O(1); in training, for any
        world size.

        Raises ConfigError, with both values, if dataset, split, seed, batch, partitions, window or first differ. The
        loader is then unchanged.
        """
        saved, plan = state.get("of", {}), self.plan
        for name, mine in self.state_dict()["of"].items():
            if name == "window" and self._open_window:
                plan = dataclasses.replace(plan, window=saved.get(name, mine))
            elif saved.get(name, mine) != mine:
                raise ConfigError(f"{name}={mine} but the loader's state is of {name}={saved[name]}; use that one")
        if not {"epoch", "step"} <= state.keys():
            raise ConfigError(f"loader state {state}: epoch and step are missing")
        epoch, step = index(state["epoch"]), index(state["step"])
        if epoch < 0 or not 0 <= step < max(len(self), 1):
            raise ConfigError(f"loader state epoch={epoch} step={step}: an epoch has {len(self)} steps here")
        self.bad.load(state.get("bad", ()))
        self.plan, self._epoch, self._step = plan, epoch, step
        self._stop()

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        if os.getpid() != self._process:  # threads do not survive a fork: the first batch would never come
            raise ConfigError("this loader is of another process; make one in this process")
        while self._epoch == epoch and len(self):  # in a tiny evaluation a rank may have no images
            started = time.perf_counter()
            try:
                batch = self._next()
            except BaseException:  # the batches in flight no longer fit the state: this one must come again
                self._stop()
                raise
            self._reader.stages.add(wait_seconds=time.perf_counter() - started)
            self._step += 1
            if self._step == len(self):
                self._epoch, self._step = epoch + 1, 0
            yield batch

    def stats(self) -> dict[str, float]:
        """Returns sums since the last call: seconds that the consumer waited for batches; images that were decoded
        whole because their cuts are missing or damaged; each stage's bytes, and seconds over all threads (stages.py);
        `queued`, the decoded batches that were ready at each request (portable backend); and, if pixels are checked,
        how many crops were checked and how many differed.
        """
        return self._reader.stages.take()

    def decoder(self) -> str:
        """Returns a line for the log: the decoder in use and, on a GPU, why it does not use the hardware."""
        return self._engine.decoder()

    def close(self) -> None:
        """Ends all threads and closes all files. The loader cannot be used afterwards."""
        if not self._reader.closing.is_set():
            self._reader.closing.set()
            self._stop()
            self._setup.pool.shutdown(cancel_futures=True)
            for part in (self._engine, self._check, self._cutter, self._reader):
                if part:
                    part.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> Batch:
        if self._reader.closing.is_set():
            raise ConfigError("this loader is closed; make a new one")
        if self._check and self._check.error and self.config.verify_action == "stop":
            raise self._check.error
        work, images = self._decoded()
        if self._check and not self.bad.error():
            self._check.add(work, images)
        images = self._reader.stages.copied(images, self.device)
        if self._mean_image is not None:
            images = images - self._mean_image  # from uint8 to float32 in one pass
            if self.augment.colour and self.plan.train:
                images.sub_(to_device(work.mean[:, 0], self.device)[:, :, None, None])
            images = images.to(getattr(torch, self.dtype))
        if self.plan.views > 1:
            images = images.view(-1, self.plan.views, *images.shape[1:])
        labels = to_device(work.rows[:, fetch.LABEL].copy(), self.device)
        batch, kept = Batch(images, labels, torch.from_numpy(work.ids.copy())), torch.from_numpy(work.kept)
        return batch if kept.all() else Batch(*(each[kept] for each in batch))

    def _decoded(self) -> tuple[Work, Tensor]:
        """Returns the engine's next batch; if a sample is bad, retries with replacements."""
        while True:
            if self._planned_without != len(self.bad.found):
                self._planned_without = len(self.bad.found)
                self._stop()
            try:
                if self._works is None:
                    self._works = works(
                        self.plan, self._reader, self._epoch, self._step, ahead=self.config.prefetch_batches
                    )
                    self._engine.start(self._works.__next__)
                return self._engine.next()
            except BadSample as err:
                self._stop()
                self.bad.add(err)
            if self.bad.error():  # all ranks raise it together at the end of this step
                self._engine.close()
                self._engine = make_backend.make("synthetic", self._setup)

    def _stop(self) -> None:
        works, self._works = self._works, None
        if works is not None:
            self._engine.stop()
            works.close()
