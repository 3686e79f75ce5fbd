"""Where each image is cropped, and whether it is flipped. Pure: whole pixels from coordinates, before any decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ..errors import ConfigError
from ..geometry import centre_offset, resized
from . import draws

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # 0.485, 0.456, 0.406 of 255, as the seed and torchvision use them
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class AugmentConfig:
    """The view of an image that the net sees."""

    resize: int = 256
    """Short side in pixels before the crop (antialiased); shards of this short side are not resized again."""
    crop: int = 224
    """Side of the square that the net sees: at a random place in training, in the centre in evaluation."""
    square: bool = True
    """Take training crops from the centre square only, as the paper does, not from the whole image."""
    flip: bool = True
    """Mirror half of the training images."""
    normalize: Literal["mean", "mean-std"] = "mean"
    """Subtract the mean (the paper), or also divide by the standard deviation; per channel."""
    statistics: Literal["dataset", "imagenet"] = "dataset"
    """Whose mean and deviation: measured when the shards were made, or torchvision's for ImageNet."""

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            if not 1 <= getattr(self, name) <= 8192:
                raise ConfigError(f"augment.{name}={getattr(self, name)}: choose 1 to 8192 pixels")
        if self.crop > self.resize:
            raise ConfigError(
                f"augment.crop={self.crop} is larger than augment.resize={self.resize}; a crop lies inside the image"
            )
        if self.normalize not in ("mean", "mean-std"):
            raise ConfigError(f"augment.normalize={self.normalize}: choose mean or mean-std")
        if self.statistics not in ("dataset", "imagenet"):
            raise ConfigError(f"augment.statistics={self.statistics}: choose dataset or imagenet")


class Placement(NamedTuple):
    """Where the crop of each of n images lies. All fields (n,) int64, in pixels; flip is 0 or 1."""

    width: np.ndarray  # of the resized image
    height: np.ndarray
    left: np.ndarray  # of the crop in the resized image
    top: np.ndarray
    flip: np.ndarray

    def source_box(self, width: np.ndarray, height: np.ndarray, crop: int) -> tuple[np.ndarray, np.ndarray]:
        """The crop in pixels of the image as stored: (n, 2) float32 start and end, as (y, x)."""
        scale = np.stack([height / self.height, width / self.width], axis=1)
        start = np.stack([self.top, self.left], axis=1)
        return (start * scale).astype(np.float32), ((start + crop) * scale).astype(np.float32)


def place(
    config: AugmentConfig, ids: np.ndarray, width: np.ndarray, height: np.ndarray, *, seed: int, epoch: int, train: bool
) -> Placement:
    """The crops of images `ids` of stored size width × height; a function of its arguments alone."""
    w, h = resized(width.astype(np.int64), height.astype(np.int64), config.resize)
    if not train:
        return Placement(w, h, centre_offset(w, config.crop), centre_offset(h, config.crop), np.zeros_like(w))
    u = draws.uniform(ids, seed=seed, epoch=epoch, stream=draws.CROP, count=2)
    left, top = (_random_offset(config, length, u[:, axis]) for axis, length in enumerate((w, h)))
    flip = draws.uniform(ids, seed=seed, epoch=epoch, stream=draws.FLIP, count=1)[:, 0] < 0.5
    return Placement(w, h, left, top, (flip & config.flip).astype(np.int64))


def _random_offset(config: AugmentConfig, length: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Uniform over all places of the crop, ends included: 0..32 for 224 in 256, as the original code."""
    if not config.square:
        return np.asarray(u * (length - config.crop + 1)).astype(np.int64)
    inside = (u * (config.resize - config.crop + 1)).astype(np.int64)
    return centre_offset(length, config.resize) + inside
