"""Images in files of their own, labelled by a table: CSV, Parquet, ImageNet as Kaggle packs it, Tiny ImageNet."""

import argparse
import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...errors import ConfigError, DataError, reading
from .base import Files, Item, Items, UniqueKeys
from .folders import ImageFolder, TrainAndVal, readable_key, require_utf8
from .imagenet import FIRST_CLASS

BOXES = ("x", "y", "width", "height")
BATCH = 1024  # rows in memory at a time, with images 100 MB


@dataclass
class Table:
    """A file with a row for each image: `.parquet`, or else CSV. `columns`: of the image and of its label.

    names: of all columns, for a CSV without a header. place: of the row that was read last, for messages.
    """

    path: Path
    columns: tuple[str, str] = ("path", "label")
    names: tuple[str, ...] | None = None
    delimiter: str = ","
    place: str = ""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(image, label) of each row. Raises DataError for a row without them, and for damage."""
        for row in self.rows():
            found = [row.get(column) for column in self.columns]
            for column, value in zip(self.columns, found):
                if value is None or not str(value).strip():
                    raise self.error(f"no {column!r}; write one in each row")
            if None in row:
                raise self.error("more fields than columns; quote fields that hold commas")
            yield str(found[0]), str(found[1]).strip()

    def rows(self) -> Iterator[dict[Any, Any]]:
        """The values of each row by column. Raises DataError for damage."""
        if self.path.suffix == ".parquet":
            self.place, rows, cure = "row 0", self._parquet(parquet(self.path)), "copy it again"
        else:
            self.place, rows, cure = "line 0", self._csv(), "write it as CSV in UTF-8"
        try:
            yield from rows
        except Exception as err:  # pyarrow has several kinds
            raise DataError(f"{self.path}: behind {self.place}: cannot be read ({err}); {cure}") from err

    def error(self, reason: str) -> DataError:
        return DataError(f"{self.path}: {self.place}: {reason}")

    def _csv(self) -> Iterator[dict[Any, Any]]:
        with open(self.path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, self.names, delimiter=self.delimiter, strict=True)
            for column in self.columns:
                if reader.fieldnames and reader.fieldnames.count(column) != 1:
                    raise ValueError(f"of its columns, {reader.fieldnames}, one must be {column!r}")
            for row in reader:
                self.place = f"line {reader.line_num}"
                yield row

    def _parquet(self, file: Any) -> Iterator[dict[Any, Any]]:
        number = 0
        for batch in file.iter_batches(BATCH, columns=list(self.columns)):
            for row in batch.to_pylist():
                number += 1
                self.place = f"row {number}"
                yield row


def parquet(path: Path) -> Any:
    """The file as pyarrow's ParquetFile. Raises ConfigError without pyarrow, DataError for damage."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as err:
        raise ConfigError(f"{path}: pyarrow is missing; pip install pyarrow") from err
    with reading(f"{path}: behind row 0:", "copy it again", Exception):  # pyarrow has several kinds
        return ParquetFile(open(path, "rb"))  # it opens no name that is not UTF-8 itself


def labelled(source: Files, table: Table, split: str) -> Iterator[Item]:
    """The images of a split's table.

    Raises DataError for one with two labels or another class, or whose file is missing.
    """
    unique, folder, labels = UniqueKeys(), source.folders[split], dict[str, int]()
    for name, label in table:
        number = source.label_of.get(label)
        if number is None:
            raise table.error(f"{label!r} is none of the {len(source.classes):,} training classes")
        if labels.setdefault(os.path.normpath(name), number) != number:
            raise table.error(f"{name} has another label than in an earlier row; give each image one")
        if not os.path.isfile(folder / name):
            raise table.error(f"no file {folder / name}; copy it there or remove the row")
        yield Item(unique(readable_key(require_utf8(name))), number, f"{split}/{name}")


@dataclass
class CSV(TrainAndVal, Files):
    """A table for each split. Labels are names, and classes the sorted names; whole numbers are sorted as numbers.

    root: the folder of the images' paths. Default: each table's own.
    """

    name: str = "csv"
    root: Path | None = None

    metavar = "FILE"
    help = "a CSV or Parquet file with the columns path and label"

    def items(self, split: str, place: Path) -> Iterator[Item]:
        if split == "train":
            self.name_classes(label for _, label in Table(place))
        self.folders[split] = self.root or place.parent
        return labelled(self, Table(place), split)

    @classmethod
    def add_options(cls, p: argparse.ArgumentParser) -> None:
        super().add_options(p)
        p.add_argument("--root", type=Path, metavar="DIR", help="the folder of the images' paths (default: the file's)")


@dataclass
class Kaggle(Files):
    """ImageNet in the folder `src` as Kaggle's competition has it, unpacked. Labels are those of ImageNet2012."""

    src: Path

    name = "kaggle"
    help = "ImageNet from Kaggle, unpacked: the folder that holds ILSVRC/ and LOC_val_solution.csv"
    first: ClassVar[str | None] = FIRST_CLASS
    places: ClassVar[dict[str, str]] = {
        split: f"ILSVRC/Data/CLS-LOC/{split}" for split in ("train", "val", "test")
    }  # of the images
    table = "LOC_val_solution.csv"
    words = "LOC_synset_mapping.txt"  # the classes' names

    def __post_init__(self) -> None:
        self.folders = {split: self.src / place for split, place in self.places.items()}
        train = ImageFolder(self.folders["train"])
        self.classes, self.passed_over = train.classes, train.passed_over
        if self.first not in (None, self.classes[0]):
            raise DataError(f"{train.train}: the first class is {self.classes[0]}, but ImageNet has {self.first}")
        self.splits = train.splits | {"val": Items(self._validation(self.src / self.table))}
        if self.folders["test"].is_dir():
            unique = UniqueKeys()
            self.splits["test"] = Items(
                Item(unique(readable_key(name)), -1, f"test/{name}")
                for name in sorted(os.listdir(self.folders["test"]))
            )
        if (words := self.src / self.words).is_file():
            name_of = dict(line.split(maxsplit=1) for line in words.read_text(encoding="utf-8").splitlines() if line)
            self.class_names = [name_of.get(wnid, wnid).strip() for wnid in self.classes]

    def _validation(self, path: Path) -> Iterator[Item]:
        folder = self.folders["val"]
        left = set(os.listdir(folder)) if folder.is_dir() else set()
        for item in labelled(self, self.labels(path), "val"):
            left.discard(item.where.removeprefix("val/"))
            yield item
        if left:
            raise DataError(f"{path}: no row for {folder / min(left)}; copy the file again")

    def labels(self, path: Path) -> Table:
        return _Boxes(path, ("ImageId", "PredictionString"))

    @staticmethod
    def add_options(p: argparse.ArgumentParser) -> None:
        p.add_argument("--src", type=Path, required=True, metavar="DIR", help="the folder that holds it")


class _Boxes(Table):
    """Kaggle's table: the label is the first of "n01440764 x y x y n01440764 x y x y", which are all the same."""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for image, boxes in super().__iter__():
            label, *others = boxes.split()[::5]
            if {*others} - {label}:
                raise self.error(f"{image} has the labels {label} and {others[0]}; copy the file again")
            yield f"{image}.JPEG", label


@dataclass
class TinyImageNet(Kaggle):
    """Tiny ImageNet in its folder `src`, tiny-imagenet-200, as its archive has it."""

    name = "tiny-imagenet"
    help = "Tiny ImageNet, unpacked: the folder that holds train/, val/ and words.txt"
    first = None
    places: ClassVar[dict[str, str]] = {"train": "train", "val": "val/images", "test": "test/images"}
    table = "val/val_annotations.txt"
    words = "words.txt"

    def labels(self, path: Path) -> Table:
        return Table(path, names=("path", "label", *BOXES), delimiter="\t")
