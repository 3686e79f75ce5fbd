"""The loader with cuts beside that of an earlier checkout, in one run: IMAGES BEFORE FILE.json [FFCV_PYTHON].

BEFORE is a checkout of 702004f, the last commit whose loader knows no cuts:

    git worktree add --detach ../before 702004f
    python tests/tools/cuts_pairs.py imagenet-sample.tar ../before cuts.json

In each of five rounds a process of its own measures each cell, as `tools/bench loader` does.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipeline.cores import usable_cores  # noqa: E402 (the path comes first)
from tools.bench import data, harness, loader  # noqa: E402

ROUNDS, SECONDS, BATCH = 5, 2.0, 128
BEFORE = ("portable", "jitter", "dali-cpu")
NOW = [*BEFORE, *(f"cuts-{name}" for name in BEFORE), "decode"]
BOUNDS = {  # of the rate with cuts, relative to that of the checkout before
    ("jpeg", "portable"): 1.15,
    ("jpeg", "jitter"): 1.15,
    ("keep", "portable"): 1.15,
    ("keep", "jitter"): 1.4,
    ("keep", "dali-cpu"): 1.2,
}


def main() -> None:
    images, before, out, *ffcv = map(Path, sys.argv[1:])
    here = harness.ALONE
    args = Namespace(
        json=out,
        rounds=ROUNDS,
        seconds=SECONDS,
        batch=BATCH,
        threads=usable_cores(),
        only=[*NOW, "ffcv"] if ffcv else NOW,
        ffcv_python=ffcv[0] if ffcv else None,
    )
    record = harness.Record(args, "Loader rates with cuts, and those of a checkout before cuts; medians of rounds.")
    record.content["command"] = f"python tests/tools/cuts_pairs.py {images.name} before {out.name}"
    with harness.scratch_folder() as scratch:
        folder = data.unpacked(images, scratch / "images")
        cells = []
        for kind in ("jpeg", "keep"):
            data.shard(folder, scratch / kind)
            cells += [(here, cell) for cell in loader.cells_on(kind, folder, scratch, args)]
            args.only, now = BEFORE, args.only
            for cell in loader.cells_on(kind, folder, scratch, args):
                cell.what["loader"] += ", before cuts"
                cells.append((before.resolve() / here.relative_to(here.parents[2]), cell))
            args.only = now
        for number in range(ROUNDS):
            for harness.ALONE, cell in cells:
                harness.measure(cell)
            record.keep(results=[cell.record() for _, cell in cells])
            print(f"round {number + 1} of {ROUNDS} done", file=sys.stderr, flush=True)
    rates = {(r["data"], r["loader"]): r["images_per_second"] for r in record.content["results"]}
    ours, ratios = loader.OURS, {}
    for (kind, name), bound in BOUNDS.items():
        ratio = rates[kind, ours[f"cuts-{name}"]] / rates[kind, f"{ours[name]}, before cuts"]
        ratios[f"{kind}, {name}"] = {"ratio": ratio, "bound": bound}
    decode = rates["jpeg", ours["cuts-portable"]] / rates["jpeg", "decode alone (libjpeg-turbo)"]
    ratios["jpeg, decode alone"] = {"ratio": decode, "bound": 1.05}
    record.keep(ratios=ratios)
    print("\n".join(f"{name}: {r['ratio']:.3f}, at least {r['bound']}" for name, r in ratios.items()))
    sys.exit(any(r["ratio"] < r["bound"] for r in ratios.values()))


if __name__ == "__main__":
    main()
