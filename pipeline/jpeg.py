"""Baseline JPEGs as far as their Huffman codes: the header, and which bits of the scan belong to which MCU. For Numba.

An MCU is the smallest unit of a scan: 8 × 8 pixels of a grey or 4:4:4 image, 16 × 16 of a 4:2:0 one.
"""

from __future__ import annotations

import numpy as np

from .huffman import TABLE, read_table, skip_block, unstuff
from .jit import compiled

# The numbers of a layout, (LAYOUT,) int64. A component's are COMPONENT + 4 · its number: blocks an MCU across and down,
# and its DC and AC table.
WIDTH, HEIGHT, FRAME, DATA, COMPONENTS, MCU_WIDTH, MCU_HEIGHT, COMPONENT = range(8)
LAYOUT = COMPONENT + 12


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
            layout[DATA] = after
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
        size = read_table(data, at + 1, after, tables, table * TABLE)
        if size < 0:
            return -1
        at, known = at + 1 + size, known | 1 << table
    return known


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


# Places: the bits of the scan at which MCUs begin. An entry every STEP pixels of each of their rows, and a last one.
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
