"""One run's configuration: frozen dataclasses, each validating itself, composed from the packages that own them.

Order of precedence: preset < flags. Every error names the field and its value.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from model import ModelConfig
from model.alexnet import VARIANTS
from pipeline.errors import ConfigError
from pipeline.read.augment import AugmentConfig
from pipeline.read.config import LoaderConfig


@dataclass(frozen=True)
class DataConfig:
    """Where the images are."""

    shards: str = ""
    """Folder made by tools/make_shards.py."""
    train_split: str = "train"
    val_split: str = "val"
    partitions: int = 1
    """Parts that are shuffled by themselves, so that a node reads only its parts' shards; see docs/order.md."""
    window: int = 0
    """Shards that are shuffled together; 0: all of a part."""

    def __post_init__(self) -> None:
        _at_least(self, "data", partitions=1, window=0)


PRECISIONS = ("launcher", "fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, in which precision, and what changes with the epochs."""

    epochs: int = 15
    batch: int = 128
    """Global batch: images an update, over all ranks."""
    accumulate: int = 1
    """Passes that a rank's part of the batch is cut into, for less memory; ids, rates and mean gradient stay."""
    eval_batch: int = 256
    """Images a step in evaluation, over all ranks; changes nothing but memory and speed."""
    eval_every: int = 1
    """Epochs between evaluations; after the last one it is evaluated in any case."""
    stop_at: float = 0.0
    """End as soon as an evaluation's top-1 reaches this share; 0: train all epochs."""
    precision: Literal["launcher", "fp32", "tf32", "bf16", "fp16"] = "launcher"
    """launcher: what accelerate launch --mixed_precision says. tf32: fp32 with rounded products, on NVIDIA GPUs."""
    compile: Literal["auto", "off", "norm", "model"] = "auto"
    """What torch.compile gets: the whole model (auto on a GPU), response normalisation alone (auto elsewhere, where it
    is faster), nothing."""
    compress: Literal["none", "bf16", "fp16"] = "none"
    """What gradients are sent as between ranks: half the bytes, rounded."""
    crop_sizes: tuple[int, ...] = ()
    """Smaller crops for the first epochs (progressive resolution), then augment.crop; augment.resize shrinks alike."""
    crop_until: tuple[int, ...] = ()
    """The epoch that each of crop_sizes is used up to."""
    colour_epochs: int = 0
    """Epochs after which augment.colour is off, as in the original code's last third; 0: always on."""
    conv1_epochs: int = 0
    """Epochs after which the first convolution is frozen, as in the original code's last fifth; 0: never."""

    def __post_init__(self) -> None:
        _at_least(self, "train", epochs=1, batch=1, accumulate=1, eval_batch=1, eval_every=1, stop_at=0.0)
        _at_least(self, "train", colour_epochs=0, conv1_epochs=0)
        _at_most(self, "train", stop_at=1.0)
        _one_of(self, "train", precision=PRECISIONS, compile=("auto", "off", "norm", "model"))
        _one_of(self, "train", compress=("none", "bf16", "fp16"))
        if len(self.crop_sizes) != len(self.crop_until):
            raise ConfigError(
                f"train.crop_sizes={_plain(self.crop_sizes)}, train.crop_until={_plain(self.crop_until)}:"
                " give one epoch for each size"
            )
        if self.crop_sizes and not (self.crop_until[0] > 0 and _rises(self.crop_until)):
            raise ConfigError(f"train.crop_until={_plain(self.crop_until)}: epochs that rise, from 1")


SCHEDULES = ("constant", "step", "plateau", "poly", "cosine")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, and the learning rate over time."""

    name: Literal["sgd", "velocity", "lars"] = "sgd"
    """sgd: with momentum, as torch's; velocity: the paper's form of it, with the rate inside the velocity; lars: a rate
    for each layer, for large batches."""
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    """Greatest norm of the gradient; 0: any."""
    schedule: Literal["constant", "step", "plateau", "poly", "cosine"] = "constant"
    """step: by milestones; plateau: when evaluation stalls; poly, cosine: towards zero over the run."""
    milestones: tuple[float, ...] = ()
    """Of step: epochs at which the rate is multiplied by factor."""
    factor: float = 0.1
    """What step and plateau multiply the rate by."""
    plateau_patience: int = 5
    """Of plateau: evaluations without a better top-1 before the rate is lowered."""
    plateau_drops: int = 3
    """Of plateau: how often it is lowered at most."""
    power: float = 2.0
    """Of poly: (1 - progress) to this power, the warm-up counted in."""
    warmup_epochs: float = 0.0
    """Linear rise at the start."""
    warmup_from: float = 0.0
    """The rate that the rise begins at."""
    scale_lr: Literal["none", "linear"] = "none"
    """How lr follows train.batch: lr is for base_batch."""
    base_batch: int = 256
    biases: Literal["variant", "weights", "no-decay"] = "variant"
    """How biases are trained: as the variant's source does (original and caffe: twice the rate, no decay), like
    weights, or without decay."""
    norms: Literal["weights", "no-decay"] = "weights"
    """How normalisation's own parameters are trained."""
    lars_eta: float = 0.001
    """Of lars: a layer's step as a share of its weights' norm."""
    lars_clip: bool = False
    """Of lars: take the smaller of lr and the layer's own rate (LARC), not their product."""

    def __post_init__(self) -> None:
        zeros = dict.fromkeys(("lr", "momentum", "weight_decay", "clip_norm", "warmup_epochs", "warmup_from"), 0.0)
        _at_least(self, "optim", **zeros, power=0.0, plateau_patience=1, plateau_drops=0, base_batch=1)
        _one_of(self, "optim", name=("sgd", "velocity", "lars"), schedule=SCHEDULES)
        _one_of(self, "optim", scale_lr=("none", "linear"), norms=("weights", "no-decay"))
        _one_of(self, "optim", biases=("variant", "weights", "no-decay"))
        for name, most in (("factor", 1.0), ("lars_eta", 1.0)):
            if not 0 < getattr(self, name) <= most:
                raise ConfigError(f"optim.{name}={getattr(self, name)}: must be above 0 and at most {most:g}")
        if self.momentum >= 1:
            raise ConfigError(f"optim.momentum={self.momentum}: must be below 1")
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ConfigError(f"optim.nesterov=True: goes with optim.name=sgd and a momentum, not {self.name}")
        if self.schedule == "step" and not self.milestones:
            raise ConfigError("optim.milestones is empty: optim.schedule=step needs epochs, such as 30 60")
        if not (all(0 < m < math.inf for m in self.milestones) and _rises(self.milestones)):
            raise ConfigError(f"optim.milestones={_plain(self.milestones)}: epochs that rise, above 0")
        if self.warmup_from and not self.warmup_epochs:
            raise ConfigError(f"optim.warmup_from={self.warmup_from}: set optim.warmup_epochs too")


@dataclass(frozen=True)
class RegularizeConfig:
    """What keeps a net from learning its images by heart, beside dropout, weight decay and crops."""

    label_smoothing: float = 0.0
    """Share of the target that all classes have alike."""
    ema: float = 0.0
    """Decay, at each update, of a moving average of the weights, which is evaluated and saved too; 0: none."""

    def __post_init__(self) -> None:
        _at_least(self, "regularize", label_smoothing=0.0, ema=0.0)
        for name in ("label_smoothing", "ema"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"regularize.{name}={getattr(self, name)}: must be below 1")


@dataclass(frozen=True)
class RunConfig:
    """Where the run is kept and how it reports."""

    dir: str = ""
    """Run folder; default: runs/<preset>."""
    seed: int = 0
    log_every: int = 20
    """Steps between two records of the loss: the only times that the device is waited for."""
    save_every: int = 0
    """Steps between checkpoints within an epoch; 0: only at its end. A run goes on from any of them."""
    keep_checkpoints: int = 3
    trackers: tuple[str, ...] = ("tensorboard",)
    """Who gets the figures beside metrics.jsonl, by the names that Accelerate knows: tensorboard, wandb, mlflow …"""
    record_ids: bool = False
    """Write each rank's sample ids of every step to ids/, to compare runs."""
    ddp_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: NCCL between GPUs, gloo between CPUs; gloo also joins two ranks on one GPU."""
    deterministic: bool = False
    """On GPUs: kernels that give the same bits each time, slower. CPUs always do."""

    def __post_init__(self) -> None:
        _at_least(self, "run", seed=0, log_every=1, save_every=0, keep_checkpoints=1)
        _one_of(self, "run", ddp_backend=("auto", "nccl", "gloo"))
        for name in self.trackers:
            _check_tracker(name)


@dataclass(frozen=True)
class GuardConfig:
    """What a run does when something goes wrong; see docs/failures.md."""

    on_bad_numbers: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is NaN or infinite: stop exits with code 76, skip leaves the update out. skip waits for
    a GPU at every step."""
    max_bad_steps: int = 10
    """Batches that skip may leave out over the run."""
    hang_seconds: float = 600.0
    """A rank that makes no step for so long is named, all stacks are kept, the run ends with 77; 0: waits for ever."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """A checkpoint or record that cannot be written: end with 74, or say so, train on and try again at the next one."""

    def __post_init__(self) -> None:
        _at_least(self, "guard", max_bad_steps=0, hang_seconds=0.0)
        _one_of(self, "guard", on_bad_numbers=("stop", "skip"), on_save_error=("stop", "continue"))
        if 0 < self.hang_seconds < 2:
            raise ConfigError(f"guard.hang_seconds={self.hang_seconds:g}: at least 2, or 0 to wait for ever")


@dataclass(frozen=True)
class Config:
    """All of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    regularize: RegularizeConfig = field(default_factory=RegularizeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)
    resume: str = ""
    """A checkpoint folder to go on from. Without it the newest in the run folder that verifies, if there is one;
    with a bare --resume there must be one."""
    overfit: int = 0
    """A check of the net: train on so many images alone, without augmentation and dropout, at a rate of at most 0.003,
    until all of them are right; exit code 1 if they never are."""

    limit_steps: int = 0
    """End after so many steps of the run, evaluated and saved; without it the same command goes on. 0: all epochs."""
    profile: int = 0
    """Steps of which torch's profiler makes a trace and a table in the run folder; 0: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.overfit <= 100_000:
            raise ConfigError(f"overfit={self.overfit}: choose 1 to 100,000 images, such as 64, or 0 for a real run")
        if self.limit_steps < 0:
            raise ConfigError(f"limit_steps={self.limit_steps}: choose a number of steps, or 0 for all epochs")
        if not 0 <= self.profile <= 1000:
            raise ConfigError(f"profile={self.profile}: choose 1 to 1000 steps, such as 10, or 0 for none")
        self._check_crops()

    def _check_crops(self) -> None:
        sizes = self.train.crop_sizes
        if not sizes:
            return
        if not (sizes[0] > 0 and _rises((*sizes, self.augment.crop))):
            raise ConfigError(
                f"train.crop_sizes={_plain(sizes)}: sizes that rise, all below augment.crop={self.augment.crop}"
            )
        if self.augment.normalize == "mean-image":
            raise ConfigError(
                f"train.crop_sizes={_plain(sizes)}: augment.normalize=mean-image is of one size; use mean or mean-std"
            )
        if self.train.crop_until[-1] >= self.train.epochs:
            raise ConfigError(
                f"train.crop_until={_plain(self.train.crop_until)}, train.epochs={self.train.epochs}: augment.crop="
                f"{self.augment.crop} would never be trained; give earlier epochs, or neither crop_sizes nor crop_until"
            )
        if ":" not in self.model.name and not VARIANTS[self.model.name].any_crop:
            raise ConfigError(
                f"train.crop_sizes={_plain(sizes)}: model.name={self.model.name} takes one size; use modern"
            )


def behind_the_end(config: Config) -> list[str]:
    """A line for each field that names an epoch which the run does not reach: presets are made for their own length."""
    train, optim = config.train, config.optim
    late = [m for m in optim.milestones if m >= train.epochs] if optim.schedule == "step" else []
    notes = [f"optim.milestones {_plain(tuple(late))}: the run has {train.epochs} epochs"] if late else []
    if optim.warmup_epochs >= train.epochs:
        notes.append(
            f"optim.warmup_epochs {optim.warmup_epochs:g}: the run has {train.epochs} epochs, so optim.lr is not passed"
        )
    for name, epoch in (("colour_epochs", train.colour_epochs), ("conv1_epochs", train.conv1_epochs)):
        if epoch >= train.epochs:
            notes.append(f"train.{name} {epoch}: the run has {train.epochs} epochs")
    return notes


def _plain(numbers: tuple[Any, ...]) -> str:
    return " ".join(map(str, numbers)) or "none"


def _rises(numbers: tuple[float, ...]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def _check_tracker(name: str) -> None:
    if name == "tensorboard":  # comes with us; the import costs a second
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [logger.value for logger in LoggerType if logger.value != "all"]
    if name not in known:
        raise ConfigError(f"run.trackers={name}: unknown{did_you_mean(name, known)}; choose of {', '.join(known)}")
    if name not in map(str, get_available_trackers()):
        raise ConfigError(f"run.trackers={name}: is not installed; install it, or choose tensorboard")


def _at_most(config: Any, group: str, **most: float) -> None:
    for name, maximum in most.items():
        if getattr(config, name) > maximum:
            raise ConfigError(f"{group}.{name}={getattr(config, name)}: must be at most {maximum:g}")


def augment_at(config: Config, epoch: int) -> AugmentConfig:
    """How training images are seen in an epoch, from 0: crops may grow, colours be left alone after a time."""
    train, augment = config.train, config.augment
    for size, until in zip(train.crop_sizes, train.crop_until):
        if epoch < until:
            resize = round(augment.resize * size / augment.crop)
            augment = dataclasses.replace(augment, crop=size, resize=resize)
            break
    if train.colour_epochs and epoch >= train.colour_epochs:
        augment = dataclasses.replace(augment, colour=0.0)
    return augment


def _at_least(config: Any, group: str, **least: float) -> None:
    for name, minimum in least.items():
        value = getattr(config, name)
        if not minimum <= value < math.inf:  # so that NaN fails too
            raise ConfigError(f"{group}.{name}={value}: must be a number of at least {minimum}")


def _one_of(config: Any, group: str, **allowed: tuple[str, ...]) -> None:
    for name, choices in allowed.items():
        if getattr(config, name) not in choices:
            raise ConfigError(f"{group}.{name}={getattr(config, name)}: choose one of {', '.join(choices)}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.batch": 128, …}, as the flags are named; values as JSON gives them back."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        name = prefix + f.name
        flat |= flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: _as_json(value)}
    return flat


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# Fields that were removed, at the values that changed nothing. Checkpoints and model cards made before hold them.
REMOVED = {"mixup": 0.0, "cutmix": 0.0, "lrn_alpha": "variant"}


def check_removed(saved: dict[str, Any], source: str) -> None:
    """Raises ConfigError if values that were saved, flat or nested names alike, set a removed field."""
    for name, value in saved.items():
        field_name = name.split(".")[-1]
        if field_name in REMOVED and value != REMOVED[field_name]:
            raise ConfigError(
                f"{source}: {name}={value} is no longer supported; use the version of imagenet-express that made it"
            )


RESUME_NEWEST = "newest"

OVERFIT_EPOCHS = 400  # at least, of few images
# A net that sees the same few images at every step diverges at rates that many images bear: after a step or two every
# ReLU may be silent for good.
OVERFIT_RATE, OVERFIT_WARMUP = 0.003, 20  # at most; epochs


def overfitting(config: Config) -> Config:
    """The same run on few images: every epoch shows them alike, so that only the net and its training are tried."""
    a = config.augment
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, val_split=config.data.train_split, partitions=1, window=0),
        train=dataclasses.replace(
            config.train,
            batch=min(config.train.batch, config.overfit),
            epochs=max(config.train.epochs, OVERFIT_EPOCHS),
            accumulate=1,
            eval_every=1,
            stop_at=0.0,
            crop_sizes=(),
            crop_until=(),
            colour_epochs=0,
            conv1_epochs=0,
        ),
        optim=dataclasses.replace(
            config.optim,
            name="sgd" if config.optim.name == "lars" else config.optim.name,  # its rates are no bound
            lr=min(config.optim.lr, OVERFIT_RATE),
            schedule="constant",
            milestones=(),
            scale_lr="none",
            warmup_epochs=OVERFIT_WARMUP,
            warmup_from=0.0,
            weight_decay=0.0,
        ),
        regularize=RegularizeConfig(),
        augment=dataclasses.replace(
            a,
            resize=a.crop,
            flip=False,
            colour=0.0,
            scale_jitter=None,
            normalize="mean" if a.normalize == "mean-image" else a.normalize,
        ),
    )


def did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
