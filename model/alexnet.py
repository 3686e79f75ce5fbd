"""AlexNet as tables: each variant reads like its paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from .lrn import LocalResponseNorm


@dataclass(frozen=True)
class ModelConfig:
    """Which net, how wide, how initialised. The number of classes comes from the data."""

    name: Literal["seed", "small"] = "seed"
    """seed: the single tower for 224-pixel crops; small: the same blocks for crops of about 32 pixels."""
    width: float = 1.0
    """Multiplies every layer's channels and units."""
    dropout: float = 0.5
    """Share of units dropped before each hidden fully connected layer, while training."""
    lrn: bool = True
    """Local response normalisation after the first two ReLUs."""
    weight_init: Literal["paper", "he", "torch"] = "paper"
    """paper: N(0, 0.01), biases of 1, made for the full width; he: for any width, output layer zero; torch: its own."""

    def __post_init__(self) -> None:
        if self.name not in VARIANTS:
            raise ValueError(f"model.name={self.name}: choose one of {', '.join(VARIANTS)}")
        if not 0 < self.width <= 8:
            raise ValueError(f"model.width={self.width}: must be in (0, 8]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: must be in [0, 1)")
        if self.weight_init not in ("paper", "he", "torch"):
            raise ValueError(f"model.weight_init={self.weight_init}: choose paper, he or torch")


@dataclass(frozen=True)
class Conv:
    """A convolution and its ReLU. `bias` is the paper's initial bias."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: float = 0.0


@dataclass(frozen=True)
class Norm:
    """Local response normalisation over `size` channels; alpha is divided by size, as in torch."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0


@dataclass(frozen=True)
class Pool:
    """Overlapping max pooling where stride < kernel."""

    kernel: int = 3
    stride: int = 2


@dataclass(frozen=True)
class Hidden:
    """Dropout, a fully connected layer and its ReLU."""

    units: int
    bias: float = 1.0


Layer = Conv | Norm | Pool | Hidden

VARIANTS: dict[str, list[Layer]] = {
    # Sizes for 224-pixel crops.
    "seed": [
        Conv(96, 11, stride=4, padding=2), Norm(), Pool(),  # 96 × 27 × 27
        Conv(256, 5, padding=2, bias=1.0), Norm(), Pool(),  # 256 × 13 × 13
        Conv(384, 3, padding=1),
        Conv(384, 3, padding=1, bias=1.0),
        Conv(256, 3, padding=1, bias=1.0), Pool(),  # 256 × 6 × 6
        Hidden(4096),
        Hidden(4096),
    ],
    # Sizes for 32-pixel crops: the first convolution keeps the resolution, the rest is AlexNet's.
    "small": [
        Conv(96, 5, padding=2), Norm(), Pool(),  # 96 × 15 × 15
        Conv(256, 5, padding=2, bias=1.0), Norm(), Pool(),  # 256 × 7 × 7
        Conv(384, 3, padding=1),
        Conv(384, 3, padding=1, bias=1.0),
        Conv(256, 3, padding=1, bias=1.0), Pool(),  # 256 × 3 × 3
        Hidden(4096),
        Hidden(4096),
    ],
}  # fmt: skip


class AlexNet(nn.Module):
    """The variant of `config` for square crops of `crop` pixels.

    forward: (N, 3, crop, crop) float → (N, classes) logits. In the seed variant the positions in `layers` are those of
    the seed's own Sequential. Raises ValueError where the crop is too small for the pools, or a size is not positive.
    """

    def __init__(self, config: ModelConfig, *, classes: int, crop: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes={classes}: must be at least 1")
        self.config = config
        self.layers = nn.Sequential(*_modules(config, classes, crop))
        initialise(self, config)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def _modules(config: ModelConfig, classes: int, crop: int) -> list[nn.Module]:
    """The table as modules, in order; tracks the shape, so that the first fully connected layer fits."""
    modules: list[nn.Module] = []
    channels, side, features = 3, crop, 0
    for layer in VARIANTS[config.name]:
        match layer:
            case Conv():
                out = _scaled(layer.channels, config.width)
                side = (side + 2 * layer.padding - layer.kernel) // layer.stride + 1
                conv = nn.Conv2d(channels, out, layer.kernel, layer.stride, layer.padding)
                modules += [conv, nn.ReLU(inplace=True)]
                channels = out
            case Norm() if config.lrn:
                modules.append(LocalResponseNorm(layer.size, layer.alpha, layer.beta, layer.k))
            case Pool():
                side = (side - layer.kernel) // layer.stride + 1
                modules.append(nn.MaxPool2d(layer.kernel, layer.stride))
            case Hidden():
                if not features:
                    features = channels * side * side
                    modules.append(nn.Flatten())
                units = _scaled(layer.units, config.width)
                modules += [nn.Dropout(config.dropout), nn.Linear(features, units), nn.ReLU(inplace=True)]
                features = units
        if side < 1:
            raise ValueError(
                f"augment.crop={crop} is too small for model.name={config.name}: its pools shrink it to nothing"
            )
    return [*modules, nn.Linear(features, classes)]


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


def initialise(net: AlexNet, config: ModelConfig) -> None:
    """Sets weights and biases as `config.weight_init` says, from torch's global generator."""
    if config.weight_init == "torch":
        return
    table = [layer for layer in VARIANTS[config.name] if isinstance(layer, Conv | Hidden)]
    biases = [layer.bias for layer in table] + [0.0]  # the output layer's is 0
    weighted = [m for m in net.layers if isinstance(m, nn.Conv2d | nn.Linear)]
    for module, bias in zip(weighted, biases, strict=True):
        # Krizhevsky et al. 2012, section 5: N(0, 0.01). He et al. 2015: N(0, sqrt(2 / fan-in)), and zero biases.
        fan_in = module.weight[0].numel()
        paper = config.weight_init == "paper"
        nn.init.normal_(module.weight, std=0.01 if paper else math.sqrt(2 / fan_in))
        assert module.bias is not None
        nn.init.constant_(module.bias, bias if paper else 0.0)
    if config.weight_init == "he":
        # The loss starts at log(classes) instead of above it, and the first gradients are small: a ReLU that rounding
        # flips then moves the loss by 1e-6 and not by 1e-3, so that runs on one and two ranks stay comparable.
        nn.init.zeros_(weighted[-1].weight)


def count_parameters(net: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)
