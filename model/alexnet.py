"""AlexNet, built from a variant's table.

python -m model.alexnet paper    prints shapes, parameters, multiply-adds and receptive fields.
"""

import argparse
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .dropout import Dropout
from .lrn import LocalResponseNorm, SpatialResponseNorm
from .summary import table
from .variants import (
    VARIANTS,
    Act,
    BatchNorm,
    Conv,
    Layer,
    Linear,
    ModelConfig,
    Norm,
    Place,
    Pool,
    SpatialNorm,
)

Weighted = list[tuple[nn.Conv2d | nn.Linear, Conv | Linear]]


class AlexNet(nn.Module):
    """The AlexNet variant of `config`, for square crops of `crop` pixels.

    forward: images (N, 3, crop, crop) float, rows (N,) int32 or None → (N, classes) logits. rows: hashes from which
    dropout masks are computed, see model.dropout; None: torch's generator. If the variant's source has a net, weights
    have its names and order: a `state_dict` of torchvision's AlexNet or of the seed's net loads with strict=True.
    Raises ValueError with field and value if the crop is too small for the pools, or sizes do not divide.
    """

    def __init__(self, config: ModelConfig, *, classes: int, crop: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes={classes}: must be at least 1")
        self.config = config
        builder = _Builder(config, crop)
        self.variant = builder.variant
        builder.build(classes)
        layers = list(builder.modules.items())
        self._before_fc = list(builder.modules).index("flatten") + 1
        parts = {"features": layers[: self._before_fc], "classifier": layers[self._before_fc :]}
        if self.variant.names == "seed":
            parts = {"AlexNet_model": layers}
        for part, named in parts.items():
            modules = OrderedDict(named)
            by_name = self.variant.names == "layer"  # otherwise by position
            self.add_module(part, nn.Sequential(modules) if by_name else nn.Sequential(*modules.values()))
        _initialise(builder.weighted, chosen(config.weight_init, self.variant.weight_init))

    def forward(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        for module in self.in_order():
            images = module(images, rows) if isinstance(module, Dropout) else module(images)
        return images

    def in_order(self) -> Iterator[nn.Module]:
        """Every layer, from the image to the logits."""
        for part in self.children():
            yield from part.children()

    def feature_layers(self) -> list[nn.Module]:
        """The layers before the fully connected ones."""
        return list(self.in_order())[: self._before_fc]


class _Builder:
    """Builds named modules from a table; tracks the shape, so that each layer fits the previous one.

    modules: by name, in order. weighted: those with weights, in order, each with its row of the table.
    """

    def __init__(self, config: ModelConfig, crop: int) -> None:
        self.config, self.variant, self.crop = config, VARIANTS[config.name], crop
        self.towers = config.towers or self.variant.towers
        self.norm = chosen(config.norm, self.variant.norm)
        places = {"none": True, "lrn": any(isinstance(row, Norm) for row in self.variant.layers)}
        if not places.get(self.norm, BatchNorm in self.variant.layers):
            raise ValueError(f"model.norm={self.norm}: model.name={config.name} has no place for it")
        self.channels, self.side, self.units = 3, crop, 0  # of the last layer's output; units: after flattening
        self.counts = Counter(fc=5, drop=5)  # the numbers of fully connected layers follow conv5: fc6, fc7, fc8
        self.modules: dict[str, nn.Module] = {}
        self.weighted: Weighted = []

    def build(self, classes: int) -> None:
        left_out = False  # whether the last convolution was left out, and its activation must be too
        for row in self.variant.layers:
            if isinstance(row, Conv):
                self.counts["conv"] += 1
                left_out = f"conv{self.counts['conv']}" in self.config.drop
            if left_out and (isinstance(row, Conv) or row == Act):
                left_out = row != Act
                continue
            self._add(row)
            if self.side < 1:
                raise ValueError(
                    f"augment.crop={self.crop} is too small for model.name={self.config.name}:"
                    " its pools shrink it to nothing"
                )
        self._linear(Linear(classes), classes)

    def _append(self, kind: str, module: nn.Module) -> None:
        self.counts[kind] += 1
        self.modules[f"{kind}{self.counts[kind]}"] = module

    def _add(self, row: Layer) -> None:
        match row:
            case Conv():
                self._conv(row)
            case Norm() | SpatialNorm():
                self._response_norm(row)
            case Pool():
                kernel = row.kernel if self.config.overlapping_pool else row.stride
                self.side = (self.side - kernel) // row.stride + 1
                self._append("pool", nn.MaxPool2d(kernel, row.stride))
            case Linear():
                self._linear(row, _scaled(row.units, self.config.width))
            case Place("act"):
                self._append("act", ACTIVATIONS[self.config.activation]())
            case Place("drop"):
                self._flatten()
                self._append("drop", Dropout(self.config.dropout, layer=self.counts["drop"] + 1))
            case Place("bn") if self.norm == "bn":
                self._append("bn", nn.BatchNorm2d(self.channels))
            case Place("pool6"):
                self.side = 6
                self.modules["pool6"] = PoolToFit(6)

    def _conv(self, row: Conv) -> None:
        name, out = f"conv{self.counts['conv']}", _scaled(row.channels, self.config.width)
        towers = self._towers(name, self.channels, out, across=row.across)
        padding = row.kernel // 2 if row.padding is None else row.padding
        beyond = -(self.side - row.kernel) % row.stride if row.ceil and self.side >= row.kernel else 0
        if beyond:
            self._append("pad", nn.ZeroPad2d((0, beyond, 0, beyond)))
        conv = nn.Conv2d(self.channels, out, row.kernel, row.stride, padding, groups=towers)
        self.side = (self.side + beyond + 2 * padding - row.kernel) // row.stride + 1
        self.channels = out
        self.modules[name] = conv
        self.weighted.append((conv, row))

    def _towers(self, name: str, *channels: int, across: bool) -> int:
        # The first convolution that is not left out sees the image, which belongs to no tower.
        towers = self.towers if self.weighted and not across else 1
        for count in channels:
            if count % towers:
                width = f" at model.width={self.config.width}" if self.config.width != 1 else ""
                raise ValueError(f"model.towers={towers}: the {count} channels of {name}{width} do not divide")
        return towers

    def _response_norm(self, row: Norm | SpatialNorm) -> None:
        module: nn.Module = nn.Identity()
        options = row._asdict()
        if self.norm == "lrn" and isinstance(row, Norm):
            towers = self._towers("a norm", self.channels, across=not options.pop("in_tower"))
            module = LocalResponseNorm(**options, towers=towers)
        elif self.norm == "lrn":
            module = SpatialResponseNorm(**options)
        self._append("norm" if isinstance(row, Norm) else "spatialnorm", module)

    def _linear(self, row: Linear, units: int) -> None:
        self._flatten()
        linear = nn.Linear(self.units, units)
        self._append("fc", linear)
        self.weighted.append((linear, row))
        self.units = units

    def _flatten(self) -> None:
        if not self.units:
            self.units = self.channels * self.side * self.side
            self.modules["flatten"] = nn.Flatten()


ACTIVATIONS: dict[str, Any] = {"relu": partial(nn.ReLU, inplace=True), "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class PoolToFit(nn.AdaptiveAvgPool2d):
    """Averages any size down to side × side. Returns inputs of that size unchanged, since the backward pass has no
    deterministic kernel on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-2] == x.shape[-1] == self.output_size else super().forward(x)


def chosen(value: str, of_variant: str) -> str:
    return of_variant if value == "variant" else value


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


def _initialise(weighted: Weighted, scheme: str) -> None:
    """Sets weights and biases as model.weight_init says, from torch's global generator."""
    for module, row in weighted:
        std, bias = row.std, row.bias
        if scheme == "he":
            # He et al. 2015: N(0, sqrt(2 / fan-in)), and zero biases. The loss starts at log(classes) instead of above
            # it, and the first gradients are small: if rounding flips a ReLU, the loss changes by 1e-6 instead of 1e-3,
            # so that runs on one and two ranks stay comparable.
            std = 0.0 if module is weighted[-1][0] else math.sqrt(2 / module.weight[0].numel())
            bias = 0.0
        if scheme != "torch":
            assert module.bias is not None
            nn.init.normal_(module.weight, std=std)
            nn.init.constant_(module.bias, bias)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m model.alexnet", description="Prints a variant's layers.")
    p.add_argument("variant", choices=VARIANTS)
    p.add_argument("--crop", type=int, help="pixels along a side of the input (the variant's own)")
    p.add_argument("--classes", type=int, default=1000, help="(%(default)s)")
    for name in ("width", "norm", "towers"):
        own = getattr(ModelConfig, name)
        p.add_argument(
            f"--{name}", type=type(own), default=own, help=f"as --model.{name} of train/run.py (%(default)s)"
        )
    p.add_argument("--drop", nargs="*", default=[], metavar="CONV", help="convolutions to leave out")
    a = p.parse_args(argv)
    crop = a.crop or VARIANTS[a.variant].crop
    try:
        config = ModelConfig(a.variant, width=a.width, norm=a.norm, towers=a.towers, drop=tuple(a.drop))
        with torch.device("meta"):
            net = AlexNet(config, classes=a.classes, crop=crop)
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    print(table(net, crop))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
