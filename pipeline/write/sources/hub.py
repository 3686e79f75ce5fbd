"""Image datasets of the Hugging Face Hub: Parquet files that hold the images."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...progress import Progress
from ...shards import Sample, write_shard
from ...storage import Folder
from .base import UniqueKeys
from .tables import Table, parquet
from .tars import WebDataset


@dataclass
class HubParquet(WebDataset):
    """Parquet files with a column of images and one of class numbers, as the Hub has them.

    unpack: a folder in which each file is first converted to a tar, which later runs reuse. Shards take images in
    random order, but Parquet is read by row groups: without tars each image would cost reading a group.
    """

    name: str = "hf-parquet"
    unpack: Path = Path()
    image_column: str = "image"
    label_column: str = "label"

    help = "image datasets of the Hugging Face Hub: Parquet files that hold the images"

    def __post_init__(self) -> None:
        super().__post_init__()
        metadata = parquet(super().files(str(self.train))[0]).schema_arrow.metadata or {}
        info = json.loads(metadata.get(b"huggingface", "{}")).get("info", {})
        names = info.get("features", {}).get(self.label_column, {}).get("names", [])
        if names and int(self.classes[-1]) < len(names):
            self.class_names = [names[int(number)] for number in self.classes]

    def files(self, pattern: str) -> list[Path]:
        return [self._unpacked(path) for path in super().files(pattern)]

    def _unpacked(self, path: Path) -> Path:
        """The file's tar, which lies in a folder for the file as it is now: a changed one is unpacked again."""
        status = path.stat()
        folder = self.unpack / f"{status.st_mtime_ns:x}-{status.st_size:x}"
        name = f"{path.stem}.tar"
        if not (folder / name).is_file():
            with Progress(f"unpack {path.name}", parquet(path).metadata.num_rows) as progress:
                write_shard(Folder(folder), name, self._rows(path, progress))
        return folder / name

    def _rows(self, path: Path, progress: Progress) -> Iterator[Sample]:
        table, unique = Table(path, (self.image_column, self.label_column)), UniqueKeys()
        for number, row in enumerate(table.rows()):
            image, label = (row.get(column) for column in table.columns)
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes) or not data:
                raise table.error(f"no bytes of an image in {self.image_column!r}; --image-column names another")
            if not isinstance(label, int) or label < 0:
                raise table.error(f"no class number in {self.label_column!r}; --label-column names another")
            progress.update(1)
            yield Sample(unique(f"{path.stem}_{number:07}"), data, label, 0, 0)

    @classmethod
    def add_options(cls, p: argparse.ArgumentParser) -> None:
        super().add_options(p)
        p.add_argument("--unpack", type=Path, required=True, metavar="DIR", help="the images are unpacked there first")
        p.add_argument("--image-column", default="image", metavar="NAME", help="of the images (%(default)s)")
        p.add_argument("--label-column", default="label", metavar="NAME", help="of the class numbers (%(default)s)")
