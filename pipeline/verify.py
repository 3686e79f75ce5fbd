"""Whether a dataset is what its manifest says, to the last byte: shards, headers, checksums, labels and images.

What is wrong is named: file, byte, sample.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from simplejpeg import decode_jpeg

from . import manifest
from .errors import DataError
from .manifest import Split
from .pool import follow_the_parent
from .shards import crc32, file_sha256
from .tar import Member, members

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".raw")
MANY = 20  # findings of one kind that a shard names


class Finding(NamedTuple):
    """Something wrong. check: which of CHECKS."""

    check: str
    file: str
    what: str


CHECKS = {
    "size": "shards are there, at their full size",
    "sha256": "shards' sha256",
    "tar": "tar headers, names and end marks",
    "index": "index against the tars' members",
    "idx": "DALI's .idx against the tars' members",
    "label": "labels in the tars",
    "crc32": "samples' checksums",
    "decode": "every image can be decoded",
    "info": "_info.json and mean image",
}


@dataclass
class SplitReport:
    """What a split holds."""

    shards: int
    samples: int
    bytes: int
    histogram: list[int]  # samples of each class
    unlabelled: int = 0


@dataclass
class Report:
    """What was looked at and what was found."""

    root: str
    dataset: str
    fingerprint: str
    deep: bool
    splits: dict[str, SplitReport] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    # Groups of samples with the same bytes, each sample as split, number and label.
    duplicates: list[list[tuple[str, int, int]]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def duplicated(self, *, across: bool) -> int:
        """Groups within one split, or across several."""
        return sum((len({split for split, _, _ in group}) > 1) == across for group in self.duplicates)

    def contradictory(self) -> int:
        """Groups whose samples have different labels."""
        return sum(len({label for _, _, label in group}) > 1 for group in self.duplicates)


def check(
    root: Path, *, deep: bool = False, workers: int = 1, progress: Callable[[int], None] = lambda samples: None
) -> Report:
    """Looks at everything, whatever is found on the way. Raises DataError where the folder is no dataset at all.

    deep: decode every image, too. progress is told of samples.
    """
    dataset = manifest.open_dataset(root, check_splits=False)
    report = Report(str(root), str(dataset.manifest.get("dataset")), dataset.fingerprint, deep)
    labels = len(dataset.classes)
    for name, split in dataset.splits.items():
        try:
            index = split.index
        except DataError as err:
            report.findings.append(Finding("index", split.index_name, str(err)))
            continue
        known = index["label"][index["label"] >= 0]
        histogram = np.bincount(known, minlength=labels).tolist()
        total = sum(shard.bytes for shard in split.shards)
        report.splits[name] = SplitReport(len(split.shards), len(index), total, histogram, len(index) - len(known))
        if len(histogram) > labels:
            report.findings.append(
                Finding("index", split.index_name, f"a label of {len(histogram) - 1}, {labels} classes")
            )
        counts = np.bincount(index["shard"], minlength=len(split.shards)).tolist()
        if counts != [shard.samples for shard in split.shards]:
            report.findings.append(Finding("index", split.index_name, "counts samples otherwise than the manifest"))
        of_ours = "plan" in dataset.manifest
        for findings, samples in _shards(split, deep, of_ours, dataset.encoding == "raw", workers):
            report.findings += findings
            progress(samples)
    report.findings += _extras(dataset)
    report.duplicates = _duplicates({name: dataset.splits[name] for name in report.splits})
    return report


def _shards(split: Split, deep: bool, of_ours: bool, raw: bool, workers: int) -> Iterator[tuple[list[Finding], int]]:
    tasks = [(split, number, deep, of_ours, raw) for number in range(len(split.shards))]
    if workers == 1 or len(tasks) == 1:
        yield from map(_shard, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=follow_the_parent) as pool:
        try:
            yield from pool.map(_shard, tasks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _shard(task: tuple[Split, int, bool, bool, bool]) -> tuple[list[Finding], int]:
    split, number, deep, of_ours, raw = task
    shard, rows = split.shards[number], split.index[split.index["shard"] == number]
    path, found = split.root / split.shards[number].name, list[Finding]()

    def say(check: str, what: str) -> None:
        found.append(Finding(check, shard.name, what))

    if not path.is_file():
        say("size", "missing; copy it again")
        return found, shard.samples
    if (size := path.stat().st_size) != shard.bytes:
        say("size", f"{size} bytes where the manifest says {shard.bytes}; copy it again")
    if file_sha256(path) != shard.sha256:
        say("sha256", "its bytes are not those that were written; copy it again")
    inside = _members(path, say)
    _compare_index(rows, inside, say)
    with open(path, "rb") as file:
        _read_samples(file.fileno(), rows, inside, say, deep=deep, raw=raw)
    if of_ours:
        _compare_idx(path.with_suffix(".idx"), inside, say)
    return _not_too_many(found), shard.samples


def _members(path: Path, say: Callable[[str, str], None]) -> dict[int, Member]:
    """By offset; those before the first damage."""
    inside: dict[int, Member] = {}
    try:
        for member in members(path):
            inside[member.offset] = member
    except DataError as err:
        say("tar", str(err).removeprefix(f"{path}: "))
    return inside


def _compare_index(rows: np.ndarray, inside: dict[int, Member], say: Callable[[str, str], None]) -> None:
    last = max(inside, default=-1)
    for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True):
        member = inside.get(offset)
        if member is None and offset <= last:
            say("index", f"the index names a sample at byte {offset}, where no member begins")
        elif member is not None and member.size != size:
            say("index", f"{member.name} at byte {offset} has {member.size} bytes, {size} in the index")
    images = sum(os.path.splitext(member.name)[1].lower() in IMAGES for member in inside.values())
    if images > len(rows):
        say("index", f"{images} images in the tar, {len(rows)} in the index")


def _read_samples(
    fd: int, rows: np.ndarray, inside: dict[int, Member], say: Callable[[str, str], None], *, deep: bool, raw: bool
) -> None:
    by_name = {member.name: member for member in inside.values()}
    for row in rows:
        offset, size = int(row["offset"]), int(row["size"])
        member = inside.get(offset)
        where = f"{member.name} at byte {offset}" if member else f"the sample at byte {offset}"
        data = os.pread(fd, size, offset)
        if len(data) < size:
            say("size", f"ends within {where}")
            return
        if crc32(data) != row["crc32"]:
            say("crc32", f"{where}: its bytes changed since they were written")
        elif deep and (fault := _undecodable(data, int(row["width"]), int(row["height"]), raw)):
            say("decode", f"{where}: {fault}")
        label = by_name.get(os.path.splitext(member.name)[0] + ".cls") if member else None
        if label:
            text = os.pread(fd, min(label.size, 32), label.offset)
            if text.strip() != str(row["label"]).encode():
                say("label", f"{label.name} says {text[:20]!r}, the index {row['label']}")


def _undecodable(data: bytes, width: int, height: int, raw: bool) -> str | None:
    if raw:
        return None if len(data) == 3 * width * height else f"{len(data)} bytes for {width}×{height} pixels"
    try:
        pixels = decode_jpeg(data)
    except ValueError:
        try:
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except Exception as err:  # Pillow's decoders raise whatever they like
            return f"cannot be decoded ({err})"
    if pixels.shape[:2] != (height, width):
        return f"{pixels.shape[1]}×{pixels.shape[0]} pixels, {width}×{height} in the index"
    return None


def _compare_idx(path: Path, inside: dict[int, Member], say: Callable[[str, str], None]) -> None:
    try:
        header, *lines = path.read_text().splitlines()
        named = {int(at): (name, int(size)) for line in lines for _, at, size, name in _fours(line.split())}
    except (OSError, ValueError) as err:
        say("idx", f"{path.name} cannot be read ({err}); shard the data again")
        return
    if header != f"v1.2 {len(lines)}":
        say("idx", f"{path.name} begins with {header!r} and has {len(lines)} lines")
    wrong = [m for m in inside.values() if named.get(m.offset) != (m.name, m.size)]
    if wrong:
        say("idx", f"{path.name} does not name {wrong[0].name} at byte {wrong[0].offset}")


def _fours(fields: list[str]) -> Iterator[list[str]]:
    if not fields or len(fields) % 4:
        raise ValueError("a line without groups of four")
    for i in range(0, len(fields), 4):
        yield fields[i : i + 4]


def _not_too_many(found: list[Finding]) -> list[Finding]:
    """A shard of zeros needs no thousand lines."""
    kept: list[Finding] = []
    for check in CHECKS:
        of = [finding for finding in found if finding.check == check]
        kept += of[:MANY]
        if len(of) > MANY:
            kept.append(Finding(check, of[0].file, f"and {len(of) - MANY} more"))
    return kept


def _extras(dataset: manifest.Dataset) -> list[Finding]:
    found = []
    if "mean_image" in dataset.manifest["statistics"]:
        try:
            dataset.mean_image  # noqa: B018
        except DataError as err:
            found.append(Finding("info", dataset.manifest["statistics"]["mean_image"]["file"], str(err)))
    path = dataset.root / "_info.json"
    if "plan" in dataset.manifest:
        try:
            info = {name: of["num_samples"] for name, of in json.loads(path.read_text())["splits"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            return [*found, Finding("info", path.name, f"cannot be read ({err}); shard the data again")]
        if info != {name: split.samples for name, split in dataset.splits.items()}:
            found.append(Finding("info", path.name, "counts samples otherwise than the manifest"))
    return found


def _duplicates(splits: dict[str, Split]) -> list[list[tuple[str, int, int]]]:
    """Samples with the same bytes: those of one checksum and size are compared by sha256."""
    if not splits:
        return []
    names = list(splits)
    of = np.concatenate([np.full(len(splits[name].index), i) for i, name in enumerate(names)])
    number = np.concatenate([np.arange(len(splits[name].index)) for name in names])
    keys = np.concatenate(
        [splits[name].index["crc32"].astype(np.uint64) << np.uint64(32) | splits[name].index["size"] for name in names]
    )
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    groups: dict[tuple[int, str], list[tuple[str, int, int]]] = {}
    for i in np.flatnonzero(counts[inverse] > 1).tolist():
        split, sample = splits[names[of[i]]], int(number[i])
        row = split.index[sample]
        try:
            with open(split.root / split.shards[row["shard"]].name, "rb") as file:
                data = os.pread(file.fileno(), int(row["size"]), int(row["offset"]))
        except OSError:
            continue
        key = int(inverse[i]), hashlib.sha256(data).hexdigest()
        groups.setdefault(key, []).append((names[of[i]], sample, int(row["label"])))
    return [group for group in groups.values() if len(group) > 1]


def table(report: Report) -> str:
    """For people: what is there, what was checked, what was found."""
    lines = [f"{report.root}: {report.dataset}, fingerprint {report.fingerprint[:16]}"]
    for name, split in report.splits.items():
        used = [count for count in split.histogram if count]
        line = f"  {name}: {split.samples:,} samples in {split.shards} shards, {split.bytes / 1e6:,.1f} MB"
        if used:
            spread = f"{min(used):,} to {max(used):,} samples each"
            line += f"; {len(used)} of {len(split.histogram)} classes, {spread}"
        lines.append(line + (f"; {split.unlabelled:,} without a label" if split.unlabelled else ""))
    for check, what in CHECKS.items():
        if check == "decode" and not report.deep:
            lines.append(f"  not looked at   {what} (--deep)")
            continue
        of = [finding for finding in report.findings if finding.check == check]
        lines.append(f"  {'ok           ' if not of else f'{len(of):>4} wrong   '}   {what}")
        lines += [f"      {finding.file}: {finding.what}" for finding in of]
    within, across = report.duplicated(across=False), report.duplicated(across=True)
    lines.append(
        f"  note: {within} groups of equal images within a split, {across} across splits,"
        f" {report.contradictory()} with different labels"
    )
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    return {
        "root": report.root,
        "dataset": report.dataset,
        "fingerprint": report.fingerprint,
        "deep": report.deep,
        "ok": report.ok,
        "splits": {name: vars(split) for name, split in report.splits.items()},
        "findings": [finding._asdict() for finding in report.findings],
        "duplicates": [
            [{"split": split, "sample": sample, "label": label} for split, sample, label in group]
            for group in report.duplicates
        ],
    }
