"""Measures a trained net, or the mean of several, on a split: every image once, with 95 % intervals.

    python tools/evaluate.py runs/demo --data.shards shards/digits

MODEL is a run, a checkpoint or weights; several are one ensemble. For many GPUs:
accelerate launch --config_file docker/accelerate/8gpu.yaml tools/evaluate.py …
Exit codes: 0 done, 2 usage, 65 bad data, 74 not writable.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import csv
import dataclasses
import io
import re
import time
from typing import Any
from unicodedata import normalize

from pipeline.errors import ConfigError, DataError
from pipeline.files import Json, write_json, write_text
from pipeline.manifest import Dataset, open_dataset
from pipeline.progress import Progress
from tools import cli
from train import environment

SUBMITTED = re.compile(r"ILSVRC20\d\d_test_(\d{8})")


def parser() -> cli.Parser:
    p = cli.Parser(description=__doc__)
    p.path("models", "MODEL", "run, checkpoint, .safetensors, .pth or .onnx", nargs="+")
    p.add_argument("--data.shards", dest="shards", required=True, metavar="DIR", help="what to measure on")
    p.option("data.split", "val", "(%(default)s)", dest="split", metavar="NAME")
    p.option("views", 1, "centre, or ten as the paper (%(default)s)", choices=(1, 10))
    p.option("batch", 256, "images at once, over all ranks (%(default)s)", metavar="N")
    p.option("loader.max-bad-samples", 0, "damaged images to leave out (%(default)s)", dest="max_bad", metavar="N")
    p.option("precision", "trained", "(as %(default)s)", choices=("trained", "fp32", "bf16"))
    p.model_options()
    p.option("resamples", 1000, "of the bootstrap, 0: none (%(default)s)", metavar="N")
    p.files(
        json="all figures, by class too, with what they depend on",
        csv="each image's label and five predictions",
        submission="five labels a line, for ImageNet's test images",
    )
    return p


def main() -> None:
    args = parser().parse_args()
    for name, least in (("batch", 1), ("resamples", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: at least {least}")
    dataset = open_dataset(args.shards, allow_http=args.allow_http)
    labelled = (dataset.split(args.split).index["label"] >= 0).all()
    if not labelled and (args.json or not (args.submission or args.csv)):
        raise DataError(
            f"{args.shards}: {args.split} has no labels; --submission or --csv alone writes the predictions"
        )
    order = submission_order(dataset, args.split) if args.submission else []
    if args.csv and dataset.remote:
        dataset.split(args.split).keys()  # not at the end: raises ConfigError

    from train import distributed

    models = [cli.open_model(path, args) for path in args.models]
    for model in models:
        check_classes(model, dataset)
    chosen = {model.precision for model in models} if args.precision == "trained" else {args.precision}
    precision = "bf16" if chosen in ({"bf16"}, {"fp16"}) else "fp32"  # also for nets of different precisions
    accelerator = distributed.make_plain_accelerator(precision)
    distributed.take_cores(accelerator.device)
    started = time.monotonic()
    predictions = predicted(models, dataset, args, accelerator)
    if accelerator.is_main_process:
        print(f"{len(predictions.ids):,} images in {time.monotonic() - started:.1f} s", file=sys.stderr)
        if labelled:
            report(predictions, models, dataset, args, precision)
        if args.csv:
            write_csv(args.csv, predictions, dataset, args.split)
        if args.submission:  # official numbers, the most probable first
            ids = dataset.manifest["class_ids"]
            lines = (" ".join(str(ids[label]) for label in best) + "\n" for best in predictions.best[order])
            write_text(args.submission, "".join(lines))
            print(f"{args.submission}: {len(order):,} lines of five labels")


def check_classes(model: Any, dataset: Dataset) -> None:
    """Raises DataError if the classes of the net are not those of the data."""
    if model.classes != len(dataset.classes):
        raise DataError(
            f"{model.source}: predicts {model.classes:,} classes, but {dataset.place} has {len(dataset.classes):,}"
        )
    known = model.card.inputs
    if known is None or not known.fingerprint:  # another project's weights
        return
    for number, (theirs, ours) in enumerate(zip(known.classes, dataset.classes, strict=True)):
        if normalize("NFC", theirs) != normalize("NFC", ours):
            raise DataError(
                f"{model.source}: its class {number} is {theirs}, but {dataset.place} has {ours}; use shards of its"
                " classes"
            )


def predicted(models: list[Any], dataset: Dataset, args: argparse.Namespace, accelerator: Any) -> Any:
    """Returns the Predictions of all models' mean."""
    from pipeline.read.config import LoaderConfig
    from pipeline.read.loader import Loader
    from train.build import of_this_rank
    from train.evaluation import predict

    loaders, nets = {}, {}  # nets that see the same pixels share a loader
    with contextlib.ExitStack() as stack:
        for model in models:
            augment = dataclasses.replace(model.card.augment, views=args.views)
            statistics = model.statistics(dataset)
            image = statistics.mean_image
            pixels = (augment, statistics.mean, statistics.std, None if image is None else image.tobytes())
            if pixels not in loaders:
                loader = Loader(
                    dataset,
                    split=args.split,
                    batch=args.batch,
                    train=False,
                    statistics=statistics,
                    **of_this_rank(accelerator),
                    augment=augment,
                    # A submission has a line for each image.
                    config=LoaderConfig(max_bad_samples=0 if args.submission else args.max_bad),
                )
                loaders[pixels] = stack.enter_context(loader)
            nets.setdefault(loaders[pixels], []).append(model.net.to(accelerator.device))
        progress = stack.enter_context(Progress("evaluating", loader.samples, enabled=accelerator.is_main_process))
        return predict(nets, accelerator, progress=lambda n: progress.update(n * accelerator.num_processes))


# Reports


def report(predictions: Any, models: list[Any], dataset: Dataset, args: argparse.Namespace, precision: str) -> None:
    from train.evaluation import BEST, summary

    found = summary(predictions, dataset.classes, resamples=args.resamples)
    for model in models:
        print(f"model   {model}")
    views = "centre crop" if args.views == 1 else "ten views"
    classes = len(dataset.classes)
    images = len(dataset.split(args.split).index)
    of = f" of {images:,}" if found["images"] < images else ""
    print(f"data    {args.shards}, {args.split}: {found['images']:,}{of} images of {classes:,} classes, {views}")
    for name, label in (("top1", "top-1"), ("top5", "top-5"), ("loss", "loss")):
        if name != "top5" or classes > BEST:
            print(f"{label:<7} {figure(found, name)}")
    names = dict(zip(dataset.classes, dataset.class_names, strict=True))
    if found["confusions"]:
        print("confused most")
    for row in found["confusions"]:
        pair = f"{named(row['class'], names)} taken for {named(row['taken_for'], names)}"
        print(f"{row['count']:>7} of {row['images']:,}  {cli.printable(pair)}")
    if args.json:
        described = {
            "command": environment.command(),
            "models": [str(model) for model in models],
            "fingerprint": dataset.fingerprint,
            "split": args.split,
            "views": args.views,
            "precision": precision,
            "bad_samples": images - found["images"],
            "environment": environment.describe(),
        }
        write_json(args.json, described | found)


def figure(found: Json, name: str) -> str:
    form = ".4f" if name == "loss" else ".2%"
    low, high = found["interval_95"].get(name, (None, None))
    between = "" if low is None else f"   95 %: {low:{form}} to {high:{form}}"
    counted = f"   {found['correct'][name]:,} right" if name in found["correct"] else ""
    return f"{found[name]:{form}}{between}{counted}"


def named(wnid: str, names: dict[str, str]) -> str:
    return wnid if names[wnid] == wnid else f"{wnid} {names[wnid].split(',')[0]}"


def write_csv(path: Path, predictions: Any, dataset: Dataset, split: str) -> None:
    classes, count = dataset.classes, predictions.best.shape[1]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["key", "label", *(f"{of}{i + 1}" for of in ("answer", "probability") for i in range(count))])
    keys = dataset.split(split).keys()
    columns = (predictions.labels, predictions.best, predictions.probabilities.tolist())
    for key, label, best, probabilities in zip(map(keys.__getitem__, predictions.ids), *columns, strict=True):
        rows.writerow([key, classes[label] if label >= 0 else "", *(classes[c] for c in best), *probabilities])
    write_text(path, text.getvalue())


# The submission


def submission_order(dataset: Dataset, split: str) -> list[int]:
    """Returns the ids in the order of the official numbers. Raises DataError unless these are ImageNet's test split."""
    if "class_ids" not in dataset.manifest:
        raise DataError(f"{dataset.place}: its manifest has no official class numbers; shard ImageNet's archives again")
    found = {}
    for position, key in enumerate(dataset.split(split).keys()):
        match = SUBMITTED.fullmatch(key)
        if match is None:
            raise DataError(f"{dataset.place}: {key} is no test image of ImageNet; --submission needs its test split")
        found[int(match[1])] = position
    missing = min(set(range(1, len(found) + 1)) - found.keys(), default=None)
    if missing is not None:
        raise DataError(
            f"{dataset.place}: test image {missing} is missing, and a submission has a line for each; shard again"
        )
    return [found[number] for number in sorted(found)]


if __name__ == "__main__":
    cli.run(main, ranks=True)
