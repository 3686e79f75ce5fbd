"""Folders of images, one for each class."""

import argparse
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from PIL import Image

from ...errors import ConfigError, DataError
from ...files import Json
from .base import Files, Item, Items, PassedOver, Source, UniqueKeys, check_fraction, check_name, key_hashes

LITTER = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")
TEXTS = (".txt", ".json", ".xml", ".csv", ".md")


@dataclass
class TrainAndVal(Source):
    """Images that the user names for each split: by a folder, a file or a pattern.

    val_fraction: the fraction of each class that is held out as validation, if `val` is None; chosen by names only.
    """

    train: Path | str
    val: Path | str | None = None
    name: str = ""
    val_fraction: float = 0.0

    place: ClassVar[Callable[[str], Path | str]] = Path  # that `train` and `val` are
    metavar = "DIR"
    hint: ClassVar[str | None] = None  # how to write them

    def __post_init__(self) -> None:
        check_name(self.name)
        check_fraction("--val-fraction", self.val_fraction)
        if self.val == self.train:
            raise ConfigError(f"{self.val}: is both --train and --val; choose another, or --val-fraction 0.1")
        self.passed_over, self.folders, self.splits = PassedOver(), dict[str, Path](), dict[str, Items]()
        for split, place in (("train", self.train), ("val", self.val)):
            if place:
                self.splits[split] = Items(self.items(split, place))
                if not self.splits[split]:
                    raise DataError(f"{place}: has no images; leave it out or name another")
        if self.val_fraction:
            self.splits = held_out(self.splits["train"], self.val_fraction)

    def items(self, split: str, place: Any) -> Iterator[Item]:
        """The images of a split. Those of `train` come first, with the classes."""
        raise NotImplementedError

    def describe(self) -> Json:
        return super().describe() | ({"val_fraction": self.val_fraction} if self.val_fraction else {})

    @classmethod
    def add_options(cls, p: argparse.ArgumentParser) -> None:
        p.add_argument("--train", type=cls.place, required=True, metavar=cls.metavar, help=cls.hint)
        validation = p.add_mutually_exclusive_group()
        validation.add_argument("--val", type=cls.place, metavar=cls.metavar, help="for validation")
        validation.add_argument(
            "--val-fraction",
            type=float,
            default=0.0,
            metavar="F",
            help="hold out this part of each class as validation",
        )
        p.add_argument("--name", default=cls.name, help="the shards' first name (%(default)s)")


@dataclass
class ImageFolder(TrainAndVal, Files):
    """`train/<class>/**/<image>`, as torchvision's ImageFolder; classes are the sorted folder names.

    Every file counts as an image, except those that files_of_images passes over; later, decoding finds other files.
    Class names are compared in Unicode's composed form (NFC), as macOS may decompose them, and kept as found.
    """

    name: str = "imagefolder"

    help = "DIR/<class>/<image>, any depth below the class"

    def items(self, split: str, place: Path) -> Iterator[Item]:
        found, unique = _class_folders(place, self.passed_over), UniqueKeys()
        self.folders[split] = place
        if split == "train":
            self.classes = [folder.name for folder in found.values()]
            self.label_of = {name: label for label, name in enumerate(found)}
        for name, folder in found.items():
            if name not in self.label_of:
                raise DataError(
                    f"{folder}: this class is not among those of {self.train}; validation needs the training classes"
                )
            files = sorted(files_of_images(folder, self.passed_over))
            if not files:
                raise DataError(f"{folder}: no image in this class folder; fill or remove it")
            for file in files:
                below = require_utf8(os.path.relpath(file, place))
                yield Item(unique(readable_key(below)), self.label_of[name], f"{split}/{below}")


def held_out(items: Items, fraction: float) -> dict[str, Items]:
    """Holds out the images of each class whose hashes are smallest: the same ones on every machine."""
    order = np.lexsort((*key_hashes("val", items), items.labels))
    held = np.zeros(len(items), bool)
    for members in np.split(order, np.cumsum(np.bincount(items.labels))):  # of each class, and none after the last
        held[members[: min(round(fraction * len(members)), len(members) - 1)]] = True
    if not held.any():
        raise DataError(
            f"--val-fraction {fraction}: no class is large enough to spare an image; choose more, or add images"
        )
    return {"train": Items(compress(items, ~held)), "val": Items(compress(items, held))}


def _class_folders(folder: Path, passed_over: PassedOver) -> dict[str, Path]:
    """The folders by their names in NFC, in the order of the names as they are."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that holds a folder for each class")
    found = dict[str, Path]()
    for entry in sorted(_entries(folder, passed_over), key=lambda entry: entry.name):
        name = unicodedata.normalize("NFC", entry.name)
        if not _is_folder(entry):
            passed_over.add("outside the class folders", entry.path)
        elif name in found:
            both = f"{found[name].name!a} and {entry.name!a}"
            raise DataError(f"{folder}: {both} are one name in two Unicode spellings; merge these folders")
        else:
            found[name] = Path(entry.path)
    if not found:
        raise DataError(f"{folder}: no class folders; images belong into {folder}/<class>/")
    return found


def files_of_images(folder: Path, passed_over: PassedOver) -> Iterator[str]:
    """Yields all files at any depth, except litter and text files, such as notes and annotations, that are not images.

    Follows links as torchvision does, except to a parent folder, which holds other classes or makes a cycle. Does not
    use recursion, which is limited to a depth of 1,000.
    """
    real = folder.resolve()
    todo = [(str(folder), frozenset(map(str, (real, *real.parents))))]
    while todo:
        path, above = todo.pop()
        for entry in _entries(path, passed_over):
            suffix = os.path.splitext(entry.name)[1].lower()
            if _is_folder(entry):
                if (inside := os.path.realpath(entry.path)) not in above:
                    todo.append((entry.path, above | {inside}))
            elif suffix in TEXTS and not (entry.is_file() and is_image(entry.path)):  # a pipe would wait
                passed_over.add(suffix, entry.path)
            else:
                yield entry.path


def _entries(folder: Path | str, passed_over: PassedOver) -> Iterator[os.DirEntry[str]]:
    """All but litter, whose files are counted."""
    for entry in os.scandir(folder):
        if kind := litter(entry.name):
            within = [files for *_, files in os.walk(entry.path)]  # nothing for a file
            passed_over.add(kind, entry.path, sum(map(len, within)) if within else 1)
        else:
            yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def litter(name: str) -> str:
    """The kind of a file or folder that systems and tools leave beside images; "" for others."""
    if name.startswith(".") and name not in (".", ".."):
        return "hidden"
    return name if name.lower() in LITTER else ""


def is_image(file: str | BinaryIO) -> bool:
    """Whether the content looks like an image: it may still be damaged."""
    with suppress(Exception):  # Pillow's parsers raise many kinds
        Image.open(file).close()
        return True
    return False


def require_utf8(path: str) -> str:
    """JSON, and so the manifest, holds no name that is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError as err:
        raise DataError(f"{path!r}: the name is not UTF-8; rename it") from err
    return path


def readable_key(path: str) -> str:
    """ "cat/7.jpg" → "cat_7"; "n01440764/n01440764_18.JPEG" → "n01440764_18", as ImageNet names them."""
    folder, stem = os.path.split(os.path.splitext(path)[0])
    return stem if stem.startswith(folder + "_") else f"{folder}_{stem}"
