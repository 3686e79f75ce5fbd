"""ImageNet's official archives of archives, read in place, nothing unpacked.

Labels are 0-based in the order of the sorted WordNet ids, as torchvision and timm have them; the ids in the development
kit are in another order. Facts on the archives: docs/shards.md.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...errors import DataError, reading
from ...files import json_bytes
from ...manifest import PARTS
from ...progress import Progress
from ...shards import file_digest
from ...storage import Folder
from ...tar import members
from .base import Archives, Item, Items, UniqueKeys

VERIFIED = f"{PARTS}/verified.json"
Image = tuple[str, tuple[int, int, int]]  # its file's name, and its extent
FIRST_CLASS = "n01440764"  # tench: class 0 of ImageNet 2012, for everybody


@dataclass
class ImageNet2012(Archives):
    """The official archives in the folder `src`.

    counts: compare with the numbers of images in the kit. md5: let `verify` compare the archives with the official
    sums. Raises DataError for an archive that is missing, damaged or not as the kit describes it.
    """

    src: Path
    counts: bool = True
    md5: bool = False

    name = "imagenet2012"
    help = "the official archives of 2012, read in place"
    id_field = "ILSVRC2012_ID"  # of the kit's classes
    devkit = "ILSVRC2012_devkit_t12.tar.gz"
    train = "ILSVRC2012_img_train.tar"
    val = "ILSVRC2012_img_val.tar"
    val_labels = "data/ILSVRC2012_validation_ground_truth.txt"  # in the kit
    # Any one of these archives, or none.
    tests: ClassVar[tuple[str, ...]] = ("ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar")
    patches = "ILSVRC2012_img_test_patch_v10102019.tar"  # images that replace others
    test_labels: ClassVar[str | None] = None  # a file beside the archives
    sums: ClassVar[dict[str, str]] = {  # official md5 by file
        "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
        "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
        "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    }

    def __post_init__(self) -> None:
        if not self.src.is_dir():
            raise DataError(f"{self.src}: no such folder; --src names the one that holds {self.train}")
        self._kit = self._needed(self.devkit)
        self.classes, self.class_names, self.class_ids, counts = map(list, zip(*_classes(self._kit, self.id_field)))
        if self.name == "imagenet2012" and self.classes[0] != FIRST_CLASS:
            raise DataError(
                f"{self._kit}: its first class is {self.classes[0]}, but ImageNet 2012 has {FIRST_CLASS};"
                " download the kit again"
            )
        patch = self.src / self.patches
        self._patches = dict(self._images(patch)) if patch.is_file() else {}
        train, val = self._needed(self.train), self._needed(self.val)
        val_labels = self._labels(self._kit / self.val_labels, _file(self._kit, self.val_labels))
        training = self._training(train, dict(zip(self.classes, counts)))
        self.splits = {"train": self._items("train", training), "val": self._evaluation("val", val, val_labels)}
        required = self.tests[0] if self.test_labels else None
        if test := next((name for name in self.tests if (self.src / name).is_file()), required):
            path, labels = self._needed(test), None
            if self.test_labels:
                file = self._needed(self.test_labels)
                labels = self._labels(file, file.read_bytes())
            self.splits["test"] = self._evaluation("test", path, labels)
        if self._patches:
            raise DataError(f"{patch}: {min(self._patches)} replaces no image of these archives; download them again")

    def _needed(self, name: str) -> Path:
        path = self.src / name
        if not path.is_file():
            raise DataError(f"{path}: missing; download it from image-net.org into {self.src}")
        return path

    def _images(self, path: Path, *within: int) -> list[Image]:
        """The images of an archive, or of the tar within it."""
        if path not in self.archives:
            self.archives.append(path)
        archive = self.archives.index(path)
        return [(os.path.basename(m.name), (archive, m.offset, m.size)) for m in members(path, *within)]

    def _items(self, split: str, images: Iterable[tuple[Image, int]]) -> Items:
        """images: each with its label."""
        unique = UniqueKeys()
        return Items(
            Item(unique(os.path.splitext(name)[0]), label, f"{split}/{name}", self._patches.pop(name, extent))
            for (name, extent), label in images
        )

    def _training(self, path: Path, left: dict[str, int | None]) -> Iterator[tuple[Image, int]]:
        """left: how many images the kit counts in each class, if it does; each class is removed."""
        for inner in members(path):
            wnid, extension = os.path.splitext(os.path.basename(inner.name))
            if extension != ".tar" or wnid not in self.label_of:
                raise DataError(f"{path}: holds {inner.name}, which is no class of {self._kit.name}")
            if wnid not in left:
                raise DataError(f"{path}: holds {wnid} twice; download it again")
            images, expected = self._images(path, inner.offset, inner.size), left.pop(wnid)
            if self.counts and expected not in (None, len(images)):
                raise DataError(
                    f"{path}: {wnid} has {len(images):,} images, but the kit counts {expected:,};"
                    " download it again, or pass --no-counts"
                )
            for image in images:
                yield image, self.label_of[wnid]
        if left:
            raise DataError(
                f"{path}: {len(left)} of {len(self.classes)} classes are missing, {min(left)} first; download it again"
            )

    def _evaluation(self, split: str, path: Path, labels: list[int] | None) -> Items:
        """Labels are in the order of the images' names, not of the archive."""
        found = sorted(self._images(path))
        if not found:
            raise DataError(f"{path}: holds no images; download it again")
        if labels is not None and len(found) != len(labels):
            raise DataError(
                f"{path}: holds {len(found):,} images, but there are {len(labels):,} labels; download it again"
            )
        return self._items(split, zip(found, labels or [-1] * len(found)))

    def _labels(self, path: Path, data: bytes) -> list[int]:
        """0-based labels from a file of the classes' ids, a line each."""
        words = data.decode("ascii", "replace").split()
        label_of = {str(id): label for label, id in enumerate(self.class_ids or ())}
        for number, word in enumerate(words, 1):
            if word not in label_of:
                raise DataError(f"{path}: line {number} is {word!r}, no class of {self._kit.name}; download it again")
        return [label_of[word] for word in words]

    def verify(self, folder: Folder) -> None:
        """Compares the archives' md5 with the official ones; VERIFIED keeps which need not be read again."""
        sizes = {name: os.stat(self.src / name).st_size for name in self.sums if self.md5}
        known = json.loads(folder.read(VERIFIED)) if folder.size(VERIFIED) else {}
        with Progress("md5", sum(sizes.values()), unit="B") as progress:
            for name, size in sizes.items():
                path, expected = self.src / name, self.sums[name]
                state = [size, os.stat(path).st_mtime_ns, expected]
                if known.get(name) == state:
                    progress.update(size)
                    continue
                found = file_digest(path, hashlib.md5(usedforsecurity=False), progress.update)
                if found != expected:
                    raise DataError(
                        f"{path}: md5 {found}, but the official archive has {expected};"
                        " download it again, or pass --no-md5"
                    )
                known[name] = state
                folder.write(VERIFIED, json_bytes(known))

    @staticmethod
    def add_options(p: argparse.ArgumentParser) -> None:
        p.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder that holds them")
        for name, what in (("md5", "md5 sums (2012: minutes of reading)"), ("counts", "counts with the kit's")):
            p.add_argument(f"--no-{name}", dest=name, action="store_false", help=f"do not compare {what}")


class ImageNet2010(ImageNet2012):
    name = "imagenet2010"
    help = "the official archives of 2010, read in place"
    id_field = "ILSVRC2010_ID"
    devkit = "ILSVRC2010_devkit-1.0.tar.gz"
    train = "ILSVRC2010_images_train.tar"
    val = "ILSVRC2010_images_val.tar"
    val_labels = "data/ILSVRC2010_validation_ground_truth.txt"
    tests = ("ILSVRC2010_images_test.tar",)
    test_labels = "ILSVRC2010_test_ground_truth.txt"
    patches = "patch_images.tar"
    sums: ClassVar[dict[str, str]] = {}


def _file(kit: Path, name: str) -> bytes:
    """The content of a file of the development kit."""
    try:
        with tarfile.open(kit, "r:gz") as tar:
            found = [member for member in tar if member.isfile() and f"/{member.name}".endswith(f"/{name}")]
            file = tar.extractfile(found[-1]) if found else None
            if file:
                return file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as err:
        raise DataError(f"{kit}: damaged ({err}); download it again") from err
    raise DataError(f"{kit}: holds no {name}; download it again")


def _classes(kit: Path, id_field: str) -> list[Any]:
    """(WordNet id, name, id, number of training images if the kit has it) of each class, sorted."""
    from scipy.io import loadmat  # half a second that other sources do not pay

    meta = io.BytesIO(_file(kit, "data/meta.mat"))
    with reading(f"{kit}: data/meta.mat", "download it again", Exception):  # SciPy raises whatever its parser meets
        synsets: Any = np.atleast_1d(loadmat(meta, squeeze_me=True)["synsets"])
        counted = "num_train_images" in synsets.dtype.names
        leaves = sorted(
            (str(s["WNID"]), str(s["words"]), int(s[id_field]), int(s["num_train_images"]) if counted else None)
            for s in synsets
            if int(s["num_children"]) == 0
        )
    ids, wnids = sorted(leaf[2] for leaf in leaves), {leaf[0] for leaf in leaves}
    if not leaves or ids != list(range(1, len(leaves) + 1)) or len(wnids) != len(leaves):
        raise DataError(f"{kit}: data/meta.mat does not number its {len(leaves)} classes from 1 on")
    return leaves
