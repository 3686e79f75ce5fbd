"""The paper's figure 1: epochs until a four-layer net is wrong about a quarter of CIFAR-10's training images.

ReLU against tanh, each at every rate of one grid; the best rate of each counts. A run is given up where it is behind
the best of its activation, since it could not win any more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.files import write_json
from tools.bench import trained
from train import environment

ACTIVATIONS = ("relu", "tanh")
RATES = (0.003, 0.001, 0.01, 0.03)  # the likely ones first: the others are soon given up
MOST_EPOCHS = 60
TARGET = 0.75
CLAIM = "six times as fast (Krizhevsky et al. 2012, figure 1)"


def add_arguments(p: argparse.ArgumentParser) -> None:
    trained.add_arguments(p, "runs/fig1")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    shards = trained.shards(args.images, args.dir, size=32)
    results: dict[str, dict[str, Any]] = {}
    for activation in ACTIVATIONS:
        results[activation] = found = {}
        for rate in RATES:
            best = min((r["epochs"] for r in found.values() if r["reached"]), default=MOST_EPOCHS)
            found[str(rate)] = attempt(args.dir / f"{activation}-{rate}", shards, activation, rate, epochs=best)
    best = {name: fastest(found) for name, found in results.items()}
    print(table(results, best))
    if args.json:
        described = {
            "what": "epochs to 25 % training error of the four-layer net, by activation and rate",
            "claim": CLAIM,
            "command": "python tools/bench fig1",
            "environment": environment.describe(),
        }
        write_json(args.json, described | {"best": best, "results": results})
        draw(results, best, args.json.with_suffix(".png"))


def attempt(run: Path, shards: Path, activation: str, rate: float, *, epochs: int) -> dict[str, Any]:
    command = ["fig1", "--data.shards", str(shards), "--model.activation", activation, "--optim.lr", str(rate)]
    result = trained.trained(run, [*command, "--train.epochs", str(epochs)])
    reached = result["last"]["top1"] >= TARGET
    return {"rate": rate, "epochs": result["epochs"], "reached": reached, **result}


def fastest(found: dict[str, Any]) -> dict[str, Any] | None:
    """Of equal numbers of epochs the one that came further."""
    reached = [r for r in found.values() if r["reached"]]
    if not reached:
        return None
    best = min(reached, key=lambda r: (r["epochs"], -r["last"]["top1"]))
    return {"rate": best["rate"], "epochs": best["epochs"], "top1": best["last"]["top1"]}


def table(results: dict[str, Any], best: dict[str, Any]) -> str:
    rows = [f"{'':<8}" + "".join(f"{f'lr {rate:g}':>12}" for rate in sorted(RATES)) + f"{'best':>14}"]
    for name, found in results.items():
        cells = []
        for rate in sorted(RATES):
            r = found[str(rate)]
            cells.append(f"{'' if r['reached'] else '> '}{r['epochs']}".rjust(12))
        rows.append(f"{name:<8}" + "".join(cells) + f"{best[name]['epochs'] if best[name] else 'none':>14}")
    if all(best.values()):
        rows.append(f"tanh / relu: {best['tanh']['epochs'] / best['relu']['epochs']:.1f}; the paper: {CLAIM}")
    return "\n".join(rows)


def draw(results: dict[str, Any], best: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, style in (("relu", "-"), ("tanh", "--")):
        if best[name]:
            tops = results[name][str(best[name]["rate"])]["top1_by_epoch"]
            label = f"{name}, lr {best[name]['rate']:g}"
            axes.plot(range(len(tops) + 1), [0.9, *(1 - t for t in tops)], f"k{style}", label=label)
    axes.axhline(1 - TARGET, color="grey", linewidth=0.8)
    axes.set(xlabel="epochs", ylabel="training error rate", ylim=(0, 0.92), xlim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
