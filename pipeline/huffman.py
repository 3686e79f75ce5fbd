"""The Huffman codes of baseline JPEGs: tables, and the length of a block of codes, without its pixels. For Numba.

A scan may hold the byte 0xFF only with a zero stuffed behind it; `unstuff` removes these, and bit positions count in
what it returns. Every number comes from a file: nothing is read or written outside of the arrays, whatever it says.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy import ndarray

from .jit import compiled

u = np.uintp

# Huffman tables, (TABLES,) int32, zeros at first: DC 0 and 1, AC 0 and 1, TABLE numbers each. LOOK bits of a scan find,
# from 0 on, what _entry makes of the code that they begin with, and from MANY on, for AC, what all codes come to that
# they hold; 0: a longer code. From KEPT on are the 16 counts and the symbols that the table was made of: the next image
# mostly has the same. They decode longer codes.
LOOK = 10
MANY, KEPT = 1 << LOOK, 2 << LOOK
TABLE = KEPT + 16 + 256
TABLES = 4 * TABLE
DONE = 128  # coefficients, that an end of block counts for
WINDOW = 57  # bits, at least, of what `window` returns
SLACK = 8  # bytes that `peek` may read behind the last one


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
            code, symbol = code + 1, symbol + 1
    if base >= 2 * TABLE:
        _join(tables, base)
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


def _eight_bytes(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    """Where the array values[0] has those from values[1] on: one instruction loads or stores them."""
    data = context.make_array(signature.args[0])(context, builder, values[0]).data
    return builder.bitcast(builder.gep(data, [values[1]]), ir.IntType(64).as_pointer())


def _load64_code(_: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, *call: Any) -> Any:
        return builder.bswap(builder.load(_eight_bytes(context, builder, *call), align=1))

    return types.uint64(array, at), generate


def _store64_code(_: Any, array: Any, at: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, *call: Any) -> Any:
        builder.store(builder.bswap(call[1][2]), _eight_bytes(context, builder, *call), align=1)

    return types.void(array, at, types.uint64), generate


_load64: Any = intrinsic(_load64_code)
store64: Any = intrinsic(_store64_code)


@compiled
def holds_ff(word: Any) -> Any:
    """Whether one of eight bytes is 0xFF."""
    return (~word - np.uint64(0x0101010101010101)) & word & np.uint64(0x8080808080808080) != 0


@compiled
def window(clean: ndarray, bit: int) -> Any:
    """At least 57 bits from `bit` on, at the top of 64. Reads 8 bytes."""
    return _load64(clean, u(bit) >> u(3)) << np.uint64(bit & 7)


@compiled
def peek(clean: ndarray, bit: int) -> Any:
    """32 bits from `bit` on."""
    return np.int64(window(clean, bit) >> np.uint64(32))


@compiled
def _coded(tables: ndarray, base: int, bits: int) -> Any:
    """The _entry of the code that 32 bits begin with; 0: there is none."""
    found = np.int64(tables[u(base) + u(bits >> (32 - LOOK))])
    if found:
        return found
    code, symbol = 0, base + KEPT + 16
    for length in range(1, 17):
        count: Any = np.int64(tables[base + KEPT + length - 1])
        ahead = (bits >> (32 - length)) - code
        if 0 <= ahead < count:
            return _entry(length, np.int64(tables[symbol + ahead]))
        symbol, code = symbol + count, (code + count) << 1
    return 0


@compiled
def read_difference(tables: ndarray, dc: int, bits: int) -> Any:
    """(number of bits, DC difference) of the code that 32 bits begin with; no bits if there is none."""
    found = _coded(tables, dc, bits)
    length, used = found >> 16, found & 0xFF
    size = used - length
    if size > 11 or found >> 8 & 0x7F > 1:  # more than 11 bits, or with zeros before them
        return 0, 0
    value = (bits << length & 0xFFFFFFFF) >> (32 - size)
    return used, value if value >= 1 << size >> 1 else value - (1 << size) + 1


@compiled
def skip_block(clean: ndarray, bit: int, end: int, tables: ndarray, dc: int, ac: int) -> tuple[int, int]:
    """The position after the block at `bit`, and its DC difference. end + 1 if it cannot be read or passes `end`."""
    word, k = window(clean, bit), 1
    used, difference = read_difference(tables, dc, np.int64(word >> np.uint64(32)))
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
            found = _coded(tables, ac, np.int64(word >> np.uint64(32)))
            if found == 0:
                return end + 1, 0
        # Of a shift, processors look at six bits only: this mask costs nothing, a larger one a cycle.
        word, used, k = word << np.uint64(found & 63), used + (found & 0xFF), k + (found >> 8 & 0xFF)
    return min(bit + used, end + 1) if k == 64 or k >= DONE else end + 1, difference


@compiled
def unstuff(data: ndarray, start: int, end: int, clean: ndarray) -> Any:
    """Copies the scan data[start:end] up to its first marker, without stuffed zeros.

    Returns the number of bytes, and the position of the marker's second byte, or `end`.
    clean: at least end - start + SLACK long.
    """
    p, q = u(start), u(0)
    while p < u(end):
        if p + u(8) <= u(end):
            word = _load64(data, p)
            if not holds_ff(word):
                store64(clean, q, word)
                p, q = p + u(8), q + u(8)
                continue
        byte = data[p]
        clean[q] = byte
        p += u(1)
        if byte == 0xFF:
            if p >= u(end) or data[p] != 0:
                break
            p += u(1)
        q += u(1)
    clean[q : q + u(SLACK)] = 0
    return np.int64(q), np.int64(p)
