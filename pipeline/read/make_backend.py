"""Makes a backend, and chooses a reader.

Each backend is imported on first use: DALI and Numba's machine code take time to load.
"""

from importlib import import_module
from typing import Any

import torch

from ..manifest import Dataset, Split
from . import fetch
from .backend import Engine, PixelType, Setup
from .config import Backend
from .reader import Reader


def reader(dataset: Dataset, split: Split, **settings: Any) -> Reader:
    if not dataset.remote:
        return Reader(split, copies=dataset.copies, **settings)
    from .remote_reader import RemoteReader

    return RemoteReader(split, copies=dataset.copies, **settings)


def prepare(backend: Backend, dtype: PixelType, device: torch.device) -> None:
    """Compiles what a backend needs, or loads what an earlier process compiled."""
    fetch.prepare()
    if backend in ("portable", "resident"):
        from . import kernels, portable

        kernels.prepare(portable.kernel_type(dtype, device))


def make(backend: Backend, setup: Setup) -> Engine:
    """Makes a backend. Module and class have its name: portable.Portable; dali-gpu and dali-cpu are dali.Dali."""
    name = backend.partition("-")[0]
    return getattr(import_module(f".{name}", __package__), name.title())(setup)
