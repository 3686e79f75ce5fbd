"""Parses baseline JPEGs down to their Huffman codes: the header, and which bits belong to which MCU. For Numba.

An MCU is the smallest unit of a scan: 8 × 8 pixels of a grey or 4:4:4 image, 16 × 16 of a 4:2:0 one. Its first
component has BLOCKS blocks, the others one each. A position after the end of the scan means that earlier bits could not
be read; functions that receive such a position return it.
"""

from typing import Any

import numpy as np
from numba.cpython.unsafe import numbers
from numpy import ndarray

from .huffman import ONES, SLACK, TABLE, TABLES, WINDOW, append, read_table, restuff, skip_block, window
from .jit import compiled

# The content of a header: (HEADER,) int32, initially zeros: the Huffman tables, then these numbers. From TABLE_OF on:
# the positions of each component's DC and AC table.
WIDTH, HEIGHT, FRAME, DATA, COMPONENTS, BLOCKS, MCU_WIDTH, MCU_HEIGHT, TABLE_OF = range(TABLES, TABLES + 9)
HEADER = TABLE_OF + 6
u = np.uintp
leading_zeros: Any = numbers.leading_zeros  # one instruction


@compiled
def number(data: ndarray, at: int) -> int:
    return (int(data[at]) << 8) + int(data[at + 1])


@compiled
def find_headers(image: ndarray) -> tuple[int, int]:
    """The positions of a JPEG's frame header and of its first scan; (0, 0) if not found.

    All segments before them must be well-formed. For the rare JPEG with fill bytes there, it also returns (0, 0).
    """
    end, at, frame = len(image), 2, 0
    if end < 4 or image[0] != 0xFF or image[1] != 0xD8:
        return 0, 0
    while at + 9 < end and image[at] == 0xFF:
        marker = image[at + 1]
        if marker == 0xDA and frame:
            return frame, at
        if marker < 0xC0 or marker == 0xFF or 0xD0 <= marker <= 0xDA:  # has no length, or is the scan
            return 0, 0
        if marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC and not frame:
            frame = at
        at += 2 + number(image, at + 2)
    return 0, 0


@compiled
def read_header(image: ndarray, header: ndarray) -> bool:
    """Fills `header` from a JPEG's header.

    Returns False unless it is an RGB or grey baseline JPEG with one scan and without restart markers.
    """
    frame, scan = find_headers(image)
    at, known = 2, 0
    header[TABLES:] = 0
    while at < scan:
        marker, after = image[at + 1], at + 2 + number(image, at + 2)
        if marker == 0xC4:
            known = _read_tables(image, at + 4, after, header, known)
        if known < 0 or (marker == 0xDD and number(image, at + 4)):
            return False
        at = after
    return bool(frame > 0 and _read_frame(image, frame, header) and _read_scan(image, scan, header, known))


@compiled
def _read_frame(image: ndarray, at: int, header: ndarray) -> bool:
    n = int(image[at + 9])
    if image[at + 1] > 0xC1 or (n != 1 and n != 3) or number(image, at + 2) != 8 + 3 * n or image[at + 4] != 8:
        return False
    if n == 3 and (image[at + 14] != 0x11 or image[at + 17] != 0x11):
        return False
    sampling = int(image[at + 11]) if n == 3 else 0x11  # a single component has one block per MCU
    across, down = sampling >> 4, sampling & 15
    header[FRAME], header[HEIGHT], header[WIDTH] = at, number(image, at + 5), number(image, at + 7)
    header[COMPONENTS], header[BLOCKS], header[MCU_WIDTH], header[MCU_HEIGHT] = n, across * down, 8 * across, 8 * down
    return bool(1 <= across <= 2 and 1 <= down <= 2 and header[WIDTH] > 0 and header[HEIGHT] > 0)


@compiled
def _read_scan(image: ndarray, at: int, header: ndarray, known: int) -> bool:
    """Reads the scan header. known: a bit for each table that was read."""
    n, after = header[COMPONENTS], at + 2 + number(image, at + 2)
    if after != at + 8 + 2 * n or after > len(image) or image[at + 4] != n:
        return False
    header[DATA] = after
    for i in range(n):
        chosen = int(image[at + 6 + 2 * i])
        dc, ac = chosen >> 4, 2 + (chosen & 15)
        if image[at + 5 + 2 * i] != image[header[FRAME] + 10 + 3 * i] or dc > 1 or ac > 3:
            return False
        if not known >> dc & known >> ac & 1:
            return False
        header[TABLE_OF + 2 * i], header[TABLE_OF + 2 * i + 1] = dc * TABLE, ac * TABLE
    return bool(image[after - 3] == 0 and image[after - 2] == 63 and image[after - 1] == 0)


@compiled
def _read_tables(image: ndarray, at: int, after: int, header: ndarray, known: int) -> int:
    """Reads the tables of one segment; returns `known` with their bits set, or -1."""
    while at < after:
        chosen = int(image[at])
        if chosen & 0xEE or at + 17 > after:
            return -1
        table = (chosen >> 4) * 2 + (chosen & 1)
        size = read_table(image, at + 1, after, header, table * TABLE)
        if size < 0:
            return -1
        at, known = at + 1 + size, known | 1 << table
    return known


@compiled
def skip_mcu(clean: ndarray, bit: int, end: int, header: ndarray, values: ndarray) -> int:
    """Returns the position after the MCU at `bit`; updates `values`, each component's latest DC value, in place."""
    for i in range(header[COMPONENTS]):
        dc, ac = header[TABLE_OF + 2 * i], header[TABLE_OF + 2 * i + 1]
        for _ in range(header[BLOCKS] if i == 0 else 1):
            bit, difference = skip_block(clean, bit, end, header, dc, ac)
            values[i] += difference
    return bit


# Places: positions of MCUs. Every row of MCUs has an entry every STEP pixels, and the end of the scan has one. An entry
# is four numbers: the bit in the scan, stuffed zeros included, and each component's latest DC value.
STEP = 32
LONGEST = 17  # bits of a packed number's lower part, at most


@compiled
def places_in(header: ndarray) -> Any:
    return -(-header[HEIGHT] // header[MCU_HEIGHT]) * -(-header[WIDTH] // STEP) + 1


@compiled
def find_places(image: ndarray, header: ndarray) -> ndarray:
    """Returns the entries of a JPEG, (n, 4) int64; n is 0 if it cannot be cut.

    A damaged JPEG cannot be cut: every MCU is read, and the scan must end after the last one.
    """
    none = np.empty((0, 4), np.int64)
    if not read_header(image, header):
        return none
    columns, step = -(-header[WIDTH] // header[MCU_WIDTH]), STEP // header[MCU_WIDTH]
    mcus = columns * -(-header[HEIGHT] // header[MCU_HEIGHT])
    clean, places = np.empty(len(image) + SLACK, np.uint8), np.empty((places_in(header), 4), np.int64)
    n, marker = restuff(image, header[DATA], len(image), clean, False)
    bit, at, stuffed, found, values = 0, 0, 0, 0, np.zeros(3, np.int64)
    for mcu in range(mcus + 1):
        if mcu % columns % step == 0:
            while at < min(bit >> 3, n):
                stuffed += clean[at] == 0xFF
                at += 1
            places[found, 0], places[found, 1:] = 8 * stuffed + bit, values
            found += 1
        if mcu < mcus:
            bit = skip_mcu(clean, bit, 8 * n, header, values)
    return places if 0 <= 8 * n - bit < 8 and marker < len(image) and image[marker] == 0xD9 else none


@compiled
def pack(places: ndarray) -> ndarray:
    """Encodes differences between entries as Rice codes, a quarter of the size; returns no bytes for no entries.

    A number's upper bits are written in unary, ones and a zero, and its lower bits follow. The first four bytes hold
    the number of lower bits of each column.
    """
    if not len(places):
        return np.empty(0, np.uint8)
    values, lower, size, bit = places.T.copy(), np.zeros(4, np.int64), 32, 32
    values[:, 1:] -= places.T[:, :-1]
    values[1:] = values[1:] << 1 ^ values[1:] >> 63
    for column in range(4):
        costs = np.array([(values[column] >> n).sum() + (1 + n) * len(places) for n in range(LONGEST + 1)])
        lower[column], size = costs.argmin(), size + costs.min()
    packed = np.zeros(-(-size // 8) + SLACK, np.uint8)
    packed[:4] = lower
    for i in range(len(places)):
        for column in range(4):
            value, n = values[column, i], lower[column]
            ones = value >> n
            while ones > 32:
                bit, ones = append(packed, bit, ONES, 32), ones - 32
            rest = np.uint64(value & (1 << n) - 1) << np.uint64(63 - ones - n)
            bit = append(packed, bit, ~(ONES >> np.uint64(ones)) | rest, ones + 1 + n)
    return packed[:-SLACK]


@compiled
def unpack(packed: ndarray, places: ndarray) -> bool:
    """Fills `places` from `packed`, which has SLACK bytes at its end. Returns False if it does not hold exactly as many
    entries."""
    bit, end, before = 32, 8 * (len(packed) - SLACK), np.zeros(4, np.int64)
    if end < bit or packed[:4].max() > LONGEST:
        return False
    for i in range(len(places)):
        for column in range(4):
            lower, start, ones = int(packed[column]), bit, WINDOW
            while ones >= WINDOW and bit < end:
                ones = int(leading_zeros(~window(packed, bit)))
                bit += ones
            if bit + 1 + lower > end:
                return False
            value = bit - start << lower | np.int64(window(packed, bit) >> np.uint64(63 - lower))
            before[column] += value >> 1 ^ -(value & 1) if column else value
            bit += 1 + lower
        places[i] = before
    return end - bit < 8
