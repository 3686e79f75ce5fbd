"""Makes a backend, and chooses a reader.

Each is imported when it is used: DALI and Numba's machine code take a while to load.
"""

from typing import Any

import numpy as np
import torch

from ..manifest import Dataset, Split
from . import fetch
from .backend import Engine, Output, PixelType
from .config import Backend, LoaderConfig
from .cutter import Cutter
from .plan import Plan
from .reader import Reader


def reader(dataset: Dataset, split: Split, **settings: Any) -> Reader:
    if not dataset.remote:
        return Reader(split, copies=dataset.copies, **settings)
    from .remote_reader import RemoteReader

    return RemoteReader(split, copies=dataset.copies, **settings)


def prepare(backend: Backend, crop: int, dtype: PixelType, device: torch.device) -> None:
    """Compiles what a backend needs, or loads what an earlier process compiled."""
    fetch.prepare()
    if backend in ("portable", "resident"):
        from . import portable

        portable.prepare(crop, dtype, on_cpu=device.type == "cpu")


def make(
    backend: Backend,
    output: Output,
    reader: Reader,
    plan: Plan,
    config: LoaderConfig,
    *,
    raw: bool,
    threads: int,
    ranks: int,
    cutter: Cutter | None = None,
) -> Engine:
    """raw: images are stored as pixels. ranks: of this machine. cutter: cuts what crops need out of
    JPEGs."""
    rows, depth = plan.batch_per_rank * plan.views, config.prefetch_batches
    if backend == "synthetic":
        from .synthetic import Synthetic

        return Synthetic(output, rows=rows)
    if backend == "resident":
        from .resident import Resident

        return Resident(output, reader, plan, config, ranks, raw=raw, threads=threads)
    if backend == "portable":
        from .portable import Portable

        return Portable(output, reader, raw=raw, threads=threads, depth=depth, cutter=cutter)
    from .dali import Dali, Graph

    short_sides = np.minimum(plan.split.column("width"), plan.split.column("height"))
    jittered = plan.train and plan.augment.scale_jitter is not None
    resized = jittered or bool((short_sides != plan.augment.resize).any())
    whole = backend == "dali-gpu" if config.decode == "auto" else config.decode == "whole"
    graph = Graph(output, raw, resized, whole, bool(cutter), config.hw_decoder_load)
    return Dali(graph, reader, rows=rows, threads=threads, depth=depth, cutter=cutter)
