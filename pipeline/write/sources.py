"""Where labelled images come from: each source lists its items in a fixed order and reads one at a time.

An item is small and can be sent to a worker process; a source holds no open file.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..errors import DataError
from .images import BadImage

MAX_KEY = 80  # USTAR holds 100 bytes of name; the extension and a counter need some


class Item(NamedTuple):
    """One image of a split. `where` means something to its source alone."""

    key: str
    label: int
    where: str


class Source(Protocol):
    """A set of labelled images."""

    name: str
    classes: list[str]
    splits: dict[str, list[Item]]

    def read(self, item: Item) -> bytes:
        """The image file's bytes. Raises BadImage where there is none."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source: nothing that differs from machine to machine."""


def unique_keys(names: list[str]) -> list[str]:
    """Tar keys for `names`: ASCII, no dots or slashes, at most MAX_KEY + a counter long, each one once.

    webdataset cuts a key at its first dot, so that "a.b.jpg" and "a.c.jpg" would be one sample.
    """
    slugs = [re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_KEY] or "_" for name in names]
    # USTAR readers on case-insensitive disks see "Cat" and "cat" as one file.
    # A slug holds no "~", so a counter behind one never meets another slug.
    seen: Counter[str] = Counter()
    keys = []
    for slug in slugs:
        seen[slug.lower()] += 1
        n = seen[slug.lower()]
        keys.append(slug if n == 1 else f"{slug}~{n}")
    return keys


@dataclass
class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0).

    Every fifth is held out as validation. Each 8×8 image becomes a JPEG of `side`² pixels.
    """

    side: int = 40

    name = "digits"

    def __post_init__(self) -> None:
        self.classes = [str(digit) for digit in range(10)]
        _, labels = _digits()
        self.splits: dict[str, list[Item]] = {"train": [], "val": []}
        for i, label in enumerate(labels.tolist()):
            split = "val" if i % 5 == 4 else "train"
            self.splits[split].append(Item(f"digit{i:04d}", label, str(i)))

    def read(self, item: Item) -> bytes:
        grey = (_digits()[0][int(item.where)].astype(np.uint16) * 255 // 16).astype(np.uint8)
        image = Image.fromarray(grey).resize((self.side, self.side), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=95)
        return out.getvalue()

    def describe(self) -> dict[str, Any]:
        return {"kind": "digits", "side": self.side}


_DIGITS: tuple[np.ndarray, np.ndarray] | None = None


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 in 0..16 and (1797,) labels."""
    global _DIGITS
    if _DIGITS is None:
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            _DIGITS = file["images"], file["labels"]
    return _DIGITS


@dataclass
class ImageFolder:
    """`train/<class>/**/<image>`, as torchvision's ImageFolder; classes are the sorted folder names.

    Every file that is not hidden counts as an image: what is none is found by its content and named.
    """

    train: Path
    val: Path | None = None
    name: str = "imagefolder"

    def __post_init__(self) -> None:
        folders = {"train": self.train} | ({"val": self.val} if self.val else {})
        self.classes = _class_names(self.train)
        self.splits = {split: self._items(split, folder) for split, folder in folders.items()}

    def _items(self, split: str, folder: Path) -> list[Item]:
        names = _class_names(folder)
        label_of = {name: label for label, name in enumerate(self.classes)}
        if foreign := [name for name in names if name not in label_of]:
            raise DataError(
                f"{folder / foreign[0]}: this class is not among those of {self.train};"
                " validation needs the training classes"
            )
        found: list[tuple[str, int]] = []
        for name in names:
            files = sorted(_files(folder / name))
            if not files:
                raise DataError(f"{folder / name}: no image in this class folder; fill or remove it")
            paths = [_refuse_undecodable(os.path.relpath(file, folder)) for file in files]
            found += [(path, label_of[name]) for path in paths]
        keys = unique_keys([_readable_key(path) for path, _ in found])
        return [Item(key, label, f"{split}/{path}") for key, (path, label) in zip(keys, found, strict=True)]

    def read(self, item: Item) -> bytes:
        split, _, path = item.where.partition("/")
        folder = self.train if split == "train" else self.val
        assert folder is not None
        if not (folder / path).is_file():
            raise BadImage("neither a file nor a link to one")
        return (folder / path).read_bytes()

    def describe(self) -> dict[str, Any]:
        return {"kind": "imagefolder"}


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that holds a folder for each class")
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folders; images belong into {folder}/<class>/")
    return names


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """All that is not hidden, at any depth, links followed as torchvision does, but no circle of them twice."""
    above |= {os.path.realpath(folder)}
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield entry.path
        elif os.path.realpath(entry.path) not in above:
            yield from _files(Path(entry.path), above)


def _refuse_undecodable(path: str) -> str:
    """JSON, and so the manifest, holds no name that is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError as err:
        raise DataError(f"{path!r}: the name is not UTF-8; rename it") from err
    return path


def _readable_key(path: str) -> str:
    """ "cat/7.jpg" → "cat_7"; "n01440764/n01440764_18.JPEG" → "n01440764_18", as ImageNet names them."""
    folder, stem = os.path.split(os.path.splitext(path)[0])
    return stem if stem.startswith(folder + "_") else f"{folder}_{stem}"
