"""Labelled images as verified shards, and their way to the device.

    from imagenet_express.pipeline import Loader

The loader is imported when it is first asked for, so that the sharder does not pay for torch and DALI.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


def _name_missing_package(kind: type[BaseException], err: BaseException, trace: Any) -> None:
    if isinstance(err, ModuleNotFoundError):
        print(
            f"error: {sys.executable} has no package {err.name!r};"
            " start it with .venv/bin/python, which `make setup` makes, or after `. .venv/bin/activate`",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, err, trace)


# Not in an own script, whose folder may have such a name too
if __name__ == "pipeline" and os.path.basename(os.path.dirname(os.path.abspath(sys.argv[0]))) in ("tools", "train"):
    sys.excepthook = _name_missing_package

# ruff: noqa: E402
from .errors import ConfigError, DataError, ExpressError, StorageError
from .manifest import Dataset, open_dataset
from .storage import Copies

if TYPE_CHECKING:
    from .read.augment import AugmentConfig
    from .read.config import LoaderConfig
    from .read.loader import Batch, Loader
    from .read.torch_dataset import LoaderDataset

__all__ = [
    "AugmentConfig",
    "Batch",
    "ConfigError",
    "Copies",
    "DataError",
    "Dataset",
    "ExpressError",
    "Loader",
    "LoaderConfig",
    "LoaderDataset",
    "StorageError",
    "open_dataset",
]


_LAZY = {
    "AugmentConfig": "augment",
    "Batch": "loader",
    "Loader": "loader",
    "LoaderConfig": "config",
    "LoaderDataset": "torch_dataset",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".read.{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
