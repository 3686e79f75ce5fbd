"""Step resident: images that stay in the device's memory; their rate beside a copy's, and training fed from them."""

import itertools
import time
from typing import Any

from .base import Json, Proof
from .data import enlarged, pictures
from .training import CLASSES, speed, synthetic

IMAGES = 96_000  # of 341×256 pixels: 25 GB


def resident(proof: Proof) -> Json:
    import torch

    from pipeline import Loader, LoaderConfig

    images = pictures(proof, classes=CLASSES, count=CLASSES)
    shards = enlarged(proof, images, "resident", samples=2_000 if proof.tiny else IMAGES)
    device, dtype = torch.device(proof.device), "float16" if proof.on_gpu else "float32"
    config = LoaderConfig("resident")
    result: Json = {"copy_bytes_per_second": copy_rate(proof, device)}
    started = time.perf_counter()
    for full in (256, 1024):
        batch = proof.batch(full)
        options = {"batch": batch, "device": device, "dtype": dtype, "channels_last": True, "config": config}
        with Loader(shards, **options) as loader:
            loader.load()
            result.setdefault("load_seconds", round(time.perf_counter() - started, 1))
            result[f"batch-{full}"] = rate(proof, loader, result["copy_bytes_per_second"])
        proof.keep(result)
    del loader
    if proof.on_gpu:
        torch.cuda.empty_cache()
    result["fed"] = speed(proof, shards, batch=proof.batch(256), backend="resident")
    proof.keep(result)
    result["synthetic"] = proof.earlier("train-256") or synthetic(proof, 256)
    fraction = result["fed"]["images_per_second"] / result["synthetic"]["images_per_second"]
    return {**result, "fed_of_synthetic": round(fraction, 3)}


def rate(proof: Proof, loader: Any, copy: float) -> Json:
    """Images per second, and the bytes that they move as a fraction of what a copy moves."""
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in range(3):  # compiles
        images = next(batches).images
    moved = images[0].numel() * (1 + images.element_size())  # a byte is read, a number is written
    wait(proof)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < (0.2 if proof.tiny else 3):
        for _ in range(20):
            count += len(next(batches).images)
        wait(proof)
    found = count / (time.perf_counter() - started)
    return {"images_per_second": round(found), "of_copy": round(found * moved / copy, 3)}


def copy_rate(proof: Proof, device: Any) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    import torch

    size = 1 << (24 if proof.tiny else 31)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    wait(proof)
    started = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    wait(proof)
    return round(20 * 2 * size / (time.perf_counter() - started))


def wait(proof: Proof) -> None:
    import torch

    if proof.on_gpu:
        torch.cuda.synchronize()
