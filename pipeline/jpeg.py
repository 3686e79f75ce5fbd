"""Baseline JPEGs as far as their Huffman codes: which bits of a scan belong to which MCU. Compiled by Numba.

An MCU is the smallest unit of a scan: 8 × 8 pixels of a grey or 4:4:4 image, 16 × 16 of a 4:2:0 one. A scan may hold
the byte 0xFF only with a zero stuffed behind it; `unstuff` removes these, and bit positions count in what it returns.

Every number comes from a file: nothing is read or written outside of the arrays, whatever the file says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .jit import compiled

u = np.uintp

# The numbers of a layout, (LAYOUT,) int64. A component's are COMPONENT + 4 · its number: blocks an MCU across and down,
# and its DC and AC table.
WIDTH, HEIGHT, FRAME, SCAN, DATA, COMPONENTS, MCU_WIDTH, MCU_HEIGHT, COMPONENT = range(9)
LAYOUT = COMPONENT + 12

# Huffman tables, (TABLES,) int32, zeros at first: DC 0 and 1, AC 0 and 1, TABLE numbers each. LOOK bits of a scan find,
# from 0 on, what _entry makes of the code that they begin with, and from MANY on, for AC, what all codes come to that
# they hold; 0: a longer code. Of these, LAST, OFFSET and SYMBOLS are by length the last code and where its symbols are.
# From KEPT on are the counts and symbols that the table was made of: the next image mostly has the same.
LOOK = 11
MANY, LAST = 1 << LOOK, 2 << LOOK
OFFSET, SYMBOLS, KEPT = LAST + 18, LAST + 36, LAST + 36 + 256
TABLE = KEPT + 16 + 256
TABLES = 4 * TABLE
DONE = 128  # coefficients, that an end of block counts for
SLACK = 8  # bytes that `peek` may read behind the last one


@compiled
def number(data: np.ndarray, at: int) -> int:
    return (int(data[at]) << 8) + int(data[at + 1])


@compiled
def read_layout(data: np.ndarray, start: int, end: int, layout: np.ndarray, tables: np.ndarray) -> bool:
    """Fills layout and tables from the JPEG data[start:end].

    Returns False for all but an RGB or grey baseline JPEG of one scan without restart markers.
    """
    if end - start < 4 or data[start] != 0xFF or data[start + 1] != 0xD8:
        return False
    at, known = start + 2, 0
    layout[:] = 0
    while at + 4 <= end and data[at] == 0xFF:
        marker, length = data[at + 1], number(data, at + 2)
        body, after = at + 4, at + 2 + length
        if marker == 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2 or after > end:
            return False
        if marker == 0xC0 or marker == 0xC1:
            if layout[FRAME] or not _read_frame(data, at, after, layout):
                return False
        elif marker == 0xC4:
            known = _read_tables(data, body, after, tables, known)
            if known < 0:
                return False
        elif marker == 0xDD:
            if length != 4 or number(data, body):
                return False
        elif marker == 0xDA:
            layout[SCAN], layout[DATA] = at, after
            return bool(layout[FRAME] > 0 and _read_scan(data, body, after, layout, known))
        elif marker < 0xDB:  # other frames, and arithmetic coding
            return False
        at = after
    return False


@compiled
def _read_frame(data: np.ndarray, at: int, after: int, layout: np.ndarray) -> bool:
    n = int(data[at + 9]) if after >= at + 10 else 0
    if (n != 1 and n != 3) or after != at + 10 + 3 * n or data[at + 4] != 8:
        return False
    layout[FRAME], layout[HEIGHT], layout[WIDTH] = at, number(data, at + 5), number(data, at + 7)
    layout[COMPONENTS], across, down = n, 1, 1
    for i in range(n):
        sampling = int(data[at + 11 + 3 * i])
        h, v = (sampling >> 4, sampling & 15) if n > 1 else (1, 1)  # alone, a component has one block an MCU
        if i == 0:
            across, down = h, v
        elif h != 1 or v != 1:
            return False
        layout[COMPONENT + 4 * i], layout[COMPONENT + 4 * i + 1] = h, v
    if not 1 <= across <= 2 or not 1 <= down <= 2:
        return False
    layout[MCU_WIDTH], layout[MCU_HEIGHT] = 8 * across, 8 * down
    return bool(layout[WIDTH] > 0 and layout[HEIGHT] > 0)


@compiled
def _read_scan(data: np.ndarray, body: int, after: int, layout: np.ndarray, known: int) -> bool:
    """known: a bit for each table that was read."""
    n = layout[COMPONENTS]
    if after != body + 4 + 2 * n or data[body] != n:
        return False
    for i in range(n):
        chosen = int(data[body + 2 + 2 * i])
        dc, ac = chosen >> 4, chosen & 15
        if data[body + 1 + 2 * i] != data[layout[FRAME] + 10 + 3 * i] or dc > 1 or ac > 1:
            return False
        if not known >> dc & 1 or not known >> (2 + ac) & 1:
            return False
        layout[COMPONENT + 4 * i + 2], layout[COMPONENT + 4 * i + 3] = dc * TABLE, (2 + ac) * TABLE
    return bool(data[after - 3] == 0 and data[after - 2] == 63 and data[after - 1] == 0)


@compiled
def _read_tables(data: np.ndarray, at: int, after: int, tables: np.ndarray, known: int) -> int:
    """The tables of one segment; returns `known` with their bits, or -1."""
    while at < after:
        chosen = int(data[at])
        if chosen & 0xEE or at + 17 > after:
            return -1
        table = (chosen >> 4) * 2 + (chosen & 1)
        size = _read_table(data, at + 1, after, tables, table * TABLE)
        if size < 0:
            return -1
        at, known = at + 1 + size, known | 1 << table
    return known


@compiled
def _read_table(data: np.ndarray, at: int, end: int, tables: np.ndarray, base: int) -> int:
    """Fills the table at `base` from its 16 counts at data[at] and the symbols behind them; their size, or -1."""
    count = 0
    for i in range(16):
        count += int(data[at + i])
    size = 16 + count
    if count > 256 or at + size > end:
        return -1
    same = True
    for i in range(size):
        same &= tables[base + KEPT + i] == data[at + i]
    if same:
        return size
    tables[base : base + TABLE] = 0
    tables[base + KEPT] = -1  # until it is whole
    code, symbol, is_ac = 0, 0, base >= 2 * TABLE
    for length in range(1, 17):
        n = int(data[at + length - 1])
        tables[base + OFFSET + length] = symbol - code
        for _ in range(n):
            value = int(data[at + 16 + symbol])
            tables[base + SYMBOLS + symbol] = value
            if length <= LOOK and code < 1 << length:
                first = code << (LOOK - length)
                tables[base + first : base + first + (1 << (LOOK - length))] = _entry(length, value, is_ac)
            symbol += 1
            code += 1
        if code >= 1 << length:  # the code of ones alone must stay free
            return -1
        tables[base + LAST + length] = code - 1 if n else -1
        code <<= 1
    if is_ac:
        _join(tables, base)
    for i in range(size):
        tables[base + KEPT + i] = data[at + i]
    return size


@compiled
def _entry(length: int, symbol: int, is_ac: bool) -> int:
    """DC: 256 times the code's length, and the difference's bits. AC: 2¹⁶ times the code's length, 256 times the
    coefficients that it stands for, and its length with its coefficient's bits. 0: not in a baseline JPEG."""
    if not is_ac:
        return length << 8 | symbol if symbol < 12 else 0
    run, size = symbol >> 4, symbol & 15
    if size == 0 and run == 0:
        return length << 16 | DONE << 8 | length
    return length << 16 | (run + 1) << 8 | length + size if size or run == 15 else 0


@compiled
def _join(tables: np.ndarray, base: int) -> None:
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


def _load64_code(_: Any, array: Any, at: Any) -> Any:
    """Eight bytes from `at` on, as a number: one instruction, where eight loads and shifts stay as many."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        address = builder.bitcast(builder.gep(data, [values[1]]), ir.IntType(64).as_pointer())
        return builder.bswap(builder.load(address, align=1))

    return types.uint64(array, at), generate


_load64: Any = intrinsic(_load64_code)


@compiled
def _window(clean: np.ndarray, bit: int) -> Any:
    """At least 57 bits from `bit` on, at the top of 64. Reads 8 bytes."""
    return _load64(clean, u(bit) >> u(3)) << np.uint64(bit & 7)


@compiled
def peek(clean: np.ndarray, bit: int) -> Any:
    """32 bits from `bit` on."""
    return np.int64(_window(clean, bit) >> np.uint64(32))


@compiled
def coded(tables: np.ndarray, base: int, bits: int) -> Any:
    """The _entry of the code that 32 bits begin with; 0: there is none."""
    found = np.int64(tables[u(base) + u(bits >> (32 - LOOK))])
    if found:
        return found
    for length in range(LOOK + 1, 17):
        code = bits >> (32 - length)
        if code <= tables[u(base + LAST + length)]:
            symbol = np.int64(tables[u(base + SYMBOLS + tables[u(base + OFFSET + length)] + code)])
            return _entry(length, symbol, base >= 2 * TABLE)
    return 0


@compiled
def extended(bits: int, size: int) -> int:
    """The value of `size` bits, the topmost of 32."""
    if size == 0:
        return 0
    value = bits >> (32 - size)
    return value if value >> (size - 1) else value - (1 << size) + 1


@compiled
def skip_block(clean: np.ndarray, bit: int, end: int, tables: np.ndarray, dc: int, ac: int) -> tuple[int, int]:
    """The position after the block at `bit`, and its DC difference. -1 if it cannot be read or passes `end`."""
    word, used = _window(clean, bit), 0
    found = coded(tables, dc, np.int64(word >> np.uint64(32)))
    if found == 0:
        return -1, 0
    length, size = found >> 8, found & 0xFF
    difference = extended(np.int64(word << np.uint64(length) >> np.uint64(32)), size)
    used, word, k = length + size, word << np.uint64(length + size), 1
    while k < 64:
        if used > 57 - 16:  # too few bits are left for the longest code
            bit, used = bit + used, 0
            if bit > end:
                return -1, 0
            word = _window(clean, bit)
        found = np.int64(tables[u(ac + MANY) + u(word >> np.uint64(64 - LOOK))])
        many = found >> 8
        if found == 0 or k + (many & 0x7F) > 64 - (many >> 7):  # codes of the next block are among them
            found = coded(tables, ac, np.int64(word >> np.uint64(32)))
            if found == 0:
                return -1, 0
        word, used, k = word << np.uint64(found & 0xFF), used + (found & 0xFF), k + (found >> 8 & 0xFF)
    bit += used
    return bit if (k == 64 or k >= DONE) and bit <= end else -1, difference


@compiled
def skip_mcu(clean: np.ndarray, bit: int, end: int, layout: np.ndarray, tables: np.ndarray, before: np.ndarray) -> int:
    """The position after the MCU at `bit`; `before` becomes its components' last DC values. -1: it cannot be read."""
    for i in range(layout[COMPONENTS]):
        at = COMPONENT + 4 * i
        dc, ac, value = layout[at + 2], layout[at + 3], before[i]
        for _ in range(layout[at] * layout[at + 1]):
            bit, difference = skip_block(clean, bit, end, tables, dc, ac)
            if bit < 0:
                return -1
            value += difference
        before[i] = value
    return bit


@compiled
def unstuff(data: np.ndarray, start: int, end: int, clean: np.ndarray) -> Any:
    """Copies the scan data[start:end] up to its first marker, without stuffed zeros; returns the bytes copied.

    clean: at least end - start + SLACK long.
    """
    p, q = u(start), u(0)
    while p < u(end):
        byte = data[p]
        clean[q] = byte
        p += u(1)
        if byte == 0xFF:
            if p >= u(end) or data[p] != 0:
                break
            p += u(1)
        q += u(1)
    for i in range(u(SLACK)):
        clean[q + i] = 0
    return np.int64(q)


# Places: where the MCUs of an image are in its scan. An entry every STEP pixels of each of their rows, and a last one.
# An entry is four uint16: bits since the entry before, with stuffed zeros, and the components' latest DC values.
STEP = 64


@compiled
def places_in(width: int, height: int, mcu_width: int, mcu_height: int) -> int:
    return -(-height // mcu_height) * -(-width // STEP) + 1


@compiled
def find_places(
    data: np.ndarray, start: int, end: int, layout: np.ndarray, tables: np.ndarray, clean: np.ndarray, out: np.ndarray
) -> int:
    """Writes the entries of the JPEG data[start:end] into out, (n, 4) uint16; returns their number.

    0: it is none that can be cut, which includes every damaged one: each MCU is read, and the last one ends the image.
    clean: memory, at least end - start + SLACK bytes.
    """
    if not read_layout(data, start, end, layout, tables):
        return 0
    mcu_width = layout[MCU_WIDTH]
    columns, rows = -(-layout[WIDTH] // mcu_width), -(-layout[HEIGHT] // layout[MCU_HEIGHT])
    count = places_in(layout[WIDTH], layout[HEIGHT], mcu_width, layout[MCU_HEIGHT])
    if count > len(out):
        return 0
    n = unstuff(data, layout[DATA], end, clean)
    bit, at, stuffed, last, found = 0, 0, 0, 0, 0
    before = np.zeros(3, np.int64)
    for row in range(rows):
        for column in range(columns + (row == rows - 1)):
            if column % (STEP // mcu_width) == 0 or column == columns:
                while at < bit >> 3:
                    stuffed += clean[at] == 0xFF
                    at += 1
                here = 8 * stuffed + bit
                if here - last > 0xFFFF or np.abs(before).max() > 0x7FFF:
                    return 0
                out[found, 0] = here - last
                for i in range(3):
                    out[found, 1 + i] = before[i] & 0xFFFF
                last, found = here, found + 1
            if column < columns:
                bit = skip_mcu(clean, bit, 8 * n, layout, tables, before)
                if bit < 0:
                    return 0
    rest = layout[DATA] + ((last + 7) >> 3)  # the last byte may be 0xFF, with its zero behind it
    rest += clean[n - 1] == 0xFF and 8 * n - bit < 8 and bit & 7 > 0
    ends = rest + 2 <= end and data[rest] == 0xFF and data[rest + 1] == 0xD9
    return found if ends and 0 <= 8 * n - bit < 8 and found == count else 0
