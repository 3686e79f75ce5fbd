"""Step 1: what the machine has, and whether DALI decodes there what the CPU decodes."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from pipeline.errors import ExpressError

from .base import Proof
from .data import pictures

NEEDED = ("torch", "numpy", "PIL", "accelerate", "safetensors", "tyro", "tqdm", "numba", "simplejpeg", "nvidia.dali")
OPTIONAL = ("torchvision", "tensorboard", "zlib_ng", "scipy", "webdataset", "timm", "matplotlib", "sklearn", "pytest")
# Mean grey levels by which a crop may differ. Decoders differ by less than 1, a corrupted crop by tens.
LARGEST_CROP_DIFFERENCE = 4.0
BATCH, BATCHES = 16, 8


def preflight(proof: Proof) -> dict[str, Any]:
    """Checks in the order in which they explain each other; one that fails costs only its own answer."""
    found: dict[str, Any] = {"seconds": {}}
    problems = []

    def note(name: str, check: Callable[[], Any]) -> None:
        started = time.perf_counter()
        try:
            found[name] = check()
        except Exception as err:  # a check that cannot be made is an answer too
            found[name] = {"error": f"{type(err).__name__}: {err}"}
            problems.append(f"{name}: {err}")
        found["seconds"][name] = round(time.perf_counter() - started, 1)
        proof.keep(found)

    for module in NEEDED:
        note(module, lambda module=module: str(getattr(importlib.import_module(module), "__version__", "unknown")))
    note("missing", lambda: [module for module in OPTIONAL if find_spec(module) is None])
    note("gpu", lambda: describe_gpu(proof))
    note("numba", compile_kernels)
    note("compiler", lambda: try_compiler(proof))
    for how, options in (GPU_DECODERS if proof.on_gpu else CPU_DECODERS).items():
        note(f"pixels, {how}", lambda options=options: compare_pixels(proof, **options))
    note("decoders", describe_decoders)
    if problems:
        raise ExpressError("; ".join(problems))
    return found


def describe_gpu(proof: Proof) -> dict[str, Any]:
    import torch

    asked = "driver_version,memory.total,clocks.max.sm,power.limit"
    found = {
        "cuda_of_torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "NVIDIA_DRIVER_CAPABILITIES": os.environ.get("NVIDIA_DRIVER_CAPABILITIES"),
        "nvidia_smi": nvidia_smi(f"--query-gpu={asked}", "--format=csv"),
    }
    if proof.on_gpu:
        properties = torch.cuda.get_device_properties(proof.device)
        found |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    return found


def nvidia_smi(*arguments: str) -> list[str] | None:
    """Its lines; None if there is no such program, or it finds no GPU."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines() if not done.returncode else None


def compile_kernels() -> str:
    """Numba under this NumPy."""
    from pipeline.read import portable

    portable.prepare(224, "float32", on_cpu=True)
    return "compiles the loader's kernels"


def try_compiler(proof: Proof) -> dict[str, Any]:
    import torch

    from train.networks import no_compiler

    found = {name: shutil.which(name) for name in ("cc", "gcc", "g++")}
    if reason := no_compiler(torch.device(proof.device)):
        raise ExpressError(f"torch.compile does not work here ({reason}); compilers: {found}")
    return {**found, "torch.compile": "works"}


def describe_decoders() -> dict[str, Any]:
    """After the pixels: libraries are mapped when something was decoded."""
    from pipeline.read import dali

    return dali.decoder_facts()


# Pixels

LOADS = {"GPU cores alone": 0.0, "both, as by default": 0.65, "hardware alone": 1.0}
GPU_DECODERS: dict[str, dict[str, Any]] = {
    **{how: {"hw_decoder_load": load} for how, load in LOADS.items()},
    **{
        f"{how}, memory under pressure": {"hw_decoder_load": load, "pressure": True}
        for how, load in LOADS.items()
        if load
    },
}
CPU_DECODERS: dict[str, dict[str, Any]] = {"dali-cpu": {}, "dali-cpu, memory under pressure": {"pressure": True}}


def compare_pixels(proof: Proof, *, hw_decoder_load: float = 0.65, pressure: bool = False) -> dict[str, Any]:
    """Grey levels between DALI's crops on the device and the portable backend's, over the same crops.

    pressure: torch takes, fills and frees memory between batches, and two batches stay unread meanwhile. A decoder that
    writes into freed memory, or whose output is reused too early, shows.
    Raises ExpressError if a crop differs by more than LARGEST_CROP_DIFFERENCE.
    """
    import numpy as np

    from pipeline import AugmentConfig, Loader, LoaderConfig

    shards = pictures(proof, classes=8, count=64)
    options: dict[str, Any] = {"batch": BATCH, "dtype": "uint8", "augment": AugmentConfig(square=False)}
    on_device = LoaderConfig("dali-gpu" if proof.on_gpu else "dali-cpu", hw_decoder_load=hw_decoder_load)
    squeeze = Pressure(proof.device) if pressure else None
    levels, worst_crop, waiting = np.zeros(256, np.int64), 0.0, []
    with (
        Loader(shards, config=LoaderConfig("portable"), **options) as right,
        Loader(shards, config=on_device, device=proof.device, channels_last=True, **options) as tested,
    ):
        for expected, batch in itertools.islice(zip(epochs(right), epochs(tested)), BATCHES):
            assert expected.ids.tolist() == batch.ids.tolist()
            waiting.append((expected.images, batch.images))
            if squeeze:
                squeeze.change()
            if len(waiting) > 2:
                worst_crop = max(worst_crop, _difference(*waiting.pop(0), levels))
        for pair in waiting:
            worst_crop = max(worst_crop, _difference(*pair, levels))
    values = int(levels.sum())
    result = {
        "crops": BATCH * BATCHES,
        "mean_grey_levels": round(float((levels * np.arange(256)).sum() / values), 4),
        "largest": int(np.flatnonzero(levels).max()),
        "fraction_above": {str(level): float(levels[level + 1 :].sum() / values) for level in (0, 1, 2, 4, 8, 16)},
        "worst_crop_mean": round(worst_crop, 3),
    }
    if worst_crop > LARGEST_CROP_DIFFERENCE:
        raise ExpressError(f"a crop differs by {worst_crop:.1f} grey levels on average: {json.dumps(result)}")
    return result


def epochs(loader: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _difference(expected: Any, images: Any, levels: Any) -> float:
    """The worst crop's mean difference; `levels`, (256,), counts every value's difference."""
    import numpy as np

    difference = (expected.short() - images.cpu().short()).abs()
    levels += np.bincount(difference.flatten().numpy(), minlength=256)
    return float(difference.flatten(1).float().mean(1).max())


class Pressure:
    """Memory that is taken, filled and freed, so that allocators hand out what was in use a moment ago."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device, self._held = torch, device, {}
        self._random = torch.Generator().manual_seed(0)

    def change(self) -> None:
        torch = self._torch
        sizes = torch.randint(1 << 16, 1 << 23, (24,), generator=self._random).tolist()  # 64 KiB to 8 MiB
        for slot, size in enumerate(sizes):
            self._held[slot] = torch.full((size,), 0xAA, dtype=torch.uint8, device=self._device)
        for slot in range(0, len(sizes), 2):
            del self._held[slot]
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()  # back to the driver, where DALI's own pools can get it
