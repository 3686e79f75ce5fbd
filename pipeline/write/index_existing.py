"""Indexes existing WebDataset tars in place: copies no image, reads every byte once.

Each member of a tar is part of a sample, listed as a bad image, or counted as passed over.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .. import manifest, pool
from ..decode import BadImage, image_size
from ..errors import ConfigError, DataError
from ..files import Json
from ..manifest_values import EXISTING
from ..shards import INDEX_DTYPE, Shard, class_number, crc32, file_sha256
from ..storage import Folder
from ..tar import Member
from . import resize
from .images import Encoding, prepare
from .journal import ShardRecord
from .manifest_content import Collected, write_statistics
from .resize import Totals
from .sources.base import PassedOver
from .sources.folders import litter, require_utf8
from .sources.tars import read_member, samples

MAX_CLASSES = 1_000_000
SORTED_FRACTION = 0.5  # of neighbours with the same label; shuffled, ImageNet has a thousandth


def index_tar(path: Path, name: str, *, statistics_images: int, size: int) -> tuple[ShardRecord, PassedOver]:
    """Reads a tar from end to end. name: of its shard.

    Raises DataError if it is damaged, or holds members but no samples.
    """
    rows, bad, passed_over = {}, {}, PassedOver()
    for member, label in samples(path, _label):
        if label is None:
            file = os.path.basename(member.name)
            kind = litter(file) or os.path.splitext(file)[1].lower() or "without extension"
            passed_over.add(kind, _printable(path, member))
        elif isinstance(label, BadImage):
            bad[member] = label
        else:
            try:
                data = read_member(path, member)
                rows[member] = (member.offset, member.size, 0, label, crc32(data), *image_size(data))
            except BadImage as err:
                bad[member] = err
    if not rows and not bad:
        if passed_over:
            raise DataError(f"{path}: holds no samples, no image with a label, but {passed_over}")
        passed_over.add("empty tar", path.name)
    totals, encoding = Totals.zeros(size), Encoding(size=size)
    chosen = list(rows)[:: max(1, len(rows) // statistics_images)][:statistics_images] if statistics_images else []
    for image in chosen:
        try:
            prepare(read_member(path, image), encoding, totals)
        except BadImage as err:
            bad[image] = err
            del rows[image]
    listed = [{"image": _printable(path, member), "reason": str(err)} for member, err in bad.items()]
    shard = Shard(name, len(rows), path.stat().st_size, file_sha256(path))
    return ShardRecord(shard, np.array(list(rows.values()), INDEX_DTYPE), totals, [], listed), passed_over


def _printable(path: Path, member: Member) -> str:
    """A member's name for the manifest, which holds nothing but UTF-8."""
    return f"{path.name}/{member.name}".encode(errors="backslashreplace").decode()


def _label(text: str) -> int:
    label = class_number(text)
    if not 0 <= label < MAX_CLASSES:
        raise DataError(f"has the label {label}; class numbers from 0 to {MAX_CLASSES - 1:,} are read")
    return label


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
) -> tuple[Json, PassedOver]:
    """Writes index, mean image and manifest into `out`, beside the tars or apart from them; returns the manifest.

    splits: name → tars in order. statistics_images: how many of the training images to decode. progress: called with 1
    after each tar.
    """
    folder = Folder(out)
    if manifest.NAME in folder.names():
        raise ConfigError(
            f"{out}: holds a finished dataset already; choose another --out, or remove its {manifest.NAME}"
        )
    resize.prepare()  # before workers are forked
    tars = [(split, path) for split, paths in splits.items() for path in paths]
    measured = -(-statistics_images // len(splits["train"]))  # of each training tar

    passed_over = PassedOver()

    def read(tar: tuple[str, Path]) -> tuple[ShardRecord, PassedOver]:
        split, path = tar
        name = require_utf8(os.path.relpath(path.resolve(), out.resolve()))
        return index_tar(path, name, statistics_images=measured * (split == "train"), size=size)

    def counted(results: Iterator[tuple[ShardRecord, PassedOver]]) -> Iterator[tuple[str, ShardRecord]]:
        for (split, _), (record, unused) in zip(tars, results, strict=True):
            for kind, (count, example) in unused.items():
                passed_over.add(kind, example, count)
            yield split, record
            progress(1)

    with pool.run(read, tars, workers=workers, place=out) as results:
        collected = Collected(counted(results), size=size, max_bad_fraction=max_bad_fraction)
    return _publish(
        folder, name, collected, classes, {"statistics_images": statistics_images, "size": size}
    ), passed_over


def _publish(
    folder: Folder, name: str, collected: Collected, classes: list[str] | None, options: dict[str, int]
) -> Json:
    of_split = collected.of_split.items()
    labels = {split: np.concatenate([record.rows["label"] for record in found]) for split, found in of_split}
    collected.of_split = {split: [record for record in found if record.shard.samples] for split, found in of_split}
    highest = max(int(each.max(initial=-1)) for each in labels.values())
    classes = classes or [str(label) for label in range(highest + 1)]
    if len(classes) <= highest:
        raise ConfigError(f"--classes names {len(classes)} classes, but there are labels up to {highest}")
    splits = collected.write_splits(folder, name)
    measured = write_statistics(collected.totals, folder, f"{name}-mean.npy")
    content = {
        "dataset": name,
        "label_kind": "class index, 0-based",
        "classes": classes,
        "splits": splits,
        "statistics": measured | {"images": int(collected.totals.numbers[0])},
        "source": {"kind": EXISTING},
        "stored_order": {s: "class after class" if looks_sorted(each) else "mixed" for s, each in labels.items()},
        "options": options,
        "converted": [],
        "quarantine": collected.bad,
    }
    return manifest.write_manifest(folder, content)


def looks_sorted(labels: np.ndarray) -> bool:
    """Whether samples seem to be stored sorted by class: most neighbours have equal labels, more than by chance."""
    if len(labels) < 2:
        return False
    same = float((labels[1:] == labels[:-1]).mean())
    by_chance = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    return same > SORTED_FRACTION and same > 2 * by_chance
