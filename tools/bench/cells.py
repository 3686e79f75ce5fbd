"""The loader configurations that benchmarks measure: a registry, and how one of its cells is measured.

    python tools/bench/cells.py jpeg-portable jpeg-dali-cpu --shards SHARDS --device cpu

SHARDS holds a folder of shards for each kind of data: keep, jpeg, raw. Prints one line of JSON for each cell as soon
as it is measured. Add a cell by adding it to CELLS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from pipeline import AugmentConfig, Loader, LoaderConfig
from pipeline.cores import usable_cores

WARM_UP = 8  # batches: the first ones fill queues, allocate memory and load kernels
HARDWARE_LOADS = (0.65, 0.9, 1.0)


@dataclass(frozen=True)
class LoaderCell:
    """A loader configuration on one kind of data."""

    name: str
    data: str  # how the images are stored: keep, jpeg or raw
    backend: str
    decode: str = "auto"
    hw_decoder_load: float = 0.65
    devices: tuple[str, ...] = ("cpu", "cuda")  # the types of device that it is measured on
    alone: bool = False  # it may crash its process, so it runs after all others in a process of its own

    def config(self, *, threads: int) -> LoaderConfig:
        return LoaderConfig(self.backend, threads, decode=self.decode, hw_decoder_load=self.hw_decoder_load)


CELLS = (
    # The safest backend first: a crash costs the cells after it that share its process.
    *(LoaderCell(f"{data}-portable", data, "portable") for data in ("jpeg", "keep", "raw")),
    *(LoaderCell(f"{data}-dali-cpu", data, "dali-cpu") for data in ("jpeg", "keep", "raw")),
    *(
        LoaderCell(f"{data}-dali-gpu-whole-{load:g}", data, "dali-gpu", "whole", load, ("cuda",))
        for data in ("jpeg", "keep")
        for load in HARDWARE_LOADS
    ),
    LoaderCell("raw-dali-gpu", "raw", "dali-gpu", devices=("cuda",)),  # nothing to decode
    LoaderCell("jpeg-dali-cpu-whole", "jpeg", "dali-cpu", "whole", devices=("cpu",), alone=True),
    *(
        LoaderCell(f"jpeg-dali-gpu-region-{load:g}", "jpeg", "dali-gpu", "region", load, ("cuda",), alone=True)
        for load in HARDWARE_LOADS
    ),
)


def measure(cell: LoaderCell, shards: Path, *, device: str, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """Images per second that the loader delivers to `device`, after a warm-up.

    shards: a folder of shard folders, by kind of data. began, ended: Unix times, to find other measurements by.
    """
    dtype = "float16" if device.startswith("cuda") else "float32"
    with Loader(
        shards / cell.data,
        batch=batch,
        device=device,
        dtype=dtype,
        channels_last=True,
        augment=AugmentConfig(square=False),
        config=cell.config(threads=threads),
    ) as loader:
        stream = itertools.chain.from_iterable(itertools.repeat(loader))

        def next_batch() -> int:
            images = next(stream).images
            if images.is_cuda:
                torch.cuda.synchronize()
            return len(images)

        warm_until = time.perf_counter() + min(1.0, seconds)
        for number in itertools.count():
            next_batch()
            if number >= WARM_UP and time.perf_counter() > warm_until:
                break
        began, started, cpu_started, images = time.time(), time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            images += next_batch()
        elapsed, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        **asdict(cell),
        "images_per_second": round(images / elapsed, 1),
        "cpu_microseconds_per_image": round(cpu_seconds / images * 1e6, 1),
        "batch": batch,
        "threads": threads,
        "dtype": dtype,
        "began": began,
        "ended": time.time(),
    }


def main() -> None:
    by_name = {cell.name: cell for cell in CELLS}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cells", nargs="+", choices=by_name, metavar="CELL", help=f"of {', '.join(by_name)}")
    p.add_argument("--shards", type=Path, required=True, metavar="DIR", help="holds keep/, jpeg/ and raw/")
    p.add_argument("--device", default="cuda:0", help="(%(default)s)")
    p.add_argument("--batch", type=int, default=256, help="(%(default)s)")
    p.add_argument("--threads", type=int, default=usable_cores(), help="decoding threads (%(default)s)")
    p.add_argument("--seconds", type=float, default=5.0, help="of each cell (%(default)s)")
    args = p.parse_args()
    options = {"device": args.device, "batch": args.batch, "threads": args.threads, "seconds": args.seconds}
    for name in args.cells:
        try:
            result = measure(by_name[name], args.shards, **options)
        except Exception as err:  # whatever it is, the other cells still have figures to give
            result = {**asdict(by_name[name]), "error": f"{type(err).__name__}: {err}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
