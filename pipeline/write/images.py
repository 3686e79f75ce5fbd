"""Decodes, checks, resizes and encodes one image file."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy import ndarray
from simplejpeg import decode_jpeg, encode_jpeg

from ..decode import MAX_SIDE, BadImage, Scratch, decode, open_image, plain_jpeg_size, untidy
from ..errors import ConfigError
from ..geometry import resized
from ..settings import Bounds, validate
from .resize import Totals, resize

CONVERTED_QUALITY = 95  # JPEG quality for images that `keep` must convert, such as PNGs
_decoded = Scratch()


@dataclass(frozen=True)
class Encoding:
    """How images are stored: `keep` the original bytes, `jpeg` or `raw` pixels at a fixed short side."""

    kind: Literal["keep", "jpeg", "raw"] = "keep"
    size: Annotated[int, Bounds(ge=8, le=8192)] = 256
    square: bool = False
    quality: Annotated[int, Bounds(ge=1, le=100)] = 90

    def __post_init__(self) -> None:
        validate(self)
        if self.square and self.kind == "keep":
            raise ConfigError("square goes with encode=jpeg or raw: keep stores the original bytes")


class Prepared(NamedTuple):
    """An image ready to be stored, and its size."""

    image: bytes
    width: int
    height: int
    converted: str | None  # its kind before, if it had to be converted


def prepare(data: bytes, encoding: Encoding, totals: Totals | None = None, *, check: str = "full") -> Prepared:
    """Decodes, checks, resizes and encodes an image, and adds it to `totals`, of size encoding.size.

    check: `full` decodes every image; `header` reads only the size of images that `keep` stores unchanged. Raises
    BadImage with the reason.
    """
    header = plain_jpeg_size(data)
    if header and encoding.kind == "keep" and not totals:
        try:
            if check == "full":
                # Decodes all of the data, but at an eighth of the resolution: this finds the same damage, and is
                # faster.
                decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1)
            return Prepared(data, *header, None)
        except ValueError:
            pass
    pixels, converted = decode(data, memory=_decoded), None if header else _foreign(data)
    if encoding.kind == "keep":
        stored = _jpeg(pixels, CONVERTED_QUALITY) if converted else data
    else:
        _reject_slivers(pixels, encoding.size)
        pixels = resize(pixels, encoding.size, square=encoding.square)
        stored = _jpeg(pixels, encoding.quality) if encoding.kind == "jpeg" else pixels.tobytes()
    if totals:
        totals.add(pixels)
    return Prepared(stored, pixels.shape[1], pixels.shape[0], converted)


def _reject_slivers(pixels: ndarray, short: int) -> None:
    """Raises BadImage for extreme shapes: 3000×2 would become 384,000×256, too large for JPEG and soon for memory."""
    height, width, _ = pixels.shape
    w, h = resized(width, height, short)
    if max(w, h) > MAX_SIDE:
        raise BadImage(f"{width}×{height} resized would be {w}×{h}, more than JPEG holds")


def _foreign(data: bytes) -> str | None:
    """Returns the kind of an image that must be re-encoded, since not every decoder accepts it; None for RGB and grey
    JPEGs without stray bytes."""
    image = open_image(data)
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return untidy(data)
    return f"{image.format} {image.mode}"


def _jpeg(pixels: ndarray, quality: int) -> bytes:
    """Encodes as baseline 4:2:0, which hardware decoders accept. pixels: (h, w, 3) uint8."""
    return encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
