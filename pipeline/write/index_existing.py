"""WebDataset tars that exist already, indexed in place: no image is copied, every byte is read once.

As in webdataset, a sample is the adjacent members of one key, a name up to its first dot: an image and a label. Each
member of a tar is in a sample, listed as a bad image, or counted as passed over.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from glob import escape, glob
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from .. import manifest, pool
from ..decode import BadImage, image_size
from ..errors import ConfigError, DataError
from ..files import Json
from ..shards import IMAGES, INDEX_DTYPE, LABELS, Shard, crc32, file_sha256, label_name, split_name, stored_label
from ..storage import Folder
from ..tar import Member, members
from . import resize
from .images import Encoding, Preparer
from .journal import ShardRecord
from .manifest_content import Collected, write_statistics
from .resize import Sums
from .sources.base import PassedOver
from .sources.folders import is_image, litter, require_utf8

KEY = "a name up to its first dot"
NAMED = 10  # extensions of one key
MAX_NUMBERS = 1_000_000  # in the braces of a pattern
MAX_CLASSES = 1_000_000
SORTED_FRACTION = 0.5  # of neighbours with the same label; shuffled, ImageNet has a thousandth


def expand(pattern: str) -> list[Path]:
    """The tars that a pattern with {0..9}, {a,b}, *, ? or [0-9] names. What exists under the very name goes first.

    Raises ConfigError for what is no pattern, DataError if a tar is missing.
    """
    try:
        if any(abs(int(a) - int(b)) > MAX_NUMBERS for a, b in re.findall(r"(-?\d+)\.\.(-?\d+)", pattern)):
            raise ValueError("over a million numbers")  # braceexpand would hold them all
        pattern = os.path.expanduser(pattern)  # a shell leaves what is quoted
        parts = [pattern] if Path(pattern).is_file() else braceexpand(pattern)
        paths = [path for part in parts for path in _matches(Path(part))]
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{pattern}: {err}; write {{0000..1023}}, {{a,b}}, *, ? or [0-9]") from err
    if not paths:
        raise DataError(f"{pattern}: no such tar; quote the pattern, and mind its folder")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such tar; {pattern} names {len(paths)} files, and no URL or command is read")
    return paths


def _matches(path: Path) -> list[Path]:
    """The sorted files that a pattern without braces names. A folder that exists under the very name goes first."""
    folder = next((folder for folder in path.parents if folder.is_dir()), Path())
    rest = str(path.relative_to(folder))
    if path.is_file() or not re.search(r"[*?[]", rest):
        return [path]
    return sorted(map(Path, glob(os.path.join(escape(str(folder)), rest))))


def index_tar(path: Path, *, statistics_images: int, size: int) -> tuple[ShardRecord, PassedOver]:
    """Reads a tar from end to end. Raises DataError if it is damaged or holds no samples, but other members."""
    rows: dict[Member, tuple[int, ...]] = {}
    bad: dict[Member, BadImage] = {}
    unused: list[Member] = []
    for image, label in _samples(path, bad, unused):
        try:
            data = _read(path, image)
            rows[image] = (image.offset, image.size, 0, label, crc32(data), *image_size(data))
        except BadImage as err:
            bad[image] = err
    passed_over = PassedOver()
    for member in unused:
        name = os.path.basename(member.name)
        kind = litter(name) or os.path.splitext(name)[1].lower() or "without extension"
        passed_over.add(kind, _printable(path, member))
    if not rows and not bad:
        if unused:
            raise DataError(f"{path}: holds no samples, no image with a label, but {passed_over}")
        passed_over.add("empty tar", path.name)
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
    listed = [{"image": _printable(path, member), "reason": str(err)} for member, err in bad.items()]
    shard = Shard(path.name, len(rows), path.stat().st_size, file_sha256(path))
    index = np.array(list(rows.values()), dtype=INDEX_DTYPE)
    return ShardRecord(shard, index, sums.totals(), [], listed), passed_over


def _printable(path: Path, member: Member) -> str:
    """A member's name for the manifest, which holds nothing but UTF-8."""
    return f"{path.name}/{member.name}".encode(errors="backslashreplace").decode()


def _samples(path: Path, bad: dict[Member, BadImage], unused: list[Member]) -> Iterator[tuple[Member, int]]:
    """(image's member, label) of each sample, in stored order. Members of no sample go into `bad` or `unused`."""
    last: dict[str, str] = {}  # member of each key
    for key, group in groupby(_keyed(path, unused), key=itemgetter(0)):
        found: dict[str, Member] = {}
        for _, extension, member in group:
            if key in last:
                raise DataError(
                    f"{path}: {last[key]!r} and {member.name!r} are not adjacent, but both have the key {key!r}, {KEY};"
                    " sort the tar by name (tar --sort=name), or rename members with more dots"
                )
            if found.setdefault(extension, member) != member:  # but for small and capital letters
                unused.append(member)
        last[key] = member.name
        name, images, inside = label_name(found), _images(path, found), ", ".join(list(found)[:NAMED])
        used: set[Member] = set()
        if name and len(images) == 1:
            used = {*images, found[name]}
            yield images[0], _label(path, key, name, found[name])
        elif name and (images or name.endswith("cls") or b'"label"' in _read(path, found[name])):
            bad[found[name]] = BadImage(f"{len(images)} images for this label; its key, {KEY}, has {inside}")
        elif images and not name and not any(map(litter, images[0].name.split("/"))):
            raise DataError(
                f"{path}: sample {key!r} has no label, or several; its key, {KEY}, has {inside};"
                " name one .cls, and sort the tar by name (tar --sort=name) if its parts lie apart"
            )
        unused += [member for member in found.values() if member not in used and member not in bad]


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
    return [member for member in others if is_image(io.BytesIO(_read(path, member)))]


def _label(path: Path, key: str, name: str, member: Member) -> int:
    try:
        label = stored_label({name: _read(path, member)})
        if not 0 <= label < MAX_CLASSES:
            raise DataError(f"has the label {label}; class numbers from 0 to {MAX_CLASSES - 1:,} are read")
        return label
    except DataError as err:
        raise DataError(f"{path}: sample {key!r} {err}") from err


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
) -> tuple[Json, PassedOver]:
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

    passed_over = PassedOver()

    def read(tar: tuple[str, Path]) -> tuple[ShardRecord, PassedOver]:
        split, path = tar
        name = require_utf8(os.path.relpath(path.resolve(), out.resolve()))
        record, unused = index_tar(path, statistics_images=measured * (split == "train"), size=size)
        return record._replace(shard=replace(record.shard, name=name)), unused

    def counted(results: Iterator[tuple[ShardRecord, PassedOver]]) -> Iterator[tuple[str, ShardRecord]]:
        for (split, _), (record, unused) in zip(tars, results, strict=True):
            for kind, (count, example) in unused.items():
                passed_over.add(kind, example, count)
            yield split, record
            progress(1)

    with pool.run(read, tars, workers=workers, place=out) as results:
        collected = Collected(counted(results), size=size, max_bad_fraction=max_bad_fraction)
    options = {"statistics_images": statistics_images, "size": size}
    return _publish(folder, name, collected, classes, options), passed_over


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
        "source": {"kind": manifest.EXISTING},
        "stored_order": {s: "class after class" if looks_sorted(each) else "mixed" for s, each in labels.items()},
        "options": options,
        "converted": [],
        "quarantine": collected.bad,
    }
    return manifest.write_manifest(folder, content)


def looks_sorted(labels: np.ndarray) -> bool:
    """Whether samples seem to be stored class after class: most have a neighbour of their class, and not by chance."""
    if len(labels) < 2:
        return False
    same = float((labels[1:] == labels[:-1]).mean())
    by_chance = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    return same > SORTED_FRACTION and same > 2 * by_chance
