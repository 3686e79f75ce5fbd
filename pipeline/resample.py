"""Resampling row by row, for the sharder and the portable backend: weighted sums in float32, compiled by Numba.

Arrays are flat and indices unsigned: a slice costs Numba an atomic operation, a signed index a test for wrapping.
"""

from __future__ import annotations

import numpy as np

from .jit import compiled

LANES = 4  # taps are summed in groups of so many; their number is padded with zero weights
u = np.uintp


@compiled
def taps(scale: float) -> int:
    """How many source pixels one resampled pixel needs, rounded up to whole groups."""
    return (int(2 * max(scale, 1.0)) + 2 + LANES - 1) // LANES * LANES


@compiled
def blend_rows(
    pixels: np.ndarray,
    base: int,
    pitch: int,
    height: int,
    top: int,
    a: int,
    n: int,
    weights: np.ndarray,
    w: int,
    count: int,
    line: int,
) -> None:
    """weights[line : line + n] = the weighted sum of `count` rows from `top` on, bytes a to a + n of each."""
    out = u(line)
    for k in range(0, count, LANES):
        w0, w1, w2, w3 = weights[w + k], weights[w + k + 1], weights[w + k + 2], weights[w + k + 3]
        r0 = u(min(top + k, height - 1) * pitch + base + a)
        r1 = u(min(top + k + 1, height - 1) * pitch + base + a)
        r2 = u(min(top + k + 2, height - 1) * pitch + base + a)
        r3 = u(min(top + k + 3, height - 1) * pitch + base + a)
        if k == 0:
            for j in range(u(n)):
                weights[out + j] = (
                    w0 * np.float32(pixels[r0 + j])
                    + w1 * np.float32(pixels[r1 + j])
                    + w2 * np.float32(pixels[r2 + j])
                    + w3 * np.float32(pixels[r3 + j])
                )
        else:
            for j in range(u(n)):
                weights[out + j] += (
                    w0 * np.float32(pixels[r0 + j])
                    + w1 * np.float32(pixels[r1 + j])
                    + w2 * np.float32(pixels[r2 + j])
                    + w3 * np.float32(pixels[r3 + j])
                )


@compiled
def blend_columns(floats: np.ndarray, line: int, a: int, first: np.ndarray, side: int, count: int, out: int) -> None:
    """floats[out + 3 x : …] = the weighted sum of `count` pixels of the line; the weights begin at floats[0].

    Four floats at a time, the fourth of which belongs to the next pixel and is overwritten by it: a vector's width.
    """
    w = u(0)
    q = u(out)
    for x in range(u(side)):
        p = u(line + first[x] * 3 - a)
        c0 = c1 = c2 = c3 = np.float32(0)
        for _ in range(0, count, LANES):
            w0, w1, w2, w3 = floats[w], floats[w + u(1)], floats[w + u(2)], floats[w + u(3)]
            c0 += w0 * floats[p] + w1 * floats[p + u(3)] + w2 * floats[p + u(6)] + w3 * floats[p + u(9)]
            c1 += w0 * floats[p + u(1)] + w1 * floats[p + u(4)] + w2 * floats[p + u(7)] + w3 * floats[p + u(10)]
            c2 += w0 * floats[p + u(2)] + w1 * floats[p + u(5)] + w2 * floats[p + u(8)] + w3 * floats[p + u(11)]
            c3 += w0 * floats[p + u(3)] + w1 * floats[p + u(6)] + w2 * floats[p + u(9)] + w3 * floats[p + u(12)]
            p += u(3 * LANES)
            w += u(LANES)
        floats[q] = c0
        floats[q + u(1)] = c1
        floats[q + u(2)] = c2
        floats[q + u(3)] = c3
        q += u(3)


@compiled
def rounded(floats: np.ndarray, at: int, count: int, row: np.ndarray) -> None:
    start = u(at)
    for j in range(u(count)):
        row[j] = np.uint8(np.int32(floats[start + j] + np.float32(0.5)))
