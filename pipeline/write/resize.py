"""The sharder's inner loops: resizing and adding up, in whole numbers, compiled by Numba."""

from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from ..decode import Scratch
from ..geometry import centre, centre_offset, resized
from ..jit import compiled
from ..resample import resample, triangle

u = np.uintp
_memory = Scratch()


@compiled
def _resize(
    pixels: ndarray, width: int, height: int, left: int, top: int, x_scale: float, y_scale: float, out: ndarray
) -> None:
    """out: (rows, columns, 3) uint8, from (left, top) on, of the image resized by the scales."""
    x, y = triangle(left, x_scale, width, out.shape[1], False), triangle(top, y_scale, height, out.shape[0], False)
    unused = np.zeros(3, np.float32)
    resample(pixels, 0, width, width, height, x, y, out.reshape(-1), 0, True, unused, 0, unused)


@compiled
def _add(square: ndarray, pixels: ndarray, image: ndarray, sums: ndarray) -> None:
    """Adds `square` to `image`, and the sums of r, g, b, rr, rg, rb, gg, gb and bb over `pixels` to `sums`, nine int64.
    All arrays are flat."""
    image += square
    s0 = s1 = s2 = rr = rg = rb = gg = gb = bb = np.int64(0)
    for p in range(u(0), u(len(pixels)), u(3)):
        r, g, b = np.int64(pixels[p]), np.int64(pixels[p + u(1)]), np.int64(pixels[p + u(2)])
        s0 += r
        s1 += g
        s2 += b
        rr += r * r
        rg += r * g
        rb += r * b
        gg += g * g
        gb += g * b
        bb += b * b
    sums += np.array((s0, s1, s2, rr, rg, rb, gg, gb, bb))


def resize(pixels: ndarray, short: int, *, square: bool) -> ndarray:
    """Returns the image resized to a short side of `short`, (h, w, 3); square: computes only its centre square.

    pixels: (height, width, 3) uint8, RGB, contiguous. The result is valid until this thread's next call.
    """
    height, width, _ = pixels.shape
    w, h = resized(width, height, short)
    columns, rows = (short, short) if square else (w, h)
    out = _memory(3 * rows * columns).reshape(rows, columns, 3)
    left, top = centre_offset(w, columns), centre_offset(h, rows)
    _resize(pixels.reshape(-1), width, height, left, top, width / w, height / h, out)
    return out


class Totals(NamedTuple):
    """Sums over images' centre squares, in whole numbers."""

    numbers: ndarray  # (11,) int64: images, pixels, and of these the sums of r, g, b, rr, rg, rb, gg, gb and bb
    image: ndarray  # (3 · size²,): all squares added up

    @staticmethod
    def zeros(size: int, dtype: Any = np.uint32) -> "Totals":
        """dtype: of the image. 32 bits are enough for 16 million images."""
        return Totals(np.zeros(11, np.int64), np.zeros(3 * size * size, dtype))

    def add(self, pixels: ndarray) -> None:
        """Adds an image's centre square; mean and covariance count a smaller image's original pixels."""
        size, short = isqrt(len(self.image) // 3), min(pixels.shape[:2])
        square = centre(pixels, size) if short == size else resize(pixels, size, square=True)
        counted = square if short >= size else centre(pixels, short)
        _add(square.reshape(-1), counted.reshape(-1), self.image, self.numbers[2:])
        self.numbers[:2] += 1, counted.size // 3


def prepare() -> None:
    """Compiles the kernels, or loads what an earlier process compiled: before processes are forked."""
    Totals.zeros(8).add(np.zeros((40, 40, 3), np.uint8))
