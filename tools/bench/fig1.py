"""The paper's figure 1: epochs until a four-layer net is wrong about a quarter of CIFAR-10's training images.

ReLU against tanh, each at every rate of one grid; the best rate of each counts. A run is given up when it is behind
the best of its activation, since it could not win any more.
"""

from pathlib import Path

from tools.bench import harness, plots, trained

ACTIVATIONS = ("relu", "tanh")
RATES = (0.003, 0.001, 0.01, 0.03)  # the likely ones first: the others are soon given up
MOST_EPOCHS = 60
TARGET = 0.75
CLAIM = "six times as fast (Krizhevsky et al. 2012, figure 1)"


OPTIONS = {"images": Path, "dir": Path("runs/fig1")}


def run(args: harness.Namespace, record: harness.Record, scratch: Path) -> None:
    shards = trained.shards(args.images, args.dir, scratch, size=32)
    results, bests = {}, {}
    for activation in ACTIVATIONS:
        results[activation] = found = {}
        for rate in RATES:
            epochs = best["epochs"] if (best := fastest(found)) else MOST_EPOCHS
            own = f"--model.activation {activation} --optim.lr {rate} --train.epochs {epochs}".split()
            folder = args.dir / f"{activation}-{rate}"
            result = trained.trained(folder, ["fig1", "--data.shards", str(shards), *own])
            found[str(rate)] = {"rate": rate, "reached": result["last"]["top1"] >= TARGET, **result}
            bests[activation] = fastest(found)
            record.keep(claim=CLAIM, best=bests, results=results)
    for activation, found in results.items():
        print(f"{activation}\n{trained.table(found)}\nbest: {bests[activation]}\n")
    if args.json:
        plots.accuracies(args.json, args.json.parent)


def fastest(found: harness.Json) -> harness.Json | None:
    """The rate with the fewest epochs; of equal ones, the one with the greatest accuracy."""
    reached = [r for r in found.values() if r["reached"]]
    best = min(reached, key=lambda r: (r["epochs"], -r["last"]["top1"]), default=None)
    return best and {"rate": best["rate"], "epochs": best["epochs"], "top1": best["last"]["top1"]}
