"""A JPEG of only those MCUs that a crop needs, cut out of the bits of the whole one: no pixel is decoded for it.

Runs of Huffman codes are copied. Only the first DC code of each component in a row of MCUs is encoded again: it is
a difference to the MCU before it. The pixels of the cut are those of the whole image, to the last bit: it has a margin
of a pixel, which the decoder's interpolation of colours at half the resolution looks at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .huffman import TABLE, coded, peek, skip_block, unstuff
from .jit import compiled
from .jpeg import (
    COMPONENT,
    COMPONENTS,
    DATA,
    FRAME,
    HEIGHT,
    MCU_HEIGHT,
    MCU_WIDTH,
    STEP,
    WIDTH,
    number,
    places_in,
    skip_mcu,
)

CATEGORIES = 12  # of DC differences of 8 bits a sample: 0 to 11 bits
SLACK_OUT = 64  # bytes behind the limit that may be written before it is checked
EXTRA = 512  # bytes by which a cut can be larger than the image it is made of: longer DC codes
u = np.uintp


@compiled
def _write(out: np.ndarray, q: int, word: int) -> int:
    """Appends 32 bits, with a zero behind each 0xFF; returns the new end."""
    if (~word - 0x01010101) & word & 0x80808080:  # one of its bytes is 0xFF
        for shift in range(24, -1, -8):
            byte = word >> shift & 0xFF
            out[u(q)], out[u(q + 1)] = byte, 0
            q += 1 + (byte == 0xFF)
        return q
    out[u(q)], out[u(q + 1)], out[u(q + 2)], out[u(q + 3)] = word >> 24, word >> 16, word >> 8, word
    return q + 4


@compiled
def _put(out: np.ndarray, q: int, acc: int, held: int, value: int, size: int) -> tuple[int, int, int]:
    """Appends `size` <= 32 bits; `acc` ends with the latest `held` < 32 bits, which are not in `out` yet."""
    acc = (acc & 0xFFFFFFFF) << size | value
    held += size
    if held >= 32:
        held -= 32
        q = _write(out, q, acc >> held)
    return q, acc, held


@compiled
def _copy(clean: np.ndarray, bit: int, end: int, out: np.ndarray, q: int, acc: int, held: int, limit: int) -> Any:
    """Appends the bits [bit, end); stops at `limit` bytes."""
    while end - bit >= 32 and q < limit:
        acc = (acc & 0xFFFFFFFF) << 32 | peek(clean, bit)
        q = _write(out, q, acc >> held)
        bit += 32
    if 0 < end - bit < 32 and q < limit:
        return _put(out, q, acc, held, peek(clean, bit) >> (32 - (end - bit)), end - bit)
    return q, acc, held


@compiled
def _longer_table(data: np.ndarray, at: int, out: np.ndarray, q: int, codes: np.ndarray) -> int:
    """Writes a DC table with a code for every category, from the one with its counts at data[at]; 0 if none fits.

    Missing ones get longer codes, behind the last. codes: (CATEGORIES, 2), filled with each one's code and length.
    """
    counts, symbols = np.zeros(17, np.int64), np.zeros(256, np.int64)
    total, code, longest = 0, 0, 0
    codes[:] = 0
    for length in range(1, 17):
        counts[length] = data[at + length - 1]
        for _ in range(counts[length]):
            symbols[total] = data[at + 16 + total]
            if symbols[total] < CATEGORIES:
                codes[symbols[total], 0], codes[symbols[total], 1] = code, length
            code, total, longest = code + 1, total + 1, length
        code <<= 1
    code >>= 16 - longest + 1  # the next one of the longest length
    for category in range(CATEGORIES):
        if codes[category, 1] == 0:
            while code + 1 >= 1 << longest:  # only the code of ones is left, which stays free
                code, longest = code << 1, longest + 1
            if longest > 16 or total == 256:
                return 0
            codes[category, 0], codes[category, 1] = code, longest
            counts[longest] += 1
            symbols[total] = category
            code, total = code + 1, total + 1
    for length in range(1, 17):
        out[q + length - 1] = counts[length]
    for i in range(total):
        out[q + 16 + i] = symbols[i]
    return q + 16 + total


@compiled
def _write_header(
    data: np.ndarray, start: int, layout: np.ndarray, width: int, height: int,
    out: np.ndarray, q: int, limit: int, codes: np.ndarray,
) -> int:  # fmt: skip
    """Copies the segments that decide pixels, with the new size and longer DC tables; 0 if that is not possible.

    codes: (2, CATEGORIES, 2).
    """
    out[q], out[q + 1] = 0xFF, 0xD8
    at, q = start + 2, q + 2
    while at < layout[DATA]:
        marker, after = data[at + 1], at + 2 + number(data, at + 2)
        if q + after - at + 4 * CATEGORIES > limit:
            return 0
        if marker == 0xC4:
            body = at + 4
            while body < after:
                count = 0
                for i in range(16):
                    count += int(data[body + 1 + i])
                if q + 17 + count + 4 * CATEGORIES > limit:
                    return 0
                segment = q
                out[q], out[q + 1], out[q + 4] = 0xFF, 0xC4, data[body]
                if data[body] < 2:
                    q = _longer_table(data, body + 1, out, q + 5, codes[data[body]])
                    if q == 0:
                        return 0
                else:
                    out[q + 5 : q + 21 + count] = data[body + 1 : body + 17 + count]
                    q += 21 + count
                out[segment + 2], out[segment + 3] = (q - segment - 2) >> 8, (q - segment - 2) & 0xFF
                body += 17 + count
        elif marker in (0xDA, 0xDB, 0xE0, 0xEE) or at == layout[FRAME]:
            out[q : q + after - at] = data[at:after]
            if at == layout[FRAME]:
                out[q + 5], out[q + 6], out[q + 7], out[q + 8] = height >> 8, height & 0xFF, width >> 8, width & 0xFF
            q += after - at
        at = after
    return q


@compiled
def _covering(low: int, high: int, unit: int, length: int) -> tuple[int, int]:
    """The MCUs of an axis that hold the pixels [low, high) and, of colours at half the resolution, their neighbours."""
    units, margin = -(-length // unit), 1 if unit > 8 else 0
    first = min(max(low - margin, 0) // unit, units - 1)
    last = min(max(-(-(high + margin) // unit), first + 1), units)
    # Colours at most two pixels wide are interpolated in another way.
    return max(first - 1, 0) if margin and first == units - 1 else first, last


@compiled
def cut_jpeg(
    data: np.ndarray, start: int, end: int, layout: np.ndarray, tables: np.ndarray, places: np.ndarray,
    box: np.ndarray, clean: np.ndarray, out: np.ndarray, q: int, limit: int, placed: np.ndarray,
) -> int:  # fmt: skip
    """Writes a JPEG of the pixels `box` of the JPEG data[start:end] from out[q] on; returns its end there.

    0 if it is not possible: the image is to be decoded whole then, and its places are wrong or it is damaged.
    layout, tables: by read_layout. places: (n, 4) uint16 of find_places. box: left, top, right and bottom.
    clean: memory, at least end - start + SLACK bytes. limit: the end of `out`, which has SLACK_OUT bytes more.
    placed: (4,) int64, filled with left, top, width and height of what was cut.
    """
    width, height, unit, down = layout[WIDTH], layout[HEIGHT], layout[MCU_WIDTH], layout[MCU_HEIGHT]
    if len(places) != places_in(width, height, unit, down):
        return 0
    left, right = _covering(box[0], box[2], unit, width)
    top, bottom = _covering(box[1], box[3], down, height)
    placed[0], placed[1] = left * unit, top * down
    placed[2], placed[3] = min(right * unit, width) - placed[0], min(bottom * down, height) - placed[1]
    codes = np.zeros((2, CATEGORIES, 2), np.int64)
    q = _write_header(data, start, layout, placed[2], placed[3], out, q, limit, codes)
    if q == 0:
        return 0
    per_row, step = -(-width // STEP), STEP // unit
    before, written = np.zeros(3, np.int64), np.zeros(3, np.int64)
    ends, acc, held, at, place = np.zeros(3, np.int64), 0, 0, 0, 0
    for row in range(top, bottom):
        first, last = row * per_row + left // step, row * per_row + -(-right // step)
        middle = max(row * per_row + right // step, first) if right * unit < width else last
        for i, target in enumerate((first, middle, last)):
            while place < target:
                place += 1
                at += int(places[place, 0])
            ends[i] = at
        if layout[DATA] + (at >> 3) + 1 > end:
            return 0
        # The row's bits, up to the entry before its end and from there on: its last byte may have a zero behind it.
        n = unstuff(data, layout[DATA] + (ends[0] >> 3), layout[DATA] + (ends[1] >> 3), clean)
        n_last = unstuff(data, layout[DATA] + (ends[1] >> 3), min(layout[DATA] + (at >> 3) + 2, end), clean[n:])
        bits = 8 * (n + n_last)
        bit = ends[0] & 7
        for i in range(3):
            before[i] = np.int16(places[first, 1 + i])
        for _ in range(left % step):
            bit = skip_mcu(clean, bit, bits, layout, tables, before)
            if bit < 0:
                return 0
        # The first MCU, whose differences are to other values now.
        copied = bit
        for i in range(layout[COMPONENTS]):
            c = COMPONENT + 4 * i
            dc, ac = layout[c + 2], layout[c + 3]
            found = coded(tables, dc, peek(clean, bit))
            q, acc, held = _copy(clean, copied, bit, out, q, acc, held, limit)
            copied = bit + (found >> 8) + (found & 0xFF)
            bit, difference = skip_block(clean, bit, bits, tables, dc, ac)
            if bit < 0:
                return 0
            before[i] += difference
            difference = before[i] - written[i]
            size = _bits(difference)
            if size >= CATEGORIES:
                return 0
            table = dc // TABLE
            q, acc, held = _put(out, q, acc, held, codes[table, size, 0], codes[table, size, 1])
            if size:
                value = difference if difference > 0 else difference + (1 << size) - 1
                q, acc, held = _put(out, q, acc, held, value, size)
            for _ in range(layout[c] * layout[c + 1] - 1):
                bit, difference = skip_block(clean, bit, bits, tables, dc, ac)
                if bit < 0:
                    return 0
                before[i] += difference
        # From there, or from the last entry before it, to the end of the run.
        column = left + 1
        if middle > first:
            column, bit = (middle - row * per_row) * step, 8 * n + (ends[1] & 7)
            for i in range(3):
                before[i] = np.int16(places[middle, 1 + i])
        for _ in range(right - column if middle < last else 0):
            bit = skip_mcu(clean, bit, bits, layout, tables, before)
            if bit < 0:
                return 0
        q, acc, held = _copy(clean, copied, bit, out, q, acc, held, limit)
        written[:] = before
        if q >= limit:
            return 0
    padding = -held % 8  # ones fill the last byte
    q, acc, held = _put(out, q, acc, held, (1 << padding) - 1, padding)
    while held:
        byte = acc >> (held - 8) & 0xFF
        out[q], out[q + 1] = byte, 0
        q, held = q + 1 + (byte == 0xFF), held - 8
    out[q], out[q + 1] = 0xFF, 0xD9
    return q + 2


@compiled
def _bits(value: int) -> int:
    """The number of bits of |value|."""
    size, left = 0, abs(value)
    while left:
        left >>= 1
        size += 1
    return size
