"""Checks a dataset against its manifest, to the last byte: shards, headers, checksums, labels and images.

Each finding names the file, and the byte or sample.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import cuts, manifest, pool
from .decode import BadImage, decode
from .errors import DataError
from .manifest import Dataset, Split
from .shards import IMAGES, class_number, crc32, dali_index, dali_index_name, file_sha256, label_text, split_name
from .storage import Folder
from .tar import Member, members
from .write.cuts import find
from .write.manifest_content import timm_info

STORED = (*IMAGES, "raw")
MANY = 20  # findings of one kind that are listed for a shard

CHECKS = {
    "size": "shards exist, at their full size",
    "sha256": "shards' sha256",
    "tar": "tar headers, names and end marks",
    "index": "index against the tars' members",
    "idx": "DALI's .idx against the tars' members",
    "label": "labels in the tars",
    "crc32": "samples' checksums",
    "info": "_info.json, mean image, cuts, and no other tars",
    "decode": "every image can be decoded",
    "webdataset": "samples as webdataset itself reads them",
}
DEEP = ("decode", "webdataset")  # checks that are not made by default

Fault = tuple[str, str]  # the check or the file, and what is wrong


@dataclass
class Finding:
    """A problem that was found. check: one of CHECKS."""

    check: str
    file: str
    what: str


@dataclass
class SplitReport:
    """The content of a split."""

    shards: int
    samples: int
    bytes: int
    histogram: list[int]  # samples of each class
    unlabelled: int = 0


@dataclass
class Copy:
    """One of several samples with the same bytes. sample: its index in the split."""

    split: str
    sample: int
    label: int


@dataclass
class Report:
    """All that was checked and found."""

    root: str
    dataset: str
    fingerprint: str
    deep: bool
    splits: dict[str, SplitReport] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    duplicates: list[list[Copy]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings


def check(
    dataset: Dataset, *, deep: bool = False, workers: int = 1, progress: Callable[[int], None] = lambda samples: None
) -> Report:
    """Runs all checks and collects all findings. dataset: opened with check_splits=False.

    deep: also decode every image, and read the tars with webdataset. progress: called with numbers of samples.
    """
    if deep:
        import webdataset  # noqa: F401  # it loads torch: once, before workers are forked
    report = Report(str(dataset.root), str(dataset.manifest.get("dataset")), dataset.fingerprint, deep)
    for split in dataset.splits.values():
        try:
            report.splits[split.name] = _summary(split)
        except DataError as err:
            report.findings.append(Finding("index", split.index_name, str(err)))
            continue
        for name, fault in split.faults():
            report.findings.append(Finding("index" if name == split.index_name else "size", name, fault))
        check = partial(_check_shard, dataset, split, deep)
        with pool.run(check, range(len(split.shards)), workers=workers, place=dataset.root) as found:
            for shard, findings in zip(split.shards, found):
                report.findings += findings
                progress(shard.samples)
    report.findings += [Finding("info", *fault) for fault in _extra_faults(dataset)]
    report.duplicates = _duplicates([dataset.splits[name] for name in report.splits])
    return report


def _is_ours(dataset: Dataset) -> bool:
    """Whether our sharder wrote the tars; otherwise they existed, and `make_shards.py index` indexed them."""
    return "plan" in dataset.manifest


def _summary(split: Split) -> SplitReport:
    """Summarises a split's index. Raises DataError if it cannot be read."""
    index = split.index
    known = index["label"][index["label"] >= 0]
    histogram = np.bincount(known, minlength=split.classes).tolist()
    return SplitReport(
        len(split.shards), len(index), sum(shard.bytes for shard in split.shards), histogram, len(index) - len(known)
    )


def _check_shard(dataset: Dataset, split: Split, deep: bool, number: int) -> list[Finding]:
    shard, rows = split.shards[number], split.rows(number)
    path = split.root / shard.name
    faults = []
    if not path.is_file():
        return []  # see Split.faults
    if file_sha256(path) != shard.sha256:
        faults.append(("sha256", "its bytes are not those that were written; copy it again"))
    inside = dict[int, Member]()  # by offset, up to the first damage
    try:
        inside |= ((member.offset, member) for member in members(path))
    except DataError as err:
        faults.append(("tar", str(err).removeprefix(f"{path}: ")))
    places = [b""] * len(rows)
    if deep:
        with suppress(DataError):  # there are none, or cuts.faults names what is wrong
            places = cuts.read(Folder(split.root), cuts.file_name(split.name, number), shard, rows)
    with open(path, "rb") as file:
        faults += _compare_samples(file.fileno(), rows, inside, places, dataset, deep)
    if _is_ours(dataset):
        faults += _compare_dali_index(path.with_name(dali_index_name(path.name)), inside)
    if deep and not faults:
        faults += _compare_with_webdataset(path, rows, inside)
    findings = []
    for check in CHECKS:
        whats = [what for kind, what in faults if kind == check]
        if len(whats) > MANY:  # a shard of zeros would give a thousand lines
            whats[MANY:] = [f"and {len(whats) - MANY} more"]
        findings += [Finding(check, shard.name, what) for what in whats]
    return findings


def _compare_samples(
    fd: int, rows: np.ndarray, inside: dict[int, Member], places: list[bytes], dataset: Dataset, deep: bool
) -> Iterator[Fault]:
    images = sum(split_name(member.name)[1] in STORED for member in inside.values())
    if _is_ours(dataset) and images > len(rows):  # existing tars may hold images that were left out
        yield "index", f"{images} images in the tar, {len(rows)} in the index"
    by_name, last = {member.name: member for member in inside.values()}, max(inside, default=-1)
    for (offset, size, _, label, crc, width, height), stored in zip(rows.tolist(), places):
        member = inside.get(offset)
        where = f"{member.name} at byte {offset}" if member else f"the sample at byte {offset}"
        if member is None and offset <= last:
            yield "index", f"the index names a sample at byte {offset}, but no member begins there"
        elif member and member.size != size:
            yield "index", f"{where} has {member.size} bytes, {size} in the index"
        data = os.pread(fd, size, offset)
        if len(data) < size:
            yield "size", f"ends within {where}"
            return
        if crc32(data) != crc:
            yield "crc32", f"{where}: its bytes changed since they were written"
        elif deep and (fault := _undecodable(data, width, height, dataset.encoding == "raw")):
            yield "decode", f"{where}: {fault}"
        elif stored and stored != find(data):
            yield "info", f"{where}: its cuts have wrong places; remove the shard's .cuts, and {cuts.CURE}"
        cls = by_name.get(split_name(member.name)[0] + ".cls") if member else None
        if cls:
            text = os.pread(fd, min(cls.size, 32), cls.offset)
            if _label({"cls": text}) != label:
                yield "label", f"{cls.name} has {text[:20]!r}, the index {label}"


def _label(fields: dict[str, bytes]) -> int | None:
    with suppress(DataError):
        return class_number(label_text(fields))
    return None


def _undecodable(data: bytes, width: int, height: int, raw: bool) -> str | None:
    if raw:
        return None if len(data) == 3 * width * height else f"{len(data)} bytes for {width}×{height} pixels"
    try:
        decode(data, size=(width, height))
    except BadImage as err:
        return f"cannot be decoded ({err})"
    return None


def _compare_dali_index(path: Path, inside: dict[int, Member]) -> Iterator[Fault]:
    try:
        header, *lines = path.read_text().splitlines()
    except (OSError, ValueError) as err:
        yield "idx", f"{path.name} cannot be read ({err}); shard the data again"
        return
    if header != f"v1.2 {len(lines)}":
        yield "idx", f"{path.name} begins with {header!r} and has {len(lines)} lines"
    samples = [list(group) for _, group in groupby(inside.values(), key=lambda member: split_name(member.name)[0])]
    listed = set(lines)
    for (first, *_), line in zip(samples, dali_index(samples)[1:]):
        if line not in listed:
            yield "idx", f"{path.name} does not name {first.name} at byte {first.offset}"
            return


class _Seen(NamedTuple):
    """The fields of a sample that are compared."""

    key: str
    label: int | None
    bytes: int
    crc32: int


def _compare_with_webdataset(path: Path, rows: np.ndarray, inside: dict[int, Member]) -> Iterator[Fault]:
    """Names the first sample of the index that webdataset, as other programs will, reads otherwise; ignores others."""
    from webdataset import WebDataset

    expected, extension_of = [], {}
    for offset, label, size, crc in sorted(rows[["offset", "label", "size", "crc32"]].tolist()):
        key, extension = split_name(inside[offset].name)
        expected.append(_Seen(key, label, size, crc))
        extension_of[key] = extension
    read = []
    try:
        for sample in WebDataset([str(path.resolve())], shardshuffle=False, empty_check=False):
            if (key := sample["__key__"]) in extension_of:
                image = sample.get(extension_of[key], b"")
                read.append(_Seen(key, _label(sample), len(image), crc32(image)))
    except Exception as err:  # it raises whatever tarfile or a handler meets
        yield "webdataset", f"cannot be read by webdataset ({err}); shard the data again"
        return
    for theirs, ours in zip_longest(read, expected):
        if theirs != ours:
            yield "webdataset", f"webdataset reads {theirs}, the index has {ours}; shard the data again"
            return


def _extra_faults(dataset: Dataset) -> Iterator[Fault]:
    """Yields (file, what is wrong with it) for all files except shards and indices."""
    if image := dataset.manifest["statistics"].get("mean_image"):
        try:
            dataset.mean_image  # noqa: B018
        except DataError as err:
            yield image["file"], str(err)
    yield from cuts.faults(dataset)
    if _is_ours(dataset):
        try:
            if json.loads((dataset.root / manifest.INFO).read_bytes()) != timm_info(dataset.manifest["splits"]):
                yield manifest.INFO, "differs from the manifest; shard the data again"
        except (OSError, ValueError) as err:
            yield manifest.INFO, f"cannot be read ({err}); shard the data again"
        named = {shard.name for split in dataset.splits.values() for shard in split.shards}
        for path in dataset.root.glob("*.tar"):  # as others find shards
            if path.name not in named:
                yield path.name, "the manifest does not name it; remove it"


def _duplicates(splits: list[Split]) -> list[list[Copy]]:
    """Returns groups of samples with the same bytes: if checksum and size are equal, their sha256 are compared."""
    keys = [split.index["crc32"].astype(np.uint64) << 32 | split.index["size"] for split in splits]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *keys]), return_counts=True)
    groups: dict[str, list[Copy]] = defaultdict(list)
    for split, of_split in zip(splits, keys):
        for sample in np.flatnonzero(np.isin(of_split, values[counts > 1])).tolist():
            with suppress(OSError):
                groups[hashlib.sha256(split.stored(sample)).hexdigest()].append(
                    Copy(split.name, sample, int(split.index["label"][sample]))
                )
    return [group for group in groups.values() if len(group) > 1]
