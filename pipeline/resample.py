"""Antialiased bilinear resampling with integer arithmetic, row by row: for the sharder and the portable backend.

Weights are those of Pillow's triangle filter, rounded to multiples of 1/ONE; a line is rounded to grey levels between
the two directions, as in Pillow. The result is within one grey level of Pillow's (on noise, two at one value in a
million), and the same on every processor: floating-point results depend on whether a processor fuses a product and a
sum. The integers are kept in float32, which vector units multiply twice as fast as integers.

Arrays are flat and indices unsigned: a slice costs Numba an atomic operation, a signed index a test for wrapping.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from .jit import compiled, exactly_compiled

ONE = 1 << 15  # sums of bytes with these weights have 23 bits, and float32 holds 24
LANES = 4  # taps are summed in groups of this size; their number is padded with zero weights
HALF = np.float32(0.5)
u = np.uintp


class Taps(NamedTuple):
    """The source pixels and weights whose sum is each resampled pixel of an axis."""

    first: ndarray  # (count,) int64: its first source pixel
    weights: ndarray  # (count · taps,) float32
    taps: int  # a multiple of LANES


@exactly_compiled
def triangle(offset: float, scale: float, length: int, count: int, reverse: bool) -> Taps:
    """Returns the taps of resampled pixels [offset, offset + count) of an axis of `length` source pixels.

    scale: source pixels per resampled pixel. offset: in resampled pixels, may be fractional. reverse: mirrors the axis.
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
        at, share = count - 1 - i if reverse else i, ONE / total
        first[at] = low
        for k in range(taps):
            weights[at * taps + k] = np.rint(exact[k] * share) / ONE
    return Taps(first, weights, taps)


@compiled
def _blend_rows(
    pixels: ndarray, start: int, pitch: int, rows: int, top: int, weights: ndarray, w: int, taps: int,
    line: ndarray, n: int,
) -> None:  # fmt: skip
    """Sets line[:n] to the weighted sum of `taps` rows from row `top` on; n bytes of each, from pixels[start] on."""
    last = rows - 1
    for k in range(0, taps, LANES):
        # Weights are read once: LLVM must assume that `line` and `weights` overlap.
        four = weights[w + k], weights[w + k + 1], weights[w + k + 2], weights[w + k + 3]
        for j in range(u(n)):
            blended = np.float32(0)
            for i in range(LANES):
                blended += four[i] * np.float32(pixels[u(min(top + k + i, last) * pitch + start) + j])
            if k > 0:
                blended += line[j]
            line[j] = np.float32(np.int32(blended + HALF)) if k + LANES == taps else blended


@compiled
def _blend_columns(line: ndarray, a: int, first: ndarray, weights: ndarray, taps: int, sums: ndarray) -> None:
    """Sets sums[3 i : 3 i + 3] to the weighted sum of `taps` pixels of a line that begins at byte `a`.

    Writes four floats at a time, a vector's width: the fourth belongs to the next pixel, which overwrites it.
    """
    w = q = u(0)
    for i in range(u(len(first))):
        p = u(first[i] * 3 - a)
        c0 = c1 = c2 = c3 = np.float32(0)
        for _ in range(0, taps, LANES):
            for _ in range(LANES):
                weight = weights[w]
                c0 += weight * line[p]
                c1 += weight * line[p + u(1)]
                c2 += weight * line[p + u(2)]
                c3 += weight * line[p + u(3)]
                p += u(3)
                w += u(1)
        sums[q], sums[q + u(1)], sums[q + u(2)], sums[q + u(3)] = c0, c1, c2, c3
        q += u(3)


@compiled
def _finished(value: int, mean: float, scale: float, plain: bool) -> Any:
    """Converts a value to its form in `out`. plain: a compile-time constant, so it costs nothing."""
    return value if plain else (np.float32(value) - mean) * scale


@compiled
def store(
    values: ndarray, at: int, out: ndarray, start: int, columns: int, rows: int, y: int, packed: bool,
    mean: ndarray, m: int, scale: ndarray,
) -> None:  # fmt: skip
    """Writes row y of the crop at out[start:]: `columns` pixels of `values` from `at` on, normalised for float32."""
    v, plain = u(at), out.dtype == values.dtype
    m0, m1, m2 = mean[m], mean[m + 1], mean[m + 2]
    s0, s1, s2 = scale[0], scale[1], scale[2]
    if packed:
        target = u(start + 3 * columns * y)
        for _ in range(columns):
            out[target] = _finished(values[v], m0, s0, plain)
            out[target + u(1)] = _finished(values[v + u(1)], m1, s1, plain)
            out[target + u(2)] = _finished(values[v + u(2)], m2, s2, plain)
            target += u(3)
            v += u(3)
        return
    red, plane = u(start + y * columns), u(columns * rows)
    for x in range(u(columns)):  # one loop for all three, which LLVM turns into shuffles
        p = v + x * u(3)
        out[red + x] = _finished(values[p], m0, s0, plain)
        out[red + plane + x] = _finished(values[p + u(1)], m1, s1, plain)
        out[red + plane + plane + x] = _finished(values[p + u(2)], m2, s2, plain)


@compiled
def resample(
    pixels: ndarray, base: int, pitch: int, width: int, height: int, x: Taps, y: Taps,
    out: ndarray, start: int, packed: bool, mean: ndarray, m: int, scale: ndarray,
) -> None:  # fmt: skip
    """Resamples the RGB image of width × height that begins at pixels[base], and stores the result at out[start:].

    pitch: pixels from one row to the next. x, y: taps of the columns and rows. The rest: see `store`.
    """
    # Arrays are taken out of the tuples once: Numba counts references by atomic operations.
    (x_first, x_weights, x_taps), (y_first, y_weights, y_taps) = x, y
    columns, rows = len(x_first), len(y_first)
    leftmost, rightmost = min(x_first[0], x_first[-1]), max(x_first[0], x_first[-1])
    size = 3 * (min(rightmost + x_taps, width) - leftmost)
    # Zeros, since zero weights are multiplied with values beyond the line's end, and 0 · NaN is not 0.
    line = np.zeros(3 * (rightmost - leftmost + x_taps) + LANES, np.float32)
    sums, row = np.empty(3 * columns + 1, np.float32), np.empty(3 * columns, np.uint8)
    a = 3 * leftmost
    for i in range(rows):
        _blend_rows(pixels, base + a, 3 * pitch, height, y_first[i], y_weights, i * y_taps, y_taps, line, size)
        _blend_columns(line, a, x_first, x_weights, x_taps, sums)
        for j in range(u(3 * columns)):
            row[j] = np.uint8(np.int32(sums[j] + HALF))
        store(row, 0, out, start, columns, rows, i, packed, mean, m, scale)
