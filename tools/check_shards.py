"""Looks whether a shard folder is what its manifest says: counts, sizes, sha256, headers, index, labels, checksums.

    python tools/check_shards.py shards/digits
    python tools/check_shards.py /data/shards --deep --json check.json

Exit codes: 0 all is well, 1 something is wrong and was named, 2 usage, 65 the folder is no dataset.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)


from pipeline import manifest, verify
from pipeline.cores import usable_cores
from pipeline.errors import CHECK_FAILED, ConfigError
from pipeline.files import write_json
from pipeline.progress import Progress
from tools import cli


def main() -> None:
    p = cli.Parser(prog="check_shards.py", description=__doc__)
    p.add_argument("dir", type=Path, metavar="DIR", help="the shard folder")
    p.add_argument("--deep", action="store_true", help="decode every image, too")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: a core each)")
    p.add_argument(
        "--json", type=cli.new_file, metavar="FILE", help="write all that was found there, with class histograms"
    )
    args = p.parse_args()
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: must not be negative")
    dataset = manifest.open_dataset(args.dir, check_splits=False)
    progress = Progress("checking", sum(split.samples for split in dataset.splits.values()))
    try:
        workers = args.workers or usable_cores()
        found = verify.check(args.dir, deep=args.deep, workers=workers, progress=progress.update)
    finally:
        progress.close()
    print(verify.table(found))
    if args.json:
        write_json(args.json, verify.as_json(found))
    if not found.ok:
        sys.exit(CHECK_FAILED)


if __name__ == "__main__":
    cli.run(main)
