"""Measures a trained net, or the mean of several, on a split: every image once, with 95 % intervals.

    python tools/evaluate.py runs/demo --data.shards shards/digits

MODEL is a run, a checkpoint or weights; several are one ensemble. For many GPUs: accelerate launch tools/evaluate.py …
Exit codes: 0 done, 2 usage, 65 bad data, 74 not writable.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import csv
import dataclasses
import io
import re
import time
from typing import Any

from pipeline.errors import ConfigError, DataError
from pipeline.files import atomic_write, write_json
from pipeline.manifest import Dataset, open_dataset
from pipeline.progress import Progress
from tools import cli

SUBMITTED = re.compile(r"ILSVRC20\d\d_test_(\d{8})")


def parser() -> cli.Parser:
    p = cli.Parser(prog="evaluate.py", description=__doc__)
    p.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="run, checkpoint, .safetensors, .pth or .onnx")
    p.add_argument("--data.shards", dest="shards", type=Path, required=True, metavar="DIR", help="what to measure on")
    p.add_argument("--data.split", dest="split", default="val", metavar="NAME", help="(%(default)s)")
    p.add_argument("--views", type=int, choices=(1, 10), default=1, help="centre, or ten as the paper (%(default)s)")
    p.add_argument("--batch", type=int, default=256, metavar="N", help="images at once, over all ranks (%(default)s)")
    p.add_argument("--precision", choices=("trained", "fp32", "bf16"), default="trained", help="(as %(default)s)")
    cli.add_model_options(p)
    p.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap, 0: none (%(default)s)")
    p.add_argument(
        "--json", type=cli.new_file, metavar="FILE", help="all figures, by class too, with what they depend on"
    )
    p.add_argument("--csv", type=cli.new_file, metavar="FILE", help="each image's label and five answers")
    p.add_argument(
        "--submission", type=cli.new_file, metavar="FILE", help="five labels a line, for ImageNet's test images"
    )
    return p


def main() -> None:
    args = parser().parse_args()
    for name, least in (("batch", 1), ("resamples", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)}: at least {least}")
    dataset = open_dataset(args.shards)
    labelled = bool((dataset.split(args.split).index["label"] >= 0).all())
    if not (labelled or args.submission or args.csv):
        raise DataError(f"{args.shards}: {args.split} has no labels; --submission or --csv writes what is answered")
    positions = submitted(dataset, args.split) if args.submission else {}

    from train import distributed
    from train.classifier import open_classifier

    models = [
        open_classifier(path, preset=args.preset, which=args.checkpoint, averaged=not args.raw, shards=str(args.shards))
        for path in args.models
    ]
    for model in models:
        refuse_other_classes(model, dataset)
    precision = chosen_precision(args.precision, models)
    accelerator = distributed.make_plain_accelerator(precision)
    distributed.take_cores(accelerator.device)
    started = time.monotonic()
    answers = answered(models, dataset, args, accelerator)
    if accelerator.is_main_process:
        seconds = time.monotonic() - started
        print(f"{len(answers.labels):,} images in {seconds:.1f} s", file=sys.stderr)
        if args.csv:
            write_csv(args.csv, answers, dataset, args.split)
        if args.submission:
            write_submission(args.submission, answers, positions, dataset)
            print(f"{args.submission}: {len(positions):,} lines of five labels")
        if labelled:
            tell(answers, models, dataset, args, precision)


def chosen_precision(asked: str, models: list[Any]) -> str:
    trained = {model.precision for model in models}
    chosen = asked if asked != "trained" else trained.pop() if len(trained) == 1 else "fp32"
    return "bf16" if chosen in ("bf16", "fp16") else "fp32"


def refuse_other_classes(model: Any, dataset: Dataset) -> None:
    if model.classes != len(dataset.classes):
        raise DataError(
            f"{model.source}: answers {model.classes:,} classes, but {dataset.root} has {len(dataset.classes):,}"
        )
    known = model.card.inputs
    if known is None or not known.fingerprint:  # another project's weights
        return
    for number, (theirs, ours) in enumerate(zip(known.classes, dataset.classes, strict=True)):
        if theirs != ours:
            both = f"its class {number} is {theirs}, but {dataset.root} has {ours}"
            raise DataError(f"{model.source}: {both}; use shards of its classes")


def answered(models: list[Any], dataset: Dataset, args: argparse.Namespace, accelerator: Any) -> Any:
    from pipeline.read.loader import Loader
    from train.build import pixel_type
    from train.distributed import local_world
    from train.model_card import Inputs
    from train.predictions import Part, answer

    groups: list[tuple[Any, Any, list[Any]]] = []  # nets that see the same pixels share a loader
    for model in models:
        augment = dataclasses.replace(model.card.augment, views=args.views)
        known = model.card.inputs or Inputs.of(dataset, augment)
        alike = next((nets for a, i, nets in groups if a == augment and i.same_pixels(known)), None)
        if alike is None:
            groups.append((augment, known, alike := []))
        alike.append(model.net.to(accelerator.device))
    parts = [
        Part(
            nets,
            Loader(
                dataset,
                split=args.split,
                batch=args.batch,
                train=False,
                statistics=known.statistics,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                local_world=local_world(),
                device=accelerator.device,
                dtype=pixel_type(accelerator.mixed_precision, accelerator.device),
                channels_last=True,
                augment=augment,
            ),
        )
        for augment, known, nets in groups
    ]
    progress = Progress("evaluating", parts[0].loader.samples, enabled=accelerator.is_main_process)
    try:
        return answer(parts, accelerator, progress=lambda n: progress.update(n * accelerator.num_processes))
    finally:
        progress.close()
        for part in parts:
            part.loader.close()


# What is told


def tell(answers: Any, models: list[Any], dataset: Dataset, args: argparse.Namespace, precision: str) -> None:
    from train.predictions import summary

    found = summary(answers, dataset.classes, resamples=args.resamples)
    for model in models:
        print(f"model   {model}")
    views = "centre crop" if args.views == 1 else "ten views"
    print(
        f"data    {args.shards}, {args.split}: {found['images']:,} images of {len(dataset.classes):,} classes, {views}"
    )
    for name, label in (("top1", "top-1"), ("top5", "top-5"), ("loss", "loss")):
        print(f"{label:<7} {figure(found, name)}")
    names = dict(zip(dataset.classes, dataset.class_names, strict=True))
    if found["confusions"]:
        print("confused most")
    for row in found["confusions"]:
        pair = f"{named(row['class'], names)} taken for {named(row['taken_for'], names)}"
        print(f"{row['count']:>7} of {row['images']:,}  {pair}")
    if args.json:
        from train import environment

        described = {
            "command": environment.command(),
            "models": [str(model) for model in models],
            "fingerprint": dataset.fingerprint,
            "split": args.split,
            "views": args.views,
            "precision": precision,
            "environment": environment.describe(),
        }
        write_json(args.json, described | found)


def figure(found: dict[str, Any], name: str) -> str:
    value, interval = found[name], found["interval_95"].get(name)
    shown = (lambda x: f"{x:.4f}") if name == "loss" else (lambda x: f"{x:.2%}")
    counted = f"   {found['correct'][name]:,} right" if name in found["correct"] else ""
    return shown(value) + (f"   95 %: {shown(interval[0])} to {shown(interval[1])}" if interval else "") + counted


def named(wnid: str, names: dict[str, str]) -> str:
    return wnid if names[wnid] == wnid else f"{wnid} {names[wnid].split(',')[0]}"


def write_csv(path: Path, answers: Any, dataset: Dataset, split: str) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    k = answers.best.shape[1]
    rows.writerow(["key", "label", *(f"answer{i + 1}" for i in range(k)), *(f"probability{i + 1}" for i in range(k))])
    classes = dataset.classes
    for key, label, best, probabilities in zip(
        dataset.split(split).keys(), answers.labels, answers.best, answers.probabilities, strict=True
    ):
        rows.writerow([key, classes[label] if label >= 0 else "", *(classes[c] for c in best), *probabilities.tolist()])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


# The submission


def submitted(dataset: Dataset, split: str) -> dict[int, int]:
    """{official number: position in the split}, before anything is computed."""
    if "class_ids" not in dataset.manifest:
        raise DataError(f"{dataset.root}: its manifest has no official class numbers; shard ImageNet's archives again")
    found: dict[int, int] = {}
    for position, key in enumerate(dataset.split(split).keys()):
        match = SUBMITTED.fullmatch(key)
        if match is None:
            raise DataError(
                f"{dataset.root}: {key} is no test image of ImageNet; --submission goes with its test split"
            )
        found[int(match[1])] = position
    missing = next((n for n in range(1, len(found) + 1) if n not in found), None)
    if missing is not None:
        raise DataError(
            f"{dataset.root}: test image {missing} is missing, and a submission has a line for each; shard again"
        )
    return found


def write_submission(path: Path, answers: Any, positions: dict[int, int], dataset: Dataset) -> None:
    """Five official numbers a line, the best first, lines in the order of the images' numbers."""
    ids = dataset.manifest["class_ids"]
    with atomic_write(path) as file:
        for number in sorted(positions):
            best = answers.best[positions[number]]
            file.write((" ".join(str(ids[label]) for label in best) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
