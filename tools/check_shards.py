"""Checks a shard folder against its manifest: counts, sizes, sha256, headers, index, labels, checksums.

    python tools/check_shards.py shards/digits
    python tools/check_shards.py /data/shards --deep --json check.json

Exit codes: 0 all is well, 1 something is wrong and was named, 2 usage, 65 the folder is no dataset.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)


from dataclasses import asdict

from pipeline import manifest, pool, verify
from pipeline.errors import CHECK_FAILED
from pipeline.files import write_json
from pipeline.progress import Progress
from tools import cli


def main() -> None:
    p = cli.Parser(description=__doc__)
    p.path("dir", "DIR", "the shard folder")
    p.flag("deep", "also decode every image and read the tars with webdataset")
    p.workers()
    p.files(json="write all that was found there, with class histograms")
    args = p.parse_args()
    workers = pool.worker_count(args.workers)
    dataset = manifest.open_dataset(args.dir, check_splits=False)
    with Progress("checking", sum(split.samples for split in dataset.splits.values())) as progress:
        found = verify.check(args.dir, deep=args.deep, workers=workers, progress=progress.update)
    print_report(found)
    if args.json:
        write_json(args.json, asdict(found) | {"ok": found.ok})
    if not found.ok:
        sys.exit(CHECK_FAILED)


def print_report(report: verify.Report) -> None:
    """What the folder holds, what was checked, what was found."""
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
        result = f"{len(found):>4} wrong   " if found else "ok           "
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


if __name__ == "__main__":
    cli.run(main)
