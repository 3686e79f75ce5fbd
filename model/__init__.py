"""AlexNet, its layers and its initialisations. Imports torch and nothing else."""

from typing import TYPE_CHECKING, Any

from .variants import ModelConfig

if TYPE_CHECKING:
    from .alexnet import AlexNet

__all__ = ["AlexNet", "ModelConfig"]


def __getattr__(name: str) -> Any:
    # Lazy: `python -m model.alexnet` must not find model.alexnet already imported, and a configuration needs no torch.
    if name == "AlexNet":
        from .alexnet import AlexNet

        return AlexNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
