"""The sharder's inner loops: resizing and adding up, in whole numbers, compiled by Numba."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from ..decode import Scratch
from ..geometry import centre_offset, resized
from ..jit import compiled, straight_lines_vectorised
from ..resample import resample, triangle

u = np.uintp


@compiled
def _resize(
    pixels: ndarray, width: int, height: int, left: int, top: int, x_scale: float, y_scale: float, out: ndarray
) -> None:
    """out: (rows, columns, 3) uint8, from (left, top) on, of the image resized by the scales."""
    x, y = triangle(left, x_scale, width, out.shape[1], False), triangle(top, y_scale, height, out.shape[0], False)
    unused = np.zeros(3, np.float32)
    resample(pixels, 0, width, width, height, x, y, out.reshape(-1), 0, True, unused, 0, unused)


@compiled
def _add(pixels: ndarray, start: int, stride: int, side: int, sums: ndarray) -> None:
    """Adds up side² pixels: each channel, and each pair's products (rr, rg, rb, gg, gb, bb), into nine int64."""
    for y in range(side):  # so many products of bytes fit 32 bits: a line has at most 8,192 pixels
        s0 = s1 = s2 = rr = rg = rb = gg = gb = bb = np.uint32(0)
        p = u(start + y * stride)
        for _ in range(u(side)):
            r, g, b = np.uint32(pixels[p]), np.uint32(pixels[p + u(1)]), np.uint32(pixels[p + u(2)])
            s0 += r
            s1 += g
            s2 += b
            rr += r * r
            rg += r * g
            rb += r * b
            gg += g * g
            gb += g * b
            bb += b * b
            p += u(3)
        sums[0] += s0
        sums[1] += s1
        sums[2] += s2
        sums[3] += rr
        sums[4] += rg
        sums[5] += rb
        sums[6] += gg
        sums[7] += gb
        sums[8] += bb


@compiled
def _add_image(pixels: ndarray, start: int, stride: int, side: int, image: ndarray) -> None:
    q = u(0)
    for y in range(side):
        p = u(start + y * stride)
        for j in range(u(3 * side)):
            image[q + j] += np.uint32(pixels[p + j])
        q += u(3 * side)


def resize(pixels: ndarray, short: int, memory: Scratch, *, square: bool) -> ndarray:
    """(h, w, 3) in `memory`: the image, its short side `short`, or of this the centre square; no more is computed.

    pixels: (height, width, 3) uint8, RGB, contiguous.
    """
    height, width, _ = pixels.shape
    w, h = resized(width, height, short)
    columns, rows = (short, short) if square else (w, h)
    out = memory(3 * rows * columns).reshape(rows, columns, 3)
    left, top = centre_offset(w, columns), centre_offset(h, rows)
    _resize(pixels.reshape(-1), width, height, left, top, width / w, height / h, out)
    return out


class Square(NamedTuple):
    """The centre pixels of an image, in place: no copy."""

    pixels: ndarray  # (n,) uint8: the image, RGB
    start: int  # of the first, in bytes
    stride: int  # from one line to the next, in bytes
    side: int  # pixels

    @staticmethod
    def centre(pixels: ndarray, side: int) -> Square:
        """pixels: (h, w, 3), contiguous. An odd margin is split as by torchvision's CenterCrop."""
        height, width, _ = pixels.shape
        top, left = (int(centre_offset(length, side)) for length in (height, width))
        return Square(pixels.reshape(-1), 3 * (top * width + left), 3 * width, side)


class Totals(NamedTuple):
    """Sums over images' centre squares, in whole numbers."""

    numbers: ndarray  # (11,) int64: images, pixels, and of these the sums of r, g, b, rr, rg, rb, gg, gb and bb
    image: ndarray  # (3 · size²,): all squares added up

    @staticmethod
    def zeros(size: int, dtype: Any = np.uint32) -> Totals:
        """dtype: of the image. 32 bits are enough for 16 million images."""
        return Totals(np.zeros(11, np.int64), np.zeros(3 * size * size, dtype))

    def add(self, square: Square, pixels: Square) -> None:
        """square: size² pixels of the mean image. pixels: those that mean and covariance are made of."""
        assert 3 * square.side**2 == len(self.image)
        _add_image(*square, self.image)
        _add(*pixels, self.numbers[2:])
        self.numbers[:2] += 1, pixels.side**2


def prepare() -> None:
    """Compiles the kernels, or loads what an earlier process compiled: before processes are forked."""
    with straight_lines_vectorised():
        pixels = resize(np.zeros((40, 40, 3), np.uint8), 8, Scratch(), square=True)
        centre = Square.centre(pixels, 8)
        Totals.zeros(8).add(centre, centre)
