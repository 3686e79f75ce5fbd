"""The loader configurations that benchmarks measure: a registry, and the batches of one of its cells.

The GPU proof measures CELLS, `tools/bench loader` the CPU's of them and VARIANTS: add a cell there.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import AugmentConfig, Loader, LoaderConfig
from pipeline.read import cutter, portable, reader
from pipeline.read import loader as loaders

HARDWARE_LOADS = (0.65, 0.9, 1.0)
DATA = ("jpeg", "keep", "raw")
JPEGS = ("jpeg", "keep")
CUTS = "-cuts-"  # in the names of the cells that use cuts


@dataclass(frozen=True)
class LoaderCell:
    """A loader configuration on one kind of data."""

    name: str
    data: str  # how the images are stored: keep, jpeg or raw
    config: LoaderConfig
    devices: tuple[str, ...] = ("cpu", "cuda")  # the types of device that it is measured on
    alone: bool = False  # may crash its process, so it runs last, in a process of its own
    jitter: bool = False  # random resized crops
    ranks: int = 1
    delay: float = 0.0  # seconds to sleep before every read, as if nothing were cached


def on_gpu(data: str, decode: str, load: float, cuts: str = "-", **options: bool) -> LoaderCell:
    config = LoaderConfig("dali-gpu", decode=decode, hw_decoder_load=load)
    return LoaderCell(f"{data}{cuts}dali-gpu-{decode}-{load:g}", data, config, ("cuda",), **options)


PORTABLE, DALI_CPU = LoaderConfig("portable"), LoaderConfig("dali-cpu")
CELLS = (
    # The safest backend first: a crash loses all later cells in the same process.
    *(LoaderCell(f"{data}-portable", data, PORTABLE) for data in DATA),
    *(LoaderCell(f"{data}-dali-cpu", data, DALI_CPU) for data in DATA),
    *(on_gpu(data, "whole", load) for data in JPEGS for load in HARDWARE_LOADS),
    *(on_gpu(data, "whole", load, CUTS) for data in JPEGS for load in (0.65, 1.0)),
    LoaderCell("raw-dali-gpu", "raw", LoaderConfig("dali-gpu"), ("cuda",)),  # nothing to decode
    LoaderCell("jpeg-dali-cpu-whole", "jpeg", LoaderConfig("dali-cpu", decode="whole"), ("cpu",), alone=True),
    *(on_gpu("jpeg", "region", load, alone=True) for load in HARDWARE_LOADS),
)
VARIANTS = (
    *(LoaderCell(f"{data}-unverified", data, LoaderConfig("portable", verify=False)) for data in DATA),
    *(LoaderCell(f"{data}-jitter", data, PORTABLE, jitter=True) for data in DATA),
    *(LoaderCell(f"{data}{CUTS}portable", data, PORTABLE) for data in JPEGS),
    *(LoaderCell(f"{data}{CUTS}jitter", data, PORTABLE, jitter=True) for data in JPEGS),
    *(LoaderCell(f"{data}{CUTS}dali-cpu", data, DALI_CPU) for data in JPEGS),
    LoaderCell("raw-resident", "raw", LoaderConfig("resident")),  # the other kinds have images of many sizes
    *(LoaderCell(f"jpeg-{ranks}-ranks", "jpeg", PORTABLE, ranks=ranks) for ranks in (2, 4)),
    *(LoaderCell(f"jpeg-{delay}-ms-late", "jpeg", PORTABLE, delay=delay / 1000) for delay in (1, 10)),
)
BY_NAME = {cell.name: cell for cell in (*CELLS, *VARIANTS)}


def batches(
    name: str,
    shards: str,
    batch: int,
    threads: int,
    device: str = "cpu",
    dtype: str = "uint8",
    rank: int = 0,
    world: int = 1,
) -> Iterator[int]:
    """Yields the sizes of the batches that the loader delivers to `device`, endlessly.

    name: of a cell. shards: a folder with one shard folder per kind of data. batch: per rank.
    """
    cell = BY_NAME[name]
    if cell.delay:
        slow_storage(cell.delay)
    loaders.open_cutter = cutter.open_cutter if CUTS in name else lambda *_: None
    with Loader(
        Path(shards) / cell.data,
        batch=batch * world,
        rank=rank,
        world=world,
        device=device,
        dtype=dtype,
        channels_last=dtype != "uint8",  # floats in training's memory format, bytes in the peers'
        augment=AugmentConfig(square=False, scale_jitter=(0.08, 1.0) if cell.jitter else None),
        # 0: each of several ranks takes its fraction of the cores.
        config=replace(cell.config, threads=threads if world == 1 else 0),
    ) as loader:
        assert bool(loader._cutter) == (CUTS in name), "no cuts; make them with tools/make_shards.py cuts"
        for images, *_ in itertools.chain.from_iterable(itertools.repeat(loader)):
            if images.is_cuda:
                torch.cuda.synchronize()
            yield len(images)


def slow_storage(seconds: float) -> None:
    """Makes each read of encoded images wait, whichever thread makes it."""
    fetch_images = reader.fetch_images

    def delayed(buffer: Any, at: Any, fds: Any, *args: object) -> int:
        for _ in range((fds >= 0).sum()):  # one wait per read, which getrusage counts as it does for a disk
            time.sleep(seconds)
        return fetch_images(buffer, at, fds, *args)

    portable.fetch_images = reader.fetch_images = delayed
