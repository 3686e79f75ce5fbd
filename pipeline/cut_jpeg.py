"""A JPEG of only those MCUs that a crop needs, cut out of the bits of the whole one: no pixel is decoded for it.

Runs of Huffman codes are copied. Only the first DC code of each component in a row of MCUs is encoded again: it is
a difference to the MCU before it. The pixels of the cut are those of the whole image, to the last bit: it has a margin
of a pixel, which the decoder's interpolation of colours at half the resolution looks at.
"""

from typing import Any

import numpy as np
from numpy import ndarray

from .huffman import KEPT, SLACK, TABLE, holds_ff, peek, read_difference, skip_block, store64, unstuff, window
from .jit import compiled
from .jpeg import (
    BLOCKS,
    CODES,
    COMPONENTS,
    DATA,
    FRAME,
    HEIGHT,
    MCU_HEIGHT,
    MCU_WIDTH,
    STEP,
    WIDTH,
    places_in,
    skip_mcu,
    unpack,
)

CATEGORIES = 12  # of DC differences of 8 bits a sample: 0 to 11 bits
EXTRA = 1024  # bytes of three DC tables with their segments: a cut has these, and twice its image's at most
ROW_EXTRA = 64  # bytes that a row of MCUs can take beside its own, with the latest bits before it and the end
u = np.uintp


@compiled
def _write(out: ndarray, q: int, bits: int, size: int) -> int:
    """Appends whole bytes, with a zero behind each 0xFF; returns the new end."""
    for shift in range(size - 8, -1, -8):
        byte = bits >> shift & 0xFF
        out[u(q)], out[u(q + 1)] = byte, 0
        q += 1 + (byte == 0xFF)
    return q


@compiled
def _put(out: ndarray, q: int, acc: int, held: int, value: int, size: int) -> tuple[int, int, int]:
    """Appends `size` <= 32 bits; `acc` ends with the latest `held` < 32 bits, which are not in `out` yet."""
    acc = (acc & 0xFFFFFFFF) << size | value
    held += size
    if held >= 32:
        held -= 32
        q = _write(out, q, acc >> held, 32)
    return q, acc, held


@compiled
def _copy(clean: ndarray, bit: int, end: int, out: ndarray, q: int, acc: int, held: int) -> Any:
    """Appends the bits [bit, end), seven bytes at a time: mostly none is 0xFF, and needs a zero behind it."""
    if end - bit >= 64:
        size = 32 - held
        q, acc, held = _put(out, q, acc, held, peek(clean, bit) >> held, size)
        bit += size
        while end - bit >= 56:
            word = window(clean, bit) & np.uint64(0xFFFFFFFFFFFFFF00)
            if holds_ff(word):
                q = _write(out, q, np.int64(word >> np.uint64(8)), 56)
            else:
                store64(out, u(q), word)
                q += 7
            bit += 56
    if end - bit >= 32:
        q, acc, held = _put(out, q, acc, held, peek(clean, bit), 32)
        bit += 32
    return _put(out, q, acc, held, peek(clean, bit) >> (32 - (end - bit)), end - bit)


@compiled
def _write_table(tables: ndarray, base: int, out: ndarray, q: int, codes: ndarray) -> int:
    """Writes the DC table at `base` with a code for every category, and returns its end; 0 if there is none left.

    Missing ones get codes of 16 bits. codes: (CATEGORIES, 2) zeros, filled with each one's code and length.
    """
    kept, code, count = tables[base + KEPT : base + TABLE], 0, 0
    for length in range(1, 17):
        code <<= 1
        for _ in range(kept[length - 1]):
            category = kept[16 + count]
            if category < CATEGORIES:
                codes[category, 0], codes[category, 1] = code, length
            code, count = code + 1, count + 1
    out[q + 5 : q + 21 + count] = kept[: 16 + count]
    for category in range(CATEGORIES):
        if codes[category, 1] == 0:
            if code == 0xFFFF or count == 255:  # the code of ones alone must stay free
                return 0
            codes[category, 0], codes[category, 1] = code, 16
            out[q + 20], out[q + 21 + count] = out[q + 20] + 1, category
            code, count = code + 1, count + 1
    length = 19 + count
    out[q : q + 5] = np.array((0xFF, 0xC4, length >> 8, length, base // TABLE))
    return q + 2 + length


@compiled
def _covering(low: int, high: int, unit: int, length: int) -> tuple[int, int]:
    """The MCUs of an axis that hold the pixels [low, high) and, of colours at half the resolution, their neighbours."""
    units, margin = -(-length // unit), 1 if unit > 8 else 0
    first = min(max(low - margin, 0) // unit, units - 1)
    last = min(max(-(-(high + margin) // unit), first + 1), units)
    # Colours at most two pixels wide are interpolated in another way.
    return max(first - 1, 0) if margin and first == units - 1 else first, last


@compiled
def _write_header(image: ndarray, header: ndarray, placed: ndarray, out: ndarray, codes: ndarray) -> Any:
    """Copies the header, with the new size, and longer DC tables before the scan's, which count instead of the old.

    Returns its end; 0 if that is not possible. codes: (components, CATEGORIES, 2) zeros, see _write_table.
    """
    q = scan = header[DATA] - 8 - 2 * header[COMPONENTS]
    out[:scan] = image[:scan]
    at, width, height = header[FRAME] + 5, placed[2], placed[3]
    out[at : at + 4] = np.array((height >> 8, height, width >> 8, width))
    for i in range(header[COMPONENTS]):
        q = _write_table(header, header[CODES + 2 * i], out, q, codes[i])
        if q == 0:
            return 0
    out[q : q + header[DATA] - scan] = image[scan : header[DATA]]
    return q + header[DATA] - scan


@compiled
def cut_jpeg(
    image: ndarray, header: ndarray, packed: ndarray, box: ndarray, odd: bool,
    out: ndarray, placed: ndarray,
) -> Any:  # fmt: skip
    """Writes a JPEG of the pixels `box` of a JPEG into `out`; returns its size.

    0 if it is not possible: the image is to be decoded whole then, and its places are wrong or it is damaged.
    header: by read_header. packed: the image's places, see jpeg.unpack. box: left, top, right and bottom.
    odd: make its width odd, if that loses no pixel of the box, for a decoder whose memory we do not choose: of an even
        width, libjpeg-turbo stores many rows past the caches there, see decode.py. In ours that would cost 2 %.
    out: it suffices if it has 2 len(image) + EXTRA bytes.
    placed: (4,) int64, filled with left, top, width and height of what was cut.
    """
    width, height, unit, down = header[WIDTH], header[HEIGHT], header[MCU_WIDTH], header[MCU_HEIGHT]
    places = np.empty((places_in(header), 4), np.int64)
    if not unpack(packed, places):
        return 0
    starts = 8 * header[DATA] + places[:, 0]
    if (starts[-1] >> 3) + 2 > len(image):
        return 0
    left, right = _covering(box[0], box[2], unit, width)
    top, bottom = _covering(box[1], box[3], down, height)
    placed[0], placed[1] = left * unit, top * down
    placed[2], placed[3] = min(right * unit, width) - placed[0], min(bottom * down, height) - placed[1]
    placed[2] -= odd and placed[2] % 2 == 0 and placed[0] + placed[2] > box[2]
    codes = np.zeros((header[COMPONENTS], CATEGORIES, 2), np.int64)
    q = _write_header(image, header, placed, out, codes)
    if q == 0:
        return 0
    per_row, step, acc, held = -(-width // STEP), STEP // unit, 0, 0
    clean, before, written = np.empty(len(image) + SLACK, np.uint8), np.zeros(3, np.int64), np.zeros(3, np.int64)
    for row in range(per_row * top, per_row * bottom, per_row):
        # The entries before the row's first MCU, before its end and, at the latest, there.
        first, last, behind = row + left // step, row + right // step, row - (-right // step)
        if right * unit >= width:
            last = behind
        # Its bits, up to the entry before its end and from there on: its last byte may have a zero behind it.
        n = unstuff(image, starts[first] >> 3, starts[last] >> 3, clean)[0]
        bits = 8 * (n + unstuff(image, starts[last] >> 3, (starts[behind] >> 3) + 2, clean[n:])[0])
        if q + bits // 4 + ROW_EXTRA > len(out):
            return 0
        bit, before[:] = starts[first] & 7, places[first, 1:]
        for _ in range(left % step):
            bit = skip_mcu(clean, bit, bits, header, before)
        # The first MCU, whose differences are to other values now.
        copied = bit
        for i in range(header[COMPONENTS]):
            if bit > copied:
                q, acc, held = _copy(clean, copied, bit, out, q, acc, held)
            dc, ac, size = header[CODES + 2 * i], header[CODES + 2 * i + 1], 0
            length, difference = read_difference(header, dc, peek(clean, bit))
            copied, difference = bit + length, difference + before[i] - written[i]
            for _ in range(header[BLOCKS] if i == 0 else 1):
                bit = skip_block(clean, bit, bits, header, dc, ac)[0]
            while abs(difference) >> size:
                size += 1
            if size >= CATEGORIES or bit > bits:
                return 0
            value = difference if difference > 0 else difference + (1 << size) - 1
            q, acc, held = _put(out, q, acc, held, codes[i, size, 0] << size | value, codes[i, size, 1] + size)
        # The others, up to the end of the run.
        end, written[:] = 8 * n + (starts[last] & 7), places[last, 1:]
        for _ in range(right % step if last < behind else 0):
            end = skip_mcu(clean, end, bits, header, written)
        if not bit <= end <= bits:
            return 0
        q, acc, held = _copy(clean, copied, end, out, q, acc, held)
    padding = -held % 8  # ones fill the last byte
    q, acc, held = _put(out, q, acc, held, (1 << padding) - 1, padding)
    q = _write(out, q, acc, held)
    out[q], out[q + 1] = 0xFF, 0xD9
    return q + 2
