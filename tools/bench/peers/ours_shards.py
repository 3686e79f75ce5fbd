"""imagenet-express's sharder, from class folders."""

import resource
import shutil
import time
from pathlib import Path
from typing import Any

from pipeline.write import resize
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder


def measure(
    images: str, out: str, workers: int, encode: str = "keep", cuts: int = 0, **options: Any
) -> dict[str, float]:
    """options: of the sharding."""
    plan = Plan(ImageFolder(Path(images)), Options(Encoding(encode), **options), cuts)
    count = plan.images(plan.numbers(None))  # lists the images
    resize.prepare()
    started = time.perf_counter()
    build(plan, Path(out), workers=workers)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    found = {"images": count, "seconds": seconds}
    if workers > 1:  # one worker is this process
        found["megabytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return found
