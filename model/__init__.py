"""AlexNet, its layers and its initialisations. Imports torch and nothing else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alexnet import AlexNet
    from .variants import ModelConfig

__all__ = ["AlexNet", "ModelConfig"]
_MODULES = {"AlexNet": ".alexnet", "ModelConfig": ".variants"}


def __getattr__(name: str) -> Any:
    # On demand: `python -m model.alexnet` must not find itself imported already, and a configuration needs no torch.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
