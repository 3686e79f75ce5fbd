"""One run's configuration: frozen dataclasses, each validating itself, composed from the packages that own them.

Order of precedence: preset < flags. Every error names the field and its value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import re
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import tyro

from model import ModelConfig
from pipeline.errors import ConfigError
from pipeline.read.augment import AugmentConfig
from pipeline.read.loader import LoaderConfig


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


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, in which precision."""

    epochs: int = 15
    batch: int = 128
    """Global batch: images a step over all ranks."""
    eval_batch: int = 256
    """Images a step in evaluation, over all ranks; changes nothing but memory and speed."""
    precision: Literal["launcher", "fp32", "bf16", "fp16"] = "launcher"
    """launcher: what accelerate launch --mixed_precision says."""
    compile: Literal["auto", "off", "norm", "model"] = "auto"
    """What torch.compile gets: the whole model (auto on a GPU), response normalisation alone (auto elsewhere, where it
    is faster), nothing."""

    def __post_init__(self) -> None:
        _at_least(self, "train", epochs=1, batch=1, eval_batch=1)
        _one_of(self, "train", precision=("launcher", "fp32", "bf16", "fp16"))
        _one_of(self, "train", compile=("auto", "off", "norm", "model"))


@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum, and the learning rate over time."""

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine falls towards zero over the run."""
    biases: Literal["variant", "weights"] = "variant"
    """How biases are trained: as the variant's source does (original and caffe: twice the rate, no decay), or like
    weights."""
    warmup_epochs: float = 0.0
    """Linear rise from zero at the start."""

    def __post_init__(self) -> None:
        _at_least(self, "optim", lr=0.0, momentum=0.0, weight_decay=0.0, warmup_epochs=0.0)
        _one_of(self, "optim", schedule=("constant", "cosine"), biases=("variant", "weights"))
        if self.momentum >= 1:
            raise ConfigError(f"optim.momentum={self.momentum}: must be below 1")


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
    record_ids: bool = False
    """Write each rank's sample ids of every step to ids/, to compare runs."""
    ddp_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: NCCL between GPUs, gloo between CPUs; gloo also joins two ranks on one GPU."""
    deterministic: bool = False
    """On GPUs: kernels that give the same bits each time, slower. CPUs always do."""

    def __post_init__(self) -> None:
        _at_least(self, "run", seed=0, log_every=1, save_every=0, keep_checkpoints=1)
        _one_of(self, "run", ddp_backend=("auto", "nccl", "gloo"))


@dataclass(frozen=True)
class GuardConfig:
    """What a run does when something goes wrong; see docs/failures.md."""

    on_bad_numbers: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is NaN or infinite: end with 76; leave the update out; or go back to the last checkpoint
    and leave that batch out. skip and rollback wait for a GPU at every step."""
    max_bad_steps: int = 10
    """Batches that skip and rollback may leave out over the run."""
    hang_seconds: float = 600.0
    """A rank that makes no step for so long is named, all stacks are kept, the run ends with 77; 0: waits for ever."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """A checkpoint or record that cannot be written: end with 74, or say so, train on and try again at the next one."""

    def __post_init__(self) -> None:
        _at_least(self, "guard", max_bad_steps=0, hang_seconds=0.0)
        _one_of(self, "guard", on_bad_numbers=("stop", "skip", "rollback"), on_save_error=("stop", "continue"))
        if 0 < self.hang_seconds < 2:
            raise ConfigError(f"guard.hang_seconds={self.hang_seconds:g}: at least 2, or 0 to wait for ever")


@dataclass(frozen=True)
class Config:
    """All of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
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

    def __post_init__(self) -> None:
        if not 0 <= self.overfit <= 100_000:
            raise ConfigError(f"overfit={self.overfit}: choose 1 to 100,000 images, such as 64, or 0 for a real run")


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


RESUME_NEWEST = "newest"


def parse(argv: list[str], presets: dict[str, Config], *, prog: str) -> Config:
    """The configuration that `argv` (preset first, then flags) asks for. Raises ConfigError; exits for --help."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(presets, prog))
        raise SystemExit(0 if argv else 2)
    preset, *flags = argv
    if preset not in presets:
        raise ConfigError(f"unknown preset {preset!r}{_did_you_mean(preset, presets)}; presets: {', '.join(presets)}")
    flags = _expand_resume(flags)
    _refuse_unknown(flags, presets[preset])
    config = _tyro(flags, _for_net_of(flags, presets[preset]), prog=f"{prog} {preset}")
    if not config.run.dir:
        folder = f"runs/{preset}-overfit" if config.overfit else f"runs/{preset}"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder))
    if not config.data.shards:
        raise ConfigError("data.shards is not set; name a folder made by tools/make_shards.py with --data.shards DIR")
    return overfitting(config) if config.overfit else config


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
        ),
        optim=dataclasses.replace(
            config.optim,
            lr=min(config.optim.lr, OVERFIT_RATE),
            schedule="constant",
            warmup_epochs=OVERFIT_WARMUP,
            weight_decay=0.0,
        ),
        augment=dataclasses.replace(
            a,
            resize=a.crop,
            flip=False,
            colour=0.0,
            scale_jitter=None,
            normalize="mean" if a.normalize == "mean-image" else a.normalize,
        ),
    )


def _help(presets: dict[str, Config], prog: str) -> str:
    return (
        f"usage: accelerate launch {prog} PRESET --data.shards DIR [--group.field VALUE ...]\n\n"
        f"presets: {', '.join(presets)}\n"
        f"fields and their values in a preset: python {prog} PRESET --help"
    )


def _expand_resume(flags: list[str]) -> list[str]:
    """A bare --resume means the newest checkpoint; the command line library knows no optional values."""
    out = []
    for flag, following in zip_longest(flags, flags[1:], fillvalue="--"):
        out.append(flag)
        if flag == "--resume" and following.startswith("--"):
            out.append(RESUME_NEWEST)
    return out


def _refuse_unknown(flags: list[str], preset: Config) -> None:
    """Names an unknown field before the parser does, with the nearest known one."""
    known = flatten(preset)
    negations = [re.sub(r"([^.]+)$", r"no_\1", name) for name, value in known.items() if isinstance(value, bool)]
    names = {*known, *negations, "help"}
    for flag in flags:
        name = flag[2:].split("=")[0].replace("-", "_")
        if flag.startswith("--") and name not in names:
            raise ConfigError(f"unknown field {flag.split('=')[0]}{_did_you_mean(name, names)}")


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _for_net_of(flags: list[str], preset: Config) -> Config:
    """Where a flag asks for another library's net, without the preset's switches of an AlexNet."""
    for flag, following in zip_longest(flags, flags[1:], fillvalue=""):
        name, _, value = flag.partition("=")
        if name == "--model.name" and ":" in (value or following):
            return dataclasses.replace(preset, model=ModelConfig())
    return preset


class _Box(io.StringIO):
    """What tyro prints into; it draws frames of dashes where it is told of no encoding."""

    encoding = "utf-8"


def _tyro(flags: list[str], preset: Config, *, prog: str) -> Config:
    printed = _Box()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Config, default=preset, args=flags, prog=prog)
    except ValueError as err:  # of packages that know no ConfigError of ours
        raise ConfigError(str(err)) from err
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(_first_sentence(printed.getvalue())) from end


def _first_sentence(box: str) -> str:
    """What stands between the frame's top and its first rule, on one line."""
    lines = []
    for line in box.splitlines():
        text = line.strip("│ ")
        if text.startswith("─"):
            break
        if not line.startswith("╭"):
            lines.append(text)
    return " ".join(lines) or box.strip()
