"""The handwritten digits that come with the project."""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import ConfigError
from ...files import Json
from .base import Item, Items, Source


@dataclass
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0).

    Every fifth is held out as validation. Each 8×8 image becomes a JPEG of `side`² pixels.
    """

    side: int = 40

    name = "digits"
    help = "1,797 handwritten digits that come with the project"

    def __post_init__(self) -> None:
        if not 8 <= self.side <= 1024:
            raise ConfigError(f"--side {self.side}: choose 8 to 1024 pixels")
        self.classes = [str(digit) for digit in range(10)]
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            self._pixels, labels = file["images"], file["labels"]  # (1797, 8, 8) uint8 in 0..16 and (1797,)
        items = [Item(f"digit{i:04d}", label, str(i)) for i, label in enumerate(labels.tolist())]
        self.splits = {
            "train": Items(item for i, item in enumerate(items) if i % 5 != 4),
            "val": Items(items[4::5]),
        }

    def read(self, item: Item) -> bytes:
        grey = (self._pixels[int(item.where)].astype(np.uint16) * 255 // 16).astype(np.uint8)
        image = Image.fromarray(grey).resize((self.side, self.side), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=95)
        return out.getvalue()

    def describe(self) -> Json:
        return {"kind": "digits", "side": self.side}

    @staticmethod
    def add_options(p: argparse.ArgumentParser) -> None:
        p.add_argument("--side", type=int, default=36, help="pixels of a digit's side (%(default)s)")
