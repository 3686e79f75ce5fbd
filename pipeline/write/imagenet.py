"""ImageNet as it is shipped: archives of archives, read in place, nothing unpacked.

Labels are 0-based in the order of the sorted WordNet ids, as torchvision and timm have them; the ids in the development
kit are another order. Facts on the archives: docs/shards.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..files import write_json
from ..tar import Member, members
from .images import BadImage
from .sources import Item, Items, UniqueKeys, advise

FIRST_CLASS = "n01440764"  # tench: class 0 of ImageNet 2012, for everybody
HASH_CHUNK = 8 << 20


class Edition(NamedTuple):
    """The files of a year, and what is known of them. md5: by file."""

    name: str
    id_field: str
    devkit: str
    train: str
    val: str
    val_labels: str  # in the kit
    test: tuple[str, ...]  # any one of these names, or none
    test_labels: str | None  # a file beside the archives
    patches: str
    md5: dict[str, str]


EDITIONS = {
    "imagenet2012": Edition(
        "imagenet2012",
        "ILSVRC2012_ID",
        "ILSVRC2012_devkit_t12.tar.gz",
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "data/ILSVRC2012_validation_ground_truth.txt",
        ("ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar"),
        None,
        "ILSVRC2012_img_test_patch_v10102019.tar",
        {
            "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
            "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
            "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
        },
    ),
    "imagenet2010": Edition(
        "imagenet2010",
        "ILSVRC2010_ID",
        "ILSVRC2010_devkit-1.0.tar.gz",
        "ILSVRC2010_images_train.tar",
        "ILSVRC2010_images_val.tar",
        "data/ILSVRC2010_validation_ground_truth.txt",
        ("ILSVRC2010_images_test.tar",),
        "ILSVRC2010_test_ground_truth.txt",
        "patch_images.tar",
        {},
    ),
}


@dataclass
class ImageNet:
    """The official archives in the folder `src`. counts: compare with the numbers of images that the kit names.

    Raises DataError for an archive that is missing, damaged or not what the kit says.
    """

    src: Path
    edition: Edition
    counts: bool = True
    classes: list[str] = field(init=False)  # WordNet ids, sorted
    class_names: list[str] = field(init=False)
    class_ids: list[int] = field(
        init=False
    )  # the kit's own numbers, from 1 on, in another order: submissions want them
    splits: dict[str, Items] = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.edition.name
        self._fds: dict[int, int] = {}
        self.archives: list[Path] = []
        if not self.src.is_dir():
            raise DataError(f"{self.src}: no such folder; --src names the one that holds {self.edition.train}")
        kit = _Kit(self._needed(self.edition.devkit), self.edition)
        self.classes, self.class_names, self.class_ids = kit.wnids, kit.names, kit.ids
        if self.edition.name == "imagenet2012" and self.classes[0] != FIRST_CLASS:
            raise DataError(
                f"{kit.path}: its first class is {self.classes[0]} where ImageNet 2012 has {FIRST_CLASS};"
                " download the kit again"
            )
        self._patches = self._read_patches()
        self._unused = set(self._patches)
        train, val = self._needed(self.edition.train), self._needed(self.edition.val)
        test = next((self.src / name for name in self.edition.test if (self.src / name).is_file()), None)
        if test is None and self.edition.test_labels:
            test = self._needed(self.edition.test[0])
        self.splits = {"train": self._training(train, kit), "val": self._labelled(val, "val", kit.val_labels)}
        if test and self.edition.test_labels:
            labels = kit.labels(self._needed(self.edition.test_labels), None)
            self.splits["test"] = self._labelled(test, "test", labels)
        elif test:
            self.splits["test"] = self._labelled(test, "test", None)
        if self._unused and (test or not self.edition.test_labels):
            patch = self.src / self.edition.patches
            raise DataError(f"{patch}: {min(self._unused)} replaces no image of these archives; download them again")

    def _needed(self, name: str) -> Path:
        path = self.src / name
        if not path.is_file():
            raise DataError(f"{path}: missing; download it from image-net.org into {self.src}")
        return path

    def _archive(self, path: Path) -> int:
        if path not in self.archives:
            self.archives.append(path)
        return self.archives.index(path)

    def _read_patches(self) -> dict[str, tuple[int, int, int]]:
        """Images that replace those of the same name."""
        path = self.src / self.edition.patches
        if not path.is_file():
            return {}
        number = self._archive(path)
        return {os.path.basename(m.name): (number, m.offset, m.size) for m in members(path)}

    def _item(self, path: Path, member: Member, split: str, label: int, unique: UniqueKeys) -> Item:
        name = os.path.basename(member.name)
        extent = (self._archive(path), member.offset, member.size)
        if name in self._patches:
            self._unused.discard(name)
            extent = self._patches[name]
        return Item(unique(os.path.splitext(name)[0]), label, f"{split}/{name}", extent)

    def _training(self, path: Path, kit: _Kit) -> Items:
        return Items(self._training_items(path, kit))

    def _training_items(self, path: Path, kit: _Kit) -> Iterator[Item]:
        unique = UniqueKeys()
        label_of = {wnid: label for label, wnid in enumerate(self.classes)}
        left = set(self.classes)
        for inner in members(path):
            wnid, extension = os.path.splitext(os.path.basename(inner.name))
            if extension != ".tar" or wnid not in label_of:
                raise DataError(f"{path}: holds {inner.name}, which is no class of {kit.path.name}")
            if wnid not in left:
                raise DataError(f"{path}: holds {wnid} twice; download it again")
            left.remove(wnid)
            label = label_of[wnid]
            images = list(members(path, inner.offset, inner.size))
            self._compare(path, wnid, len(images), kit.train_counts.get(wnid))
            for member in images:
                yield self._item(path, member, "train", label, unique)
        if left:
            raise DataError(
                f"{path}: {len(left)} of {len(self.classes)} classes are missing, {min(left)} first; download it again"
            )

    def _labelled(self, path: Path, split: str, labels: list[int] | None) -> Items:
        """Labels belong to the images in the order of their names, not in that of the archive."""
        found = sorted(members(path), key=lambda member: os.path.basename(member.name))
        if not found:
            raise DataError(f"{path}: holds no images; download it again")
        if labels is not None and len(found) != len(labels):
            raise DataError(
                f"{path}: holds {len(found):,} images, but there are {len(labels):,} labels; download it again"
            )
        of, unique = labels or [-1] * len(found), UniqueKeys()
        return Items(self._item(path, m, split, label, unique) for m, label in zip(found, of, strict=True))

    def _compare(self, path: Path, wnid: str, found: int, expected: int | None) -> None:
        if self.counts and expected is not None and found != expected:
            raise DataError(
                f"{path}: {wnid} has {found:,} images where the kit counts {expected:,};"
                " download it again, or pass --no-counts"
            )

    def verify(self, progress: Callable[[int], None], remembered: Path) -> None:
        """Compares the archives' md5 with those that are known; in `remembered` it is kept what need not be read again.

        progress is told of bytes. Raises DataError for an archive that differs.
        """
        known: dict[str, Any] = json.loads(remembered.read_text()) if remembered.is_file() else {}
        for name, size in self.to_verify():
            path, expected = self.src / name, self.edition.md5[name]
            state = [size, os.stat(path).st_mtime_ns, expected]
            if known.get(name) == state:
                progress(size)
                continue
            digest = hashlib.md5(usedforsecurity=False)
            with open(path, "rb") as file:
                while chunk := file.read(HASH_CHUNK):
                    digest.update(chunk)
                    progress(len(chunk))
            if digest.hexdigest() != expected:
                raise DataError(
                    f"{path}: md5 {digest.hexdigest()} where the official archive has {expected};"
                    " download it again, or pass --no-md5"
                )
            known[name] = state
            write_json(remembered, known)

    def to_verify(self) -> list[tuple[str, int]]:
        """(file, bytes) of those whose md5 is known."""
        return [(name, os.stat(self.src / name).st_size) for name in self.edition.md5]

    def ahead(self, item: Item) -> None:
        archive, offset, size = item.extent
        advise(self._fd(archive), offset, size)

    def read(self, item: Item) -> bytes:
        archive, offset, size = item.extent
        data = b""
        while len(data) < size:  # one read as a rule
            more = os.pread(self._fd(archive), size - len(data), offset + len(data))
            if not more:
                raise BadImage(f"{self.archives[archive].name} ends before it")
            data = data + more if data else more
        return data

    def _fd(self, archive: int) -> int:
        # Kept open by each process that reads: pread knows no position, so that a fork may share it.
        if archive not in self._fds:
            self._fds[archive] = os.open(self.archives[archive], os.O_RDONLY | os.O_CLOEXEC)
        return self._fds[archive]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.edition.name}


class _Kit:
    """What the development kit says: classes, how many training images each has, and validation's labels."""

    def __init__(self, path: Path, edition: Edition) -> None:
        self.path, self._edition = path, edition
        meta, val = self._files("data/meta.mat", edition.val_labels)
        leaves = self._leaves(meta)
        self._wnid_of = {int(leaf[edition.id_field]): str(leaf["WNID"]) for leaf in leaves}
        named = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
        self.wnids = sorted(named)
        self.names = [named[wnid] for wnid in self.wnids]
        self._label_of = {wnid: label for label, wnid in enumerate(self.wnids)}
        id_of = {wnid: number for number, wnid in self._wnid_of.items()}
        self.ids = [id_of[wnid] for wnid in self.wnids]
        counted = leaves and "num_train_images" in leaves[0].dtype.names
        self.train_counts = {str(leaf["WNID"]): int(leaf["num_train_images"]) for leaf in leaves} if counted else {}
        self.val_labels = self.labels(path / edition.val_labels, val)

    def _files(self, *wanted: str) -> list[bytes]:
        found: dict[str, bytes] = {}
        try:
            with tarfile.open(self.path, "r:gz") as tar:
                for member in tar:
                    for name in wanted:
                        if member.isfile() and ("/" + member.name).endswith("/" + name):
                            file = tar.extractfile(member)
                            assert file is not None
                            found[name] = file.read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as err:
            raise DataError(f"{self.path}: damaged ({err}); download it again") from err
        if missing := [name for name in wanted if name not in found]:
            raise DataError(f"{self.path}: holds no {missing[0]}; download it again")
        return [found[name] for name in wanted]

    def _leaves(self, meta: bytes) -> list[Any]:
        from scipy.io import loadmat  # half a second that other sources do not pay

        try:
            synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
            leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
            ids = sorted(int(leaf[self._edition.id_field]) for leaf in leaves)
            wnids = {str(leaf["WNID"]) for leaf in leaves}
        except Exception as err:  # SciPy raises whatever its parser meets
            raise DataError(f"{self.path}: data/meta.mat cannot be read ({err}); download it again") from err
        if not leaves or ids != list(range(1, len(leaves) + 1)) or len(wnids) != len(leaves):
            raise DataError(f"{self.path}: data/meta.mat does not number its {len(leaves)} classes from 1 on")
        return leaves

    def labels(self, path: Path, data: bytes | None) -> list[int]:
        """0-based labels from a file of 1-based ids, a line each."""
        text = (path.read_bytes() if data is None else data).decode("ascii", "replace").split()
        for number, word in enumerate(text, 1):
            if not word.isdigit() or int(word) not in self._wnid_of:
                raise DataError(f"{path}: line {number} is {word!r}, no class of {self.path.name}; download it again")
        return [self._label_of[self._wnid_of[int(word)]] for word in text]
