"""imagenet-express's sharder, from class folders."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from pipeline.write import pixels
from pipeline.write.build import Options, Plan, build
from pipeline.write.images import Encoding
from pipeline.write.sources import ImageFolder


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--images", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--workers", type=int, required=True)
    p.add_argument("--encode", default="keep")
    p.add_argument("--stats", default="on")
    p.add_argument("--check", default="full")
    p.add_argument("--samples-per-shard", type=int, default=1000)
    a = p.parse_args()
    shutil.rmtree(a.out, ignore_errors=True)
    options = Options(Encoding(a.encode), a.samples_per_shard, stats=a.stats == "on", check=a.check)
    plan = Plan(ImageFolder(a.images), options)
    images = len(plan.tasks) and plan.samples
    pixels.prepare()
    started = time.perf_counter()
    build(plan, a.out, workers=a.workers)
    seconds = time.perf_counter() - started
    shutil.rmtree(a.out)
    megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    if a.workers == 1:  # getrusage would name what the process that started this one had
        (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        megabytes = int(peak.split()[1]) / 1024
    print(json.dumps({"images": images, "seconds": seconds, "megabytes": megabytes}))


if __name__ == "__main__":
    main()
