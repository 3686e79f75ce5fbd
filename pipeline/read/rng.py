"""Random numbers from coordinates: an integer hash of (seed, epoch, stream, sample id). Pure and vectorised.

The numbers must never change, since a run must see the same crops in ten years: tests compare golden values.
The module does not use NumPy's generators, whose streams may change between versions.
"""

import numpy as np
from numpy import ndarray

# One stream for each purpose, so that no two purposes share a draw. DROPOUT's number is kept for its masks.
ORDER, CROP, FLIP, DROPOUT, SHARDS, JITTER, COLOUR, CHECK = range(8)

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive counters
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _mix(x: ndarray) -> ndarray:
    """A bijection on 64 bits: each input bit changes half of the output bits (Stafford's variant 13). In place."""
    x ^= x >> 30
    x *= _M1
    x ^= x >> 27
    x *= _M2
    x ^= x >> 31
    return x


def _unmix(x: ndarray) -> ndarray:
    """The inverse of _mix. In place."""
    for shift, factor in ((31, _M2), (27, _M1), (30, 1)):
        x ^= x >> shift ^ x >> 2 * shift
        x *= pow(factor, -1, 1 << 64)
    return x


def key(*coordinates: int) -> int:
    """Hashes integers to 64 bits: the key of all draws at these coordinates."""
    x = 0
    for value in coordinates:
        # Mixed between two additions, so that (1, 0), (0, 1) and neighbours have unrelated keys.
        x = x + (value + 1) * _GOLDEN & _MASK
        # The same as _mix() on a Python int: arrays of one number took 40 µs instead of 2, eight times per plan.
        x = (x ^ x >> 30) * _M1 & _MASK
        x = (x ^ x >> 27) * _M2 & _MASK
        x ^= x >> 31
    return x


def bits(ids: ndarray, *, seed: int, epoch: int, stream: int, draw: int = 0) -> ndarray:
    """(n,) uint64 for (n,) ids. For fixed keywords a bijection of the id: distinct ids never collide."""
    x = np.asarray(ids).astype(np.uint64)  # a copy, mixed in place from here on
    # Two keyed rounds: with only one, two epochs would be shifted windows of the same sequence.
    x *= _GOLDEN
    x += key(seed, epoch, stream, draw)
    _mix(x)
    x ^= key(draw, stream, epoch, seed)
    return _mix(x)


def ids(bits: ndarray, *, seed: int, epoch: int, stream: int, draw: int = 0) -> ndarray:
    """The inverse of `bits`, in place."""
    x = _unmix(bits)
    x ^= key(draw, stream, epoch, seed)
    _unmix(x)
    x -= key(seed, epoch, stream, draw)
    x *= pow(_GOLDEN, -1, 1 << 64)
    return x


def uniform(ids: ndarray, *, count: int, **at: int) -> ndarray:
    """(n, count) float64 in [0, 1), multiples of 2^-53. at: seed, epoch and stream."""
    return np.stack([(bits(ids, draw=d, **at) >> 11) * 2.0**-53 for d in range(count)], axis=1)


def normal(ids: ndarray, *, count: int, **at: int) -> ndarray:
    """(n, count) float64, standard normal (Box-Muller: two uniform draws give two). at: seed, epoch and stream.

    log and cos may differ in the last bit between platforms; the integer draws do not.
    """
    pairs = -(-count // 2)
    u = uniform(ids, count=2 * pairs, **at)
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, :pairs])), 2 * np.pi * u[:, pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]
