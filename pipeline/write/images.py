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

CONVERTED_QUALITY = 95  # for what `keep` cannot keep, such as a PNG
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

    check: `full` decodes every image, `header` reads only its size if `keep` stores it as it is. Raises BadImage with
    the reason.
    """
    header = plain_jpeg_size(data)
    if header and encoding.kind == "keep" and not totals:
        try:
            if check == "full":
                # All of the data is decoded, but an eighth of the pixels is made: what is damaged shows all the
                # same, and sooner.
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
    """A 3000×2 image would become 384,000×256: more than JPEG holds, and soon more than memory does."""
    height, width, _ = pixels.shape
    w, h = resized(width, height, short)
    if max(w, h) > MAX_SIDE:
        raise BadImage(f"{width}×{height} resized would be {w}×{h}, more than JPEG holds")


def _foreign(data: bytes) -> str | None:
    """The kind of an image that must be re-encoded, since not every decoder takes it: all but RGB and grey JPEGs
    without stray bytes."""
    image = open_image(data)
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return untidy(data)
    return f"{image.format} {image.mode}"


def _jpeg(pixels: ndarray, quality: int) -> bytes:
    """Baseline 4:2:0, which hardware decoders take. pixels: (h, w, 3) uint8."""
    return encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
