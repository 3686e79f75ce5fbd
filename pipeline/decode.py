"""From an image file's bytes to its pixels: one decoder for the sharder, the loader, the checks and predictions.

libjpeg-turbo decodes; Pillow decodes what libjpeg-turbo rejects: PNG, CMYK, a slightly damaged JPEG. Only the content
is trusted, never the name.
"""

import contextlib
import io
import threading
import warnings

import numpy as np
from numpy import ndarray
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header

MAX_PIXELS = 100_000_000  # rejected from the header: 300 MB decoded, 5 times ImageNet's largest
MAX_SIDE = 65_500  # libjpeg's limit

Image.MAX_IMAGE_PIXELS = None  # our own check names the file and the limit
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of odd EXIF, for example


class BadImage(ValueError):
    """Why this file cannot become a sample."""


class Scratch(threading.local):
    """Memory of each thread that all its images reuse: fresh pages cost more than filling them.

    Its address is odd: libjpeg-turbo writes rows at multiples of 32 bytes past the processor's caches, which costs a
    tenth of the decoding time and makes the crop read from main memory.
    """

    _memory = np.empty(0, np.uint8)

    def __call__(self, size: int) -> ndarray:
        """(size,) uint8, not initialised; valid until this thread's next call."""
        if len(self._memory) < size:
            self._memory = np.empty(size + size // 4 + 1, np.uint8)[1:]
        return self._memory[:size]


def decode(data: bytes | memoryview, *, size: tuple[int, int] | None = None, memory: Scratch | None = None) -> ndarray:
    """Returns the first frame, (height, width, 3) uint8, RGB as stored; ignores transparency and EXIF orientation.

    size: (width, height) that the image must have. memory: for the pixels, if possible. Raises BadImage.
    """
    if size:  # first: a damaged header may name any size
        _check_size(image_size(data), size)
    pixels: ndarray | None = None
    if header := plain_jpeg_size(data):
        with contextlib.suppress(ValueError):
            pixels = decode_jpeg(data, buffer=(memory or Scratch())(3 * header[0] * header[1]))
    if pixels is None:
        pixels = pillows_pixels(open_image(data))
    if size:  # formats with several sizes may load another one
        _check_size(pixels.shape[1::-1], size)
    return pixels


def _check_size(found: tuple[int, ...], size: tuple[int, int]) -> None:
    if found != size:
        raise BadImage(f"{found[0]}×{found[1]} pixels, but the index says {size[0]}×{size[1]}")


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """(width, height) from the header. Raises BadImage if the header is enough to reject the image."""
    return plain_jpeg_size(data) or open_image(data).size


def plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) of a JPEG that every decoder accepts (RGB or grey, allowed size, not `untidy`); else None."""
    try:
        height, width, colours, _ = decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "RGB", "Gray") or untidy(data):
        return None
    return (width, height) if _size_fault(width, height) is None else None


def open_image(data: bytes | memoryview) -> Image.Image:
    """Opens an image and reads its header only. Raises BadImage if the header is enough to reject it."""
    if not len(data):
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as err:  # the parsers of thirty formats raise many kinds
        raise BadImage("not an image that Pillow reads") from err
    if fault := _size_fault(*image.size):
        raise BadImage(fault)
    # Mode I is accepted only for PGM, whose 16 bits Pillow opens as 32-bit integers.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "floats" if image.mode == "F" else "signed or 32-bit integers"
        raise BadImage(f"{image.format} of {kind}, which have no fixed white; save it with 8 or 16 bits a channel")
    return image


def pillows_pixels(image: Image.Image) -> ndarray:
    """(height, width, 3) uint8, RGB. 16-bit values keep their upper byte; Pillow would clip grey ones to white."""
    shift = 4 if "I;12" in str(getattr(image, "tile", "")) else 8
    try:
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> shift).astype(np.uint8))
        return np.array(image.convert("RGB"))
    except Exception as err:  # as above
        raise BadImage(f"damaged or truncated image ({err})") from err


def _size_fault(width: int, height: int) -> str | None:
    if width * height > MAX_PIXELS:
        return f"{width}×{height} pixels are over the limit of {MAX_PIXELS:,}"
    if max(width, height) > MAX_SIDE:
        return f"{width}×{height}: a side over {MAX_SIDE:,} pixels is more than JPEG holds"
    return None


def untidy(data: bytes | memoryview) -> str | None:
    """Reports stray bytes between a JPEG's segments, else None. libjpeg skips them, DALI rejects the image."""
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # the scan begins: what follows has no segments
            return None
        if marker == 0xFF:  # padding
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return "JPEG with stray bytes"
