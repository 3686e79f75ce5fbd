"""Folders of images, one for each class."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..images import BadImage
from .base import Item, Items, Source, UniqueKeys, advise, check_fraction, check_name

NO_FILE = "neither a file nor a link to one"


@dataclass
class ImageFolder(Source):
    """`train/<class>/**/<image>`, as torchvision's ImageFolder; classes are the sorted folder names.

    Every file that is not hidden counts as an image: the content of others shows that they are none.
    val_fraction: the fraction of each class that is held out as validation, instead of a folder; chosen by names alone.
    """

    train: Path
    val: Path | None = None
    name: str = "imagefolder"
    val_fraction: float = 0.0

    help = "DIR/<class>/<image>, any depth below the class"

    def __post_init__(self) -> None:
        self._opened: dict[str, int] = {}  # this process's files that ahead() opened and read() has not read yet
        folders = {"train": self.train} | ({"val": self.val} if self.val else {})
        self.classes = _class_names(self.train)
        self.splits = {split: self._items(split, folder) for split, folder in folders.items()}
        if self.val_fraction:
            self.splits = _held_out(self.splits["train"], self.val_fraction)

    def _items(self, split: str, folder: Path) -> Items:
        names = _class_names(folder)
        label_of = {name: label for label, name in enumerate(self.classes)}
        if foreign := [name for name in names if name not in label_of]:
            raise DataError(
                f"{folder / foreign[0]}: this class is not among those of {self.train};"
                " validation needs the training classes"
            )
        return Items(self._found(split, folder, {name: label_of[name] for name in names}))

    def _found(self, split: str, folder: Path, labels: dict[str, int]) -> Iterator[Item]:
        unique = UniqueKeys()
        for name, label in labels.items():
            files = sorted(_files(folder / name))
            if not files:
                raise DataError(f"{folder / name}: no image in this class folder; fill or remove it")
            for file in files:
                path = _require_utf8(os.path.relpath(file, folder))
                yield Item(unique(_readable_key(path)), label, f"{split}/{path}")

    def _path(self, item: Item) -> str:
        split, _, path = item.where.partition("/")
        # An image held out as validation keeps its place in the folder of all.
        return f"{self.train if split == 'train' else self.val}/{path}"

    def _open(self, item: Item) -> int:
        return os.open(self._path(item), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def ahead(self, item: Item) -> None:
        with contextlib.suppress(OSError):  # read() will name it
            self._opened[item.where] = fd = self._open(item)
            advise(fd, 0, 0)

    def read(self, item: Item) -> bytes:
        try:
            fd = self._opened.pop(item.where) if item.where in self._opened else self._open(item)
        except FileNotFoundError as err:
            raise BadImage(NO_FILE) from err
        with open(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadImage(NO_FILE)
            return file.readall()

    def describe(self) -> dict[str, Any]:
        return {"kind": "imagefolder"} | ({"val_fraction": self.val_fraction} if self.val_fraction else {})

    @staticmethod
    def add_options(p: argparse.ArgumentParser) -> None:
        p.add_argument("--train", type=Path, required=True, metavar="DIR")
        validation = p.add_mutually_exclusive_group()
        validation.add_argument("--val", type=Path, metavar="DIR")
        validation.add_argument(
            "--val-fraction",
            type=float,
            default=0.0,
            metavar="F",
            help="hold out this part of each class as validation",
        )
        p.add_argument("--name", default="imagefolder", help="the shards' first name (%(default)s)")

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> ImageFolder:
        fraction = check_fraction("--val-fraction", args.val_fraction)
        return cls(args.train, args.val, check_name(args.name), fraction)


def _held_out(items: Items, fraction: float) -> dict[str, Items]:
    """Holds out the images of each class whose hashes are smallest: the same ones on every machine."""
    hashes = [hashlib.sha256(f"val/{key}".encode()).digest() for key in items.keys]
    order = sorted(range(len(items)), key=lambda i: (items.labels[i], hashes[i]))
    held: set[int] = set()
    for _, group in groupby(order, key=items.labels.__getitem__):
        members = list(group)
        held.update(members[: min(round(fraction * len(members)), len(members) - 1)])
    if not held:
        raise DataError(f"--val-fraction {fraction}: no class is large enough to spare an image; choose more")
    return {
        "train": Items(item for i, item in enumerate(items) if i not in held),
        "val": Items(item for i, item in enumerate(items) if i in held),
    }


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that holds a folder for each class")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folders; images belong into {folder}/<class>/")
    return names


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """All files that are not hidden, at any depth. Links are followed as torchvision does, but no circle of them."""
    above |= {os.path.realpath(folder)}
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield entry.path
        elif os.path.realpath(entry.path) not in above:
            yield from _files(Path(entry.path), above)


def _require_utf8(path: str) -> str:
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
