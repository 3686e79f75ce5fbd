"""The configuration of a run: frozen dataclasses that validate themselves, composed from the packages that own them.

Fields declare bounds, whether they may change on resume or between hosts, and whether the short help shows them, in
their types: see pipeline/settings.py. Order of precedence: preset < --config < flags.
"""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from model import ModelConfig
from model.variants import VARIANTS
from pipeline.errors import ConfigError
from pipeline.read.augment import AugmentConfig
from pipeline.read.config import DataConfig, LoaderConfig
from pipeline.settings import (
    BelowOne,
    Bounds,
    Fraction,
    InHelp,
    MayChange,
    NonNegative,
    NonNegativeFloat,
    PerHost,
    Positive,
    PositiveFraction,
    did_you_mean,
    validate,
)


def _plain(numbers: tuple[Any, ...]) -> str:
    return " ".join(map(str, numbers)) or "none"


def _rise(numbers: tuple[float, ...]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def _check_tracker(name: str) -> None:
    if name == "tensorboard":  # a dependency of ours; the import costs a second
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [logger.value for logger in LoggerType if logger.value != "all"]
    if name not in known:
        raise ConfigError(f"run.trackers={name}: unknown{did_you_mean(name, known)}; choose one of {', '.join(known)}")
    if name not in map(str, get_available_trackers()):
        raise ConfigError(f"run.trackers={name}: is not installed; install it, or choose tensorboard")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision, and what changes with the epochs."""

    epochs: InHelp[MayChange[Positive]] = 15
    batch: InHelp[Positive] = 128
    """Global batch: images per update, over all ranks."""
    accumulate: InHelp[MayChange[Positive]] = 1
    """Micro-batches per rank and step, for less memory; ids, rates and mean gradient are unchanged."""
    eval_batch: MayChange[Positive] = 256
    """Images per evaluation step, over all ranks; changes nothing but memory and speed."""
    eval_every: Positive = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    stop_at: MayChange[Fraction] = 0.0
    """End as soon as an evaluation's top-1 reaches this fraction; 0: train all epochs."""
    precision: InHelp[Literal["launcher", "fp32", "tf32", "bf16", "fp16"]] = "launcher"
    """launcher: as set by accelerate launch --mixed_precision. tf32: fp32 with TF32 products, on NVIDIA GPUs."""
    compile: InHelp[Literal["auto", "off", "norm", "model"]] = "auto"
    """The part to compile: the whole model (auto on a GPU), response normalisation (auto elsewhere), none."""
    compress: Literal["none", "bf16", "fp16"] = "none"
    """Type in which ranks exchange gradients: half the bytes, rounded."""
    crop_sizes: tuple[int, ...] = ()
    """Smaller crops for the first epochs (progressive resolution), then augment.crop; augment.resize shrinks alike."""
    crop_until: tuple[int, ...] = ()
    """The epoch until which each of crop_sizes is used."""
    colour_epochs: NonNegative = 0
    """Epochs after which augment.colour is off, as in the original code's last third; 0: always on."""
    conv1_epochs: NonNegative = 0
    """Epochs after which the first convolution is frozen, as in the original code's last fifth; 0: never."""

    def __post_init__(self) -> None:
        validate(self)
        if len(self.crop_sizes) != len(self.crop_until):
            raise ConfigError(
                f"train.crop_sizes={_plain(self.crop_sizes)}, train.crop_until={_plain(self.crop_until)}: give one"
                " epoch for each size"
            )
        if not _rise((0, *self.crop_until)):
            raise ConfigError(f"train.crop_until={_plain(self.crop_until)}: must be epochs that rise, from 1")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, and the learning rate over time."""

    name: Literal["sgd", "velocity", "lars"] = "sgd"
    """sgd: with momentum; velocity: the paper's form, the rate inside the velocity; lars: each layer has a rate."""
    lr: InHelp[NonNegativeFloat] = 0.01
    momentum: BelowOne = 0.9
    nesterov: bool = False
    weight_decay: InHelp[NonNegativeFloat] = 0.0
    clip_norm: NonNegativeFloat = 0.0
    """Maximum norm of the gradient; 0: no limit."""
    schedule: InHelp[Literal["constant", "step", "plateau", "poly", "cosine"]] = "constant"
    """step: by milestones; plateau: when evaluation stalls; poly, cosine: towards zero over the run."""
    milestones: tuple[float, ...] = ()
    """For step: epochs at which the rate is multiplied by factor."""
    factor: PositiveFraction = 0.1
    """For step and plateau: multiplies the rate."""
    plateau_patience: Positive = 5
    """For plateau: evaluations without a better top-1 before the rate is lowered."""
    plateau_drops: NonNegative = 3
    """For plateau: how often it is lowered at most."""
    power: NonNegativeFloat = 2.0
    """For poly: (1 - progress) to this power; progress includes the warm-up."""
    warmup_epochs: InHelp[NonNegativeFloat] = 0.0
    """Linear rise at the start."""
    warmup_from: NonNegativeFloat = 0.0
    """The rate at which the rise begins."""
    scale_lr: Literal["none", "linear"] = "none"
    """How lr follows train.batch: lr is for base_batch."""
    base_batch: Positive = 256
    biases: Literal["variant", "weights", "no-decay"] = "variant"
    """How biases are trained: as the variant's source does (original, caffe: twice the rate, no decay), or as named."""
    norms: Literal["weights", "no-decay"] = "weights"
    """How normalisation's own parameters are trained."""
    lars_eta: PositiveFraction = 0.001
    """For lars: a layer's step as a fraction of its weights' norm."""
    lars_clip: bool = False
    """For lars: take the smaller of lr and the layer's own rate (LARC), not their product."""

    def __post_init__(self) -> None:
        validate(self)
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ConfigError(f"optim.nesterov=True: needs optim.name=sgd and a momentum, not {self.name}")
        if self.schedule == "step" and not self.milestones:
            raise ConfigError("optim.milestones is empty: optim.schedule=step needs epochs, such as 30 60")
        if not _rise((0, *self.milestones, float("inf"))):
            raise ConfigError(f"optim.milestones={_plain(self.milestones)}: must be epochs that rise, above 0")
        if self.warmup_from and not self.warmup_epochs:
            raise ConfigError(f"optim.warmup_from={self.warmup_from}: set optim.warmup_epochs too")


@dataclass(frozen=True)
class RegularizeConfig:
    """Against overfitting, beside dropout, weight decay and crops."""

    label_smoothing: BelowOne = 0.0
    """Label smoothing: fraction spread over all classes."""
    ema: BelowOne = 0.0
    """Decay, at each update, of a moving average of the weights, which is evaluated and saved too; 0: none."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class RunConfig:
    """The run folder, and how the run reports."""

    dir: InHelp[PerHost[str]] = ""
    """Run folder; default: runs/<preset>."""
    seed: NonNegative = 0
    log_every: MayChange[Positive] = 20
    """Steps between two records of the loss; the host waits for the device only then."""
    save_every: InHelp[MayChange[NonNegative]] = 0
    """Steps between checkpoints within an epoch; 0: only at its end. A run resumes from any of them."""
    keep_checkpoints: MayChange[Positive] = 3
    trackers: MayChange[tuple[str, ...]] = ("tensorboard",)
    """Trackers that get the figures beside metrics.jsonl, by Accelerate's names: tensorboard, wandb, mlflow …"""
    record_ids: MayChange[bool] = False
    """Write each rank's sample ids of every step to ids/, to compare runs."""
    report: MayChange[bool] = True
    """Keep report.html's pictures in showcase.json, and write that page when the run ends."""
    ddp_backend: MayChange[Literal["auto", "nccl", "gloo"]] = "auto"
    """auto: NCCL between GPUs, gloo between CPUs; gloo also joins two ranks on one GPU."""
    deterministic: bool = False
    """On GPUs: kernels that give the same bits each time, slower. CPUs always do."""

    def __post_init__(self) -> None:
        validate(self)
        for name in self.trackers:
            _check_tracker(name)


@dataclass(frozen=True)
class GuardConfig:
    """The reaction of a run to errors; see docs/failures.md."""

    on_bad_numbers: Literal["stop", "skip"] = "stop"
    """A non-finite loss or gradient: stop exits with 76, skip omits the update and waits for a GPU at each step."""
    max_bad_steps: NonNegative = 10
    """Batches that skip may leave out over the run."""
    hang_seconds: NonNegativeFloat = 600.0
    """If a rank makes no step for so long, name it, write all stacks and exit with 77; 0: never."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """A checkpoint or record that cannot be written: stop exits with 74, continue reports it and retries next time."""

    def __post_init__(self) -> None:
        validate(self)
        if 0 < self.hang_seconds < 2:
            raise ConfigError(f"guard.hang_seconds={self.hang_seconds:g}: must be at least 2, or 0 to wait for ever")


RESUME_NEWEST = "newest"  # the value of --resume without an argument
FewImages = Annotated[int, Bounds(ge=0, le=100_000, choose="images to train on, such as 64, or 0 for a real run")]
FewSteps = Annotated[int, Bounds(ge=0, le=1000, choose="steps to trace, such as 10, or 0 for none")]


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    regularize: RegularizeConfig = RegularizeConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    loader: MayChange[LoaderConfig] = LoaderConfig()
    guard: MayChange[GuardConfig] = GuardConfig()
    run: RunConfig = RunConfig()
    resume: InHelp[PerHost[str]] = ""
    """A checkpoint folder to resume from; default: the newest that verifies, if any; a bare --resume requires one."""
    overfit: InHelp[FewImages] = 0
    """A check of the net: train on so many images alone, without augmentation and dropout, at a rate of at most 0.003,
    until all of them are right; exit code 1 if they never are."""
    limit_steps: InHelp[MayChange[NonNegative]] = 0
    """End after so many steps of the run, evaluated and saved; without it the same command resumes. 0: all epochs."""
    profile: InHelp[MayChange[FewSteps]] = 0
    """Steps of which torch's profiler makes a trace and a table in the run folder; 0: none."""

    def __post_init__(self) -> None:
        validate(self)
        train, crop, model = self.train, self.augment.crop, self.model.name
        if not train.crop_sizes:
            return
        sizes = f"train.crop_sizes={_plain(train.crop_sizes)}"
        if not _rise((0, *train.crop_sizes, crop)):
            alone = f"--augment.resize {crop * 9 // 8} --train.crop-sizes --train.crop-until"
            raise ConfigError(f"{sizes}: must be sizes that rise, all below augment.crop={crop}; or add {alone}")
        if self.augment.normalize == "mean-image":
            raise ConfigError(f"{sizes}: augment.normalize=mean-image is of one size; use mean or mean-std")
        if train.crop_until[-1] >= train.epochs:
            raise ConfigError(
                f"train.crop_until={_plain(train.crop_until)}, train.epochs={train.epochs}: augment.crop={crop} would"
                " never be trained; give earlier epochs, or neither crop_sizes nor crop_until"
            )
        if ":" not in model and not VARIANTS[model].any_crop:
            raise ConfigError(f"{sizes}: model.name={model} takes one size; use modern")

    def scaled_optim(self) -> OptimConfig:
        """Returns `optim` with its learning rates scaled to the global batch by `scale_lr`."""
        optim = self.optim
        factor = self.train.batch / optim.base_batch if optim.scale_lr == "linear" else 1.0
        lr, warmup_from = optim.lr * factor, optim.warmup_from * factor
        return dataclasses.replace(optim, lr=lr, warmup_from=warmup_from, scale_lr="none")

    def behind_the_end(self) -> list[str]:
        """Returns a line for each field whose epoch the run does not reach."""
        optim, end = self.optim, self.train.epochs
        epochs: dict[str, list[float]] = {
            "optim.milestones": [m for m in optim.milestones if m >= end and optim.schedule == "step"],
            "optim.warmup_epochs": [optim.warmup_epochs],
            "train.colour_epochs": [self.train.colour_epochs],
            "train.conv1_epochs": [self.train.conv1_epochs],
        }
        effects = {"optim.warmup_epochs": ", so optim.lr is not reached"}
        return [
            f"{name} {' '.join(f'{epoch:g}' for epoch in named)}: the run has {end} epochs{effects.get(name, '')}"
            for name, named in epochs.items()
            if named and named[-1] >= end
        ]

    def augment_at(self, epoch: int) -> AugmentConfig:
        """The augmentation of training images in an epoch, from 0: crops may grow, colour shifts may end."""
        train, augment = self.train, self.augment
        for size, until in zip(train.crop_sizes, train.crop_until):
            if epoch < until:
                augment = dataclasses.replace(augment, crop=size, resize=round(augment.resize * size / augment.crop))
                break
        if train.colour_epochs and epoch >= train.colour_epochs:
            augment = dataclasses.replace(augment, colour=0.0)
        return augment
