"""One image file, safely: decoded, checked, resized and encoded. Pure, and nothing is trusted but the content."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import ConfigError
from ..geometry import centre_offset, resized

MAX_PIXELS = 100_000_000  # refused from the header: 300 MB decoded, 5 times ImageNet's largest
MAX_SIDE = 65_500  # libjpeg's limit
CONVERTED_QUALITY = 95  # for what `keep` cannot keep, such as a PNG

Image.MAX_IMAGE_PIXELS = None  # our own check names the file and the limit


class BadImage(Exception):
    """Why this file cannot become a sample."""


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
    """What statistics are made of, in whole numbers: sums over images, in any order, are the same to the last bit."""

    square: np.ndarray  # (size, size, 3) uint8: the centre square as training sees it
    pixels: np.ndarray  # (m, 3) uint8: the same, but of smaller images only the pixels that are there


class Prepared(NamedTuple):
    """An image ready to be stored, and what was learnt on the way."""

    image: bytes
    width: int
    height: int
    measured: Measured
    converted: str | None  # what it was before, where it had to be converted


def prepare(data: bytes, encoding: Encoding) -> Prepared:
    """Decodes `data` completely and encodes it as asked. Raises BadImage with the reason."""
    image = _open(data)
    converted = _foreign(image) or _untidy(data, image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF and the like: the pixels are what counts
            image.load()
        pixels = _to_8_bit(image)
    except Exception as err:  # the decoders of thirty formats raise whatever they like
        raise BadImage(f"damaged or truncated image ({err})") from err
    if encoding.kind != "keep":
        _refuse_slivers(image.size, encoding.size)
        pixels = resize_short_side(pixels, encoding.size)
        if encoding.square:
            pixels = centre_square(pixels, encoding.size)
        stored = _jpeg(pixels, encoding.quality) if encoding.kind == "jpeg" else pixels.convert("RGB").tobytes()
    else:
        stored = _jpeg(pixels, CONVERTED_QUALITY) if converted else data
    return Prepared(stored, *pixels.size, _measured(pixels, encoding.size), converted)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as err:  # as above
        raise BadImage("not an image") from err
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}×{height} pixels are over the limit of {MAX_PIXELS:,}")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width}×{height}: a side over {MAX_SIDE:,} pixels is more than JPEG holds")
    return image


def _refuse_slivers(size: tuple[int, int], short: int) -> None:
    """A 3000×2 image would become 384,000×256: more than JPEG holds, and soon more than memory does."""
    width, height = map(int, resized(*size, short))
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{size[0]}×{size[1]} resized would be {width}×{height}, more than JPEG holds")


def _foreign(image: Image.Image) -> str | None:
    """What must be re-encoded, since not every decoder takes it: all but RGB and grey JPEG."""
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return None
    return f"{image.format} {image.mode}"


def _untidy(data: bytes, image: Image.Image) -> str | None:
    """A JPEG with stray bytes between its segments: libjpeg skips them, DALI's decoders refuse the whole image."""
    if image.format not in ("JPEG", "MPO"):
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
    return f"{image.format} {image.mode} with stray bytes"


def _to_8_bit(image: Image.Image) -> Image.Image:
    """RGB or L. 16-bit grey keeps its upper byte; Pillow alone would clip it to white."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def resize_short_side(image: Image.Image, short: int) -> Image.Image:
    """Antialiased bilinear, as torchvision's Resize on PIL images."""
    width, height = map(int, resized(*image.size, short))
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def centre_square(image: Image.Image, side: int) -> Image.Image:
    """The centre `side`² pixels; where a margin is odd, as torchvision's CenterCrop."""
    left, top = (int(centre_offset(length, side)) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _jpeg(image: Image.Image, quality: int) -> bytes:
    """Baseline 4:2:0, which hardware decoders take."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def _measured(image: Image.Image, size: int) -> Measured:
    """The centre square, its short side `size`; pixels are counted at their own size where that is smaller."""
    square = np.asarray(centre_square(resize_short_side(image, size), size).convert("RGB"))
    short = min(image.size)
    if short >= size:
        return Measured(square, square.reshape(-1, 3))
    return Measured(square, np.asarray(centre_square(image, short).convert("RGB")).reshape(-1, 3))
