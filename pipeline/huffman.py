"""The Huffman codes of baseline JPEGs: tables, and the length of a block of codes, without its pixels. For Numba.

A scan may hold the byte 0xFF only with a zero stuffed behind it; `restuff` removes these, and bit positions count in
what it returns. Every number comes from a file: nothing is read or written outside of the arrays, whatever it says.
"""

from typing import Any

import numpy as np
from numba import types
from numpy import ndarray

from .jit import compiled

u = np.uintp

# Huffman tables, (TABLES,) int32, zeros at first: DC 0 and 1, AC 0 and 1, TABLE numbers each. LOOK bits of a scan find,
# from 0 on, what _entry makes of the code that they begin with, and from MANY on, for AC, what all codes come to that
# they hold; 0: a longer code. For DC, from CODES on are 32 times each category's code and its length, and from LONGER
# on 16 counts and the symbols of a table that has the missing categories too, with codes of 16 bits. From KEPT on are
# those that the table was made of: the next image mostly has the same. They decode longer codes.
LOOK = 10
MANY, KEPT = 1 << LOOK, 2 << LOOK
TABLE = KEPT + 16 + 256
TABLES = 4 * TABLE
DONE = 128  # coefficients, that an end of block counts for
WINDOW = 57  # bits, at least, of what `window` returns
SLACK = 8  # bytes that `window` may read behind the last one
CATEGORIES = 12  # of DC differences of 8 bits a sample: 0 to 11 bits
CODES, LONGER = MANY, MANY + 256
ONES = np.uint64((1 << 64) - 1)

_reversed: Any = types.ExternalFunction("llvm.bswap.i64", types.uint64(types.uint64))  # bytes, in one instruction


@compiled
def read_table(data: ndarray, at: int, end: int, tables: ndarray, base: int) -> Any:
    """Fills the table at `base` from its 16 counts at data[at] and the symbols behind them; their size, or -1."""
    size, kept = 16 + np.int64(data[at : at + 16].sum()), base + KEPT
    if size > 16 + 256 or at + size > end:
        return -1
    if (tables[kept : kept + size] == data[at : at + size]).all():
        return size
    tables[base : base + TABLE] = 0
    tables[kept] = -1  # until it is whole
    code, symbol = 0, at + 16
    for length in range(1, 17):
        code <<= 1
        count = np.int64(data[at + length - 1])
        if code + count >= 1 << length:  # the code of ones alone must stay free
            return -1
        for _ in range(count):
            if length <= LOOK:
                first = base + (code << (LOOK - length))
                tables[first : first + (1 << (LOOK - length))] = _entry(length, np.int64(data[symbol]))
            tables[base + CODES + data[symbol]] = code << 5 | length
            code, symbol = code + 1, symbol + 1
    if base >= 2 * TABLE:
        _join(tables, base)
    else:
        longer, last = base + LONGER, base + LONGER + size
        tables[longer:last] = data[at : at + size]
        for category in range(CATEGORIES):
            # The code of ones alone must stay free; and a count is a byte.
            if tables[base + CODES + category] == 0 and code < 0xFFFF and tables[longer + 15] < 255:
                tables[base + CODES + category] = code << 5 | 16
                tables[longer + 15], tables[last] = tables[longer + 15] + 1, category
                code, last = code + 1, last + 1
    tables[kept : kept + size] = data[at : at + size]
    return size


@compiled
def _entry(length: int, symbol: int) -> int:
    """2¹⁶ times the code's length, 256 times the coefficients that it stands for, and its length with its coefficient's
    bits. 0: not in a baseline JPEG."""
    run, size = symbol >> 4, symbol & 15
    if size == 0 and run == 0:
        return length << 16 | DONE << 8 | length
    return length << 16 | (run + 1) << 8 | length + size if size or run == 15 else 0


@compiled
def _join(tables: ndarray, base: int) -> None:
    """Fills an AC table's MANY: the coefficients and bits of all codes that LOOK bits hold, to the end of a block."""
    for bits in range(1 << LOOK):
        used, coefficients = 0, 0
        while used < LOOK:
            entry = tables[base + (bits << used & (1 << LOOK) - 1)]
            if entry == 0 or used + (entry >> 16) > LOOK or coefficients + (entry >> 8 & 0x7F) > 63:
                break
            used, coefficients = used + (entry & 0xFF), coefficients + (entry >> 8 & 0xFF)
            if coefficients >= DONE:
                break
        tables[base + MANY + bits] = coefficients << 8 | used


@compiled
def _load64(data: ndarray, at: int) -> Any:
    """Eight bytes, the first one at the top. LLVM makes one instruction of the loop."""
    word = np.uint64(0)
    for i in range(u(8)):
        word |= np.uint64(data[at + i]) << np.uint64(8) * np.uint64(i)
    return _reversed(word)


@compiled
def store64(data: ndarray, at: int, word: Any) -> None:
    word = _reversed(word)
    for i in range(u(8)):
        data[at + i] = word >> np.uint64(8) * np.uint64(i)


@compiled
def window(clean: ndarray, bit: int) -> Any:
    """At least 57 bits from `bit` on, at the top of 64. Reads 8 bytes."""
    return _load64(clean, u(bit) >> u(3)) << np.uint64(bit & 7)


@compiled
def _coded(tables: ndarray, base: int, word: Any) -> Any:
    """The _entry of the code that a word of 64 bits begins with; 0: there is none."""
    found = np.int64(tables[u(base) + u(word >> np.uint64(64 - LOOK))])
    if found:
        return found
    code, symbol = 0, base + KEPT + 16
    for length in range(1, 17):
        count: Any = np.int64(tables[base + KEPT + length - 1])
        ahead = np.int64(word >> np.uint64(64 - length)) - code
        if 0 <= ahead < count:
            return _entry(length, np.int64(tables[symbol + ahead]))
        symbol, code = symbol + count, (code + count) << 1
    return 0


@compiled
def read_difference(tables: ndarray, dc: int, word: Any) -> Any:
    """(number of bits, DC difference) of the code that a word begins with; no bits if there is none."""
    found = _coded(tables, dc, word)
    length, used = found >> 16, found & 0xFF
    size = used - length
    if size > 11 or found >> 8 & 0x7F > 1:  # more than 11 bits, or with zeros before them
        return 0, 0
    value = np.int64(word << np.uint64(length) >> np.uint64(1) >> np.uint64(63 - size))
    return used, value if value >= 1 << size >> 1 else value - (1 << size) + 1


@compiled
def skip_block(clean: ndarray, bit: int, end: int, tables: ndarray, dc: int, ac: int) -> tuple[int, int]:
    """The position after the block at `bit`, and its DC difference. end + 1 if it cannot be read or passes `end`."""
    word, k = window(clean, bit), 1
    used, difference = read_difference(tables, dc, word)
    if used == 0:
        return end + 1, 0
    word <<= np.uint64(used)
    while k < 64:
        if used > WINDOW - 16:  # too few bits are left for the longest code
            bit, used = bit + used, 0
            if bit > end:
                return end + 1, 0
            word = window(clean, bit)
        found: Any = np.int64(tables[u(ac + MANY) + u(word >> np.uint64(64 - LOOK))])
        many = found >> 8
        if found == 0 or k + (many & 0x7F) > 64 - (many >> 7):  # codes of the next block are among them
            found = _coded(tables, ac, word)
            if found == 0:
                return end + 1, 0
        # Processors use only six bits of a shift: this mask costs nothing, a larger one a cycle.
        word, used, k = word << np.uint64(found & 63), used + (found & 0xFF), k + (found >> 8 & 0xFF)
    return min(bit + used, end + 1) if k == 64 or k >= DONE else end + 1, difference


@compiled
def append(clean: ndarray, q: int, word: Any, size: int) -> Any:
    """Writes the first `size` <= 57 bits of a word, and others behind them, at bit q. Returns the end of the `size`."""
    at, used = u(q >> 3), np.uint64(q & 7)
    before = np.uint64(clean[at]) << np.uint64(56) & ~(ONES >> used)
    store64(clean, at, before | word >> used)
    return q + size


@compiled
def restuff(data: ndarray, start: int, end: int, out: ndarray, stuffing: bool) -> Any:
    """Copies data[start:end] to `out`, with a zero behind each 0xFF, or a scan up to its first marker, without those.

    Returns the number of bytes in `out`, and the position of the marker's second byte, or `end`.
    out: with SLACK behind end - start bytes, or twice as many with zeros.
    """
    p, q, last = u(start), u(0), u(end)
    while p < last:
        if p + u(8) <= last:
            word = _load64(data, p)
            if (~word - np.uint64(0x0101010101010101)) & word & np.uint64(0x8080808080808080) == 0:  # no byte is 0xFF
                store64(out, q, word)
                p, q = p + u(8), q + u(8)
                continue
        byte = data[p]
        out[q] = byte
        p, q = p + u(1), q + u(1)
        if byte == 0xFF:
            if stuffing:
                out[q] = 0
                q += u(1)
            elif p < last and data[p] == 0:
                p += u(1)
            else:
                q -= u(1)
                break
    out[q : q + u(SLACK)] = 0
    return np.int64(q), np.int64(p)
