"""WebDataset tars: their samples, and a source that shards them once more.

As in webdataset, a sample is the adjacent members of one key, a name up to its first dot: an image and a label.
"""

import argparse
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from braceexpand import braceexpand

from ... import pool
from ...decode import BadImage
from ...errors import ConfigError, DataError
from ...progress import Progress
from ...shards import IMAGES, LABELS, label_name, label_text, split_name
from ...storage import Folder, check_url, is_url
from ...tar import Member, members
from .base import Archives, Item, UniqueKeys
from .folders import TrainAndVal, is_image, litter, require_utf8

KEY = "a name up to its first dot"
NAMED = 10  # extensions of one key
MAX_NUMBERS = 1_000_000  # in the braces of a pattern
NAMES = (*LABELS, "txt")  # a .txt may hold the class's name
T = TypeVar("T")


def expand(pattern: str) -> list[Path]:
    """The files that a pattern with {0..9}, {a,b}, *, ? or [0-9] names. A file of exactly that name has priority.

    Raises ConfigError for an invalid pattern, DataError if a file is missing.
    """
    pattern = os.path.expanduser(pattern)  # a shell leaves what is quoted
    parts = [pattern] if Path(pattern).is_file() else braces(pattern)
    paths = [path for part in parts for path in _matches(Path(part))]
    if not paths:
        raise DataError(f"{pattern}: no such file; quote the pattern, and mind its folder")
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path}: no such file, or a folder, whose tars are 'FOLDER/*.tar';"
                f" {pattern} names {len(paths)} files, and no URL or command is read"
            )
    return paths


def braces(pattern: str) -> list[str]:
    """Expands {0..9} and {a,b} in a pattern. Raises ConfigError for an invalid pattern."""
    try:
        if any(abs(int(a) - int(b)) > MAX_NUMBERS for a, b in re.findall(r"(-?\d+)\.\.(-?\d+)", pattern)):
            raise ValueError("over a million numbers")  # braceexpand would hold them all
        return list(braceexpand(pattern))
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{pattern}: {err}; write {{0000..1023}}, {{a,b}}, *, ? or [0-9]") from err


def _matches(path: Path) -> list[Path]:
    """The sorted files that a pattern without braces names. A folder that exists under the very name goes first."""
    folder = next((folder for folder in path.parents if folder.is_dir()), Path())
    rest = str(path.relative_to(folder))
    if path.is_file() or not re.search(r"[*?[]", rest):
        return [path]
    return sorted(folder / name for name in glob(rest, root_dir=folder))


def samples(
    path: Path, label: Callable[[str], T], kinds: tuple[str, ...] = LABELS
) -> Iterator[tuple[Member, T | BadImage | None]]:
    """Yields (image, label) of each sample, in stored order; for a label with no image or several, (label, BadImage).

    Then yields (member, None) for all members that belong to no sample. label: converts a label's text. kinds:
    extensions of labels, by preference.
    """
    unused = list[Member]()
    last = dict[str, str]()  # member of each key
    for key, group in groupby(_keyed(path, unused), key=itemgetter(0)):
        found = dict[str, Member]()
        for _, extension, member in group:
            if key in last:
                raise DataError(
                    f"{path}: {last[key]!r} and {member.name!r} are not adjacent, but both have the key {key!r}, {KEY};"
                    " sort the tar by name (tar --sort=name), or rename members with more dots"
                )
            if found.setdefault(extension, member) != member:  # but for small and capital letters
                unused.append(member)
        last[key] = member.name
        name, images, inside = label_name(found, kinds), _images(path, found), ", ".join(list(found)[:NAMED])
        used = set[Member]()
        if name and len(images) == 1:
            used = {*images, found[name]}
            try:
                labelled = images[0], label(label_text({name: read_member(path, found[name])}, kinds))
            except DataError as err:
                raise DataError(f"{path}: sample {key!r} {err}") from err
            yield labelled
        elif name and (images or name.endswith("cls") or b'"label"' in read_member(path, found[name])):
            used = {found[name]}
            yield found[name], BadImage(f"{len(images)} images for this label; its key, {KEY}, has {inside}")
        elif images and not name and not any(map(litter, images[0].name.split("/"))):
            raise DataError(
                f"{path}: sample {key!r} has no label, or several; its key, {KEY}, has {inside};"
                " name one .cls, and sort the tar by name (tar --sort=name) if its parts lie apart"
            )
        unused += [member for member in found.values() if member not in used]
    for member in unused:
        yield member, None


def _keyed(path: Path, unused: list[Member]) -> Iterator[tuple[str, str, Member]]:
    """(key, extension, member) of each member that webdataset reads."""
    for member in members(path):
        key, extension = split_name(member.name)
        if extension and key[-1:] not in ("", "/"):
            yield key, extension, member
        else:
            unused.append(member)


def _images(path: Path, found: dict[str, Member]) -> list[Member]:
    """A sample's image, by the usual extensions or else by content; several if that leaves a choice."""
    if plain := [found[extension] for extension in IMAGES if extension in found]:
        return plain[:1]
    others = [member for extension, member in found.items() if extension.rpartition(".")[2] not in LABELS]
    return [member for member in others if is_image(io.BytesIO(read_member(path, member)))]


def read_member(path: Path, member: Member) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


@dataclass
class WebDataset(TrainAndVal, Archives):
    """The samples of tars that exist already. Labels are numbers, or names, whose classes are then in sorted order.

    fetch: a folder to which files at a URL are copied first, for later runs too. allow_http: also without encryption.
    """

    name: str = "webdataset"
    fetch: Path | None = None
    allow_http: bool = False

    place = str
    metavar = "PATTERN"
    hint = "files, with {0000..1023} or *; quote it; also a URL, with {}"
    help = "WebDataset tars, sharded once more: in a new order, size or encoding"

    def items(self, split: str, place: str) -> Iterator[Item]:
        found, unique = [], UniqueKeys()
        for path in self.files(place):
            for member, label in samples(path, str, NAMES):
                if isinstance(label, str):
                    found.append((len(self.archives), member, label))
                else:
                    self.passed_over.add("members of no sample", f"{path.name}/{member.name}")
            self.archives.append(path)
        if split == "train":
            self.name_classes(label for *_, label in found)
        for archive, member, label in found:
            where = f"{split}/{self.archives[archive].name}/{require_utf8(member.name)}"
            if label not in self.label_of:
                raise DataError(f"{where}: {label!r} is none of the {len(self.classes):,} training classes")
            extent = (archive, member.offset, member.size)
            yield Item(unique(split_name(member.name)[0]), self.label_of[label], where, extent)

    def files(self, pattern: str) -> list[Path]:
        """The tars that a pattern names, local ones now. Raises ConfigError, DataError or StorageError."""
        if not is_url(pattern):
            return expand(pattern)
        from ...remote import PATIENCE, RemoteFolder

        check_url(pattern, allow_http=self.allow_http)
        if (folder := self.fetch) is None:
            raise ConfigError(f"{pattern}: name a folder for copies of its files, by --fetch DIR")
        urls, paths = braces(pattern), list[Path]()

        def fetched() -> list[Path]:  # in another process, as its progress is
            with Progress("fetching", len(urls), unit="file") as progress:
                for url in urls:
                    place, _, name = url.rpartition("/")
                    source = RemoteFolder(place, allow_http=self.allow_http)
                    copies = Folder(folder.joinpath(*re.split("/+", str(source))))
                    if copies.size(name) != source.length(name):
                        copies.write(name, source.get(name, patience=PATIENCE))
                    paths.append(copies.path / name)
                    progress.update(1)
            return paths

        return pool.apart(fetched, place=folder)

    @classmethod
    def add_options(cls, p: argparse.ArgumentParser) -> None:
        super().add_options(p)
        p.add_argument("--fetch", type=Path, metavar="DIR", help="files at a URL are copied there first")
