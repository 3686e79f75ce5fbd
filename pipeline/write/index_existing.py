"""WebDataset tars that exist already, indexed in place: no image is copied, every byte is read once.

As in webdataset, a sample is the members of one key: an image and a label.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from glob import glob
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from .. import manifest, pool
from ..decode import BadImage, image_size
from ..errors import ConfigError, DataError
from ..shards import IMAGES, INDEX_DTYPE, Shard, crc32, file_sha256, split_name, stored_label
from ..storage import Folder
from ..tar import Member, members
from . import resize
from .images import Encoding, Preparer
from .journal import ShardRecord
from .manifest_content import Collected
from .resize import Sums

SORTED_FRACTION = 0.5  # of neighbours with the same label; shuffled, ImageNet has a thousandth


def expand(pattern: str) -> list[Path]:
    """The tars that a pattern with braces or stars names. Raises DataError if one of them is missing."""
    paths = [Path(found) for part in braceexpand(pattern) for found in (sorted(glob(part)) if "*" in part else [part])]
    if not paths:
        raise DataError(f"{pattern}: no such tar; quote the pattern, and mind its folder")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such tar; the pattern names {len(paths)}")
    return paths


def index_tar(path: Path, *, statistics_images: int, size: int) -> ShardRecord:
    """Reads a tar from end to end. Raises DataError if it is damaged or holds no samples."""
    rows: dict[Member, tuple[int, ...]] = {}
    bad: dict[Member, BadImage] = {}
    for image, label in _samples(path):
        data = _read(path, image)
        try:
            rows[image] = (image.offset, image.size, 0, label, crc32(data), *image_size(data))
        except BadImage as err:
            bad[image] = err
    if not rows and not bad:
        raise DataError(f"{path}: holds no samples: no image with a label; is it a WebDataset tar?")
    sums, prepare = Sums(size), Preparer(Encoding(size=size))
    chosen = list(rows)[:: max(1, len(rows) // statistics_images)][:statistics_images] if statistics_images else []
    for image in chosen:
        try:
            measured = prepare(_read(path, image)).measured
            assert measured is not None
            sums.add(*measured)
        except BadImage as err:
            bad[image] = err
            del rows[image]
    listed = [{"image": f"{path.name}/{image.name}", "reason": str(err)} for image, err in bad.items()]
    shard = Shard(path.name, len(rows), path.stat().st_size, file_sha256(path))
    return ShardRecord(shard, np.array(list(rows.values()), dtype=INDEX_DTYPE), sums, [], listed)


def _samples(path: Path) -> Iterator[tuple[Member, int]]:
    """(image's member, label) of each sample, in stored order."""
    seen: set[str] = set()
    named = ((split_name(member.name), member) for member in members(path))
    with_both = (
        (key, extension, member) for (key, extension), member in named if extension and key[-1:] not in ("", "/")
    )
    for key, group in groupby(with_both, key=itemgetter(0)):
        if key in seen:
            raise DataError(f"{path}: two samples have the key {key!r}; their members must lie together")
        seen.add(key)
        found = {extension: member for _, extension, member in group}
        image = next((found[extension] for extension in IMAGES if extension in found), None)
        if image:
            yield image, _label(path, key, found)


def _label(path: Path, key: str, found: dict[str, Member]) -> int:
    text = stored_label({name: _read(path, member) for name, member in found.items() if name in ("cls", "json")})
    if text is None:
        raise DataError(f"{path}: sample {key!r} has no label: neither .cls nor .json with a 'label'")
    if not text.isascii() or not text.isdigit():
        raise DataError(f"{path}: sample {key!r} has the label {text!r}; class numbers from 0 are read")
    return int(text)


def _read(path: Path, member: Member) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def index(
    name: str,
    splits: dict[str, list[Path]],
    out: Path,
    *,
    classes: list[str] | None = None,
    statistics_images: int = 10_000,
    size: int = 256,
    max_bad_fraction: float = 0.0,
    workers: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Writes index, mean image and manifest into `out`, beside the tars or apart from them; returns the manifest.

    splits: name → tars in order. statistics_images: how many of the training images to decode. progress: called with 1
    after each tar.
    """
    folder = Folder(out)
    if manifest.NAME in folder.names():
        raise ConfigError(f"{out}: holds a finished dataset already; choose another --out or remove it")
    resize.prepare()  # before workers are forked
    tars = [(split, path) for split, paths in splits.items() for path in paths]
    measured = -(-statistics_images // len(splits["train"]))  # of each training tar

    def read(tar: tuple[str, Path]) -> ShardRecord:
        split, path = tar
        record = index_tar(path, statistics_images=measured * (split == "train"), size=size)
        return record._replace(shard=replace(record.shard, name=os.path.relpath(path.resolve(), out.resolve())))

    def counted(results: Iterator[ShardRecord]) -> Iterator[tuple[str, ShardRecord]]:
        for (split, _), record in zip(tars, results, strict=True):
            yield split, record
            progress(1)

    with pool.run(read, tars, workers=workers, place=out) as results:
        collected = Collected(counted(results), size=size, max_bad_fraction=max_bad_fraction)
    return _publish(folder, name, collected, classes, {"statistics_images": statistics_images, "size": size})


def _publish(
    folder: Folder, name: str, collected: Collected, classes: list[str] | None, options: dict[str, int]
) -> dict[str, Any]:
    usable = {split: [r for r in found if r.shard.samples] for split, found in collected.of_split.items()}
    collected.of_split = usable
    labels = 1 + max(int(record.rows["label"].max()) for found in usable.values() for record in found)
    classes = classes or [str(label) for label in range(labels)]
    if len(classes) < labels:
        raise ConfigError(f"--classes names {len(classes)} classes, but there are labels up to {labels - 1}")
    splits, totals = collected.write_splits(folder, name), collected.totals
    content = {
        "dataset": name,
        "label_kind": "class index, 0-based",
        "classes": classes,
        "splits": splits,
        "statistics": totals.publish(folder, f"{name}-mean.npy") | {"images": totals.images},
        "source": {"kind": manifest.EXISTING},
        "stored_order": {split: stored_order(found) for split, found in usable.items()},
        "options": options,
        "converted": [],
        "quarantine": collected.bad,
    }
    return manifest.write_manifest(folder, content)


def stored_order(records: list[ShardRecord]) -> str:
    labels = np.concatenate([record.rows["label"] for record in records])
    return "class after class" if looks_sorted(labels) else "mixed"


def looks_sorted(labels: np.ndarray) -> bool:
    """Whether samples seem to be stored class after class: most have a neighbour of their class, and not by chance."""
    if len(labels) < 2:
        return False
    same = float((labels[1:] == labels[:-1]).mean())
    by_chance = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    return same > SORTED_FRACTION and same > 2 * by_chance
