"""Recipes by name. Each docstring gives the command, what to expect, and on what it was measured."""

from __future__ import annotations

from model import ModelConfig
from pipeline.read.augment import AugmentConfig

from .config import Config, OptimConfig, RunConfig, TrainConfig


def seed() -> Config:
    """The document that this project comes from: its single tower, its crops, its SGD, 15 epochs.

    accelerate launch train/run.py seed --data.shards /data/shards
    Expected accuracy: not measured. Hours: not measured.
    """
    return Config(
        train=TrainConfig(epochs=15, batch=128),
        optim=OptimConfig(lr=0.01, momentum=0.9),
        model=ModelConfig(name="seed"),
        augment=AugmentConfig(resize=256, crop=224, normalize="mean-std", statistics="imagenet"),
    )


def demo() -> Config:
    """A quarter-width AlexNet for 32-pixel crops: the embedded digits in a minute or two on two cores.

    make demo
    Digits and CIFAR-10: docs/results.md.
    He's initialisation, since the paper's is for the full width. No flips: a mirrored 2 is no digit.
    """
    return Config(
        train=TrainConfig(epochs=12, batch=64, compile="off"),
        optim=OptimConfig(lr=0.02, momentum=0.9, weight_decay=5e-4, schedule="cosine", warmup_epochs=3),
        model=ModelConfig(name="small", width=0.25, weight_init="he"),
        augment=AugmentConfig(resize=36, crop=32, flip=False, normalize="mean-std"),
        run=RunConfig(log_every=10),
    )


PRESETS = {"demo": demo(), "seed": seed()}
