"""The protocol of a source of labelled images: it lists its items in a fixed order and reads one at a time."""

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...decode import BadImage
from ...errors import ConfigError
from ...files import Json, OpenFile
from ...storage import Folder

NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")
MADE_AT_ONCE = 256  # items: the garbage collector would scan more of them repeatedly
NO_FILE = "neither a file nor a link to one"
MAX_OPEN = 32  # archives, of which ImageNet has four
MAX_KEY = 80  # USTAR holds 100 bytes of name; the extension and a counter need some


class Item(NamedTuple):
    """One image of a split. `where` names it for people, and is all that some sources need to find it."""

    key: str
    label: int  # 0-based; -1: not known
    where: str
    extent: tuple[int, int, int] = (0, 0, 0)  # archive, first byte, bytes: for sources that read archives


class Names:
    """Many strings in two arrays: as Python objects, a million would take 100 MB, and each worker would copy them."""

    def __init__(self) -> None:
        self.lines, self._ends = bytearray(), array("q", [0])

    def extend(self, names: Iterable[str]) -> None:
        lines = [name.encode("utf-8", "surrogateescape") + b"\n" for name in names]
        self._ends.extend(accumulate(map(len, lines), initial=self._ends.pop()))
        self.lines += b"".join(lines)

    def __iter__(self) -> Iterator[str]:
        return (self.lines[a : b - 1].decode("utf-8", "surrogateescape") for a, b in pairwise(self._ends))

    def __getitem__(self, i: int) -> str:
        return self.lines[self._ends[i] : self._ends[i + 1] - 1].decode("utf-8", "surrogateescape")


class Items(Sequence[Item]):
    """A split's images: 100 bytes each."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.keys, self.where = Names(), Names()
        labels, extents = array("i"), array("q")
        items = iter(items)
        while some := [*zip(*islice(items, MADE_AT_ONCE))]:
            keys, of, where, places = some
            self.keys.extend(keys)
            self.where.extend(where)
            labels.extend(of)
            extents.extend(chain.from_iterable(places))
        self.labels = np.array(labels, np.int32)
        self.extents = np.array(extents, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: Any) -> Any:
        return Item(self.keys[i], int(self.labels[i]), self.where[i], tuple(self.extents[i].tolist()))

    def digest(self) -> str:
        """A hash of all that decides what is stored, except the images themselves."""
        digest = hashlib.sha256(self.keys.lines)
        digest.update(self.where.lines)
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


def key_hashes(prefix: str, items: Items) -> np.ndarray:
    """Returns 128 bits of the sha256 of "prefix/key" for each item, (2, n) uint64, for np.lexsort.

    Hashes, not a random generator: their order is the same in every version of Python and NumPy.
    """
    hashes = (hashlib.sha256(f"{prefix}/{key}".encode()).digest()[:16] for key in items.keys)
    return np.fromiter(hashes, "S16", len(items)).view(">u8").astype(np.uint64).reshape(-1, 2).T[::-1]


class PassedOver(dict[str, tuple[int, str]]):
    """How many files or members of each kind are no samples, and the name of one."""

    def add(self, kind: str, name: str, count: int = 1) -> None:
        before, first = self.get(kind, (0, name))
        self[kind] = before + count, first

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind} ({name})" for kind, (count, name) in self.items())


class Source:
    """A set of labelled images. Forked workers inherit it as it is, so it holds no open file before the first read."""

    name: str
    classes: list[str]
    splits: dict[str, Items]
    class_names: list[str] | None = None  # for people, if `classes` are ids
    class_ids: list[int] | None = None  # official numbers of the classes, if labels are others
    passed_over = PassedOver()  # read-only

    help = ""  # of the command line

    @cached_property
    def label_of(self) -> dict[str, int]:
        """The number of each class."""
        return {name: label for label, name in enumerate(self.classes)}

    def name_classes(self, labels: Iterable[str]) -> None:
        """Sets the classes to the sorted labels; integers are sorted as numbers."""
        found = set(labels)
        numbers = all(label.isdecimal() for label in found)
        self.classes = sorted(found, key=int) if numbers else sorted(found)
        if numbers and self.classes != [str(number) for number in range(len(found))]:
            self.class_ids = [int(label) for label in self.classes]

    def read(self, item: Item) -> bytes:
        """The image file's bytes. Raises BadImage if there is none."""
        raise NotImplementedError

    def ahead(self, item: Item) -> None:
        """Asks the system to fetch what read() will want soon; returns at once."""

    def describe(self) -> Json:
        """The manifest's entry on the source: nothing that differs from machine to machine."""
        return {"kind": type(self).name}  # --name may be another

    def verify(self, folder: Folder) -> None:
        """Checks the whole input before any shard is made. May store results in a file below PARTS."""

    @staticmethod
    def add_options(p: argparse.ArgumentParser) -> None:
        """Adds the command line's options of this source."""

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> "Source":
        """The options' values go to the dataclass's fields of the same names."""
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


class Files(Source):
    """Images in files of their own: an item's `where` is its split and the path below the split's folder."""

    folders: dict[str, Path]  # of each split

    @cached_property
    def _opened(self) -> dict[str, int]:
        """This process's files that ahead() opened and read() has not read yet."""
        return {}

    def _open(self, item: Item) -> int:
        split, _, path = item.where.partition("/")
        return os.open(os.path.join(self.folders[split], path), os.O_RDONLY | os.O_NONBLOCK)

    def ahead(self, item: Item) -> None:
        with contextlib.suppress(OSError):  # read() will name it
            self._opened[item.where] = fd = self._open(item)
            advise(fd, 0, 0)

    def read(self, item: Item) -> bytes:
        try:
            fd = self._opened.pop(item.where) if item.where in self._opened else self._open(item)
        except OSError as err:
            if err.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                raise
            raise BadImage(NO_FILE) from err
        with open(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadImage(NO_FILE)
            return file.readall()


class Archives(Source):
    """Images in tars, read in place: an item's `extent` begins with the number of its archive."""

    @cached_property
    def archives(self) -> list[Path]:
        return []

    @cached_property
    def _opened(self) -> Callable[[Path], OpenFile]:
        """Each process that reads keeps archives open; pread has no position, so forked workers may share them."""
        return lru_cache(MAX_OPEN)(lambda path: OpenFile(os.open(path, os.O_RDONLY)))

    def ahead(self, item: Item) -> None:
        archive, offset, size = item.extent
        advise(self._opened(self.archives[archive]).fd, offset, size)

    def read(self, item: Item) -> bytes:
        archive, offset, size = item.extent
        path = self.archives[archive]
        file = self._opened(path)  # a reference, or another thread's open might close it
        data = os.pread(file.fd, size, offset)
        if len(data) < size:
            raise BadImage(f"{path.name} ends before it")
        return data


class UniqueKeys(dict[str, int]):
    """Tar keys for names: ASCII, no dots or slashes, at most MAX_KEY + a counter long, each one once.

    webdataset cuts a key at its first dot, so that "a.b.jpg" and "a.c.jpg" would be one sample.
    """

    def __call__(self, name: str) -> str:
        slug = NOT_IN_KEYS.sub("_", name)[:MAX_KEY] or "_"
        # USTAR readers on case-insensitive disks see "Cat" and "cat" as one file.
        # A slug holds no "~", so a counter behind one never meets another slug.
        folded = slug.lower()
        n = self[folded] = self.get(folded, 0) + 1
        return slug if n == 1 else f"{slug}~{n}"


def advise(fd: int, offset: int, size: int) -> None:
    """Asks the system to read `size` bytes of a file ahead; 0: all up to its end."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a pipe
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)


def check_name(name: str) -> str:
    """The value of --name, with which the names of shards start."""
    if NOT_IN_KEYS.search(name) or not name.strip("-_"):
        raise ConfigError(f"--name {name!r}: use letters, digits, - and _")
    return name


def check_fraction(option: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ConfigError(f"{option} {value}: must be in [0, 1)")
    return value


def few_images(source: Source) -> Iterator[str]:
    """Yields warnings about splits and classes without images to learn from or to measure with."""
    if len({"train", "val", "valid", "test"}.intersection(source.classes)) > 1:
        yield "classes are named as splits are; pass the folder train as --train, and val, valid or test as --val"
    if "val" not in source.splits:
        yield "no validation split, which training needs; --val names one, --val-fraction 0.1 holds one out"
    for name, number, what in (("train", 1, "one training image"), ("val", 0, "no validation image")):
        if items := source.splits.get(name):
            few = np.flatnonzero(np.bincount(items.labels, minlength=len(source.classes)) == number)
            for label in few[:1]:
                yield f"{what} in {len(few):,} of the classes, such as {source.classes[label]}"
