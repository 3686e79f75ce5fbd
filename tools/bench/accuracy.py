"""CIFAR-10, 50,000 training and 10,000 test images, by three recipes: an hour and a half.

One net, narrow by default, about as many minutes for each recipe, curves side by side. The seed's recipe and the
paper's are theirs but for the net, its initialisation (He's: theirs is for the full width), crops of 32 from 36 pixels,
and bf16; modern's crops are random resized ones. Inputs are of unit variance, which He's initialisation is for: with
the paper's, pixels less the mean image, the loss ran off within six steps at its rate, and stood still at a tenth of
it. A run that was stopped is resumed; one that is done is not run again.
"""

from pathlib import Path

from pipeline.files import read_object
from tools.bench import harness, plots, trained
from tools.bench.proof.training import times_to

EPOCHS, WIDTH = 35, 0.375
LRN_COSTS = 1.4  # an epoch with response normalisation, of one with batch normalisation, by processor time
LEVELS = (0.6, 0.7, 0.75, 0.8, 0.85)
COMMON = """
    --model.name small --model.weight-init he --augment.resize 36 --augment.crop 32 --train.precision bf16
    --run.log-every 50"""
RECIPES = {
    "modern": """
        --train.batch 256 --train.crop-sizes --train.crop-until --augment.scale-jitter 0.5 1 --optim.weight-decay 5e-4
        --optim.warmup-epochs 2 --regularize.ema 0.998 --model.dropout 0.3 --train.compile off""",
    "seed": "--augment.statistics dataset",
    "paper": "--augment.normalize mean-std",
}


ONLY = {"choices": RECIPES, "help": "one recipe; what --json holds of others stays"}
OPTIONS = {"images": Path, "dir": Path("runs/accuracy"), "epochs": EPOCHS, "width": WIDTH, "only": ONLY}


def run(args: harness.Namespace, record: harness.Record, scratch: Path) -> None:
    shards = trained.shards(args.images, args.dir, scratch, size=36)
    results = read_object(args.json).get("results", {}) if args.only and args.json else {}
    for name in [args.only] if args.only else RECIPES:
        folder = args.dir / name
        result = trained.trained(folder, flags(name, shards, epochs=args.epochs, width=args.width))
        results[name] = result | {"seconds_to": times_to(LEVELS, folder)["seconds_to"]}
        record.keep(results=results)
    print(trained.table(results))
    if args.json:
        plots.accuracies(args.json, args.json.parent)


def flags(name: str, shards: Path, *, epochs: int, width: float) -> list[str]:
    """A recipe as arguments of train/run.py. epochs: of modern; the others get fewer, for about the same time."""
    epochs = epochs if name == "modern" else round(epochs / LRN_COSTS)
    own = f"--train.epochs {epochs} --model.width {width} {COMMON} {RECIPES[name]}"
    return [name, "--data.shards", str(shards), *own.split()]
