"""Recipes by name. Each docstring gives the command, what to expect with its source, and on what, in how many hours."""

import inspect
from typing import Any

from model import ModelConfig
from pipeline.read.augment import AugmentConfig
from pipeline.read.config import DataConfig
from pipeline.settings import flatten, updated

from .config import Config, OptimConfig, RegularizeConfig, RunConfig, TrainConfig

# The recipe that all of 2012 has in common, with the default momentum of 0.9, which every preset keeps.
PAPER: dict[str, Any] = {"lr": 0.01, "weight_decay": 5e-4}


def demo() -> Config:
    """A quarter-width AlexNet for 32-pixel crops: the embedded digits in 16 seconds on two cores.

    make demo
    Expected top-1: 98.6 % on 359 held-out digits, 75.1 % on CIFAR-10 in 10 epochs (docs/results.md).
    Hours: 0.005 on two cores.
    He's initialisation, since the paper's is for the full width. No flips: a mirrored 2 is no digit.
    """
    return Config(
        train=TrainConfig(epochs=12, batch=64, compile="off"),
        optim=OptimConfig(lr=0.02, weight_decay=5e-4, schedule="cosine", warmup_epochs=3),
        model=ModelConfig(name="small", width=0.25, weight_init="he"),
        augment=AugmentConfig(resize=36, crop=32, flip=False, normalize="mean-std"),
        run=RunConfig(log_every=10),
    )


def seed() -> Config:
    """The document that this project comes from: its single tower, its crops, its SGD, 15 epochs.

    python train/run.py seed --data.shards /data/shards
    Expected top-1 on ImageNet: not measured; the document gives none.
    Hours: not measured.
    """
    return Config(
        train=TrainConfig(epochs=15, batch=128),
        optim=OptimConfig(lr=0.01),
        model=ModelConfig(name="seed"),
        augment=AugmentConfig(normalize="mean-std", statistics="imagenet"),
    )


def paper() -> Config:
    """The paper as it says: two towers, its formula of LRN, mean image, colour shifts, rate ÷10 on a plateau.

    python train/run.py paper --data.shards /data/shards
    Expected top-1 / top-5 on ILSVRC-2012, ten views: 59.3 / 81.8 % (the paper's table 2); by us: not measured.
    Hours: not measured.
    Needs shards with statistics of short side 256, as make_shards.py makes them.
    """
    return Config(
        train=TrainConfig(epochs=90, batch=128),
        optim=OptimConfig(name="velocity", **PAPER, schedule="plateau"),
        model=ModelConfig(name="paper"),
        augment=AugmentConfig(colour=0.1, colour_by="eigenvalue", normalize="mean-image"),
    )


def original() -> Config:
    """The code of 2012: LRN within towers, its initial weights, rates by hand, colours and conv1 at rest in the end.

    python train/run.py original --data.shards /data/shards
    Expected top-1 / top-5 on ILSVRC-2012, ten views: 59.34 / 81.79 %, from the code's own logs; by us: not measured.
    Hours: not measured.
    The rates fall at epochs 25, 51 and 79 of 93, as in the run on 2012's images. Crops and flips are drawn for each
    image, not for 32 together, and pixels are not divided by 1.1 after the colour shift.
    """
    return Config(
        train=TrainConfig(epochs=93, batch=128, colour_epochs=67, conv1_epochs=72),
        optim=OptimConfig(name="velocity", **PAPER, schedule="step", milestones=(25, 51, 79)),
        model=ModelConfig(name="original"),
        augment=AugmentConfig(colour=0.1, colour_by="deviation", normalize="mean-image"),
    )


def caffe() -> Config:
    """BVLC's AlexNet: crops of 227, k = 1 in LRN, smaller biases, the rate ÷10 every 20 epochs.

    python train/run.py caffe --data.shards /data/shards
    Expected top-1 / top-5 on ILSVRC-2012, centre crop: 57.1 / 80.2 % (BVLC's model zoo); by us: not measured.
    Hours: not measured.
    450,000 steps of 256 are 90 epochs. BVLC squeezed images to squares of 256, and subtracted the mean image at the
    crop's own place; here the short side is 256, and each crop gets the mean image's centre.
    """
    return Config(
        train=TrainConfig(epochs=90, batch=256),
        optim=OptimConfig(name="velocity", **PAPER, schedule="step", milestones=(20, 40, 60, 80)),
        model=ModelConfig(name="caffe"),
        augment=AugmentConfig(crop=227, normalize="mean-image"),
    )


def torchvision() -> Config:
    """torchvision's AlexNet by its reference recipe: no LRN, random resized crops, the rate ÷10 every 30 epochs.

    python train/run.py torchvision --data.shards /data/shards
    Expected top-1 / top-5 on ILSVRC-2012, centre crop: 56.5 / 79.1 % (its documentation); by us: not measured.
    Hours: not measured.
    The checkpoints' weights load into torchvision.models.alexnet.
    """
    return Config(
        train=TrainConfig(epochs=90, batch=256),
        optim=OptimConfig(lr=0.01, weight_decay=1e-4, schedule="step", milestones=(30, 60)),
        model=ModelConfig(name="torchvision"),
        augment=AugmentConfig(scale_jitter=(0.08, 1.0), square=False, normalize="mean-std", statistics="imagenet"),
    )


def modern() -> Config:
    """The best an AlexNet can be: batch normalisation, cosine, label smoothing, averaged weights, growing crops.

    python train/run.py modern --data.shards /data/shards --train.precision bf16
    Expected top-1 on ImageNet: not measured; 60.4 % is published for an AlexNet with batch normalisation (HolmesShuan).
    CIFAR-10, narrow: make accuracy (docs/results.md).
    Hours: not measured.
    """
    return Config(
        train=TrainConfig(epochs=90, batch=1024, crop_sizes=(128, 160, 192), crop_until=(25, 45, 65)),
        optim=OptimConfig(
            lr=0.1,
            nesterov=True,
            weight_decay=1e-4,
            schedule="cosine",
            warmup_epochs=5,
            scale_lr="linear",
            biases="no-decay",
            norms="no-decay",
        ),
        regularize=RegularizeConfig(label_smoothing=0.1, ema=0.9999),
        model=ModelConfig(name="modern", norm="bn"),
        augment=AugmentConfig(scale_jitter=(0.25, 1.0), square=False, normalize="mean-std"),
    )


def large_batch() -> Config:
    """8,192 images a step with a rate for each layer (LARC): for many GPUs. Other batches: the rate follows.

    accelerate launch --config_file docker/accelerate/8gpu.yaml train/run.py large-batch --data.shards /data/shards
    Expected top-1 on ImageNet: 58.7 % in 95 epochs (Jia et al. 2018, arXiv 1807.11205); by us: not measured.
    Hours: not measured.
    The recipe of NVIDIA's Caffe, models/alexnet_bn: 8K: rate 10, warm-up of 600 steps from 1. Its others are not on one
    line: 16K: --optim.lr 24, 32K: --optim.lr 32, each with --optim.scale-lr none and a warm-up of 400 steps.
    """
    return Config(
        train=TrainConfig(epochs=100, batch=8192),
        optim=OptimConfig(
            name="lars",
            lr=10.0,
            weight_decay=5e-4,
            schedule="poly",
            warmup_epochs=3.84,
            warmup_from=1.0,
            scale_lr="linear",
            base_batch=8192,
            norms="no-decay",
            biases="no-decay",
            lars_clip=True,
        ),
        model=ModelConfig(name="modern", norm="bn"),
        augment=AugmentConfig(normalize="mean"),
    )


def fig1() -> Config:
    """The paper's figure 1: four layers on CIFAR-10, trained until a quarter of the training images are wrong.

    python train/run.py fig1 --data.shards shards/cifar10 --model.activation tanh
    Expected: ReLU six times as fast as tanh (the paper's claim); found by us: 8 epochs of ReLU at a rate of 0.003, 6 of
    tanh at 0.01 (docs/results.md).
    Hours: 0.1 on one core.
    No regularisation, as there; evaluation is of the training images. The paper gives neither sizes nor rates.
    """
    return Config(
        data=DataConfig(val_split="train"),
        train=TrainConfig(epochs=60, batch=128, stop_at=0.75),
        optim=OptimConfig(lr=0.01),
        model=ModelConfig(name="fig1"),
        augment=AugmentConfig(resize=32, crop=32, flip=False, normalize="mean-std"),
        run=RunConfig(log_every=50),
    )


def finetune() -> Config:
    """Trained weights on a few hundred images of your own: a new output layer, few epochs, random crops and flips.

    python train/run.py finetune --data.shards shards/mine --model.init runs/base
    Expected top-1: 80 % on 100 held-out images of CIFAR-10, from 80 of each of five classes (docs/own-images.md).
    Hours: 0.01 on two cores, for 400 images of 32 pixels.
    If the weights record their net and the size of their images, as a run and an exported file do, these are taken from
    there; otherwise they are torchvision's AlexNet and 224 of 256 pixels, and --model.name names another net.
    """
    return Config(
        train=TrainConfig(epochs=20, batch=32),
        optim=OptimConfig(lr=0.01, weight_decay=5e-4, schedule="cosine", warmup_epochs=1),
        model=ModelConfig(name="torchvision"),
        augment=AugmentConfig(scale_jitter=(0.5, 1.0), square=False, normalize="mean-std", statistics="imagenet"),
        run=RunConfig(log_every=10),
    )


_ALL = {
    f.__name__.replace("_", "-"): f
    for f in (demo, seed, paper, original, caffe, torchvision, modern, large_batch, finetune, fig1)
}
PRESETS = {name: make() for name, make in _ALL.items()}
DESCRIPTIONS = {name: inspect.getdoc(make) or "" for name, make in _ALL.items()}
FINETUNE = finetune.__name__


OVERFIT_EPOCHS = 400  # at least, of few images
# A net that sees the same few images at every step diverges at rates that many images bear: after a step or two every
# ReLU may be silent for good.
OVERFIT_RATE, OVERFIT_WARMUP = 0.003, 20  # at most; epochs


# Fields that return to their defaults, which do nothing.
UNUSED_IN_OVERFITTING = """
    data.partitions data.window train.accumulate train.eval_every train.stop_at train.colour_epochs train.conv1_epochs
    train.crop_sizes train.crop_until optim.schedule optim.milestones optim.scale_lr optim.warmup_from
    optim.weight_decay regularize.label_smoothing regularize.ema augment.colour augment.scale_jitter"""


def overfitting(config: Config) -> Config:
    """The same run on few images, alike in every epoch, so that only the net and its training are tested."""
    train, optim, augment, defaults = config.train, config.optim, config.augment, flatten(Config())
    changes = {
        **{name: defaults[name] for name in UNUSED_IN_OVERFITTING.split()},
        "data.val_split": config.data.train_split,
        "train.batch": min(train.batch, config.overfit),
        "train.epochs": max(train.epochs, OVERFIT_EPOCHS),
        "optim.name": "sgd" if optim.name == "lars" else optim.name,  # its rates are no bound
        "optim.lr": min(optim.lr, OVERFIT_RATE),
        "optim.warmup_epochs": OVERFIT_WARMUP,
        "augment.resize": augment.crop,
        "augment.flip": False,
        "augment.normalize": "mean" if augment.normalize == "mean-image" else augment.normalize,
    }
    return updated(config, changes)


ENLARGED = 1.5  # times: from here on an image costs more than twice the work, and shows nothing more
WEIGHTS_PER_IMAGE = 2000  # more of them learn few images by heart


def advice(config: Config, *, images: int, short_side: int, weights: int) -> list[str]:
    """Warnings, with the flags to set, about a net from scratch whose images are enlarged or too few.

    images: for training. short_side: their median, in pixels. weights: of the net.
    """
    lines, resize = [], config.augment.resize
    if config.model.init:
        return []
    if resize > ENLARGED * short_side:
        name = "" if ":" in config.model.name else f"--model.name {'modern' if short_side >= 63 else 'small'} "
        sizes = f"--augment.resize {short_side * 9 // 8} --augment.crop {short_side}"
        alone = " --train.crop-sizes --train.crop-until" if config.train.crop_sizes else ""
        lines.append(f"images are enlarged {resize / short_side:.1f} times; at their own size: {name}{sizes}{alone}")
    if weights > WEIGHTS_PER_IMAGE * images:
        few = f"{images:,} images are few for {weights:,} weights"
        lines.append(f"{few}; start from trained ones: {FINETUNE} --model.init WEIGHTS")
    return [f"warning: {line} (docs/own-images.md)" for line in lines]
