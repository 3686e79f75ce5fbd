"""The loader's settings, and the backend that `auto` chooses."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from ..errors import ConfigError
from ..settings import Bounds, Fraction, InHelp, PerHost, validate

if TYPE_CHECKING:  # a configuration needs no torch, which takes seconds to import
    import torch

Few = Annotated[int, Bounds(ge=1, le=1024)]
Backend = Literal["auto", "dali-gpu", "dali-cpu", "portable", "synthetic"]


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made. These fields do not change which samples and crops a batch holds."""

    backend: InHelp[Backend] = "auto"
    """auto takes dali-gpu if the net is on a CUDA device and DALI is installed, otherwise portable; never synthetic,
    which delivers noise without reading an image, to measure the network alone."""
    threads: PerHost[Annotated[int, Bounds(ge=0, le=1024)]] = 0
    """Decoding threads of a rank; 0: the cores it may use, divided by the ranks of this machine."""
    read_threads: PerHost[Few] = 32
    """Reads in flight."""
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
    hw_decoder_load: Fraction = 0.65
    """Fraction of JPEGs that DALI gives to a GPU's hardware decoder; the GPU's cores decode the rest."""

    def __post_init__(self) -> None:
        validate(self)

    def check_every(self, backend: Backend, device: torch.device) -> int:
        """N: one crop in N is compared with the reference decoder's; 0: none."""
        if backend == "synthetic":
            return 0  # noise is no crop of anything
        if self.verify_pixels >= 0:
            return self.verify_pixels
        return 250 if device.type == "cuda" else 0


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
