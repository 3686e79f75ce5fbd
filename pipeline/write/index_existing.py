"""WebDataset tars that exist already, indexed where they lie: no image is copied, every byte is read once.

A sample is what webdataset takes for one: members of one key, an image and a label.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from glob import glob
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from PIL import Image

from .. import manifest
from ..errors import ConfigError, DataError, StorageError
from ..pool import follow_the_parent
from ..shards import INDEX_DTYPE, Shard, crc32, file_sha256, write_index
from ..tar import Member, members
from . import pixels
from .images import BadImage, Encoding, Preparer
from .pixels import Sums
from .statistics import Statistics

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
MAX_SIDE = 65_535  # what the index holds
SORTED_SHARE = 0.5  # of neighbours with the same label; shuffled, ImageNet has a thousandth


@dataclass(frozen=True)
class Existing:
    """Tars to index. splits: name → tars in order."""

    name: str
    splits: dict[str, list[Path]]
    classes: list[str] | None = None
    statistics_images: int = 10_000
    size: int = 256


@dataclass
class Indexed:
    """What one tar holds."""

    shard: Shard
    rows: np.ndarray  # (n,) INDEX_DTYPE; `shard` is filled in later
    sums: Sums
    bad: list[dict[str, str]] = field(default_factory=list)


def expand(pattern: str) -> list[Path]:
    """The tars that a pattern with braces or stars names. Raises DataError for one that is not there."""
    paths = [Path(found) for part in braceexpand(pattern) for found in (sorted(glob(part)) if "*" in part else [part])]
    if not paths:
        raise DataError(f"{pattern}: no such tar; quote the pattern, and mind its folder")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such tar; the pattern names {len(paths)}")
    return paths


def index_tar(path: Path, *, statistics_images: int, size: int) -> Indexed:
    """Reads a tar from end to end. Raises DataError where it is damaged or holds no samples."""
    rows, bad, images = [], [], []
    for image, label in _samples(path):
        data = _read(path, image)
        try:
            width, height = _size(data)
        except BadImage as err:
            bad.append({"image": f"{path.name}/{image.name}", "reason": str(err)})
            continue
        rows.append((image.offset, image.size, 0, label, crc32(data), width, height))
        images.append(image)
    if not rows and not bad:
        raise DataError(f"{path}: holds no samples: no image with a label; is it a WebDataset tar?")
    sums, prepare, damaged = Sums(size), Preparer(Encoding(size=size)), set()
    chosen = images[:: max(1, len(images) // statistics_images)][:statistics_images] if statistics_images else []
    for image in chosen:
        try:
            measured = prepare(_read(path, image)).measured
            assert measured is not None
            sums.add(*measured)
        except BadImage as err:
            bad.append({"image": f"{path.name}/{image.name}", "reason": str(err)})
            damaged.add(image.offset)
    rows = [row for row in rows if row[0] not in damaged]
    shard = Shard(path.name, len(rows), path.stat().st_size, file_sha256(path))
    return Indexed(shard, np.array(rows, dtype=INDEX_DTYPE), sums, bad)


def _samples(path: Path) -> Iterator[tuple[Member, int]]:
    """(image's member, label) of each sample, in stored order."""
    seen: set[str] = set()
    current = ""
    parts: dict[str, Member] = {}
    for member in members(path):
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not (dot and stem):
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if current:
                yield from _sample(path, current, parts)
            if key in seen:
                raise DataError(f"{path}: two samples have the key {key!r}; their parts must lie together")
            seen.add(key)
            current, parts = key, {}
        parts[extension.lower()] = member
    if current:
        yield from _sample(path, current, parts)


def _sample(path: Path, key: str, parts: dict[str, Member]) -> Iterator[tuple[Member, int]]:
    images = [extension for extension in IMAGES if extension in parts]
    if not images:
        return
    if "cls" in parts:
        text = _read(path, parts["cls"]).decode(errors="replace").strip()
    elif "json" in parts:
        text = str(_json(_read(path, parts["json"])).get("label", ""))
    else:
        raise DataError(f"{path}: sample {key!r} has no label: neither .cls nor .json with a 'label'")
    if not text.isascii() or not text.isdigit():
        raise DataError(f"{path}: sample {key!r} has the label {text!r}; class numbers from 0 are read")
    yield parts[images[0]], int(text)


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path, member: Member) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _size(data: bytes) -> tuple[int, int]:
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except Exception as err:  # Pillow's parsers raise whatever they like
        raise BadImage("not an image") from err
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width}×{height}: a side over {MAX_SIDE:,} pixels is more than the index holds")
    return width, height


def index(
    existing: Existing, out: Path, *, workers: int, max_bad_fraction: float, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Writes index, mean image and manifest into `out`, beside the tars or apart from them; returns the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / manifest.NAME).exists():
        raise ConfigError(f"{out}: holds a finished dataset already; choose another --out or remove it")
    tars = [(split, path) for split, paths in existing.splits.items() for path in paths]
    pixels.prepare()  # before workers are forked
    try:
        done = list(_run(existing, tars, workers, progress))
    except BrokenProcessPool as err:
        raise StorageError(f"{out}: a worker was killed, perhaps for want of memory; use fewer --workers") from err
    bad = sorted((entry for indexed in done for entry in indexed.bad), key=lambda entry: entry["image"])
    samples = sum(len(indexed.rows) for indexed in done)
    if len(bad) > max_bad_fraction * (samples + len(bad)):
        listed = "; ".join(f"{b['image']}: {b['reason']}" for b in bad[:20])
        raise DataError(
            f"{len(bad)} of {samples + len(bad)} images cannot be used ({listed}); allow them with --max-bad-fraction"
        )
    return _publish(existing, out, tars, done, bad)


def _run(
    existing: Existing, tars: list[tuple[str, Path]], workers: int, progress: Callable[[int], None]
) -> Iterator[Indexed]:
    train = sum(split == "train" for split, _ in tars)
    each = [-(-existing.statistics_images // train) if split == "train" else 0 for split, _ in tars]
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=follow_the_parent) as pool:
        futures = [
            pool.submit(index_tar, path, statistics_images=count, size=existing.size)
            for (_, path), count in zip(tars, each, strict=True)
        ]
        try:
            for future in futures:
                yield (indexed := future.result())
                progress(len(indexed.rows))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _publish(
    existing: Existing, out: Path, tars: list[tuple[str, Path]], done: list[Indexed], bad: list[dict[str, str]]
) -> dict[str, Any]:
    splits, statistics, order = {}, Statistics(existing.size), {}
    labels = 1 + max(int(indexed.rows["label"].max()) for indexed in done if len(indexed.rows))
    classes = existing.classes or [str(label) for label in range(labels)]
    if len(classes) < labels:
        raise ConfigError(f"--classes names {len(classes)} classes, but there are labels up to {labels - 1}")
    for split in existing.splits:
        shards: list[Shard] = []
        rows = []
        for (of, path), indexed in zip(tars, done, strict=True):
            if of != split or not len(indexed.rows):
                continue
            where = os.path.relpath(path.resolve(), out.resolve())
            indexed.rows["shard"] = len(shards)
            shards.append(Shard(where, indexed.shard.samples, indexed.shard.bytes, indexed.shard.sha256))
            rows.append(indexed.rows)
            if split == "train":
                statistics.add(indexed.sums)
        if not rows:
            raise DataError(f"{split}: no usable image is left in this split")
        name = f"{existing.name}-{split}.index.npy"
        joined = np.concatenate(rows)
        splits[split] = manifest.split_record(shards, name, write_index(out / name, joined))
        order[split] = "class after class" if looks_sorted(joined["label"]) else "mixed"
    content = {
        "dataset": existing.name,
        "label_kind": "class index, 0-based",
        "classes": classes,
        "splits": splits,
        "statistics": statistics.publish(out, f"{existing.name}-mean.npy") | {"images": statistics.images},
        "source": {"kind": "existing webdataset tars"},
        "stored_order": order,
        "options": {"statistics_images": existing.statistics_images, "size": existing.size},
        "converted": [],
        "quarantine": bad,
    }
    return manifest.write_manifest(out, content)


def looks_sorted(labels: np.ndarray) -> bool:
    """Whether samples seem to be stored class after class: most have a neighbour of their class, and not by chance."""
    if len(labels) < 2:
        return False
    same = float((labels[1:] == labels[:-1]).mean())
    by_chance = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    return same > SORTED_SHARE and same > 2 * by_chance
