"""Writes a page about a run, draws its curves and prints where everything is; one page compares several runs.

    python tools/report.py runs/demo
    python tools/report.py runs/demo --json docs/results/demo.json
    python tools/report.py runs/seed runs/paper

Exit codes: 0 done, 2 usage, 65 not a run folder.
"""

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline.errors import ConfigError, DataError
from pipeline.files import Json, write_json
from pipeline.settings import flatten
from tools import cli
from tools.page import write_page
from train.run_folder import CONFIG, EXIT, SHOWCASE, read_config, read_json, read_metrics


def draw(path: Path, *panels: tuple[Json, list[tuple[Any, ...]]]) -> None:
    """Draws panels side by side as a PNG. panels: (arguments of Axes.set, curves as (x, y, style, name)) each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(panels)
    figure, grid = plt.subplots(1, count, figsize=(4 + 3 * count, 4), layout="constrained", squeeze=False)
    for axes, (labels, curves) in zip(grid[0], panels, strict=True):
        for *points, name in curves:
            axes.plot(*points, label=name)
        axes.set(**labels)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


CURVES = {  # of each panel: the kind of line, the field, the style and the name of each curve
    "cross-entropy": [("train", "loss", "C0-", "training"), ("val", "loss", "C1.-", "validation")],
    "accuracy": [
        ("val", "top1", "C1.-", "validation top-1"),
        ("val", "top5", "C1:", "validation top-5"),
        ("val of average", "top1", "C1--", "validation top-1 of averaged weights"),
    ],
}
ON_PAGE = CURVES | {
    "learning rate": [("train", "lr", "", "learning rate")],
    "images per second": [("train", "images_per_second", "", "training")],
    "time spent waiting for data": [("train", "data_wait", "", "training")],
}
POINTS = 2000  # of a curve on a page


def curves_of(lines: dict[str, list[Json]], panel: list[tuple[str, ...]]) -> Iterator[tuple[Any, ...]]:
    """(epochs, values, style, name) of each curve of a panel that the run has."""
    steps_per_epoch = max(line["step"] / line["epoch"] for line in lines["train"])  # the ratio is lower within an epoch
    for kind, field, *style in panel:
        points = [(line["step"] / steps_per_epoch, line[field]) for line in lines[kind] if field in line]
        if points and (field != "top5" or min(points, key=lambda point: point[1])[1] < 1):  # of five classes always 1
            yield *zip(*points, strict=True), *style


def draw_curves(lines: dict[str, list[Json]], best: Json | None, path: Path) -> None:
    """Loss and accuracy over epochs, with the `best` evaluation marked."""
    panels = []
    for ylabel, panel in CURVES.items():
        labels = {"xlabel": "epoch", "ylabel": ylabel, "ylim": (0, None), "title": cli.printable(path.parent.name)}
        panels.append((labels, list(curves_of(lines, panel))))
    if best:
        panels[-1][1].append(
            ([best["epoch"]], [best["top1"]], "C3*", f"best: {best['top1']:.2%} in epoch {best['epoch']}")
        )
    draw(path, *panels)


# The page


def read(path: Path) -> Json:
    """Returns all data of a run that the page shows; fields that were not recorded are empty."""
    lines = read_metrics(path)
    if not lines["train"]:
        raise DataError(f"{path}: no epoch was finished yet; draw it when one is")
    config, ended, shown = (read_json(path / name, cure="copy it again") or {} for name in (CONFIG, EXIT, SHOWCASE))
    return {
        **shown,
        "path": path,
        "name": path.resolve().name,
        "lines": lines,
        "settings": flatten(config.pop("config", {})),
        "environment": flatten(config),
        "ended": ended,
    }


def plot(title: str, runs: list[Json]) -> Json:
    traces = []
    for number, run in enumerate(runs):
        for curve, (epochs, values, _, name) in enumerate(curves_of(run["lines"], ON_PAGE[title])):
            kept = reduced(np.array(values, float))
            x, y = ([float(f"{column[i]:.5g}") for i in kept] for column in (epochs, values))
            traces.append({"x": x, "y": y, "name": name, "of": run["name"], "run": number, "curve": curve})
    return {"title": title, "traces": traces}


def reduced(values: np.ndarray) -> list[int]:
    """Returns the indices of at most POINTS values: minimum and maximum of each section, so that no peak is lost."""
    stretches = np.array_split(np.arange(len(values)), min(POINTS // 2, len(values)))
    return sorted({int(s[end(values[s])]) for s in stretches for end in (np.argmin, np.argmax)})


def result(run: Path, lines: dict[str, list[Json]], *, timed: bool = True) -> Json:
    """The result of a run and what it depended on, for docs/results. timed: with seconds, of a run never resumed."""
    names = ("command", "ranks", "precision", "backend", "fingerprint", "environment")
    described = read_config(run, *names)
    last, average = lines["val"][-1], lines["val of average"]
    if timed and len(lines["start"]) != 1:
        raise DataError(f"{run}: was resumed, so the time between its attempts would count; record an unbroken run")
    started = lines["start"][0]["time"]
    seconds = {
        "seconds_training_and_evaluating": round(last["time"] - started, 1),
        "seconds_by_epoch": [round(line["time"] - started, 1) for line in lines["val"]],
    }
    return {
        **{name: described[name] for name in names},
        "epochs": last["epoch"],
        **(seconds if timed else {}),
        "images_per_second": round(statistics.median(line["images_per_second"] for line in lines["train"]), 1),
        "last": {name: last[name] for name in ("top1", "top5", "loss", "images")},
        "top1_by_epoch": [line["top1"] for line in lines["val"]],
        **({"top1_of_average_by_epoch": [line["top1"] for line in average]} if average else {}),
    }


def main() -> None:
    p = cli.Parser(description=__doc__)
    p.path("run", "RUN", "run folders", nargs="+")
    p.files(
        html="the page (default: report.html in RUN; here if there are several)",
        json="also write the result of one run with what it depended on",
    )
    args = p.parse_args()
    runs = [read(path) for path in args.run]
    page = args.html or (args.run[0] if len(runs) == 1 else Path()) / "report.html"
    if args.json:
        if len(runs) > 1 or not runs[0]["lines"]["val"]:
            raise ConfigError("--json: needs one run, which was evaluated")
        write_json(args.json, result(args.run[0], runs[0]["lines"]))
    write_page(page, "report.html", runs=runs, plots=[plot(title, runs) for title in ON_PAGE])
    for run in runs:
        show(run["path"], run["lines"])
    print(f"report:      {page}")


def show(run: Path, lines: dict[str, list[Json]]) -> None:
    """Draws the curves and prints where everything is."""
    kept, evaluated = run / "checkpoints" / "best", [*lines["val"], *lines["val of average"]]
    name = kept.read_text(errors="replace").strip() if kept.is_file() else ""
    saved = [line for line in evaluated if name == f"step-{line['step']:08d}"]
    best = max(saved or evaluated, key=lambda line: line["top1"], default=None)
    draw_curves(lines, best, run.resolve() / "curves.png")
    if best:
        whose = " (averaged weights)" if best["kind"] != "val" else ""
        print(f"best: top-1 {best['top1']:.2%}{whose} on {best['images']} validation images in epoch {best['epoch']}")
    print(f"curves:      {run / 'curves.png'}")
    print(f"metrics:     {run / 'metrics.jsonl'} (TensorBoard: tensorboard --logdir {run})")
    print(f"checkpoints: {run / 'checkpoints' / name}")
    print(f"settings:    {run / 'config.json'}")


if __name__ == "__main__":
    cli.run(main)
