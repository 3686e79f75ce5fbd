"""The sharder's inner loops: resizing and adding up, in whole numbers, compiled by Numba.

The resize is Pillow's antialiased bilinear one, down and then across, and faster. Whole numbers, because
floating point differs by a grey level where one processor joins a product and a sum and another does not, and then
shards made on two machines would not be the same bytes; whole numbers in float32, because vectors multiply those twice
as fast as integers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..compiled import compiled, straight_lines_vectorised
from ..geometry import centre_offset, resized
from ..resample import LANES, blend_columns, blend_rows

SLACK = 64  # bytes that a kernel may read beyond the last pixel, and weighs with zero
ONE = 1 << 15  # weights are whole numbers of 1/ONE: their sums of bytes have 23 bits, and float32 holds 24
u = np.uintp


class Taps(NamedTuple):
    """What each resampled pixel is the sum of."""

    first: np.ndarray  # (count,) int64: its first source pixel
    weights: np.ndarray  # (count · taps,) float32
    taps: int  # a multiple of LANES


@lru_cache(4096)
def triangle(length: int, resampled: int, start: int, count: int) -> Taps:
    """Antialiased bilinear weights, as Pillow defines them, for pixels [start, start + count) of `resampled`."""
    scale = length / resampled
    spread = max(scale, 1.0)
    centre = (np.arange(start, start + count) + 0.5) * scale
    low = np.maximum((centre - spread + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + spread + 0.5).astype(np.int64), length)
    needed = -(-int((high - low).max()) // LANES) * LANES
    at = low[:, None] + np.arange(needed)
    weights = np.maximum(1.0 - np.abs((at - centre[:, None] + 0.5) * (1.0 / spread)), 0.0)
    weights[at >= high[:, None]] = 0.0
    weights /= weights.sum(1, keepdims=True)
    return Taps(low, (np.rint(weights * ONE) / ONE).astype(np.float32).reshape(-1), needed)


@compiled
def _resize(
    pixels: np.ndarray,
    width: int,
    height: int,
    x_first: np.ndarray,
    x_taps: int,
    y_first: np.ndarray,
    y_taps: int,
    floats: np.ndarray,
    out: np.ndarray,
) -> None:
    """out: a pixel for each of y_first and x_first. floats: weights across, weights down, a line, a blended line."""
    columns = len(x_first)
    down = columns * x_taps
    line = down + len(y_first) * y_taps
    blended = len(floats) - 3 * columns - 1
    a = 3 * x_first[0]
    n = u(3 * min(x_first[columns - 1] + x_taps, width) - a)
    q = u(0)
    for y in range(len(y_first)):
        blend_rows(pixels, 0, 3 * width, height, y_first[y], a, n, floats, down + y * y_taps, y_taps, line)
        for j in range(n):
            floats[u(line) + j] = np.float32(np.int32(floats[u(line) + j] + np.float32(0.5)))
        blend_columns(floats, line, a, x_first, columns, x_taps, blended)
        for j in range(u(3 * columns)):
            out[q + j] = np.uint8(np.int32(floats[u(blended) + j] + np.float32(0.5)))
        q += u(3 * columns)


@compiled
def _add(pixels: np.ndarray, count: int, sums: np.ndarray, products: np.ndarray) -> None:
    """Adds each channel's sum, and the sum of each pair's products (rr, rg, rb, gg, gb, bb), of `count` pixels."""
    for start in range(0, count, 4096):  # so many products of bytes fit 32 bits
        s0 = s1 = s2 = rr = rg = rb = gg = gb = bb = np.uint32(0)
        p = u(3 * start)
        for _ in range(u(min(4096, count - start))):
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
        products[0] += rr
        products[1] += rg
        products[2] += rb
        products[3] += gg
        products[4] += gb
        products[5] += bb


@compiled
def _add_image(pixels: np.ndarray, sums: np.ndarray) -> None:
    for j in range(u(len(sums))):
        sums[j] += np.uint32(pixels[j])


class Resizer:
    """Resizes RGB images into buffers of its own, which the next call reuses. For one thread."""

    def __init__(self) -> None:
        self._out, self._floats = np.zeros(0, np.uint8), np.zeros(0, np.float32)

    def __call__(
        self, pixels: np.ndarray, size: tuple[int, int], to: tuple[int, int], part: tuple[int, int, int, int]
    ) -> np.ndarray:
        """(bottom - top, right - left, 3) uint8: `part` of the image resized, valid until the next call.

        pixels: flat uint8, RGB, with SLACK bytes behind the last pixel. size, to: (width, height).
        part: left, top, right, bottom of the resized image.
        """
        (width, height), (left, top, right, bottom) = size, part
        x = triangle(width, to[0], left, right - left)
        y = triangle(height, to[1], top, bottom - top)
        columns, rows, weights = len(x.first), len(y.first), len(x.weights) + len(y.weights)
        needed = weights + 3 * (width + x.taps) + 3 * columns + 2 * LANES
        if len(self._floats) < needed:
            # Zeros, since weights of zero meet what stands beyond a line's end, and 0 · NaN is not 0.
            self._floats = np.zeros(needed * 5 // 4, np.float32)
        if len(self._out) < rows * columns * 3:
            self._out = np.zeros(rows * columns * 15 // 4, np.uint8)
        floats, out = self._floats[:needed], self._out[: rows * columns * 3]
        floats[: len(x.weights)] = x.weights
        floats[len(x.weights) : weights] = y.weights
        _resize(pixels, width, height, x.first, x.taps, y.first, y.taps, floats, out)
        return out.reshape(rows, columns, 3)


def resize_short_side(resizer: Resizer, pixels: np.ndarray, size: tuple[int, int], short: int) -> np.ndarray:
    """(h, w, 3): the whole image, its short side `short`."""
    width, height = (int(side) for side in resized(*size, short))
    return resizer(pixels, size, (width, height), (0, 0, width, height))


def resized_square(resizer: Resizer, pixels: np.ndarray, size: tuple[int, int], short: int) -> np.ndarray:
    """(short, short, 3): the centre square of the image whose short side became `short`; no more is computed."""
    to = tuple(int(side) for side in resized(*size, short))
    left, top = (int(centre_offset(length, short)) for length in to)
    return resizer(pixels, size, (to[0], to[1]), (left, top, left + short, top + short))


class Sums:
    """Of one shard's images, in whole numbers: see measures.Statistics."""

    def __init__(self, size: int) -> None:
        self.size, self.images, self.pixels = size, 0, 0
        self.image = np.zeros(3 * size * size, np.uint32)  # enough for 16 million images
        self.channels = np.zeros(3, np.int64)
        self.products = np.zeros(6, np.int64)  # rr, rg, rb, gg, gb, bb

    def add(self, square: np.ndarray, pixels: np.ndarray) -> None:
        """square: size² pixels of the mean image. pixels: those that mean and covariance are made of; flat uint8."""
        _add_image(square, self.image)
        _add(pixels, len(pixels) // 3, self.channels, self.products)
        self.images += 1
        self.pixels += len(pixels) // 3


def prepare() -> None:
    """Compiles the kernels, or loads what an earlier process compiled: before processes are forked."""
    with straight_lines_vectorised():
        pixels = np.zeros(3 * 40 * 40 + SLACK, np.uint8)
        square = resized_square(Resizer(), pixels, (40, 40), 8)
        Sums(8).add(square.reshape(-1), square.reshape(-1))
