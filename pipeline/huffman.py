"""The Huffman codes of baseline JPEGs: tables, and the length of a block's codes, without decoding pixels. For Numba.

In a scan, a zero is stuffed after every byte 0xFF; `restuff` removes these zeros, and bit positions refer to its
output. All numbers come from a file, so nothing is read or written outside the arrays for any content of the file.
"""

from typing import Any

import numpy as np
from numba import types
from numpy import ndarray

from .jit import compiled

u = np.uintp

# Huffman tables: (TABLES,) int32, initially zeros: DC 0, DC 1, AC 0, AC 1, each of TABLE numbers. In each table:
#   0 …       indexed by the next LOOK bits of a scan: _entry of their first code; 0: the code is longer.
#   MANY …    (AC) the same index: the sum over all codes in these bits, see _join; of 127: the first code is longer.
#   CODES …   (DC) for each category, 32 · its code + the code's length.
#   LONGER …  (DC) 16 counts and the symbols of a table with the missing categories too, as codes of 16 bits.
#   KEPT …    the 16 counts and symbols in the file: they decode longer codes, and most images have the same ones.
LOOK = 10
MANY, KEPT = 1 << LOOK, 2 << LOOK
TABLE = KEPT + 16 + 256
TABLES = 4 * TABLE
DONE = 129  # an end of block counts as one coefficient and 128 more
WINDOW = 57  # `window` returns at least this many valid bits
SLACK = 8  # bytes that `window` may read after the last one
CATEGORIES = 12  # of DC differences at 8 bits per sample: 0 to 11 bits
CODES, LONGER = MANY, MANY + 256
ONES = np.uint64((1 << 64) - 1)

_reversed: Any = types.ExternalFunction("llvm.bswap.i64", types.uint64(types.uint64))  # bytes, in one instruction


@compiled
def read_table(data: ndarray, at: int, end: int, tables: ndarray, base: int) -> Any:
    """Fills the table at `base` from 16 counts at data[at] and the symbols after them; returns their size, or -1."""
    size, kept = 16 + np.int64(data[at : at + 16].sum()), base + KEPT
    if size > 16 + 256 or at + size > end:
        return -1
    if (tables[kept : kept + size] == data[at : at + size]).all():
        return size
    tables[base : base + TABLE] = 0
    tables[kept] = -1  # marks the table as invalid until it is complete
    code, symbol = 0, at + 16
    for length in range(1, 17):
        code <<= 1
        count = np.int64(data[at + length - 1])
        if code + count >= 1 << length:  # the code of all ones is reserved
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
            # The code of all ones is reserved, and a count is one byte.
            if tables[base + CODES + category] == 0 and code < 0xFFFF and tables[longer + 15] < 255:
                tables[base + CODES + category] = code << 5 | 16
                tables[longer + 15], tables[last] = tables[longer + 15] + 1, category
                code, last = code + 1, last + 1
    tables[kept : kept + size] = data[at : at + size]
    return size


@compiled
def _entry(length: int, symbol: int) -> int:
    """2¹⁶ · the code's length + 2⁸ · the number of coefficients that it stands for + the length of the code and its
    coefficient's bits. 0: not allowed in a baseline JPEG."""
    run, size = symbol >> 4, symbol & 15
    if size == 0 and run == 0:
        return length << 16 | DONE << 8 | length
    return length << 16 | (run + 1) << 8 | length + size if size or run == 15 else 0


@compiled
def _join(tables: ndarray, base: int) -> None:
    """Fills an AC table from MANY on: 2⁸ · coefficients + bits of all whole codes in LOOK bits, up to a block's end."""
    for bits in range(1 << LOOK):
        used, coefficients = 0, 0
        while coefficients < DONE:
            entry = tables[base + (bits << used & (1 << LOOK) - 1)]
            if entry == 0 or used + (entry >> 16) > LOOK or coefficients + (entry >> 8 & 0x7F) > 63:
                break
            used, coefficients = used + (entry & 0xFF), coefficients + (entry >> 8 & 0xFF)
        tables[base + MANY + bits] = (coefficients or 127) << 8 | used


@compiled
def _load64(data: ndarray, at: int) -> Any:
    """Loads eight bytes, big-endian. LLVM compiles the loop to one instruction."""
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
    """Returns at least 57 bits from `bit` on, as the most significant bits of a uint64. Reads 8 bytes."""
    return _load64(clean, u(bit) >> u(3)) << np.uint64(bit & 7)


@compiled
def _coded(tables: ndarray, base: int, word: Any) -> Any:
    """The _entry of the first code in a 64-bit word; 0 if there is none."""
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
    """(number of bits, DC difference) of the first code in a 64-bit word; (0, 0) if there is none."""
    found = _coded(tables, dc, word)
    length, used = found >> 16, found & 0xFF
    size = used - length
    if size > 11 or found >> 8 & 0x7F > 1:  # more than 11 bits, or a run of zeros
        return 0, 0
    value = np.int64(word << np.uint64(length) >> np.uint64(1) >> np.uint64(63 - size))
    return used, value if value >= 1 << size >> 1 else value - (1 << size) + 1


@compiled
def skip_block(clean: ndarray, bit: int, end: int, tables: ndarray, dc: int, ac: int) -> tuple[int, int]:
    """Returns the position after the block at `bit`, or end + 1 if the block is invalid or passes `end`; and its DC
    difference."""
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
        if k + (found >> 8 & 0x7F) > 64:  # a longer code, or one of the next block
            found = _coded(tables, ac, word)
            if found == 0:
                return end + 1, 0
        # Processors use only six bits of a shift: this mask costs nothing, a larger one a cycle.
        word, used, k = word << np.uint64(found & 63), used + (found & 0xFF), k + (found >> 8 & 0xFF)
    return min(bit + used, end + 1) if k == 64 or k >= DONE else end + 1, difference


@compiled
def append(clean: ndarray, q: int, word: Any, size: int) -> Any:
    """Writes the first `size` <= 57 bits of a word at bit q, and undefined bits after them. Returns q + size."""
    at, used = u(q >> 3), np.uint64(q & 7)
    before = np.uint64(clean[at]) << np.uint64(56) & ~(ONES >> used)
    store64(clean, at, before | word >> used)
    return q + size


@compiled
def restuff(data: ndarray, start: int, end: int, out: ndarray, stuffing: bool) -> Any:
    """Copies data[start:end] to `out`. stuffing: adds a zero after each 0xFF. Otherwise removes these zeros, and stops
    at the first marker.

    Returns the number of bytes in `out`, and the position of the marker's second byte, or `end`.
    out: at least end - start bytes, twice as many with stuffing, and SLACK bytes more.
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
