"""The sharder's inner loops: resizing and adding up, in whole numbers, compiled by Numba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..geometry import centre_offset, resized
from ..jit import compiled, straight_lines_vectorised
from ..resample import resample, triangle

SLACK = 64  # bytes that a caller keeps free behind an image's last pixel
u = np.uintp


@compiled
def _resize(
    pixels: np.ndarray, width: int, height: int, left: int, top: int, x_scale: float, y_scale: float, out: np.ndarray
) -> None:
    """out: (rows, columns, 3) uint8, from (left, top) on, of the image resized by the scales."""
    x, y = triangle(left, x_scale, width, out.shape[1], False), triangle(top, y_scale, height, out.shape[0], False)
    unused = np.zeros(3, np.float32)
    resample(pixels, 0, width, height, x, y, out.reshape(-1), 0, True, unused, 0, unused)


@compiled
def _add(pixels: np.ndarray, start: int, stride: int, side: int, sums: np.ndarray) -> None:
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
def _add_image(pixels: np.ndarray, start: int, stride: int, side: int, image: np.ndarray) -> None:
    q = u(0)
    for y in range(side):
        p = u(start + y * stride)
        for j in range(u(3 * side)):
            image[q + j] += np.uint16(pixels[p + j])
        q += u(3 * side)


class Resizer:
    """Resizes RGB images into a buffer of its own, which the next call reuses. For one thread."""

    def __init__(self) -> None:
        self._out = np.zeros(0, np.uint8)

    def __call__(
        self, pixels: np.ndarray, size: tuple[int, int], to: tuple[int, int], part: tuple[int, int, int, int]
    ) -> np.ndarray:
        """(bottom - top, right - left, 3) uint8: `part` of the image resized, valid until the next call.

        pixels: flat uint8, RGB. size, to: (width, height). part: left, top, right, bottom of the resized image.
        """
        (width, height), (left, top, right, bottom) = size, part
        rows, columns = bottom - top, right - left
        if len(self._out) < rows * columns * 3:
            self._out = np.zeros(rows * columns * 15 // 4, np.uint8)
        out = self._out[: rows * columns * 3].reshape(rows, columns, 3)
        _resize(pixels, width, height, left, top, width / to[0], height / to[1], out)
        return out


def resize_short_side(resizer: Resizer, pixels: np.ndarray, size: tuple[int, int], short: int) -> np.ndarray:
    """(h, w, 3): the whole image, its short side `short`."""
    width, height = (int(side) for side in resized(*size, short))
    return resizer(pixels, size, (width, height), (0, 0, width, height))


def resized_square(resizer: Resizer, pixels: np.ndarray, size: tuple[int, int], short: int) -> np.ndarray:
    """(short, short, 3): the centre square of the image whose short side became `short`; no more is computed."""
    to = tuple(int(side) for side in resized(*size, short))
    left, top = (int(centre_offset(length, short)) for length in to)
    return resizer(pixels, size, (to[0], to[1]), (left, top, left + short, top + short))


class Square(NamedTuple):
    """The centre pixels of an image, in place: no copy."""

    pixels: np.ndarray  # (n,) uint8: the image, RGB
    start: int  # of the first, in bytes
    stride: int  # from one line to the next, in bytes
    side: int  # pixels

    @staticmethod
    def centre(pixels: np.ndarray, side: int) -> Square:
        """pixels: (h, w, 3), contiguous. An odd margin is split as by torchvision's CenterCrop."""
        height, width, _ = pixels.shape
        top, left = (int(centre_offset(length, side)) for length in (height, width))
        return Square(pixels.reshape(-1), 3 * (top * width + left), 3 * width, side)


class Sums:
    """Sums over one shard's images, in whole numbers: see statistics.Statistics."""

    FLUSH = 257  # images whose sum fits 16 bits, which are half the memory to go through for each

    def __init__(self, size: int) -> None:
        self.size, self.images, self.pixels = size, 0, 0
        self._image = np.zeros(3 * size * size, np.uint32)  # enough for 16 million images
        self._latest, self._in_latest = np.zeros(3 * size * size, np.uint16), 0
        self._sums = np.zeros(9, np.int64)

    def add(self, square: Square, pixels: Square) -> None:
        """square: size² pixels of the mean image. pixels: those that mean and covariance are made of."""
        assert square.side == self.size
        if self._in_latest == self.FLUSH:
            self._flush()
        _add_image(*square, self._latest)
        _add(*pixels, self._sums)
        self._in_latest += 1
        self.images += 1
        self.pixels += pixels.side**2

    def _flush(self) -> None:
        self._image += self._latest
        self._latest[:], self._in_latest = 0, 0

    @property
    def image(self) -> np.ndarray:
        """(3 · size²,) uint32: all squares added up."""
        self._flush()
        return self._image

    @property
    def channels(self) -> np.ndarray:
        """(3,) int64"""
        return self._sums[:3]

    @property
    def products(self) -> np.ndarray:
        """(6,) int64: rr, rg, rb, gg, gb, bb"""
        return self._sums[3:]

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, to be stored."""
        return {"image": self.image, "sums": self._sums, "counts": np.array([self.size, self.images, self.pixels])}

    @staticmethod
    def restored(arrays: Mapping[str, np.ndarray]) -> Sums:
        """Raises KeyError or ValueError for anything but what `arrays` returned."""
        size, images, pixels = arrays["counts"].tolist()
        sums = Sums(size)
        sums.images, sums.pixels = images, pixels
        sums._image[:], sums._sums[:] = arrays["image"], arrays["sums"]
        return sums


def prepare() -> None:
    """Compiles the kernels, or loads what an earlier process compiled: before processes are forked."""
    with straight_lines_vectorised():
        pixels = np.zeros(3 * 40 * 40 + SLACK, np.uint8)
        square = resized_square(Resizer(), pixels, (40, 40), 8)
        centre = Square.centre(square, 8)
        Sums(8).add(centre, centre)
