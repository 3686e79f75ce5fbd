"""The loader configurations that benchmarks measure: a registry, and how one of its cells is measured.

    python tools/bench/cells.py jpeg-portable jpeg-dali-cpu --shards SHARDS --device cpu

SHARDS holds a folder of shards for each kind of data: keep, jpeg, raw. Prints one line of JSON for each cell as soon
as it is measured. The GPU proof measures CELLS, `tools/bench loader` the CPU's of them and VARIANTS: add a cell there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from pipeline import AugmentConfig, Loader, LoaderConfig
from pipeline.cores import usable_cores
from pipeline.read import portable, reader
from tools.bench.harness import add_options
from tools.bench.timing import rate

HARDWARE_LOADS = (0.65, 0.9, 1.0)
DATA = ("jpeg", "keep", "raw")


@dataclass(frozen=True)
class LoaderCell:
    """A loader configuration on one kind of data."""

    name: str
    data: str  # how the images are stored: keep, jpeg or raw
    config: LoaderConfig
    devices: tuple[str, ...] = ("cpu", "cuda")  # the types of device that it is measured on
    alone: bool = False  # it may crash its process, so it runs after all others in a process of its own
    jitter: bool = False  # random resized crops
    ranks: int = 1
    delay: float = 0.0  # seconds to sleep before every read, as if nothing were cached


def on_gpu(data: str, decode: str, load: float, **options: bool) -> LoaderCell:
    config = LoaderConfig("dali-gpu", decode=decode, hw_decoder_load=load)
    return LoaderCell(f"{data}-dali-gpu-{decode}-{load:g}", data, config, ("cuda",), **options)


PORTABLE, DALI_CPU = LoaderConfig("portable"), LoaderConfig("dali-cpu")
CELLS = (
    # The safest backend first: a crash costs the cells after it that share its process.
    *(LoaderCell(f"{data}-portable", data, PORTABLE) for data in DATA),
    *(LoaderCell(f"{data}-dali-cpu", data, DALI_CPU) for data in DATA),
    *(on_gpu(data, "whole", load) for data in ("jpeg", "keep") for load in HARDWARE_LOADS),
    LoaderCell("raw-dali-gpu", "raw", LoaderConfig("dali-gpu"), ("cuda",)),  # nothing to decode
    LoaderCell("jpeg-dali-cpu-whole", "jpeg", LoaderConfig("dali-cpu", decode="whole"), ("cpu",), alone=True),
    *(on_gpu("jpeg", "region", load, alone=True) for load in HARDWARE_LOADS),
)
VARIANTS = (
    *(LoaderCell(f"{data}-unverified", data, LoaderConfig("portable", verify=False)) for data in DATA),
    *(LoaderCell(f"{data}-jitter", data, PORTABLE, jitter=True) for data in DATA),
    *(LoaderCell(f"jpeg-{ranks}-ranks", "jpeg", PORTABLE, ranks=ranks) for ranks in (2, 4)),
    *(LoaderCell(f"jpeg-{delay}-ms-late", "jpeg", PORTABLE, delay=delay / 1000) for delay in (1, 10)),
)
BY_NAME = {cell.name: cell for cell in (*CELLS, *VARIANTS)}


def batches(
    name: str, shards: str | Path, device: str, dtype: str, batch: int, threads: int, rank: int = 0, world: int = 1
) -> Iterator[int]:
    """Sizes of the batches that the loader has delivered to `device`, without end.

    shards: a folder of shard folders, by kind of data. batch: of each rank.
    """
    cell = BY_NAME[name]
    if cell.delay:
        slow_storage(cell.delay)
    with Loader(
        Path(shards) / cell.data,
        batch=batch * world,
        rank=rank,
        world=world,
        device=device,
        dtype=dtype,
        channels_last=dtype != "uint8",  # floats as training takes them, bytes as the peers deliver them
        augment=AugmentConfig(square=False, scale_jitter=(0.08, 1.0) if cell.jitter else None),
        # 0: each of several ranks takes its fraction of the cores.
        config=replace(cell.config, threads=threads if world == 1 else 0),
    ) as loader:
        for images, *_ in itertools.chain.from_iterable(itertools.repeat(loader)):
            if images.is_cuda:
                torch.cuda.synchronize()
            yield len(images)


def slow_storage(seconds: float) -> None:
    """Makes each read of encoded images wait, whichever thread makes it."""
    read, fetch_images = os.preadv, reader.fetch_images

    def delayed(*args: object) -> int:
        time.sleep(seconds)
        return read(*args)

    def delayed_block(buffer: Any, at: Any, fds: Any, *args: object) -> int:
        for fd in fds:
            if fd >= 0:
                time.sleep(seconds)
        return fetch_images(buffer, at, fds, *args)

    os.preadv, portable.fetch_images, reader.fetch_images = delayed, delayed_block, delayed_block


def measure(cell: LoaderCell, shards: Path, *, seconds: float, **options: Any) -> dict[str, Any]:
    """Images per second after a warm-up. began, ended: Unix times, to find other measurements by."""
    dtype = "float16" if options["device"].startswith("cuda") else "float32"
    with closing(batches(cell.name, shards, dtype=dtype, **options)) as sizes:
        found = rate(sizes, seconds, warm_seconds=min(1.0, seconds))
        ended = time.time()
    return {
        **asdict(cell),
        "images_per_second": round(found["images"] / found["seconds"], 1),
        "cpu_microseconds_per_image": round(found["cpu_seconds"] / found["images"] * 1e6, 1),
        **options,
        "dtype": dtype,
        "began": ended - found["seconds"],
        "ended": ended,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cells", nargs="+", choices=BY_NAME, metavar="CELL", help=f"of {', '.join(BY_NAME)}")
    p.add_argument("--shards", type=Path, required=True, metavar="DIR", help="holds keep/, jpeg/ and raw/")
    add_options(p, device="cuda:0", batch=256, threads=usable_cores(), seconds=5.0)
    options = vars(p.parse_args())
    shards = options.pop("shards")
    for name in options.pop("cells"):
        try:
            result = measure(BY_NAME[name], shards, **options)
        except Exception as err:  # whatever it is, the other cells still have figures to give
            result = {**asdict(BY_NAME[name]), "error": f"{type(err).__name__}: {err}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
