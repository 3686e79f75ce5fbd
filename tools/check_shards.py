"""Checks a shard folder against its manifest: counts, sizes, sha256, headers, index, labels, checksums.

    python tools/check_shards.py shards/digits
    python tools/check_shards.py /data/shards --deep --json check.json --html shards.html

Exit codes: 0 all is well, 1 something is wrong and was named, 2 usage, 65 the folder is no dataset.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product

import numpy as np

from pipeline import manifest, pool, verify
from pipeline.decode import decode
from pipeline.errors import CHECK_FAILED, DataError
from pipeline.files import Json, write_json
from pipeline.progress import Progress
from tools import cli
from tools.page import thumbnail, write_page

CLASSES, PER_CLASS, LISTED = 60, 6, 30  # pictures on a page, whatever the set's size is
SIDE = 160  # pixels of a picture


def main() -> None:
    p = cli.Parser(description=__doc__)
    p.path("dir", "DIR", "the shard folder")
    p.flag("deep", "also decode every image and read the tars with webdataset")
    p.workers()
    p.files(html="a page with counts, sizes and pictures", json="write all that was found there, with class histograms")
    args = p.parse_args()
    workers = pool.worker_count(args.workers)
    dataset = manifest.open_dataset(args.dir, check_splits=False)
    with Progress("checking", sum(split.samples for split in dataset.splits.values())) as progress:
        found = verify.check(dataset, deep=args.deep, workers=workers, progress=progress.update)
    print_report(found)
    if args.json:
        write_json(args.json, asdict(found) | {"ok": found.ok})
    if args.html:
        write_page(args.html, "shards.html", report=found, checks=verify.CHECKS, **facts(dataset, found))
        print(f"page: {args.html}")
    if not found.ok:
        sys.exit(CHECK_FAILED)


def print_report(report: verify.Report) -> None:
    """Prints the folder's content, the checks and the findings."""
    print(f"{report.root}: {report.dataset}, fingerprint {report.fingerprint[:16]}")
    for name, split in report.splits.items():
        used = [count for count in split.histogram if count]
        line = f"  {name}: {split.samples:,} samples in {split.shards} shards, {split.bytes / 1e6:,.1f} MB"
        if used:
            spread = f"{min(used):,} to {max(used):,} samples each"
            line += f"; {len(used)} of {len(split.histogram)} classes, {spread}"
        print(line + (f"; {split.unlabelled:,} without a label" if split.unlabelled else ""))
    for check, what in verify.CHECKS.items():
        found = [finding for finding in report.findings if finding.check == check]
        result = f"{len(found):>4} wrong   " if found else "ok           " if report.ok else "none found   "
        if check in verify.DEEP and not report.deep:
            print(f"  not checked    {what} (--deep)")
        else:
            print(f"  {result}   {what}")
        for finding in found:
            print(f"      {finding.file}: {finding.what}")
    across = sum(len({copy.split for copy in group}) > 1 for group in report.duplicates)
    differ = sum(len({copy.label for copy in group}) > 1 for group in report.duplicates)
    print(
        f"  note: {len(report.duplicates) - across} groups of equal images within a split, {across} across splits,"
        f" {differ} with different labels"
    )


# The page


def facts(dataset: manifest.Dataset, report: verify.Report) -> Json:
    """Returns the page's content besides the report; omits splits whose index is damaged."""
    picture = partial(picture_of, dataset)
    splits, names, mean = [dataset.splits[name] for name in report.splits], dataset.class_names, []
    with contextlib.suppress(DataError):  # it was not measured
        mean = [thumbnail(dataset.mean_image.round().astype(np.uint8), SIDE)]
    return {
        "set": dataset.manifest,
        "names": names,
        "mean": mean,
        "sheet": {
            label: [picture(split, i) for i in np.flatnonzero(split.index["label"] == label)[:PER_CLASS].tolist()]
            for split in splits[:1]
            for label in range(0, len(names), -(-len(names) // CLASSES))
        },
        "sides": {s.name: np.histogram(np.minimum(s.index["width"], s.index["height"]), 24) for s in splits},
        "converted": list(converted(dataset, splits)),
        "duplicates": [
            [(copy, picture(dataset.splits[copy.split], copy.sample)) for copy in group[:PER_CLASS]]
            for group in report.duplicates[:LISTED]
        ],
    }


def converted(dataset: manifest.Dataset, splits: list[manifest.Split]) -> Iterator[tuple[Json, str]]:
    """Yields converted images, each with the picture whose key was made from its name."""
    listed = dataset.manifest.get("converted", [])[:LISTED]
    found = {}
    with contextlib.suppress(OSError):  # a shard that is missing
        found = {(s.name, key): (s, i) for s in splits if listed for i, key in enumerate(s.keys())}
    for image in listed:
        parts = re.sub("[^A-Za-z0-9_/-]", "_", image["image"].rpartition(".")[0]).split("/")
        names = product((parts[0], *dataset.splits), ("_".join(parts[1:]), parts[-1]))
        place = next(filter(None, map(found.get, names)), None)
        yield image, picture_of(dataset, *place) if place else ""


def picture_of(dataset: manifest.Dataset, split: manifest.Split, sample: int) -> str:
    """A thumbnail; "" if the image cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        data, row = split.stored(sample), split.index[sample]
        if dataset.encoding == "raw":
            return thumbnail(np.frombuffer(data, np.uint8).reshape(row["height"], row["width"], 3), SIDE)
        return thumbnail(decode(data), SIDE)
    return ""


if __name__ == "__main__":
    cli.run(main)
