"""The sharder's inner loops: resizing and adding up, in whole numbers, compiled by Numba.

The resize is Pillow's antialiased bilinear one, across and then down, with its 22-bit fixed point: equal to the last
bit at a third of the time. (Pillow 13 takes some tall images down first, a grey level's difference.) Whole numbers,
because floating point differs by a grey level where one processor joins a product and a sum and another does not,
and then shards made on two machines would not be the same bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..compiled import compiled, straight_lines_vectorised
from ..geometry import centre_offset, resized

LANES = 4  # taps are summed in groups of so many; their number is padded with zero weights
SLACK = 64  # bytes that a kernel may read beyond the last pixel, and weighs with zero
ONE = 1 << 22  # a weight of 1: Pillow's PRECISION_BITS
HALF = np.int32(ONE >> 1)
u = np.uintp


class Taps(NamedTuple):
    """What each resampled pixel is the sum of."""

    first: np.ndarray  # (count,) int64: its first source pixel
    weights: np.ndarray  # (count · taps,) int32, in 1/ONE
    taps: int


@lru_cache(4096)
def triangle(length: int, resampled: int, start: int, count: int) -> Taps:
    """Antialiased bilinear weights for pixels [start, start + count) of `length` pixels resampled to `resampled`."""
    scale = length / resampled
    spread = max(scale, 1.0)
    centre = (np.arange(start, start + count) + 0.5) * scale
    low = np.maximum((centre - spread + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + spread + 0.5).astype(np.int64), length)
    taps = -(-int((high - low).max()) // LANES) * LANES
    at = low[:, None] + np.arange(taps)
    weights = np.maximum(1.0 - np.abs((at - centre[:, None] + 0.5) * (1.0 / spread)), 0.0)
    weights[at >= high[:, None]] = 0.0
    weights /= np.add.accumulate(weights, 1)[:, -1:]  # one after the other, as Pillow does
    return Taps(low, (0.5 + weights * ONE).astype(np.int32).reshape(-1), taps)


@compiled
def _sum(w0: Any, p0: Any, w1: Any, p1: Any, w2: Any, p2: Any, w3: Any, p3: Any) -> Any:
    """Of four weighted bytes; in 32 bits, which Numba would widen, and vectors would be half as long."""
    return np.int32(
        np.int32(np.int32(w0 * np.int32(p0)) + np.int32(w1 * np.int32(p1)))
        + np.int32(np.int32(w2 * np.int32(p2)) + np.int32(w3 * np.int32(p3)))
    )


@compiled
def _across(
    pixels: np.ndarray, pitch: int, top: int, rows: int, first: np.ndarray, weights: np.ndarray, taps: int,
    out: np.ndarray,
) -> None:  # fmt: skip
    """Each of the rows from `top` on, resampled to len(first) pixels.

    Four channels at a time, the fourth of which is the next pixel's and is overwritten by it: a vector's width.
    """
    q = u(0)
    for y in range(u(rows)):
        line = (u(top) + y) * u(pitch)
        w = u(0)
        for x in range(u(len(first))):
            p = line + u(3) * u(first[x])
            c0 = c1 = c2 = c3 = HALF
            for _ in range(u(taps // LANES)):
                w0, w1, w2, w3 = weights[w], weights[w + u(1)], weights[w + u(2)], weights[w + u(3)]
                c0 = np.int32(
                    c0 + _sum(w0, pixels[p], w1, pixels[p + u(3)], w2, pixels[p + u(6)], w3, pixels[p + u(9)])
                )
                c1 = np.int32(
                    c1 + _sum(w0, pixels[p + u(1)], w1, pixels[p + u(4)], w2, pixels[p + u(7)], w3, pixels[p + u(10)])
                )
                c2 = np.int32(
                    c2 + _sum(w0, pixels[p + u(2)], w1, pixels[p + u(5)], w2, pixels[p + u(8)], w3, pixels[p + u(11)])
                )
                c3 = np.int32(
                    c3 + _sum(w0, pixels[p + u(3)], w1, pixels[p + u(6)], w2, pixels[p + u(9)], w3, pixels[p + u(12)])
                )
                p += u(3 * LANES)
                w += u(LANES)
            out[q] = np.uint8(c0 >> 22)
            out[q + u(1)] = np.uint8(c1 >> 22)
            out[q + u(2)] = np.uint8(c2 >> 22)
            out[q + u(3)] = np.uint8(c3 >> 22)
            q += u(3)


@compiled
def _down(
    rows: np.ndarray, n: int, top: int, last: int, first: np.ndarray, weights: np.ndarray, taps: int, sums: np.ndarray,
    out: np.ndarray,
) -> None:  # fmt: skip
    """Rows of n bytes, the first of which is source row `top`, resampled to len(first) rows."""
    for y in range(u(len(first))):
        to = y * u(n)
        for k in range(0, taps, LANES):
            w = y * u(taps) + u(k)
            w0, w1, w2, w3 = weights[w], weights[w + u(1)], weights[w + u(2)], weights[w + u(3)]
            start = first[y] - top + k
            r0 = u(min(start, last) * n)
            r1 = u(min(start + 1, last) * n)
            r2 = u(min(start + 2, last) * n)
            r3 = u(min(start + 3, last) * n)
            if taps == LANES:
                for j in range(u(n)):
                    total = _sum(w0, rows[r0 + j], w1, rows[r1 + j], w2, rows[r2 + j], w3, rows[r3 + j])
                    out[to + j] = np.uint8(np.int32(HALF + total) >> 22)
            elif k == 0:
                for j in range(u(n)):
                    sums[j] = HALF + _sum(w0, rows[r0 + j], w1, rows[r1 + j], w2, rows[r2 + j], w3, rows[r3 + j])
            else:
                for j in range(u(n)):
                    sums[j] += _sum(w0, rows[r0 + j], w1, rows[r1 + j], w2, rows[r2 + j], w3, rows[r3 + j])
        if taps != LANES:
            for j in range(u(n)):
                out[to + j] = np.uint8(sums[j] >> 22)


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
        self._rows = self._out = np.zeros(0, np.uint8)
        self._sums = np.zeros(0, np.int32)

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
        start = int(y.first[0])
        rows = min(int(y.first[-1]) + y.taps, height) - start
        n = 3 * (right - left)
        self._rows = _grown(self._rows, rows * n + SLACK)
        self._out = _grown(self._out, (bottom - top) * n + SLACK)
        self._sums = _grown(self._sums, n)
        _across(pixels, 3 * width, start, rows, x.first, x.weights, x.taps, self._rows)
        _down(self._rows, n, start, rows - 1, y.first, y.weights, y.taps, self._sums, self._out)
        return self._out[: (bottom - top) * n].reshape(bottom - top, right - left, 3)


def _grown(buffer: np.ndarray, size: int) -> np.ndarray:
    return buffer if len(buffer) >= size else np.zeros(size + size // 4, buffer.dtype)


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
