"""Sizes and offsets in whole pixels, and the axes of colours: one rule for the sharder and every loader backend."""

from typing import TypeVar

import numpy as np
from numpy import ndarray

Pixels = TypeVar("Pixels", int, ndarray)


def resized(width: Pixels, height: Pixels, short: int) -> tuple[Pixels, Pixels]:
    """(width, height) after the short side became `short`; scalars or arrays alike.

    The long side is cut to whole pixels, as torchvision's Resize does, and never below one.
    """
    shorter = np.minimum(width, height)
    return short * width // shorter, short * height // shorter


def principal_axes(covariance: ndarray) -> tuple[ndarray, ndarray]:
    """Its eigenvalues, ascending, and in columns its eigenvectors, of unit length.

    An eigenvector may point either way, and libraries differ: here its largest component is positive.
    """
    values, axes = np.linalg.eigh(covariance)
    return values, axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(len(values))])


def centre_offset(length: int | ndarray, part: int | ndarray) -> ndarray:
    """The start of a centred `part` of `length` pixels; a half rounds to even, as torchvision's CenterCrop."""
    return np.asarray(np.rint((np.asarray(length) - part) / 2), np.int64)


def centre(pixels: ndarray, side: int) -> ndarray:
    """(side, side, 3), contiguous: the centre of (h, w, 3). An odd margin is split as by torchvision's CenterCrop."""
    top, left = centre_offset(np.array(pixels.shape[:2]), side)
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])
