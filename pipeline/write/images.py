"""Decodes, checks, resizes and encodes one image file. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from simplejpeg import decode_jpeg, encode_jpeg

from ..decode import MAX_SIDE, open_image, pillows_pixels, plain_jpeg_size, untidy
from ..decode import BadImage as BadImage
from ..decode import decode as decode
from ..errors import ConfigError
from ..geometry import resized
from .resize import SLACK, Resizer, Square, resize_short_side, resized_square

CONVERTED_QUALITY = 95  # for what `keep` cannot keep, such as a PNG


@dataclass(frozen=True)
class Encoding:
    """How images are stored: `keep` the original bytes, `jpeg` or `raw` pixels at a fixed short side."""

    kind: str = "keep"
    size: int = 256
    square: bool = False
    quality: int = 90

    def __post_init__(self) -> None:
        if self.kind not in ("keep", "jpeg", "raw"):
            raise ConfigError(f"encode={self.kind}: choose keep, jpeg or raw")
        if not 8 <= self.size <= 8192:
            raise ConfigError(f"size={self.size}: choose 8 to 8192 pixels")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality={self.quality}: choose 1 to 100")
        if self.square and self.kind == "keep":
            raise ConfigError("square goes with encode=jpeg or raw: keep stores the original bytes")


class Measured(NamedTuple):
    """What statistics are made of; valid until the next image is prepared."""

    square: Square  # of `size`, as training sees it
    pixels: Square  # the same, but of smaller images only the pixels that are there


class Prepared(NamedTuple):
    """An image ready to be stored, its size, and what was measured."""

    image: bytes
    width: int
    height: int
    measured: Measured | None
    converted: str | None  # its kind before, if it had to be converted


class Preparer:
    """Decodes, checks, resizes and encodes, image after image, in buffers of its own. For one thread.

    measure: also return the pixels of the statistics. check: `full` decodes every image, `header` reads only its size
    if `keep` stores it as it is.

    libjpeg-turbo decodes; Pillow decodes what libjpeg-turbo rejects or warns of.
    """

    def __init__(self, encoding: Encoding, *, measure: bool = True, check: str = "full") -> None:
        self.encoding, self.measure, self.check = encoding, measure, check
        self._pixels = np.zeros(0, np.uint8)
        self._resizer = Resizer()

    def __call__(self, data: bytes) -> Prepared:
        """Raises BadImage with the reason."""
        header = plain_jpeg_size(data)
        if header and self.encoding.kind == "keep" and not self.measure:
            try:
                if self.check == "full":
                    # All of the data is decoded, but an eighth of the pixels is made: what is damaged shows all the
                    # same, and sooner.
                    decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1)
                return Prepared(data, *header, None, None)
            except ValueError:
                pass
        (width, height), converted = self._decode(data, header)
        encoding, size = self.encoding, (width, height)
        if encoding.kind == "keep":
            stored = _jpeg(self._image(size), CONVERTED_QUALITY) if converted else data
            return Prepared(stored, width, height, self._measured(size) if self.measure else None, converted)
        _reject_slivers(size, encoding.size)
        if encoding.square:
            pixels = resized_square(self._resizer, self._pixels, size, encoding.size)
        else:
            pixels = resize_short_side(self._resizer, self._pixels, size, encoding.size)
        stored = _jpeg(pixels, encoding.quality) if encoding.kind == "jpeg" else pixels.tobytes()
        centre = Square.centre(pixels, encoding.size)
        return Prepared(
            stored, pixels.shape[1], pixels.shape[0], Measured(centre, centre) if self.measure else None, converted
        )

    def _decode(self, data: bytes, header: tuple[int, int] | None) -> tuple[tuple[int, int], str | None]:
        """All pixels into the buffer; (width, height), and what the image was if `keep` cannot keep it."""
        if header:
            width, height = header
            self._make_room(width, height)
            try:
                decode_jpeg(data, buffer=self._pixels)
                return header, None
            except ValueError:
                pass
        image = open_image(data)
        converted = _foreign(image) or untidy(data)
        pixels = pillows_pixels(image)
        self._make_room(*image.size)
        self._pixels[: pixels.size] = pixels.reshape(-1)
        return image.size, converted

    def _make_room(self, width: int, height: int) -> None:
        if len(self._pixels) < 3 * width * height + SLACK:
            self._pixels = np.zeros(3 * width * height * 5 // 4 + SLACK, np.uint8)

    def _measured(self, size: tuple[int, int]) -> Measured:
        """The centre square of short side encoding.size; a smaller image's pixels are counted at their own size."""
        short, wanted = min(size), self.encoding.size
        square = Square.centre(resized_square(self._resizer, self._pixels, size, wanted), wanted)
        if short >= wanted:
            return Measured(square, square)
        return Measured(square, Square.centre(self._image(size), short))

    def _image(self, size: tuple[int, int]) -> np.ndarray:
        """(height, width, 3): what was decoded last."""
        width, height = size
        return self._pixels[: 3 * width * height].reshape(height, width, 3)


def _reject_slivers(size: tuple[int, int], short: int) -> None:
    """A 3000×2 image would become 384,000×256: more than JPEG holds, and soon more than memory does."""
    width, height = map(int, resized(*size, short))
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{size[0]}×{size[1]} resized would be {width}×{height}, more than JPEG holds")


def _foreign(image: Image.Image) -> str | None:
    """What must be re-encoded, since not every decoder takes it: all but RGB and grey JPEG."""
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return None
    return f"{image.format} {image.mode}"


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Baseline 4:2:0, which hardware decoders take. pixels: (h, w, 3) uint8."""
    encoded: bytes = encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    return encoded
