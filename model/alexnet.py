"""AlexNet as tables: each variant reads like its source's.

python -m model.alexnet paper    prints shapes, parameters, multiply-adds and receptive fields.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import Dropout
from .lrn import LocalResponseNorm, SpatialResponseNorm


@dataclass(frozen=True)
class ModelConfig:
    """Which net, how wide, how initialised. The number of classes comes from the data, the input size from the crop."""

    name: str = "seed"
    """A variant: seed, paper, original, caffe, torchvision, modern, small and fig1 (for crops of about 32 pixels); or
    torchvision:NAME, timm:NAME for any classifier of theirs, to which no other field of this group applies but init
    and freeze."""
    width: float = 1.0
    """Multiplies every layer's channels and units."""
    dropout: float = 0.5
    """Share of units dropped at each of the table's two places, while training."""
    norm: Literal["variant", "lrn", "bn", "none"] = "variant"
    """Normalisation: the variant's own, local response, batch (modern and small only) or none."""
    activation: Literal["relu", "tanh", "sigmoid"] = "relu"
    overlapping_pool: bool = True
    """Pools of 3 by 3, 2 apart; off: 2 by 2."""
    towers: int = 0
    """Parts of the net that meet only at conv3 and the fully connected layers; 0: as many as the variant has."""
    drop: tuple[str, ...] = ()
    """Convolutions left out, with their activations: of conv1 … conv5."""
    weight_init: Literal["variant", "he", "torch"] = "variant"
    """variant: its source's; he: for any width, biases and output layer zero; torch: its own defaults."""
    init: str = ""
    """Weights to start from: a .pth or .safetensors file or a checkpoint folder. An output layer of another number of
    classes is made anew."""
    freeze: Literal["none", "features"] = "none"
    """features: everything before the fully connected layers keeps its weights; of other nets, all but the last
    layer."""

    def __post_init__(self) -> None:
        if ":" not in self.name and self.name not in VARIANTS:
            others = "torchvision:NAME, timm:NAME"
            raise ValueError(f"model.name={self.name}: choose one of {', '.join(VARIANTS)}, {others}")
        if not 0 < self.width <= 8:
            raise ValueError(f"model.width={self.width}: must be in (0, 8]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: must be in [0, 1)")
        if not 0 <= self.towers <= 64:
            raise ValueError(f"model.towers={self.towers}: must be from 1 to 64, or 0 for the variant's own")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name}={getattr(self, name)}: choose one of {', '.join(choices)}")
        if unknown := set(self.drop) - {f"conv{n}" for n in range(1, 6)}:
            raise ValueError(f"model.drop={sorted(unknown)[0]}: choose of conv1 … conv5")
        if self.freeze != "none" and not self.init:
            raise ValueError(f"model.freeze={self.freeze}: would keep random weights; set model.init too")
        if ":" in self.name and (changed := [n for n in SWITCHES if getattr(self, n) != _default(n)]):
            raise ValueError(
                f"model.{changed[0]}={getattr(self, changed[0])}: model.name={self.name} has no such switch"
            )


CHOICES = {
    "norm": ("variant", "lrn", "bn", "none"),
    "activation": ("relu", "tanh", "sigmoid"),
    "weight_init": ("variant", "he", "torch"),
    "freeze": ("none", "features"),
}
SWITCHES = ("width", "dropout", "norm", "activation", "overlapping_pool", "towers", "drop", "weight_init")


def _default(name: str) -> Any:
    return ModelConfig.__dataclass_fields__[name].default


@dataclass(frozen=True)
class Conv:
    """A convolution. in_tower: it sees its own tower's channels only, where there are several.

    std, bias: of its initial weights and biases; std None: torch's initialisation. ceil: zeros are added to the right
    and below until the last window fits, as the original code counts its modules.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    in_tower: bool = False
    std: float | None = 0.01
    bias: float = 0.0
    ceil: bool = False


@dataclass(frozen=True)
class Linear:
    """A fully connected layer. std, bias: as in Conv."""

    units: int
    std: float | None = 0.01
    bias: float = 0.0


@dataclass(frozen=True)
class Norm:
    """Local response normalisation over `size` channels; alpha is divided by size, as in torch."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0
    in_tower: bool = False


@dataclass(frozen=True)
class SpatialNorm:
    """The same over size × size pixels of a channel; alpha is divided by size²."""

    size: int = 5
    alpha: float = 1e-3
    beta: float = 0.75
    k: float = 1.0


@dataclass(frozen=True)
class Pool:
    """Max pooling; overlapping where stride < kernel."""

    kernel: int = 3
    stride: int = 2


@dataclass(frozen=True)
class Place:
    """Where something without numbers of its own stands."""

    what: str


Act, Drop, BatchNorm, Pool6 = (Place(what) for what in ("act", "drop", "bn", "pool6"))
Layer = Conv | Linear | Norm | SpatialNorm | Pool | Place


@dataclass(frozen=True)
class Variant:
    """A net from the image to the last hidden layer, and the habits of its source.

    crop: the input it is made for. names: how its weights are called: as the seed's, as torchvision's, or by layer.
    bias_lr, bias_decay: what the biases' learning rate and weight decay are multiplied with.
    """

    layers: list[Layer]
    crop: int = 224
    names: Literal["layer", "seed", "torchvision"] = "layer"
    norm: Literal["lrn", "bn", "none"] = "lrn"
    towers: int = 1
    weight_init: Literal["variant", "he"] = "variant"
    output_std: float | None = 0.01
    bias_lr: float = 1.0
    bias_decay: float = 1.0

    @property
    def any_crop(self) -> bool:
        """Whether its last pool gives the same size for every crop."""
        return Pool6 in self.layers


VARIANTS: dict[str, Variant] = {
    # The document that this project comes from: one tower, torch's initialisation.
    "seed": Variant([
        Conv(96, 11, stride=4, padding=2, std=None), Act, Norm(), Pool(),  # 96 × 27 × 27
        Conv(256, 5, padding=2, in_tower=True, std=None), Act, Norm(), Pool(),  # 256 × 13 × 13
        Conv(384, 3, padding=1, std=None), Act,
        Conv(384, 3, padding=1, in_tower=True, std=None), Act,
        Conv(256, 3, padding=1, in_tower=True, std=None), Act, Pool(),  # 256 × 6 × 6
        Drop, Linear(4096, std=None), Act,
        Drop, Linear(4096, std=None), Act,
    ], names="seed", output_std=None),
    # Krizhevsky et al. 2012, section 3 and 5. Its formula of LRN has alpha on the sum, and over all maps.
    "paper": Variant([
        Conv(96, 11, stride=4, ceil=True), Act, Norm(alpha=5e-4), Pool(),  # 96 × 27 × 27
        Conv(256, 5, padding=2, in_tower=True, bias=1), Act, Norm(alpha=5e-4), Pool(),  # 256 × 13 × 13
        Conv(384, 3, padding=1), Act,
        Conv(384, 3, padding=1, in_tower=True, bias=1), Act,
        Conv(256, 3, padding=1, in_tower=True, bias=1), Act, Pool(),  # 256 × 6 × 6
        Linear(4096, bias=1), Act, Drop,
        Linear(4096, bias=1), Act, Drop,
    ], towers=2),
    # The code of 2012, layers-145.cfg: in the first block ReLU comes after the pool, so LRN sees negative values too.
    "original": Variant([
        Conv(96, 11, stride=4, ceil=True), Norm(in_tower=True), Pool(), Act,  # 96 × 27 × 27
        Conv(256, 5, padding=2, in_tower=True, bias=1), Act, Norm(in_tower=True), SpatialNorm(), Pool(),  # 256 × 13²
        Conv(384, 3, padding=1, std=0.03), Act,
        Conv(384, 3, padding=1, in_tower=True, std=0.03, bias=1), Act,
        Conv(256, 3, padding=1, in_tower=True, std=0.03, bias=1), Pool(), Act,  # 256 × 6 × 6
        Linear(4096, bias=1), Act, Drop,
        Linear(4096, bias=1), Act, Drop,
    ], towers=2, bias_lr=2, bias_decay=0),
    # BVLC AlexNet: crops of 227, k = 1, smaller biases.
    "caffe": Variant([
        Conv(96, 11, stride=4), Act, Norm(k=1), Pool(),  # 96 × 27 × 27
        Conv(256, 5, padding=2, in_tower=True, bias=0.1), Act, Norm(k=1), Pool(),  # 256 × 13 × 13
        Conv(384, 3, padding=1), Act,
        Conv(384, 3, padding=1, in_tower=True, bias=0.1), Act,
        Conv(256, 3, padding=1, in_tower=True, bias=0.1), Act, Pool(),  # 256 × 6 × 6
        Linear(4096, std=0.005, bias=0.1), Act, Drop,
        Linear(4096, std=0.005, bias=0.1), Act, Drop,
    ], crop=227, towers=2, bias_lr=2, bias_decay=0),
    # torchvision.models.alexnet: narrower, no LRN.
    "torchvision": Variant([
        Conv(64, 11, stride=4, padding=2, std=None), Act, Pool(),  # 64 × 27 × 27
        Conv(192, 5, padding=2, in_tower=True, std=None), Act, Pool(),  # 192 × 13 × 13
        Conv(384, 3, padding=1, std=None), Act,
        Conv(256, 3, padding=1, in_tower=True, std=None), Act,
        Conv(256, 3, padding=1, in_tower=True, std=None), Act, Pool(), Pool6,  # 256 × 6 × 6
        Drop, Linear(4096, std=None), Act,
        Drop, Linear(4096, std=None), Act,
    ], names="torchvision", norm="none", output_std=None),
    # One tower, any size of image; LRN where the paper has it, or batch normalisation after ReLU and pool, none in the
    # fully connected layers, as the large-batch recipes have it.
    "modern": Variant([
        Conv(96, 11, stride=4, padding=2), Act, Norm(), Pool(), BatchNorm,  # 96 × 27 × 27
        Conv(256, 5, padding=2, in_tower=True), Act, Norm(), Pool(), BatchNorm,  # 256 × 13 × 13
        Conv(384, 3, padding=1), Act, BatchNorm,
        Conv(384, 3, padding=1, in_tower=True), Act, BatchNorm,
        Conv(256, 3, padding=1, in_tower=True), Act, Pool(), BatchNorm, Pool6,  # 256 × 6 × 6
        Drop, Linear(4096), Act,
        Drop, Linear(4096), Act,
    ], weight_init="he"),
    # For crops of about 32 pixels: the first convolution keeps the resolution, the rest is AlexNet's.
    "small": Variant([
        Conv(96, 5, padding=2), Act, Norm(), Pool(), BatchNorm,  # 96 × 15 × 15
        Conv(256, 5, padding=2, in_tower=True, bias=1), Act, Norm(), Pool(), BatchNorm,  # 256 × 7 × 7
        Conv(384, 3, padding=1), Act, BatchNorm,
        Conv(384, 3, padding=1, in_tower=True, bias=1), Act, BatchNorm,
        Conv(256, 3, padding=1, in_tower=True, bias=1), Act, Pool(), BatchNorm,  # 256 × 3 × 3
        Drop, Linear(4096, bias=1), Act,
        Drop, Linear(4096, bias=1), Act,
    ], crop=32),
    # The four layers of the paper's figure 1, which does not give their sizes: those of its author's CIFAR-10 nets.
    "fig1": Variant([
        Conv(32, 5, padding=2), Act, Pool(),  # 32 × 15 × 15
        Conv(32, 5, padding=2), Act, Pool(),  # 32 × 7 × 7
        Conv(64, 5, padding=2), Act, Pool(),  # 64 × 3 × 3
    ], crop=32, norm="none", weight_init="he"),
}  # fmt: skip


class PoolToFit(nn.AdaptiveAvgPool2d):
    """Averages any size down to side × side, and leaves that size alone: its backward pass on a GPU has no
    deterministic kernel."""

    def forward(self, x: Tensor) -> Tensor:
        fits = x.shape[-2] == x.shape[-1] == self.output_size
        return x if fits else super().forward(x)


class AlexNet(nn.Module):
    """The variant of `config` for square crops of `crop` pixels.

    forward: images (N, 3, crop, crop) float, rows (N,) int32 or None → (N, classes) logits. rows: what dropout's masks
    are made of, see model.dropout; None: torch's generator. Names and positions of weights are the source's where it
    has any: a `state_dict` of torchvision's AlexNet or of the seed's net loads strictly.
    Raises ValueError with field and value where the crop is too small for the pools, or sizes do not divide.
    """

    def __init__(self, config: ModelConfig, *, classes: int, crop: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes={classes}: must be at least 1")
        self.config = config
        self.variant: Variant = VARIANTS[config.name]
        built = _Builder(config, crop).build(classes)
        self._before_fc = next(i for i, (name, _) in enumerate(built) if name in ("pool6", "flatten"))
        features, rest = built[: self._before_fc], built[self._before_fc :]
        if self.variant.names == "seed":
            self.AlexNet_model = nn.Sequential(*(m for _, m in built))
        elif self.variant.names == "torchvision":
            self.features = nn.Sequential(*(m for _, m in features))
            self.avgpool, self.flatten = rest[0][1], rest[1][1]
            self.classifier = nn.Sequential(*(m for _, m in rest[2:]))
        else:
            self.features = nn.Sequential(OrderedDict(features))
            self.classifier = nn.Sequential(OrderedDict(rest))
        initialise(self)

    def forward(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        x = images
        for module in self.in_order():
            x = module(x, rows) if isinstance(module, Dropout) else module(x)
        return x

    def in_order(self) -> Iterator[nn.Module]:
        """Every layer, from the image to the logits."""
        for child in self.children():
            yield from child if isinstance(child, nn.Sequential) else [child]

    def feature_layers(self) -> list[nn.Module]:
        """What comes before the fully connected layers."""
        return list(self.in_order())[: self._before_fc]


class _Builder:
    """A table as named modules; tracks the shape, so that each layer fits the one before."""

    def __init__(self, config: ModelConfig, crop: int) -> None:
        self.config, self.variant, self.crop = config, VARIANTS[config.name], crop
        self.towers = config.towers or self.variant.towers
        self.norm = self.variant.norm if config.norm == "variant" else config.norm
        places = {"none": True, "lrn": any(isinstance(row, Norm) for row in self.variant.layers)}
        if not places.get(self.norm, BatchNorm in self.variant.layers):
            raise ValueError(f"model.norm={self.norm}: model.name={config.name} has no place for it")
        self.channels, self.side, self.features = 3, crop, 0
        self.seen = False  # the image, by a convolution
        self.counts: dict[str, int] = {}
        self.modules: list[tuple[str, nn.Module]] = []

    def build(self, classes: int) -> list[tuple[str, nn.Module]]:
        dropped = False  # whether the last convolution was left out, and its activation goes with it
        for row in self.variant.layers:
            if isinstance(row, Conv):
                dropped = f"conv{self.counts.get('conv', 0) + 1}" in self.config.drop
                if dropped:
                    self._name("conv")
                    continue
            elif row == Act and dropped:
                dropped = False
                continue
            self._add(row)
            if self.side < 1:
                raise ValueError(
                    f"augment.crop={self.crop} is too small for model.name={self.config.name}:"
                    " its pools shrink it to nothing"
                )
        if self.config.drop and (missing := set(self.config.drop) - {f"conv{n}" for n in range(1, self._convs + 1)}):
            raise ValueError(f"model.drop={sorted(missing)[0]}: model.name={self.config.name} has no such convolution")
        self._flatten()
        self.modules.append((self._name("fc"), nn.Linear(self.features, classes)))
        return self.modules

    @property
    def _convs(self) -> int:
        return sum(isinstance(row, Conv) for row in self.variant.layers)

    def _name(self, kind: str) -> str:
        """conv1, conv2 …; fully connected layers count on from the convolutions: fc6, fc7, fc8."""
        self.counts[kind] = self.counts.get(kind, 5 if kind in ("fc", "drop") else 0) + 1
        return f"{kind}{self.counts[kind]}"

    def _append(self, kind: str, module: nn.Module) -> None:
        self.modules.append((self._name(kind), module))

    def _add(self, row: Layer) -> None:
        match row:
            case Conv():
                self._conv(row)
            case Norm():
                self._append("norm", self._lrn(row) if self.norm == "lrn" else nn.Identity())
            case SpatialNorm():
                norm = SpatialResponseNorm(row.size, row.alpha, row.beta, row.k)
                self._append("spatialnorm", norm if self.norm == "lrn" else nn.Identity())
            case Pool():
                kernel = row.kernel if self.config.overlapping_pool else row.stride
                self.side = (self.side - kernel) // row.stride + 1
                self._append("pool", nn.MaxPool2d(kernel, row.stride))
            case Linear():
                self._flatten()
                units = _scaled(row.units, self.config.width)
                self._append("fc", nn.Linear(self.features, units))
                self.features = units
            case Place("act"):
                self._append("act", ACTIVATIONS[self.config.activation]())
            case Place("drop"):
                self._flatten()
                self._append("drop", Dropout(self.config.dropout, layer=self.counts.get("drop", 5) + 1))
            case Place("bn") if self.norm == "bn":
                self._append("bn", nn.BatchNorm2d(self.channels))
            case Place("pool6"):
                self.side = 6
                self.modules.append(("pool6", PoolToFit(6)))

    def _conv(self, row: Conv) -> None:
        out = _scaled(row.channels, self.config.width)
        # Every tower sees the whole image, also where the first convolution is left out.
        towers = self.towers if row.in_tower and self.seen else 1
        self.seen = True
        name = self._name("conv")
        for what, count in (("input", self.channels), ("output", out)):
            if count % towers:
                width = f" at model.width={self.config.width}" if self.config.width != 1 else ""
                raise ValueError(f"model.towers={towers}: {name}'s {count} {what} channels{width} do not divide")
        beyond = 0
        if row.ceil and self.side >= row.kernel:
            beyond = -(self.side - row.kernel) % row.stride
        if beyond:
            conv: nn.Conv2d = PaddedConv2d(self.channels, out, row.kernel, row.stride, beyond=beyond, groups=towers)
        else:
            conv = nn.Conv2d(self.channels, out, row.kernel, row.stride, row.padding, groups=towers)
        self.side = (self.side + beyond + 2 * row.padding - row.kernel) // row.stride + 1
        self.channels = out
        self.modules.append((name, conv))

    def _lrn(self, row: Norm) -> LocalResponseNorm:
        towers = self.towers if row.in_tower and self.seen else 1
        if self.channels % towers:
            raise ValueError(f"model.towers={towers}: {self.channels} channels do not divide")
        return LocalResponseNorm(row.size, row.alpha, row.beta, row.k, towers=towers)

    def _flatten(self) -> None:
        if not self.features:
            self.features = self.channels * self.side * self.side
            self.modules.append(("flatten", nn.Flatten()))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class PaddedConv2d(nn.Conv2d):
    """A convolution whose input gets `beyond` rows and columns of zeros below and to the right."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, *, beyond: int, groups: int) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups)
        self.beyond = beyond

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, self.beyond, 0, self.beyond)))


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


def initialise(net: AlexNet) -> None:
    """Sets weights and biases as `net.config.weight_init` says, from torch's global generator."""
    config, variant = net.config, net.variant
    scheme = variant.weight_init if config.weight_init == "variant" else config.weight_init
    if scheme == "torch":
        return
    weighted = [m for m in net.in_order() if isinstance(m, nn.Conv2d | nn.Linear)]
    if scheme == "he":
        for module in weighted:
            # He et al. 2015: N(0, sqrt(2 / fan-in)), and zero biases. The loss starts at log(classes) instead of above
            # it, and the first gradients are small: a ReLU that rounding flips then moves the loss by 1e-6 and not by
            # 1e-3, so that runs on one and two ranks stay comparable.
            std = 0.0 if module is weighted[-1] else math.sqrt(2 / module.weight[0].numel())
            _normal(module, std, 0.0)
        return
    numbers = iter(range(1, 6))
    rows: list[Conv | Linear] = []
    for row in variant.layers:
        if isinstance(row, Linear) or (isinstance(row, Conv) and f"conv{next(numbers)}" not in config.drop):
            rows.append(row)
    for module, row in zip(weighted, [*rows, Linear(0, variant.output_std)], strict=True):
        if row.std is not None:
            _normal(module, row.std, row.bias)


def _normal(module: nn.Conv2d | nn.Linear, std: float, bias: float) -> None:
    nn.init.normal_(module.weight, std=std)
    assert module.bias is not None
    nn.init.constant_(module.bias, bias)


def param_groups(
    net: nn.Module,
    *,
    bias_lr: float = 1.0,
    bias_decay: float = 1.0,
    norm_decay: float = 1.0,
    first_apart: bool = False,
) -> list[dict[str, Any]]:
    """The trainable parameters for an optimiser, by how they are treated: weights, biases, normalisation's own.

    lr_scale and decay_scale of each group are what the run's learning rate and weight decay are multiplied with;
    kind is "weight", "bias" or "norm". first_apart: the first convolution's in groups of their own, `first` in them,
    so that they can be frozen by their rate.
    """
    norms = {id(p) for m in net.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None) if first_apart else None
    at_first = {id(p) for p in first.parameters()} if first is not None else set()
    scales = {"weight": (1.0, 1.0), "bias": (bias_lr, bias_decay), "norm": (bias_lr, norm_decay)}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for kind, (lr, decay) in scales.items():
        for apart in (True, False):
            groups[kind, apart] = {"params": [], "lr_scale": lr, "decay_scale": decay, "kind": kind, "first": apart}
    for name, p in net.named_parameters():
        if p.requires_grad:
            kind = "norm" if id(p) in norms else "bias" if name.split(".")[-1] == "bias" else "weight"
            groups[kind, id(p) in at_first]["params"].append(p)
    return [group for group in groups.values() if group["params"]]


NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def count_parameters(net: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


if __name__ == "__main__":
    from .summary import main

    raise SystemExit(main())
