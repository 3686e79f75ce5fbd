"""Where labelled images come from: each source lists its items in a fixed order and reads one at a time.

A source holds no open file, so that a forked worker process inherits it as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..errors import DataError
from .images import BadImage

MAX_KEY = 80  # USTAR holds 100 bytes of name; the extension and a counter need some


class Item(NamedTuple):
    """One image of a split. `where` names it to people, and is all that some sources need to find it."""

    key: str
    label: int  # 0-based; -1: not known
    where: str
    extent: tuple[int, int, int] = (0, 0, 0)  # archive, first byte, bytes: for sources that read archives


class Names(Sequence[str]):
    """Many strings in two arrays. As Python objects a million would take 100 MB, and be copied by each worker."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, name: str) -> None:
        self._bytes += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        return self._bytes[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


class Items(Sequence[Item]):
    """A split's images: 100 bytes each."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.keys, self.where = Names(), Names()
        labels, extents = array("i"), array("q")
        for item in items:
            self.keys.append(item.key)
            self.where.append(item.where)
            labels.append(item.label)
            extents.extend(item.extent)
        self.labels = np.array(labels, np.int32)
        self.extents = np.array(extents, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return Item(self.keys[i], int(self.labels[i]), self.where[i], tuple(self.extents[i].tolist()))

    def digest(self) -> str:
        """Of all that decides what is stored, but for the images themselves."""
        digest = hashlib.sha256()
        for name in (*self.keys, *self.where):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


class Source(Protocol):
    """A set of labelled images."""

    name: str
    classes: list[str]
    splits: dict[str, Items]

    def read(self, item: Item) -> bytes:
        """The image file's bytes. Raises BadImage where there is none."""

    def ahead(self, item: Item) -> None:
        """Asks the system to fetch what read() will want soon; returns at once."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source: nothing that differs from machine to machine."""


class UniqueKeys:
    """Tar keys for names: ASCII, no dots or slashes, at most MAX_KEY + a counter long, each one once.

    webdataset cuts a key at its first dot, so that "a.b.jpg" and "a.c.jpg" would be one sample.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        slug = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_KEY] or "_"
        # USTAR readers on case-insensitive disks see "Cat" and "cat" as one file.
        # A slug holds no "~", so a counter behind one never meets another slug.
        self._seen[slug.lower()] += 1
        n = self._seen[slug.lower()]
        return slug if n == 1 else f"{slug}~{n}"


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
        items = [Item(f"digit{i:04d}", label, str(i)) for i, label in enumerate(labels.tolist())]
        self.splits = {
            "train": Items(item for i, item in enumerate(items) if i % 5 != 4),
            "val": Items(item for i, item in enumerate(items) if i % 5 == 4),
        }

    def ahead(self, item: Item) -> None:
        pass

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
    val_fraction: of each class, this part is held out as validation instead of a folder; which, the names alone say.
    """

    train: Path
    val: Path | None = None
    name: str = "imagefolder"
    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        self._opened: dict[str, int] = {}  # of this process: what was asked for and not read yet
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
                path = _refuse_undecodable(os.path.relpath(file, folder))
                yield Item(unique(_readable_key(path)), label, f"{split}/{path}")

    def _path(self, item: Item) -> str:
        split, _, path = item.where.partition("/")
        # An image held out as validation keeps its place in the folder of all.
        return f"{self.train if split == 'train' else self.val}/{path}"

    def ahead(self, item: Item) -> None:
        with contextlib.suppress(OSError):  # read() will say why
            fd = os.open(self._path(item), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            advise(fd, 0, 0)
            self._opened[item.where] = fd

    def read(self, item: Item) -> bytes:
        fd = self._opened.pop(item.where, None)
        try:
            if fd is None:
                fd = os.open(self._path(item), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadImage("neither a file nor a link to one")
            with open(fd, "rb", buffering=0) as file:
                fd = None
                return file.readall()
        except FileNotFoundError as err:
            raise BadImage("neither a file nor a link to one") from err
        finally:
            if fd is not None:
                os.close(fd)

    def describe(self) -> dict[str, Any]:
        return {"kind": "imagefolder"} | ({"val_fraction": self.val_fraction} if self.val_fraction else {})


def advise(fd: int, offset: int, size: int) -> None:
    """Asks the system to read a part of a file ahead; 0 bytes: to its end."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a pipe
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)


def _held_out(items: Items, fraction: float) -> dict[str, Items]:
    """The same images train and validate on every machine: of each class those whose hashes are smallest."""
    held: set[int] = set()
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    for i, label in enumerate(items.labels.tolist()):
        by_class.setdefault(label, []).append((hashlib.sha256(f"val/{items.keys[i]}".encode()).digest(), i))
    for members in by_class.values():
        held.update(i for _, i in sorted(members)[: min(round(fraction * len(members)), len(members) - 1)])
    if not held:
        raise DataError(f"--val-fraction {fraction}: no class is large enough to spare an image; choose more")
    return {
        "train": Items(item for i, item in enumerate(items) if i not in held),
        "val": Items(item for i, item in enumerate(items) if i in held),
    }


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
