"""The configuration of a net, and each AlexNet variant as a table that reads like the one in its source."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

IN_HELP = "in the short help"  # the value in pipeline.settings, which is not imported here


@dataclass(frozen=True)
class ModelConfig:
    """The net, its width and its initialisation. The data set the number of classes, the crop the input size."""

    name: Annotated[str, IN_HELP] = "seed"
    """A variant: seed, paper, original, caffe, torchvision, modern, small and fig1 (for crops of about 32 pixels); or
    torchvision:NAME or timm:NAME for any of their classifiers, to which only the fields init and freeze apply."""
    width: Annotated[float, IN_HELP] = 1.0
    """Multiplies every layer's channels and units."""
    dropout: float = 0.5
    """Fraction of units dropped at each of the table's two places, while training."""
    norm: Literal["variant", "lrn", "bn", "none"] = "variant"
    """Normalisation: the variant's own, local response, batch (modern and small only) or none."""
    activation: Literal["relu", "tanh", "sigmoid"] = "relu"
    overlapping_pool: bool = True
    """Max pooling of 3 by 3 with stride 2; off: 2 by 2."""
    towers: int = 0
    """Towers of the net, which meet only at conv3 and the fully connected layers; 0: as many as the variant has."""
    drop: tuple[str, ...] = ()
    """Convolutions left out, with their activations: of conv1 … conv5."""
    weight_init: Literal["variant", "he", "torch"] = "variant"
    """variant: as in its source; he: for any width, biases and output layer zero; torch: torch's defaults."""
    init: Annotated[str, IN_HELP] = ""
    """Weights to start from: a .pth or .safetensors file, a checkpoint folder, or a run folder for its best checkpoint.
    An output layer for another number of classes, or other classes, is initialised from scratch."""
    freeze: Literal["none", "features"] = "none"
    """features: all layers before the fully connected ones keep their weights; in other libraries' nets, all layers but
    the last."""

    def __post_init__(self) -> None:
        if not 0 < self.width <= 8:
            raise ValueError(f"model.width={self.width}: must be in (0, 8]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: must be in [0, 1)")
        if not 0 <= self.towers <= 64:
            raise ValueError(f"model.towers={self.towers}: must be from 1 to 64, or 0 for the variant's own")
        for name, kind in get_type_hints(ModelConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"model.{name}={getattr(self, name)}: choose one of {', '.join(get_args(kind))}")
        if self.freeze != "none" and not self.init:
            raise ValueError(f"model.freeze={self.freeze}: would keep random weights; set model.init too")
        if ":" in self.name:
            for name, value in vars(self).items():
                if name not in ("name", "init", "freeze") and value != getattr(ModelConfig, name):
                    raise ValueError(f"model.{name}={value}: model.name={self.name} has no such switch")
        elif self.name not in VARIANTS:
            names = ", ".join([*VARIANTS, "torchvision:NAME", "timm:NAME"])
            raise ValueError(f"model.name={self.name}: choose one of {names}")
        elif unknown := set(self.drop).difference(known := VARIANTS[self.name].convolutions):
            only = f"model.name={self.name} has no such convolution; choose of {', '.join(known)}"
            raise ValueError(f"model.drop={min(unknown)}: {only}")


class Conv(NamedTuple):
    """A convolution. across: its input is the channels of all towers; otherwise those of its own, or the whole image.

    padding: zeros on each side; None: as many as keep the size, for an odd kernel with stride 1.
    std: standard deviation of the initial weights. bias: initial biases. ceil: zeros are added to the right and below
    until the last window fits, so the output size is rounded up, as in the original code.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: int | None = None
    across: bool = False
    std: float = 0.01
    bias: float = 0.0
    ceil: bool = False


class Linear(NamedTuple):
    """A fully connected layer. std, bias: as in Conv."""

    units: int
    std: float = 0.01
    bias: float = 0.0


class Norm(NamedTuple):
    """Local response normalisation over `size` channels; alpha is divided by size, as in torch."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 2.0
    in_tower: bool = False


class SpatialNorm(NamedTuple):
    """Local response normalisation over size × size pixels of a channel; alpha is divided by size²."""

    size: int = 5
    alpha: float = 1e-3
    beta: float = 0.75
    k: float = 1.0


class Pool(NamedTuple):
    """Max pooling; overlapping if stride < kernel."""

    kernel: int = 3
    stride: int = 2


class Place(NamedTuple):
    """A layer without settings of its own."""

    what: str


Act, Drop, BatchNorm, Pool6 = (Place(what) for what in ("act", "drop", "bn", "pool6"))
Layer = Conv | Linear | Norm | SpatialNorm | Pool | Place


class Variant(NamedTuple):
    """A net from the image to the last hidden layer, with its source's initialisation and treatment of biases.

    crop: the input size it is made for. names: whose names its weights have: the seed's, torchvision's, or by layer.
    bias_lr, bias_decay: factors of the biases' learning rate and weight decay.
    """

    layers: list[Layer]
    crop: int = 224
    names: Literal["layer", "seed", "torchvision"] = "layer"
    norm: Literal["lrn", "bn", "none"] = "lrn"
    towers: int = 1
    weight_init: Literal["variant", "he", "torch"] = "variant"
    bias_lr: float = 1.0
    bias_decay: float = 1.0

    @property
    def any_crop(self) -> bool:
        """Whether its last pool gives the same size for every crop."""
        return Pool6 in self.layers

    @property
    def convolutions(self) -> list[str]:
        """conv1, conv2 …, as model.drop names them."""
        return [f"conv{n + 1}" for n in range(sum(isinstance(row, Conv) for row in self.layers))]


VARIANTS: dict[str, Variant] = {
    # The document that this project comes from: one tower, torch's initialisation.
    "seed": Variant([
        Conv(96, 11, stride=4, padding=2), Act, Norm(), Pool(),  # 96 × 27 × 27
        Conv(256, 5), Act, Norm(), Pool(),  # 256 × 13 × 13
        Conv(384, 3, across=True), Act,
        Conv(384, 3), Act,
        Conv(256, 3), Act, Pool(),  # 256 × 6 × 6
        Drop, Linear(4096), Act,
        Drop, Linear(4096), Act,
    ], names="seed", weight_init="torch"),
    # Krizhevsky et al. 2012, sections 3 and 5. Its LRN formula multiplies the sum by alpha, and sums across towers.
    "paper": Variant([
        Conv(96, 11, stride=4, padding=0, ceil=True), Act, Norm(alpha=5e-4), Pool(),  # 96 × 27 × 27
        Conv(256, 5, bias=1), Act, Norm(alpha=5e-4), Pool(),  # 256 × 13 × 13
        Conv(384, 3, across=True), Act,
        Conv(384, 3, bias=1), Act,
        Conv(256, 3, bias=1), Act, Pool(),  # 256 × 6 × 6
        Linear(4096, bias=1), Act, Drop,
        Linear(4096, bias=1), Act, Drop,
    ], towers=2),
    # The code of 2012, layers-145.cfg: in the first block ReLU comes after the pool, so LRN sees negative values too.
    "original": Variant([
        Conv(96, 11, stride=4, padding=0, ceil=True), Norm(in_tower=True), Pool(), Act,  # 96 × 27 × 27
        Conv(256, 5, bias=1), Act, Norm(in_tower=True), SpatialNorm(), Pool(),  # 256 × 13²
        Conv(384, 3, across=True, std=0.03), Act,
        Conv(384, 3, std=0.03, bias=1), Act,
        Conv(256, 3, std=0.03, bias=1), Pool(), Act,  # 256 × 6 × 6
        Linear(4096, bias=1), Act, Drop,
        Linear(4096, bias=1), Act, Drop,
    ], towers=2, bias_lr=2, bias_decay=0),
    # BVLC AlexNet: crops of 227, k = 1, smaller biases.
    "caffe": Variant([
        Conv(96, 11, stride=4, padding=0), Act, Norm(k=1), Pool(),  # 96 × 27 × 27
        Conv(256, 5, bias=0.1), Act, Norm(k=1), Pool(),  # 256 × 13 × 13
        Conv(384, 3, across=True), Act,
        Conv(384, 3, bias=0.1), Act,
        Conv(256, 3, bias=0.1), Act, Pool(),  # 256 × 6 × 6
        Linear(4096, std=0.005, bias=0.1), Act, Drop,
        Linear(4096, std=0.005, bias=0.1), Act, Drop,
    ], crop=227, towers=2, bias_lr=2, bias_decay=0),
    # torchvision.models.alexnet: narrower, no LRN.
    "torchvision": Variant([
        Conv(64, 11, stride=4, padding=2), Act, Pool(),  # 64 × 27 × 27
        Conv(192, 5), Act, Pool(),  # 192 × 13 × 13
        Conv(384, 3, across=True), Act,
        Conv(256, 3), Act,
        Conv(256, 3), Act, Pool(), Pool6,  # 256 × 6 × 6
        Drop, Linear(4096), Act,
        Drop, Linear(4096), Act,
    ], names="torchvision", norm="none", weight_init="torch"),
    # One tower, any image size; LRN at the paper's places, or batch normalisation after ReLU and pool, but not in the
    # fully connected layers, as in the large-batch recipes.
    "modern": Variant([
        Conv(96, 11, stride=4, padding=2), Act, Norm(), Pool(), BatchNorm,  # 96 × 27 × 27
        Conv(256, 5), Act, Norm(), Pool(), BatchNorm,  # 256 × 13 × 13
        Conv(384, 3, across=True), Act, BatchNorm,
        Conv(384, 3), Act, BatchNorm,
        Conv(256, 3), Act, Pool(), BatchNorm, Pool6,  # 256 × 6 × 6
        Drop, Linear(4096), Act,
        Drop, Linear(4096), Act,
    ], weight_init="he"),
    # For crops of about 32 pixels: the first convolution keeps the resolution, the rest is AlexNet's.
    "small": Variant([
        Conv(96, 5), Act, Norm(), Pool(), BatchNorm,  # 96 × 15 × 15
        Conv(256, 5, bias=1), Act, Norm(), Pool(), BatchNorm,  # 256 × 7 × 7
        Conv(384, 3, across=True), Act, BatchNorm,
        Conv(384, 3, bias=1), Act, BatchNorm,
        Conv(256, 3, bias=1), Act, Pool(), BatchNorm,  # 256 × 3 × 3
        Drop, Linear(4096, bias=1), Act,
        Drop, Linear(4096, bias=1), Act,
    ], crop=32),
    # The four layers of the paper's figure 1, which does not give sizes: these are of its author's CIFAR-10 nets.
    "fig1": Variant([
        Conv(32, 5), Act, Pool(),  # 32 × 15 × 15
        Conv(32, 5, across=True), Act, Pool(),  # 32 × 7 × 7
        Conv(64, 5, across=True), Act, Pool(),  # 64 × 3 × 3
    ], crop=32, norm="none", weight_init="he"),
}  # fmt: skip
