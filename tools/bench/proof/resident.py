"""Step resident: images that stay in the device's memory; their rate beside a copy's, and training fed from them."""

import itertools
import time
from typing import Any

from .base import Json, Proof
from .data import enlarged, pictures
from .training import CLASSES, fed_from

IMAGES = 96_000  # of 341×256 pixels: 25 GB
SEVERAL = 20  # batches per measurement, since synchronising with the device takes time


def resident(proof: Proof) -> Json:
    import torch

    from pipeline import Loader, LoaderConfig

    images = pictures(proof, classes=CLASSES, count=CLASSES)
    shards = enlarged(proof, images, "resident", samples=2_000 if proof.tiny else IMAGES)
    device, dtype = torch.device(proof.device), "float16" if proof.on_gpu else "float32"
    result: Json = {"copy_bytes_per_second": copy_rate(proof, device)}
    started = time.perf_counter()
    for full in (256, 1024):
        options = {"batch": proof.batch(full), "device": device, "dtype": dtype, "channels_last": True}
        with Loader(shards, config=LoaderConfig("resident"), **options) as loader:
            loader.load()
            result.setdefault("load_seconds", time.perf_counter() - started)
            result[f"batch-{full}"] = rate(proof, loader, result["copy_bytes_per_second"])
        proof.keep(result)
    del loader
    if proof.on_gpu:
        torch.cuda.empty_cache()
    return fed_from(shards, proof, 256, backend="resident", **result)


def rate(proof: Proof, loader: Any, copy: float) -> Json:
    """Measures images per second, and the bytes that they move as a fraction of the rate of a plain copy."""
    from tools.bench.layers import median_seconds

    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    images = next(batches).images
    moved = images[0].numel() * (1 + images.element_size())  # a byte is read, a number is written

    def several() -> None:
        for _ in itertools.islice(batches, SEVERAL):
            pass

    seconds = median_seconds(several, 0.2 if proof.tiny else 3, images.device)
    found = SEVERAL * len(images) / seconds
    return {"images_per_second": found, "of_copy": found * moved / copy}


def copy_rate(proof: Proof, device: Any) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    import torch

    from tools.bench.layers import median_seconds

    size = 1 << (24 if proof.tiny else 31)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / median_seconds(lambda: target.copy_(source), 0.05, device)
