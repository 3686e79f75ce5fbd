"""A folder is a dataset only once it has a manifest.json, which is written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .files import canonical_json, json_bytes
from .shards import Shard, file_sha256, read_index, sample_keys
from .storage import Folder

FORMAT = "imagenet-express"
VERSION = 1
NAME = "manifest.json"
INFO = "_info.json"  # read by timm's reader_wds


@dataclass(frozen=True)
class Split:
    """One split of a dataset: its shards, and the place of each sample in them."""

    root: Path
    name: str
    shards: tuple[Shard, ...]
    index_name: str
    index_sha256: str

    @cached_property
    def index(self) -> np.ndarray:
        """(n,) INDEX_DTYPE, read-only."""
        return read_index(self.root / self.index_name, sha256=self.index_sha256)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def keys(self) -> list[str]:
        """The samples' keys, in stored order, from their tar headers."""
        keys: list[str] = []
        for number, shard in enumerate(self.shards):
            offsets = self.index["offset"][self.index["shard"] == number].tolist()
            keys += sample_keys(self.root / shard.name, offsets)
        return keys

    def faults(self) -> Iterator[tuple[str, str]]:
        """(file, what is wrong with it) of shards that are missing or too short, and of an index that does not fit.

        Reads no image.
        """
        for shard in self.shards:
            path = self.root / shard.name
            if not path.is_file():
                yield shard.name, "the shard is missing; copy it again or shard the data again"
            elif (size := path.stat().st_size) != shard.bytes:
                cure = "copy it again or shard the data again"
                yield shard.name, f"{size} bytes, {shard.bytes} in the manifest; {cure}"
        counts = np.bincount(self.index["shard"], minlength=len(self.shards))  # a shard may have lost all its images
        if counts.tolist() != [shard.samples for shard in self.shards]:
            yield self.index_name, "the index and the manifest count differently"


@dataclass(frozen=True)
class Statistics:
    """The statistics of the training images, with which all inputs of a net are normalised."""

    mean: tuple[float, float, float]  # per channel, grey levels 0..255
    std: tuple[float, float, float]
    mean_image: np.ndarray | None = None  # (size, size, 3) float32 grey levels; None: not needed


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder. `manifest` is the parsed file, `splits` its typed part."""

    root: Path
    manifest: dict[str, Any]
    splits: dict[str, Split]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def classes(self) -> list[str]:
        return list(self.manifest["classes"])

    @property
    def class_names(self) -> list[str]:
        return list(self.manifest.get("class_names", self.classes))

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per channel over the training split, in grey levels 0..255."""
        return tuple(self._measured("mean"))

    @property
    def std(self) -> tuple[float, float, float]:
        return tuple(self._measured("std"))

    @cached_property
    def covariance(self) -> np.ndarray:
        """(3, 3) float64, of red, green and blue over the training split, in grey levels."""
        return np.array(self._measured("covariance"))

    @cached_property
    def mean_image(self) -> np.ndarray:
        """(size, size, 3) float32 grey levels: the mean of the training split's centre squares."""
        record = self._measured("mean_image")
        path = self.root / record["file"]
        if not path.is_file() or file_sha256(path) != record["sha256"]:
            raise DataError(f"{path}: the mean image is missing or damaged; copy it again or shard the data again")
        image: np.ndarray = np.load(path, allow_pickle=False)
        return image

    def statistics(self, *, mean_image: bool = False) -> Statistics:
        return Statistics(self.mean, self.std, self.mean_image if mean_image else None)

    def _measured(self, name: str) -> Any:
        if name not in self.manifest["statistics"]:
            raise DataError(f"{self.root}: its manifest has no {name}; shard the data again, with statistics")
        return self.manifest["statistics"][name]

    @property
    def encoding(self) -> str:
        """How images are stored: "raw" pixels, or anything else for encoded images."""
        return str(self.manifest.get("options", {}).get("encoding", {}).get("kind", "keep"))

    def split(self, name: str) -> Split:
        if name not in self.splits:
            names = ", ".join(self.splits)
            raise DataError(
                f"{self.root}: no split {name!r}; it has {names}; name one of these or shard the data with it"
            )
        return self.splits[name]


def open_dataset(root: str | Path, *, check_splits: bool = True) -> Dataset:
    """Opens a shard folder; every shard's presence and size is checked, no image is read.

    check_splits: False leaves the shards unchecked.
    Raises DataError if the folder is missing, unfinished, damaged or of another kind.
    """
    root = Path(root)
    path = root / NAME
    if not root.is_dir():
        raise DataError(f"{root}: no such shard folder; make one with tools/make_shards.py")
    if not path.is_file():
        raise DataError(
            f"{root}: no {NAME}, so its sharding never finished (or this is no shard folder);"
            " run tools/make_shards.py again"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise DataError(
                f"{path}: format {manifest['format']} version {manifest['version']},"
                f" but this program reads {FORMAT} version {VERSION}; shard the data again"
            )
        if fingerprint(manifest) != manifest["fingerprint"]:
            raise DataError(f"{path}: changed since it was written (its fingerprint differs); shard the data again")
        splits = {
            name: Split(root, name, tuple(Shard(**s) for s in split["shards"]), split["index"], split["index_sha256"])
            for name, split in manifest["splits"].items()
        }
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(f"{path}: not a manifest of {FORMAT} ({err}); shard the data again") from err
    for split in splits.values() if check_splits else ():
        for name, fault in split.faults():
            raise DataError(f"{root / name}: {fault}")
    return Dataset(root, manifest, splits)


def split_record(shards: list[Shard], index_name: str, index_sha256: str) -> dict[str, Any]:
    """A split's part of the manifest."""
    return {
        "samples": sum(shard.samples for shard in shards),
        "index": index_name,
        "index_sha256": index_sha256,
        "shards": [asdict(shard) for shard in shards],
    }


def timm_info(splits: dict[str, Any]) -> dict[str, Any]:
    """The content of INFO. splits: of the manifest."""
    info = {}
    for name, split in splits.items():
        info[name] = {
            "name": name,
            "num_samples": split["samples"],
            "filenames": [shard["name"] for shard in split["shards"]],
            "shard_lengths": [shard["samples"] for shard in split["shards"]],
        }
    return {"splits": info}


def fingerprint(manifest: dict[str, Any]) -> str:
    """Names the content: two folders with the same fingerprint hold the same bytes in the same order."""
    content = {k: v for k, v in manifest.items() if k not in ("fingerprint", "plan")}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def write_manifest(folder: Folder, content: dict[str, Any]) -> dict[str, Any]:
    """Adds format, version and fingerprint and publishes the manifest: the last file of a dataset."""
    manifest = {"format": FORMAT, "version": VERSION, **content}
    manifest["fingerprint"] = fingerprint(manifest)
    folder.write(NAME, json_bytes(manifest))
    return manifest
