"""Step 1: the machine's hardware and software, and whether DALI decodes to the same pixels there as the CPU."""

import importlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import ExpressError

from .base import Check, Json, Proof, answers
from .data import pictures, shards_of

NEEDED = ("torch", "numpy", "PIL", "accelerate", "safetensors", "tyro", "tqdm", "numba", "simplejpeg", "nvidia.dali")
OPTIONAL = ("torchvision", "tensorboard", "zlib_ng", "scipy", "webdataset", "timm", "matplotlib", "sklearn", "pytest")
BATCH, BATCHES = 16, 8


def preflight(proof: Proof) -> Json:
    return answers(proof, checks(proof))


def real_pixels(proof: Proof) -> Json:
    """The comparison of pixels on the images that are given."""
    return answers(proof, pixel_checks(proof, shards_of(proof, "jpeg")))


def checks(proof: Proof) -> Iterator[tuple[str, Check]]:
    for module in NEEDED:
        yield module, partial(version_of, module)
    yield "missing", lambda: [module for module in OPTIONAL if find_spec(module) is None]
    yield "gpu", partial(describe_gpu, proof)
    yield "numba", compile_kernels
    yield from pixel_checks(proof, pictures(proof, classes=8, count=64))
    yield "decoders", partial(describe_decoders, proof)
    yield "compiler", partial(try_compiler, proof)  # last: the first time on a machine it may take most of a minute


def version_of(module: str) -> str:
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def describe_gpu(proof: Proof) -> Json:
    import torch

    found = {
        "cuda_of_torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "NVIDIA_DRIVER_CAPABILITIES": os.environ.get("NVIDIA_DRIVER_CAPABILITIES"),
        "nvidia_smi": nvidia_smi("--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"),
    }
    if proof.on_gpu:
        found["capability"] = torch.cuda.get_device_capability(proof.device)
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
    import torch

    from pipeline.read import make_backend

    make_backend.prepare("portable", "float32", torch.device("cpu"))
    return "compiles the loader's kernels"


def try_compiler(proof: Proof) -> Json:
    import torch

    from train.networks import no_compiler

    found = {name: shutil.which(name) for name in ("cc", "gcc", "g++")}
    if reason := no_compiler(torch.device(proof.device)):
        raise ExpressError(f"torch.compile does not work here ({reason}); compilers: {found}")
    return {**found, "torch.compile": "works"}


def describe_decoders(proof: Proof) -> Json:
    """Reports which nvJPEG is loaded while DALI decodes with it, and whether libnvcuvid is."""
    import torch

    from pipeline.read.dali_decoder import Decoder

    return Decoder(torch.device(proof.device).index).facts()


# Pixels

LOADS = {"GPU cores alone": 0.0, "both, as by default": 0.65, "hardware alone": 1.0}


def pixel_checks(proof: Proof, shards: Path) -> Iterator[tuple[str, Check]]:
    ways = LOADS if proof.on_gpu else {"dali-cpu": 0.65}
    for pressure, (how, load) in itertools.product((False, True), ways.items()):
        if pressure and not load:
            continue
        name = f"pixels, {how}{', memory under pressure' if pressure else ''}"
        yield name, partial(compare_pixels, proof, shards, load=load, pressure=pressure)


def compare_pixels(proof: Proof, shards: Path, *, load: float, pressure: bool) -> Json:
    """Compares DALI's crops on the device with the portable backend's, in grey levels, over the same crops.

    pressure: torch allocates, fills and frees memory between batches, while two batches stay unread. This detects a
    decoder that writes into freed memory, or whose output is reused too early.
    Raises ExpressError if a tile of a crop differs by more than the training run's check tolerates.
    """
    from pipeline import AugmentConfig, Loader, LoaderConfig

    options = {"batch": BATCH, "dtype": "uint8", "augment": AugmentConfig(square=False)}
    backend = "dali-gpu" if proof.on_gpu else "dali-cpu"
    on_device = LoaderConfig(backend, verify_pixels=0, hw_decoder_load=load)
    with (
        Loader(shards, config=LoaderConfig("portable"), **options) as right,
        Loader(shards, config=on_device, device=proof.device, channels_last=True, **options) as tested,
    ):
        epochs = (zip(right, tested, strict=True) for _ in itertools.count())
        pairs = itertools.islice(itertools.chain.from_iterable(epochs), BATCHES)
        return differences(delayed(under_pressure(pairs, proof.device) if pressure else pairs))


def delayed(pairs: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields the images of pairs of batches, each delayed by two pairs."""
    waiting = []
    for expected, batch in pairs:
        assert expected.ids.tolist() == batch.ids.tolist()
        waiting.append((expected.images, batch.images))
        if len(waiting) > 2:
            yield waiting.pop(0)
    yield from waiting


def differences(pairs: Iterable[tuple[Any, Any]]) -> Json:
    """Measures the difference of crops from the expected ones, in grey levels.

    pairs: (expected, actual), (n, 3, crop, crop) uint8 each.

    Raises ExpressError if a tile is out of tolerance.
    """
    import torch

    from pipeline.read.pixel_check import TOLERANCE, largest_tile_mean

    found = torch.cat([(expected.short() - images.cpu().short()).abs() for expected, images in pairs]).float()
    worst = max(map(largest_tile_mean, found.mean(1).numpy()))
    result = {
        "crops": len(found),
        "mean": round(float(found.mean()), 4),
        "largest": int(found.max()),
        "worst_tile_mean": round(worst, 3),
    }
    if worst > TOLERANCE:
        raise ExpressError(f"a tile differs by {worst:.1f} grey levels on average: {json.dumps(result)}")
    return result


def under_pressure(pairs: Iterator[Any], device: str) -> Iterator[Any]:
    """Allocates, fills and frees memory at each pair, so that allocators hand out memory that was just in use."""
    import torch

    random = torch.Generator().manual_seed(0)
    for pair in pairs:
        sizes = torch.randint(1 << 16, 1 << 23, (24,), generator=random).tolist()  # 64 KiB to 8 MiB
        held = [torch.full((size,), 0xAA, dtype=torch.uint8, device=device) for size in sizes]
        del held[::2]
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # back to the driver, where DALI's own pools can get it
        yield pair
