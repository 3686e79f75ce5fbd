"""A folder is a dataset only once it has a manifest.json, which is written last."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from .errors import ConfigError, DataError, reading
from .files import Json, json_bytes
from .manifest_values import bounds, check_types, checked_shards
from .shards import INDEX_DTYPE, Shard, read_array, sample_keys
from .storage import Copies, Folder, absolute, file_size, is_url

if TYPE_CHECKING:  # needs a library that only URLs need
    from .remote import RemoteFolder

FORMAT = "imagenet-express"
VERSION = 1
NAME = "manifest.json"
INFO = "_info.json"  # read by timm's reader_wds
PARTS = "parts"  # the folder for the records of shards until the manifest is written
FETCH_MEMORY = 2000  # MB
REMOTE_WINDOW = 16  # shards
CHECKED = 1 << 16  # samples checked at a time: their numbers fit into the processor's cache


@dataclass(frozen=True)
class Split:
    """One split of a dataset: its shards, and each sample's place. remote: where the shards are, if not in `root`."""

    root: Path
    name: str
    shards: tuple[Shard, ...]
    index_name: str
    index_sha256: str
    classes: int
    remote: RemoteFolder | None = None

    @cached_property
    def index(self) -> ndarray:
        """(n,) INDEX_DTYPE, read-only. Raises DataError if it is damaged or exceeds the bounds of shards or classes."""
        path = _local(self.root, self.remote, self.index_name, self.index_sha256)
        index: Any = read_array(path, "index", sha256=self.index_sha256)
        if index.dtype != INDEX_DTYPE or index.ndim != 1:
            raise DataError(f"{path}: index of another format version; shard the data again")
        sizes = np.array([shard.bytes for shard in self.shards], np.uint64)
        for start in range(0, len(index), CHECKED):
            part = index[start : start + CHECKED]
            for name, valid in bounds(part, sizes, self.classes):
                if not valid.all():
                    at = int(np.argmin(valid))
                    raise DataError(
                        f"{path}: sample {start + at} has {name} {part[name][at]}, out of bounds; shard the data again"
                    )
        index.base.madvise(mmap.MADV_DONTNEED)
        return index

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.samples for shard in self.shards))

    def rows(self, number: int) -> ndarray:
        """The rows of the index that belong to shard `number`, which are contiguous."""
        end = self._ends[number]
        return self.index[end - self.shards[number].samples : end]

    def column(self, name: str) -> ndarray:
        """Returns a copy of one column of the index, (n,), so that the whole file does not stay in memory."""
        index: Any = self.index
        column = index[name].copy()
        index.base.madvise(mmap.MADV_DONTNEED)
        return column

    @property
    def samples(self) -> int:
        return self._ends[-1]

    def keys(self) -> list[str]:
        """The samples' keys, in stored order, from their tar headers."""
        if self.remote:
            raise ConfigError(f"{self.remote}: the keys of samples are in the shards; copy them to this machine")
        keys = list[str]()
        for number, shard in enumerate(self.shards):
            keys += sample_keys(self.root / shard.name, self.rows(number)["offset"].tolist())
        return keys

    def stored(self, sample: int) -> bytes:
        """A sample's image bytes, from its shard on this machine."""
        row = self.index[sample]
        with open(self.root / self.shards[row["shard"]].name, "rb") as file:
            file.seek(row["offset"])
            return file.read(row["size"])

    def faults(self) -> Iterator[tuple[str, str]]:
        """Yields (file, what is wrong) for shards that are missing or too short, and for an index that does not fit.

        Reads no image.
        """
        for shard in self.shards:
            size = self.remote.size(shard) if self.remote else file_size(self.root / shard.name)
            if size != shard.bytes:
                what = "the shard is missing" if size is None else f"{size} bytes, {shard.bytes} in the manifest"
                yield shard.name, f"{what}; copy it again or shard the data again"
        # A shard may have lost all its images.
        counts = np.bincount(self.column("shard"), minlength=len(self.shards))
        if counts.tolist() != [shard.samples for shard in self.shards]:
            yield self.index_name, "the index and the manifest count differently"


@dataclass(frozen=True)
class Statistics:
    """The statistics of the training images, which normalise all inputs of a net."""

    mean: tuple[float, float, float]  # per channel, grey levels 0..255
    std: tuple[float, float, float]
    mean_image: ndarray | None = None  # (size, size, 3) float32 grey levels; None: not needed


@dataclass(frozen=True)
class Dataset:
    """An opened dataset. manifest: the parsed file. splits: its splits, as typed objects.

    remote: the location of the dataset, if it is not in `root`.
    """

    root: Path
    manifest: Json
    splits: dict[str, Split]
    remote: RemoteFolder | None = None
    copies: Copies | None = None

    @property
    def place(self) -> Path | RemoteFolder:
        """The folder or URL, for messages."""
        return self.remote or self.root

    @property
    def window(self) -> int:
        """The default of the loader's `window`: see docs/order.md."""
        return REMOTE_WINDOW if self.remote or self.copies else 0

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    @property
    def class_names(self) -> list[str]:
        return self.manifest.get("class_names", self.classes)

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per channel over the training split, in grey levels 0..255."""
        return tuple(self._measured("mean"))

    @property
    def std(self) -> tuple[float, float, float]:
        return tuple(self._measured("std"))

    @cached_property
    def covariance(self) -> ndarray:
        """(3, 3) float64: of red, green and blue over the training split, in squared grey levels."""
        return np.array(self._measured("covariance"))

    @cached_property
    def mean_image(self) -> ndarray:
        """(size, size, 3) float32 grey levels: the mean of the training split's centre squares."""
        record = self._measured("mean_image")
        path = _local(self.root, self.remote, record["file"], record.get("sha256"))
        image = read_array(path, "mean image", sha256=record.get("sha256"))
        if image.dtype != np.float32 or image.shape != (len(image), len(image), 3):
            raise DataError(f"{path}: no mean image, but {image.dtype} of {image.shape}; shard the data again")
        return np.array(image)

    def _measured(self, name: str) -> Any:
        if name not in self.manifest["statistics"]:
            raise DataError(f"{self.place}: its manifest has no {name}; shard the data again, with statistics")
        return self.manifest["statistics"][name]

    @property
    def encoding(self) -> str:
        """How images are stored: "raw" pixels, or anything else for encoded images."""
        return self.manifest.get("options", {}).get("encoding", {}).get("kind", "keep")

    def split(self, name: str) -> Split:
        if name not in self.splits:
            names = ", ".join(self.splits)
            raise DataError(
                f"{self.place}: no split {name!r}; it has {names}; name one of these,"
                " or shard the data with --val or --val-fraction 0.1"
            )
        return self.splits[name]


def _local(root: Path, remote: RemoteFolder | None, name: str, sha256: str) -> Path:
    return remote.cached(name, sha256=sha256) if remote else root / name


def open_dataset(
    root: str | Path,
    *,
    check_splits: bool = True,
    allow_http: bool = False,
    fetch_memory: float = FETCH_MEMORY,
    copies: Copies | None = None,
) -> Dataset:
    """Opens a folder of shards or a URL of one; checks that every shard exists and has its size, and reads no image.

    check_splits: False leaves the shards unchecked. For URLs, see docs/remote.md: allow_http: also allow http://.
    fetch_memory: MB that a training and an evaluation loader together may fetch ahead. copies: local ones of shards.
    Raises DataError if the folder is missing, unfinished, damaged or not a dataset.
    """
    root = absolute(str(root)) if is_url(root) else root
    remote = None
    if is_url(root):
        from .remote import RemoteFolder

        remote = RemoteFolder(str(root), allow_http=allow_http, fetch_memory=fetch_memory)
    given = Path(root)
    place, root = remote or given, given.absolute()  # the process may change its folder
    text, path = bytes(remote.get(NAME)) if remote else _local_manifest(given), place / NAME
    with reading(f"{path}:", f"it is no manifest of {FORMAT}; shard the data again"):
        manifest = json.loads(text.decode())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise DataError(
                f"{path}: format {manifest['format']} version {manifest['version']},"
                f" but this program reads {FORMAT} version {VERSION}; shard the data again"
            )
        if fingerprint(manifest) != manifest["fingerprint"]:
            raise DataError(f"{path}: changed since it was written (its fingerprint differs); shard the data again")
        check_types(manifest)
        classes = len(manifest["classes"])
        splits = {
            name: Split(
                root, name, checked_shards(manifest, split), split["index"], split["index_sha256"], classes, remote
            )
            for name, split in manifest["splits"].items()
        }
    for split in splits.values() if check_splits else ():
        for name, fault in split.faults():
            raise DataError(f"{place / name}: {fault}")
    return Dataset(root, manifest, splits, remote, copies)


def _local_manifest(root: Path) -> bytes:
    path = root / NAME
    if not root.is_dir():
        raise DataError(f"{root}: no such shard folder; make one with tools/make_shards.py")
    if not path.is_file():
        if any(entry.is_dir() and entry.name != PARTS for entry in root.iterdir()):
            train = f"{root / 'train'} --val {root / 'val'}"
            options = train if (root / "train").is_dir() else f"{root} --val-fraction 0.1"
            raise DataError(
                f"{root}: holds folders, not shards; run python tools/make_shards.py imagefolder --train {options}"
                " --out SHARDS, and name SHARDS instead"
            )
        raise DataError(
            f"{root}: no {NAME}, so its sharding never finished (or this is no shard folder);"
            " run tools/make_shards.py again"
        )
    return path.read_bytes()


def split_record(shards: list[Shard], index_name: str, index_sha256: str) -> Json:
    """The manifest's entry for a split."""
    return {
        "samples": sum(shard.samples for shard in shards),
        "index": index_name,
        "index_sha256": index_sha256,
        "shards": [asdict(shard) for shard in shards],
    }


def fingerprint(manifest: Json) -> str:
    """A hash of the content: two folders with the same fingerprint hold the same bytes in the same order."""
    content = {k: v for k, v in manifest.items() if k not in ("fingerprint", "plan")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Folder, content: Json) -> Json:
    """Adds format, version and fingerprint and publishes the manifest: the last file of a dataset."""
    manifest = {"format": FORMAT, "version": VERSION, **content}
    manifest["fingerprint"] = fingerprint(manifest)
    folder.write(NAME, json_bytes(manifest))
    return manifest
