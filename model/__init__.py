"""AlexNet, its layers and its initialisations. Imports torch and nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alexnet import AlexNet
    from .variants import ModelConfig

__all__ = ["AlexNet", "ModelConfig"]


def __getattr__(name: str) -> Any:
    # On demand, so that `python -m model.alexnet` does not find itself imported already.
    if name in __all__:
        return getattr(import_module(".alexnet", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
