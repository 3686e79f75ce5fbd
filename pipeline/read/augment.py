"""The crop, flip and colour shift of each image. Pure: functions of coordinates, computed before any decoding."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy import ndarray

from ..errors import ConfigError
from ..geometry import centre, centre_offset, principal_axes, resized
from ..manifest import Dataset, Statistics
from ..settings import Bounds, InHelp, validate
from . import rng

# 255 times 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225, as used by the seed and torchvision
IMAGENET_STATISTICS = Statistics((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
TRIES = 10  # attempts to draw a random rectangle inside the image, as in torchvision's RandomResizedCrop


Pixels = Annotated[int, Bounds(ge=1, le=8192)]


@dataclass(frozen=True)
class AugmentConfig:
    """The view of an image that the net sees."""

    resize: InHelp[Pixels] = 256
    """Short side in pixels before the crop (antialiased); shards of this short side are not resized."""
    crop: InHelp[Pixels] = 224
    """Side of the square that the net sees: at a random place in training, in the centre in evaluation."""
    square: bool = True
    """Take training crops and ten views from the centre square only, as the paper does, not from the whole image."""
    scale_jitter: tuple[float, float] | None = None
    """Random resized crop in training: smallest and largest fraction of the image's area; None: a fixed size."""
    aspect_jitter: tuple[float, float] = (3 / 4, 4 / 3)
    """Its smallest and largest aspect ratio."""
    flip: bool = True
    """Mirror half of the training images."""
    views: Literal[1, 10] = 1
    """Views of each image in evaluation. 1: the centre; 10: the corners, the centre and their mirror images."""
    colour: Annotated[float, Bounds(ge=0, lt=100, choose="0 (none) or a deviation such as 0.1")] = 0.0
    """Standard deviation of the training images' shift along the colours' principal axes; the paper's is 0.1."""
    colour_by: Literal["eigenvalue", "deviation"] = "eigenvalue"
    """Unit of the shift: the axis's eigenvalue λ (the paper), or √λ (the original code); of pixels in [0, 1]."""
    normalize: Literal["mean", "mean-std", "mean-image"] = "mean"
    """Subtract each channel's mean, also divide by its deviation, or subtract the mean image (the paper)."""
    statistics: Literal["dataset", "imagenet"] = "dataset"
    """Mean and deviation: the dataset's, measured when the shards were made, or torchvision's for ImageNet."""

    def __post_init__(self) -> None:
        validate(self)
        if self.crop > self.resize:
            raise ConfigError(
                f"augment.crop={self.crop} is larger than augment.resize={self.resize}; a crop lies inside the image"
            )
        for name, greatest in (("scale_jitter", 1), ("aspect_jitter", 100)):
            pair = getattr(self, name)
            if pair is not None and (len(pair) != 2 or not 0 < pair[0] <= pair[1] <= greatest):
                raise ConfigError(f"augment.{name}={pair}: choose two numbers, 0 < least ≤ greatest ≤ {greatest}")
        if self.normalize == "mean-image" and self.statistics == "imagenet":
            raise ConfigError("augment.normalize=mean-image goes with statistics=dataset: a mean image is measured")


class Placement(NamedTuple):
    """The crop boxes of n images. A crop is a rectangle of the stored image, resampled to crop × crop pixels.

    Its box is the crop's box in the resized image, scaled back to the stored image. Resampling the box gives the pixels
    of resizing the whole image and cropping, up to rounding, at a fraction of the cost.
    """

    box: ndarray  # (n, views, 4) float64: left, top, width, height in pixels of the image as stored
    flip: ndarray  # (n, views) bool


def place(config: AugmentConfig, ids: ndarray, size: ndarray, *, train: bool, **at: int) -> Placement:
    """Returns the crops of images `ids`; a pure function of its arguments.

    size: (n, 2) int64, width and height as stored. at: seed and epoch. One crop per image in training, `config.views`
    in evaluation.
    """
    scaled, crop = np.stack(resized(size[:, 0], size[:, 1], config.resize), axis=1), config.crop
    scale = size / scaled
    # In the centre square, crops begin at 0..32 for 224 in 256, ends included, as in the original code.
    side = np.full_like(scaled, config.resize) if config.square else scaled
    first, room = centre_offset(scaled, side), side - crop
    if train:
        draw = partial(rng.uniform, ids, **at)
        flip = config.flip & (draw(stream=rng.FLIP, count=1) < 0.5)
        u = draw(stream=rng.CROP, count=2)
        if config.scale_jitter is not None:
            tries = draw(stream=rng.JITTER, count=2 * TRIES)
            return Placement(_jittered(*config.scale_jitter, *config.aspect_jitter, size, tries, u)[:, None], flip)
        places = [first + (u * (room + 1)).astype(np.int64)]
    else:
        places = [centre_offset(scaled, crop)]
        if config.views == 10:
            places = [first + room * corner for corner in ([0, 0], [1, 0], [0, 1], [1, 1])] + places
        flip = np.tile(np.arange(config.views) >= len(places), (len(ids), 1))  # the mirror images come last
    # Boxes in whole pixels of the resized image become boxes of the stored image, which is `scale` times as large.
    boxes = np.stack([np.concatenate([place * scale, crop * scale], axis=1) for place in places], axis=1)
    return Placement(np.tile(boxes, (1, flip.shape[1] // len(places), 1)), flip)


def _jittered(
    least: float, most: float, narrow: float, wide: float, size: ndarray, u: ndarray, where: ndarray
) -> ndarray:
    """Random resized crops (Szegedy et al. 2014; torchvision's RandomResizedCrop): area and aspect ratio are drawn
    until the rectangle fits; after TRIES attempts it is the largest centred one of an allowed aspect ratio.

    u: (n, 2 · TRIES), where: (n, 2): uniform random numbers. Returns (n, 4): left, top, width, height in whole pixels.
    """
    u = u.reshape(-1, TRIES, 2)
    area = size.prod(1)[:, None] * (least + (most - least) * u[..., 0])
    aspect = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * u[..., 1])
    tries = np.rint(np.sqrt(np.stack([area * aspect, area / aspect], axis=2))).astype(np.int64)
    fits = ((tries > 0) & (tries <= size[:, None])).all(2)
    chosen = np.arange(len(u)), np.argmax(fits, axis=1)
    found = fits[chosen][:, None]
    largest = np.rint(np.stack([size[:, 1] * wide, size[:, 0] / narrow], axis=1)).astype(np.int64)
    sides = np.where(found, tries[chosen], np.minimum(size, largest))
    place = np.where(found, (where * (size - sides + 1)).astype(np.int64), centre_offset(size, sides))
    return np.concatenate([place, sides], axis=1).astype(np.float64)


def colour_shift(config: AugmentConfig, ids: ndarray, covariance: ndarray, **at: int) -> ndarray:
    """Returns the grey levels to add to each channel, (n, 3) float32 (Krizhevsky et al. 2012, section 4.1).

    covariance: (3, 3), of the training images' R, G, B in grey levels. The shift is P · (α ⊙ λ), or √λ in place of λ;
    P and λ are eigenvectors and eigenvalues of the covariance of pixels in [0, 1], and α is drawn from N(0, colour²).
    """
    values, axes = principal_axes(np.asarray(covariance, np.float64) / 255**2)
    size = np.sqrt(values.clip(0)) if config.colour_by == "deviation" else values
    alpha = config.colour * rng.normal(ids, stream=rng.COLOUR, count=3, **at)
    return np.asarray(255 * (alpha * size) @ axes.T, np.float32)


class Normalisation(NamedTuple):
    """Pixels become (x - mean) / std, or (x - image) if there is a mean image."""

    mean: ndarray  # (3,) float32
    std: tuple[float, ...]
    image: ndarray | None  # (3, crop, crop) float32


def normalisation(config: AugmentConfig, measured: Statistics | Dataset) -> Normalisation:
    """Returns the configured normalisation. Raises ConfigError if a mean image is missing or has another size."""
    measured = IMAGENET_STATISTICS if config.statistics == "imagenet" else measured
    mean, std = measured.mean, measured.std
    image = None
    if config.normalize == "mean-image":
        if measured.mean_image is None:
            raise ConfigError("augment.normalize=mean-image: the statistics hold no mean image")
        if len(measured.mean_image) != config.resize:
            raise ConfigError(
                f"augment.resize={config.resize} but the mean image was measured at {len(measured.mean_image)} pixels;"
                f" shard the data with --size {config.resize}, or use normalize=mean"
            )
        # The same centre of the mean image for every crop, as in the 2012 code.
        image = np.ascontiguousarray(centre(measured.mean_image, config.crop).transpose(2, 0, 1))
        mean = (0.0, 0.0, 0.0)
    divisors = std if config.normalize == "mean-std" else (1.0,) * 3
    # The deviation of a channel that never varies is 0.
    return Normalisation(np.array(mean, np.float32), tuple(each or 1.0 for each in divisors), image)
