"""Decodes, checks, resizes and encodes one image file. Pure."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy import ndarray
from simplejpeg import decode_jpeg, encode_jpeg

from ..decode import MAX_SIDE, BadImage, Scratch, decode, open_image, plain_jpeg_size, untidy
from ..errors import ConfigError
from ..geometry import resized
from ..settings import Bounds, validate
from .resize import centre, resize

CONVERTED_QUALITY = 95  # for what `keep` cannot keep, such as a PNG


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


class Measured(NamedTuple):
    """What statistics are made of; valid until the next image is prepared."""

    square: ndarray  # (size, size, 3), as training sees it
    pixels: ndarray  # the same, but of smaller images only the pixels that are there


class Prepared(NamedTuple):
    """An image ready to be stored, its size, and what was measured."""

    image: bytes
    width: int
    height: int
    measured: Measured | None
    converted: str | None  # its kind before, if it had to be converted


@dataclass
class Preparer:
    """Decodes, checks, resizes and encodes, image after image, in buffers of its own.

    measure: also return the pixels of the statistics. check: `full` decodes every image, `header` reads only its size
    if `keep` stores it as it is.
    """

    encoding: Encoding
    measure: bool = True
    check: str = "full"
    _decoded: Scratch = field(default_factory=Scratch)
    _resized: Scratch = field(default_factory=Scratch)

    def __call__(self, data: bytes) -> Prepared:
        """Raises BadImage with the reason."""
        header, encoding = plain_jpeg_size(data), self.encoding
        if header and encoding.kind == "keep" and not self.measure:
            try:
                if self.check == "full":
                    # All of the data is decoded, but an eighth of the pixels is made: what is damaged shows all the
                    # same, and sooner.
                    decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1)
                return Prepared(data, *header, None, None)
            except ValueError:
                pass
        pixels, converted = decode(data, memory=self._decoded), None if header else _foreign(data)
        if encoding.kind == "keep":
            stored = _jpeg(pixels, CONVERTED_QUALITY) if converted else data
        else:
            _reject_slivers(pixels, encoding.size)
            pixels = resize(pixels, encoding.size, self._resized, square=encoding.square)
            stored = _jpeg(pixels, encoding.quality) if encoding.kind == "jpeg" else pixels.tobytes()
        measured = self._squares(pixels) if self.measure else None
        return Prepared(stored, pixels.shape[1], pixels.shape[0], measured, converted)

    def _squares(self, pixels: ndarray) -> Measured:
        """The centre square of short side encoding.size; a smaller image's pixels are counted at their own size."""
        short, wanted = min(pixels.shape[:2]), self.encoding.size
        square = centre(pixels, wanted) if short == wanted else resize(pixels, wanted, self._resized, square=True)
        return Measured(square, square if short >= wanted else centre(pixels, short))


def _reject_slivers(pixels: ndarray, short: int) -> None:
    """A 3000×2 image would become 384,000×256: more than JPEG holds, and soon more than memory does."""
    height, width, _ = pixels.shape
    w, h = resized(width, height, short)
    if max(w, h) > MAX_SIDE:
        raise BadImage(f"{width}×{height} resized would be {w}×{h}, more than JPEG holds")


def _foreign(data: bytes) -> str | None:
    """What must be re-encoded, since not every decoder takes it: all but RGB and grey JPEG without stray bytes."""
    image = open_image(data)
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return untidy(data)
    return f"{image.format} {image.mode}"


def _jpeg(pixels: ndarray, quality: int) -> bytes:
    """Baseline 4:2:0, which hardware decoders take. pixels: (h, w, 3) uint8."""
    return encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
