"""CIFAR-10 by three recipes on one net, narrow unless told: about as many minutes each, curves side by side.

The seed's recipe and the paper's are theirs but for the net, its initialisation (He's: theirs is for the full width),
crops of 32 from 36 pixels, and bf16; modern's crops are random resized ones. Inputs are of unit variance, which He's
initialisation is for: with the paper's, pixels less the mean image, the loss ran off within six steps at its rate, and
stood still at a tenth of it. A run that was stopped goes on; one that is done is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.files import write_json
from tools.bench import trained
from train import environment

EPOCHS, WIDTH = 35, 0.375
LRN_COSTS = 1.4  # an epoch with response normalisation, of one with batch normalisation, by processor time
LEVELS = (0.6, 0.7, 0.75, 0.8, 0.85)
NET = ["--model.name", "small", "--model.weight-init", "he"]
COMMON = ["--augment.resize", "36", "--augment.crop", "32", "--train.precision", "bf16", "--run.log-every", "50"]
RECIPES = {
    "modern": [
        *("--train.batch", "256", "--train.crop-sizes", "--train.crop-until", "--augment.scale-jitter", "0.5", "1"),
        *("--optim.weight-decay", "5e-4", "--optim.warmup-epochs", "2", "--regularize.ema", "0.998"),
        *("--model.dropout", "0.3", "--train.compile", "off"),
    ],
    "seed": ["--augment.statistics", "dataset"],
    "paper": ["--augment.normalize", "mean-std"],
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    trained.add_arguments(p, "runs/accuracy")
    p.add_argument("--epochs", type=int, default=EPOCHS, help="of modern; of the others 1 / 1.4 of it (%(default)s)")
    p.add_argument("--width", type=float, default=WIDTH, help="of the net, 1 on a GPU (%(default)s)")
    p.add_argument("--only", choices=list(RECIPES), help="one recipe; what --json holds of others stays")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.epochs < 1:
        raise ConfigError(f"--epochs {args.epochs}: at least 1")
    shards = trained.shards(args.images, args.dir, size=36)
    results = {}
    for name in [args.only] if args.only else RECIPES:
        results[name] = trained.trained(args.dir / name, flags(name, shards, epochs=args.epochs, width=args.width))
        results[name]["seconds_to"] = {f"{level:.0%}": seconds_to(level, results[name]) for level in LEVELS}
    print(table(results))
    if args.json:
        if args.only and args.json.is_file():
            held = json.loads(args.json.read_text())["results"] | results
            results = {name: held[name] for name in RECIPES if name in held}
        described = {
            "what": "CIFAR-10, 50,000 training and 10,000 test images, by three recipes on one narrow net",
            "command": "python tools/bench accuracy",
            "environment": environment.describe(),
        }
        write_json(args.json, described | {"results": results})
        draw(results, args.json.with_suffix(".png"))


def flags(name: str, shards: Path, *, epochs: int, width: float) -> list[str]:
    """A recipe as arguments of train/run.py. epochs: of modern; the others get fewer, for about the same time."""
    epochs = epochs if name == "modern" else max(1, round(epochs / LRN_COSTS))
    data = [name, "--data.shards", str(shards), "--train.epochs", str(epochs)]
    return [*data, *NET, *COMMON, "--model.width", str(width), *RECIPES[name]]


def seconds_to(level: float, result: dict[str, Any]) -> float | None:
    """Until an evaluation, of the weights or their average, first reached a top-1 of `level`, where that was timed."""
    if "seconds_by_epoch" not in result:
        return None
    tops = result["top1_by_epoch"]
    tops = [max(pair) for pair in zip(tops, result.get("top1_of_average_by_epoch", tops), strict=True)]
    return next((s for s, top1 in zip(result["seconds_by_epoch"], tops, strict=True) if top1 >= level), None)


def minutes(result: dict[str, Any]) -> str:
    seconds = result.get("seconds_training_and_evaluating")
    return f"{seconds / 60:.1f}" if seconds else "–"


def table(results: dict[str, Any]) -> str:
    levels = "".join(f"{f'to {level:.0%}':>9}" for level in LEVELS)
    rows = [f"{'recipe':<10} {'top-1':>8} {'best':>8} {'of average':>11} {'minutes':>8} {'img/s':>8}{levels}"]
    for name, result in results.items():
        average = result.get("top1_of_average_by_epoch")
        rows.append(
            f"{name:<10} {result['last']['top1']:>8.2%} {max(result['top1_by_epoch']):>8.2%}"
            f" {f'{average[-1]:.2%}' if average else '–':>11}"
            f" {minutes(result):>8} {result['images_per_second']:>8,.0f}"
            + "".join(f"{f'{s:,.0f} s' if s else '–':>9}" for s in result["seconds_to"].values())
        )
    return "\n".join(rows)


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in results.items():
        tops = result["top1_by_epoch"]
        (line,) = axes.plot(range(1, len(tops) + 1), [100 * t for t in tops], label=name)
        if average := result.get("top1_of_average_by_epoch"):
            label = f"{name}, averaged weights"
            axes.plot(range(1, len(tops) + 1), [100 * t for t in average], "--", color=line.get_color(), label=label)
    axes.set(xlabel="epoch", ylabel="top-1 on the test images, %", ylim=(None, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
