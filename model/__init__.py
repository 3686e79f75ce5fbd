"""AlexNet, its parts and its initialisations. Imports torch and nothing else."""

from .alexnet import AlexNet, ModelConfig

__all__ = ["AlexNet", "ModelConfig"]
