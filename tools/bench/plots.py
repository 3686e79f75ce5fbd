"""Draws the plots of docs/results.md from the JSON files beside them.

python tools/bench/plots.py
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipeline.files import read_object
from tools import cli, report
from tools.bench import harness

RESULTS = harness.environment.ROOT / "docs" / "results"
TITLES = {"jpeg": "JPEG of short side 256", "keep": "original JPEG", "raw": "raw, 256×256"}


def draw(out: Path) -> None:
    accuracies(RESULTS / "accuracy.json", out)
    accuracies(RESULTS / "fig1.json", out)
    rates(RESULTS / "loader.json", out)


def rates(record: Path, out: Path) -> None:
    """Each round of each loader, on each kind of data; the fastest loader is at the top."""
    panels, results = [], sorted(read_object(record)["results"], key=lambda r: r["images_per_second"])
    for kind, title in TITLES.items():
        points = [(rate, r["loader"]) for r in results if r["data"] == kind for rate in r["rates"]]
        ours = [point for point in points if point[1].startswith("ours")]
        curves = [(*zip(*points), "C0o", "others"), (*zip(*ours), "C1o", "ours")]
        panels.append(({"xlabel": "images per second", "title": title, "xlim": (0, None)}, curves))
    report.draw(out / f"{record.stem}.png", *panels)


def accuracies(record: Path, out: Path) -> None:
    """Top-1 after each epoch: of each run and of its averaged weights; of figure 1 only the best rates' runs."""
    curves, images, found = [], "test", read_object(record)
    results = found["results"]
    if best := found.get("best"):
        images = "training"
        results = {f"{name}, lr {b['rate']}": results[name][str(b["rate"])] for name, b in best.items() if b}
    for name, result in results.items():
        average = result.get("top1_of_average_by_epoch", [])
        for tops, style, label in (result["top1_by_epoch"], "-", name), (average, "--", f"{name}, averaged weights"):
            if tops:
                curves.append((range(1, len(tops) + 1), tops, style, label))
    report.draw(out / f"{record.stem}.png", ({"xlabel": "epoch", "ylabel": f"top-1 on the {images} images"}, curves))


def main() -> None:
    cli.Parser(description=__doc__).parse_args()
    draw(RESULTS)


if __name__ == "__main__":
    cli.run(main)
