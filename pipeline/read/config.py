"""The settings of data and loader, and the backend that `auto` chooses."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ..errors import ConfigError
from ..manifest import FETCH_MEMORY, Dataset, open_dataset
from ..settings import Bounds, Fraction, InHelp, NonNegative, NonNegativeFloat, PerHost, Positive, validate
from ..storage import Copies, is_url

if TYPE_CHECKING:  # a configuration needs no torch, which takes seconds to import
    import torch

Few = Annotated[int, Bounds(ge=1, le=1024)]
Backend = Literal["auto", "dali-gpu", "dali-cpu", "portable", "resident", "synthetic"]


@dataclass(frozen=True)
class DataConfig:
    """The images' location, and how they are fetched."""

    shards: InHelp[PerHost[str]] = ""
    """Folder made by tools/make_shards.py, or its URL: s3://, gs://, az://, hf://, https:// (docs/remote.md). May
    change on resume if the data's fingerprint is the same."""
    train_split: str = "train"
    val_split: InHelp[str] = "val"
    partitions: Positive = 1
    """Partitions that are shuffled separately, so that a node reads only its own shards; see docs/order.md."""
    window: Annotated[int, Bounds(ge=-1)] = -1
    """Shards that are shuffled together; 0: all of a partition; -1: 16 if shards is a URL or is copied, otherwise
    0."""
    allow_http: PerHost[bool] = False
    """Also allow http://, which is not encrypted."""
    fetch_memory: PerHost[Positive] = FETCH_MEMORY
    """MB of a rank's memory for what it fetches ahead from a URL; more makes fewer requests (docs/order.md)."""
    cache: PerHost[str] = ""
    """Folder on this machine for copies of whole shards; from a URL, images are read only from there, as far as the
    copies fit (docs/remote.md)."""
    cache_size: PerHost[NonNegativeFloat] = 0
    """GB that the copies in data.cache may take; 0: all shards."""
    stage: PerHost[str] = ""
    """Folder on this machine to which all shards are copied while training already reads them from data.shards."""

    def __post_init__(self) -> None:
        validate(self)
        if self.cache and self.stage:
            raise ConfigError("data.cache and data.stage: name one of them")
        if is_url(self.cache + self.stage):
            raise ConfigError("data.cache and data.stage are folders of this machine, not URLs")
        if self.cache_size and not self.cache:
            raise ConfigError("data.cache_size: name the folder of the copies too, by data.cache")

    def open(self) -> Dataset:
        folder, copies = self.cache or self.stage, None
        if folder:
            copies = Copies(Path(folder).expanduser(), 1e9 * self.cache_size or math.inf, wait=bool(self.cache))
        return open_dataset(self.shards, allow_http=self.allow_http, fetch_memory=self.fetch_memory, copies=copies)


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made. These fields do not change which samples and crops a batch holds, beside bad samples."""

    backend: InHelp[Backend] = "auto"
    """auto takes dali-gpu if the net is on a CUDA device and DALI is installed, otherwise portable. resident decodes
    all images once and keeps them in memory; on GPUs, auto takes it for training runs that it suits (docs/resident.md).
    synthetic delivers noise without reading an image, to measure the network alone."""
    threads: PerHost[Annotated[int, Bounds(ge=0, le=1024)]] = 0
    """Decoding threads of a rank; 0: the cores it may use, divided by the ranks of this machine."""
    read_threads: PerHost[Few] = 32
    """Reads in flight; from a URL, four times as many requests."""
    prefetch_batches: PerHost[Few] = 2
    """Batches decoded ahead of the consumer; the same number is read ahead of decoding."""
    verify: PerHost[bool] = True
    """Compare each sample's checksum when it is read."""
    decode: Literal["auto", "region", "whole"] = "auto"
    """Whether DALI decodes only the crop's region, or all of an image that needs no resizing. auto is whole on a GPU,
    whose decoder of regions is unsafe (nvImageCodec issue 55) or falls back to the CPU, and region elsewhere."""
    verify_pixels: Annotated[int, Bounds(ge=-1)] = -1
    """N: libjpeg-turbo also decodes one crop in N, in the background, and the pixels are compared; 0: none, -1: 250 on
    a GPU, none on CPUs."""
    verify_action: Literal["log", "stop"] = "log"
    """If a crop differs, log writes a line and counts it in the metrics; stop also ends the run."""
    max_bad_samples: NonNegative = 0
    """Damaged samples of a split, over all ranks, that may be replaced in training and left out in evaluation; one
    more ends the run."""
    resident_memory: PerHost[Fraction] = 0.8
    """Fraction of a device's free memory that the resident backend's images may take."""
    hw_decoder_load: Fraction = 0.65
    """Fraction of JPEGs that DALI gives to a GPU's hardware decoder; the GPU's cores decode the rest."""

    def __post_init__(self) -> None:
        validate(self)

    def check_every(self, backend: Backend, device: torch.device) -> int:
        """N: one crop in N is compared with the reference decoder's; 0: none."""
        if backend == "synthetic":
            return 0  # noise has no reference
        if self.verify_pixels >= 0:
            return self.verify_pixels
        # The images of `resident` were decoded by the reference itself.
        return 250 if device.type == "cuda" and backend != "resident" else 0


def choose_backend(backend: Backend, device: torch.device) -> tuple[Backend, str]:
    """The backend to use on this device, and the reason. Raises ConfigError for a backend that cannot work there."""
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
