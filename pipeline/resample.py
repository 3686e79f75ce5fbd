"""Antialiased bilinear resampling in whole numbers, row by row: for the sharder and the portable backend.

Weights are those of Pillow's triangle filter, rounded to whole numbers of 1/ONE, and a line is rounded to grey levels
between the two directions, as in Pillow. The result is Pillow's within one grey level, and the same on every processor:
floating point differs where one processor joins a product and a sum and another does not. The whole numbers are kept
in float32, which vectors multiply twice as fast as integers.

Arrays are flat and indices unsigned: a slice costs Numba an atomic operation, a signed index a test for wrapping.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .jit import compiled, exactly_compiled

ONE = 1 << 15  # sums of bytes with these weights have 23 bits, and float32 holds 24
LANES = 4  # taps are summed in groups of so many; their number is padded with zero weights
HALF = np.float32(0.5)
u = np.uintp


class Taps(NamedTuple):
    """The source pixels that each resampled pixel of an axis is the sum of."""

    first: np.ndarray  # (count,) int64: its first source pixel
    weights: np.ndarray  # (count · taps,) float32
    taps: int  # a multiple of LANES


@exactly_compiled
def triangle(offset: float, scale: float, length: int, count: int, reverse: bool) -> Taps:
    """Taps of pixels [offset, offset + count) of an axis of `length` pixels that is resampled by `scale`.

    offset: in resampled pixels, not necessarily whole. reverse: the last pixel comes first.
    """
    spread = max(scale, 1.0)
    taps = (int(np.ceil(2 * spread)) + LANES - 1) // LANES * LANES
    first, weights, exact = np.empty(count, np.int64), np.empty(count * taps, np.float32), np.empty(taps)
    inverse = 1.0 / spread
    for i in range(count):
        centre = (offset + i + 0.5) * scale
        low = min(max(int(centre - spread + 0.5), 0), length - 1)
        high = min(int(centre + spread + 0.5), length)
        total = 0.0
        for k in range(taps):
            exact[k] = max(1.0 - abs((low + k - centre + 0.5) * inverse), 0.0) if low + k < high else 0.0
            total += exact[k]
        if total == 0.0:  # a centre on the very edge
            exact[0] = total = 1.0
        at = count - 1 - i if reverse else i
        first[at] = low
        for k in range(taps):
            weights[at * taps + k] = np.rint(exact[k] / total * ONE) / ONE
    return Taps(first, weights, taps)


@compiled
def _blend_rows(
    pixels: np.ndarray, start: int, pitch: int, rows: int, top: int, weights: np.ndarray, w: int, taps: int,
    line: np.ndarray, n: int,
) -> None:  # fmt: skip
    """line[:n] = the weighted sum of `taps` rows from `top` on, of the n bytes of each from pixels[start] on."""
    last = rows - 1
    for k in range(0, taps, LANES):
        w0, w1, w2, w3 = weights[w + k], weights[w + k + 1], weights[w + k + 2], weights[w + k + 3]
        r0 = u(min(top + k, last) * pitch + start)
        r1 = u(min(top + k + 1, last) * pitch + start)
        r2 = u(min(top + k + 2, last) * pitch + start)
        r3 = u(min(top + k + 3, last) * pitch + start)
        for j in range(u(n)):
            blended = (
                w0 * np.float32(pixels[r0 + j])
                + w1 * np.float32(pixels[r1 + j])
                + w2 * np.float32(pixels[r2 + j])
                + w3 * np.float32(pixels[r3 + j])
            )
            line[j] = blended if k == 0 else line[j] + blended
    for j in range(u(n)):
        line[j] = np.float32(np.int32(line[j] + HALF))


@compiled
def _blend_columns(line: np.ndarray, a: int, x: Taps, sums: np.ndarray) -> None:
    """sums[3 i : 3 i + 3] = the weighted sum of x.taps pixels of a line that begins at byte `a`.

    Four floats at a time, the fourth of which belongs to the next pixel and is overwritten by it: a vector's width.
    """
    w = q = u(0)
    for i in range(u(len(x.first))):
        p = u(x.first[i] * 3 - a)
        c0 = c1 = c2 = c3 = np.float32(0)
        for _ in range(0, x.taps, LANES):
            w0, w1, w2, w3 = x.weights[w], x.weights[w + u(1)], x.weights[w + u(2)], x.weights[w + u(3)]
            c0 += w0 * line[p] + w1 * line[p + u(3)] + w2 * line[p + u(6)] + w3 * line[p + u(9)]
            c1 += w0 * line[p + u(1)] + w1 * line[p + u(4)] + w2 * line[p + u(7)] + w3 * line[p + u(10)]
            c2 += w0 * line[p + u(2)] + w1 * line[p + u(5)] + w2 * line[p + u(8)] + w3 * line[p + u(11)]
            c3 += w0 * line[p + u(3)] + w1 * line[p + u(6)] + w2 * line[p + u(9)] + w3 * line[p + u(12)]
            p += u(3 * LANES)
            w += u(LANES)
        sums[q], sums[q + u(1)], sums[q + u(2)], sums[q + u(3)] = c0, c1, c2, c3
        q += u(3)


class Lines(NamedTuple):
    """Scratch memory of `resample_row`, and the part of each source line that it needs, in bytes."""

    line: np.ndarray
    sums: np.ndarray
    start: int
    size: int


@compiled
def lines_for(x: Taps, width: int) -> Lines:
    leftmost, rightmost = min(x.first[0], x.first[-1]), max(x.first[0], x.first[-1])
    # Zeros, since weights of zero meet what stands beyond a line's end, and 0 · NaN is not 0.
    line = np.zeros(3 * (rightmost - leftmost + x.taps) + LANES, np.float32)
    size = 3 * (min(rightmost + x.taps, width) - leftmost)
    return Lines(line, np.empty(3 * len(x.first) + 1, np.float32), 3 * leftmost, size)


@compiled
def resample_row(
    pixels: np.ndarray, base: int, width: int, height: int, x: Taps, y: Taps, i: int, lines: Lines,
    out: np.ndarray, at: int,
) -> None:  # fmt: skip
    """Row i of the resampled image to out[at:], uint8; the image, width × height RGB, begins at pixels[base]."""
    start = base + lines.start
    _blend_rows(pixels, start, 3 * width, height, y.first[i], y.weights, i * y.taps, y.taps, lines.line, lines.size)
    _blend_columns(lines.line, lines.start, x, lines.sums)
    for j in range(u(3 * len(x.first))):
        out[u(at) + j] = np.uint8(np.int32(lines.sums[j] + HALF))


@compiled
def resize(
    pixels: np.ndarray, width: int, height: int, left: int, top: int, x_scale: float, y_scale: float, out: np.ndarray
) -> None:
    """out: (rows, columns, 3) uint8, from (left, top) on, of the image resized by the scales."""
    rows, columns, _ = out.shape
    x, y = triangle(left, x_scale, width, columns, False), triangle(top, y_scale, height, rows, False)
    flat, lines = out.reshape(-1), lines_for(x, width)
    for i in range(rows):
        resample_row(pixels, 0, width, height, x, y, i, lines, flat, 3 * columns * i)
