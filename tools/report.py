"""Draws a run's curves into its folder and prints where everything is.

    python tools/report.py runs/demo
    python tools/report.py runs/demo --json docs/results/demo.json

Exit codes: 0 done, 2 usage, 65 not a run folder.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline.errors import DataError
from pipeline.files import Json, write_json
from tools import cli
from train.run_folder import read_config, read_metrics


def draw(path: Path, *panels: tuple[Json, list[tuple[Any, ...]]]) -> None:
    """Panels side by side as PNG: of each, labels as Axes.set takes them, and curves as (x, y, style, name)."""
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


def draw_curves(lines: dict[str, list[Json]], best: Json, path: Path) -> None:
    """Loss and accuracy over epochs, with the `best` evaluation marked."""
    last, panels = lines["train"][-1], []
    for ylabel, curves in CURVES.items():
        points = []
        for kind, field, *style in curves:
            epochs = [line["step"] * last["epoch"] / last["step"] for line in lines[kind]]
            values = [line[field] for line in lines[kind]]
            if values and (field != "top5" or min(values) < 1):  # of five classes it is always 1
                points.append((epochs, values, *style))
        panels.append(
            ({"xlabel": "epoch", "ylabel": ylabel, "ylim": (0, None), "title": cli.printable(path.parent.name)}, points)
        )
    points.append(([best["epoch"]], [best["top1"]], "C3*", f"best: {best['top1']:.2%} in epoch {best['epoch']}"))
    draw(path, *panels)


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
    p.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    p.files(json="also write the result with what it depended on")
    args = p.parse_args()
    run = args.run
    lines = read_metrics(run)
    if not (lines["train"] and lines["val"]):
        raise DataError(f"{run}: no epoch was finished yet; draw it when one is")
    if args.json:
        write_json(args.json, result(run, lines))
    kept, evaluated = run / "checkpoints" / "best", [*lines["val"], *lines["val of average"]]
    name = kept.read_text().strip() if kept.is_file() else ""
    saved = [line for line in evaluated if name == f"step-{line['step']:08d}"]
    best = max(saved or evaluated, key=lambda line: line["top1"])
    draw_curves(lines, best, run.resolve() / "curves.png")
    whose = " (averaged weights)" if best["kind"] != "val" else ""
    print(f"best: top-1 {best['top1']:.2%}{whose} on {best['images']} validation images in epoch {best['epoch']}")
    print(f"curves:      {run / 'curves.png'}")
    print(f"metrics:     {run / 'metrics.jsonl'} (TensorBoard: tensorboard --logdir {run})")
    print(f"checkpoints: {run / 'checkpoints' / name}")
    print(f"settings:    {run / 'config.json'}")


if __name__ == "__main__":
    cli.run(main)
