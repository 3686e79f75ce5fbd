"""Cuts the MCUs that a crop needs out of a JPEG's bits, as a smaller JPEG, without decoding any pixel.

Runs of Huffman codes are copied. Only the first DC code of each component in a row of MCUs is re-encoded, since it is
a difference from the previous MCU. The cut decodes to exactly the same pixels as the whole image: it has a margin of
one pixel, which the decoder reads when it upsamples the chroma.
"""

from typing import Any

import numpy as np
from numpy import ndarray

from .huffman import (
    CATEGORIES,
    CODES,
    KEPT,
    LONGER,
    ONES,
    SLACK,
    TABLE,
    append,
    read_difference,
    restuff,
    skip_block,
    store64,
    window,
)
from .jit import compiled
from .jpeg import (
    BLOCKS,
    COMPONENTS,
    DATA,
    FRAME,
    HEIGHT,
    MCU_HEIGHT,
    MCU_WIDTH,
    STEP,
    TABLE_OF,
    WIDTH,
    places_in,
    skip_mcu,
    unpack,
)

EXTRA = 1024  # bytes of three DC tables with their segments: a cut has at most these and twice its image's bytes
ROW_EXTRA = 16  # bytes by which a re-encoded row of MCUs can be longer than the original
u = np.uintp


@compiled
def _copy(clean: ndarray, bit: int, end: int, stream: ndarray, q: int) -> Any:
    """Appends the bits [bit, end) of `clean` to `stream` at bit q; returns the new end."""
    if end - bit >= 64:  # once the output is aligned to a byte, most bits are copied seven bytes at a time
        append(stream, q, window(clean, bit), 56)
        start = 56 - (q & 7)
        bit, q = bit + start, q + start
        while end - bit >= 56:
            store64(stream, u(q) >> u(3), window(clean, bit))
            bit, q = bit + 56, q + 56
    while bit < end:
        size = min(end - bit, 56)
        q = append(stream, q, window(clean, bit), size)
        bit += size
    return q


@compiled
def _covering(low: int, high: int, unit: int, length: int) -> tuple[int, int]:
    """The MCUs of an axis that hold the pixels [low, high) and, for subsampled chroma, their neighbours."""
    units, margin = -(-length // unit), 1 if unit > 8 else 0
    first = min(max(low - margin, 0) // unit, units - 1)
    last = min(max(-(-(high + margin) // unit), first + 1), units)
    # Chroma that is at most two pixels wide is upsampled in another way.
    return max(first - 1, 0) if margin and first == units - 1 else first, last


@compiled
def _write_header(image: ndarray, header: ndarray, placed: ndarray, out: ndarray) -> Any:
    """Copies the header with the new size, and adds longer DC tables before the scan, which replace the old ones.

    Returns the end of the header in `out`.
    """
    q = scan = header[DATA] - 8 - 2 * header[COMPONENTS]
    out[:scan] = image[:scan]
    at, width, height = header[FRAME] + 5, placed[2], placed[3]
    out[at : at + 4] = np.array((height >> 8, height, width >> 8, width))
    for i in range(header[COMPONENTS]):
        dc = header[TABLE_OF + 2 * i]
        table = header[dc + LONGER : dc + KEPT]
        size = 16 + table[:16].sum()
        out[q : q + 5] = np.array((0xFF, 0xC4, size + 3 >> 8, size + 3, dc // TABLE))
        out[q + 5 : q + 5 + size] = table[:size]
        q += 5 + size
    out[q : q + header[DATA] - scan] = image[scan : header[DATA]]
    return q + header[DATA] - scan


@compiled
def cut_jpeg(
    image: ndarray, header: ndarray, packed: ndarray, box: ndarray, odd: bool,
    out: ndarray, placed: ndarray,
) -> Any:  # fmt: skip
    """Writes the pixels `box` of a JPEG into `out` as a smaller JPEG; returns its size in bytes.

    Returns 0 if the places are wrong, the image is damaged or `out` is too small: decode the whole image then.
    header: filled by read_header. packed: the image's places, see jpeg.unpack. box: left, top, right and bottom.
    odd: make the width odd, if that loses no pixel of the box. For decoders whose memory we do not choose: with an even
        width, libjpeg-turbo writes many rows past the caches, see decode.py. In our own memory it would cost 2 %.
    out: at least 2 len(image) + EXTRA bytes, enough for all images but those with hundreds of almost empty rows.
    placed: (4,) int64, filled with left, top, width and height of the cut.
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
    per_row, step, q = -(-width // STEP), STEP // unit, 0
    clean = np.empty(len(image) + SLACK, np.uint8)
    stream = np.empty(len(image) + ROW_EXTRA * (bottom - top + 1), np.uint8)  # the cut's scan, without stuffed zeros
    before, written = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for row in range(per_row * top, per_row * bottom, per_row):
        # The entries at or before the row's first MCU, at or before its end, and at or after its end.
        first, last, behind = row + left // step, row + right // step, row - (-right // step)
        if right * unit >= width:
            last = behind
        # The row's bits, first up to the entry before its end, then from there on: a zero may follow the last byte.
        n = restuff(image, starts[first] >> 3, starts[last] >> 3, clean, False)[0]
        bits = 8 * (n + restuff(image, starts[last] >> 3, (starts[behind] >> 3) + 2, clean[n:], False)[0])
        bit, before[:] = starts[first] & 7, places[first, 1:]
        for _ in range(left % step):
            bit = skip_mcu(clean, bit, bits, header, before)
        # The first MCU: its DC differences now refer to other values.
        copied = bit
        for i in range(header[COMPONENTS]):
            q = _copy(clean, copied, bit, stream, q)
            dc, ac, size = header[TABLE_OF + 2 * i], header[TABLE_OF + 2 * i + 1], 0
            length, difference = read_difference(header, dc, window(clean, bit))
            copied, difference = bit + length, difference + before[i] - written[i]
            for _ in range(header[BLOCKS] if i == 0 else 1):
                bit = skip_block(clean, bit, bits, header, dc, ac)[0]
            while abs(difference) >> size:
                size += 1
            code = np.int64(header[dc + CODES + size])
            if size >= CATEGORIES or code == 0 or bit > bits:
                return 0
            length = size + (code & 31)
            if difference < 0:
                difference += (1 << size) - 1
            q = append(stream, q, np.uint64(code >> 5 << size | difference) << np.uint64(64 - length), length)
        # The row's other MCUs.
        end, written[:] = 8 * n + (starts[last] & 7), places[last, 1:]
        for _ in range(right % step if last < behind else 0):
            end = skip_mcu(clean, end, bits, header, written)
        if not bit <= end <= bits:
            return 0
        q = _copy(clean, copied, end, stream, q)
    append(stream, q, ONES, 7)  # ones fill the last byte
    size, at = q + 7 >> 3, _write_header(image, header, placed, out)
    if at + 2 * size + SLACK > len(out):
        return 0
    end = at + restuff(stream, 0, size, out[at:], True)[0]
    out[end], out[end + 1] = 0xFF, 0xD9
    return end + 2
