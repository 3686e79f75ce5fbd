"""Sizes and offsets in whole pixels, and principal axes: the same rules for the sharder and every loader backend."""

from typing import TypeVar

import numpy as np
from numpy import ndarray

Pixels = TypeVar("Pixels", int, ndarray)


def resized(width: Pixels, height: Pixels, short: int) -> tuple[Pixels, Pixels]:
    """Returns (width, height) after resizing the short side to `short`; for scalars or arrays.

    The long side is rounded down to whole pixels, as in torchvision's Resize, and is at least 1.
    """
    shorter = np.minimum(width, height)
    return short * width // shorter, short * height // shorter


def principal_axes(covariance: ndarray) -> tuple[ndarray, ndarray]:
    """Returns the eigenvalues, ascending, and the unit eigenvectors as columns.

    The sign of an eigenvector is arbitrary and differs between libraries: here its largest component is positive.
    """
    values, axes = np.linalg.eigh(covariance)
    return values, axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(len(values))])


def centre_offset(length: int | ndarray, part: int | ndarray) -> ndarray:
    """The start of `part` centred pixels in `length`; a half is rounded to even, as in torchvision's CenterCrop."""
    return np.asarray(np.rint((np.asarray(length) - part) / 2), np.int64)


def centre(pixels: ndarray, side: int) -> ndarray:
    """(side, side, 3), contiguous: the centre of (h, w, 3). An odd margin is split as by torchvision's CenterCrop."""
    top, left = centre_offset(np.array(pixels.shape[:2]), side)
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])
