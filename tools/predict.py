"""Classifies images: prints the five most probable classes of each.

    python tools/predict.py runs/demo docs/seven.png

IMAGE is a file, a folder (with all below it), or - for an image on standard input; all that Pillow reads.
Exit codes: 0 done, 2 usage, 65 an image or the net cannot be used (the other images are classified all the same).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from pipeline.errors import BAD_DATA, ConfigError, DataError
from pipeline.files import Json, write_json
from tools import cli
from tools.page import thumbnail, write_page

AT_ONCE = 32  # images
SHOWN = 320  # pixels of a picture's longer side on the page


def parser() -> cli.Parser:
    p = cli.Parser(description=__doc__)
    p.path("model", "MODEL", "a run, a checkpoint, .safetensors, .pth or .onnx")
    p.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or - for standard input")
    p.option("views", 1, "centre, or ten as the paper (%(default)s)", choices=(1, 10))
    p.model_options()
    p.option("data.shards", "", "the training data, if asked for", dest="shards", metavar="DIR")
    p.files(html="a page with the pictures and bars", json="all predictions")
    return p


def main() -> None:
    args = parser().parse_args()
    files = image_files(args.images)

    import numpy as np
    import torch

    model = cli.open_model(args.model, args)
    viewer = make_viewer(model, args, views=args.views)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.net.to(device)
    answers, pictures = [], []
    for start in range(0, len(files), AT_ONCE):
        batch = [image for name in files[start : start + AT_ONCE] if (image := read(name, viewer, args.html))]
        if batch:
            names, views, shown = zip(*batch, strict=True)
            found = predicted(model, torch.from_numpy(np.stack(views)).to(device), names)
            for answer in found:
                print(cli.printable(answer["image"]))
                for row in answer["best"]:
                    print(cli.printable(f"  {row['probability']:7.2%}  {label_of(row)}"))
            answers += found
            pictures += shown
    if args.json:
        write_json(args.json, {"model": str(model), "views": args.views, "answers": answers})
    if args.html:
        write_page(
            args.html, "predict.html", title=str(model), shown=zip(answers, pictures, strict=True), label=label_of
        )
        print(f"page: {args.html}")
    if failed := len(files) - len(answers):
        print(f"error: {failed} of {len(files)} images cannot be read; the others are classified", file=sys.stderr)
        sys.exit(BAD_DATA)


def image_files(names: list[str]) -> list[str]:
    """Replaces folders by the images in them. Raises DataError for a folder without any, ConfigError for - twice."""
    if names.count("-") > 1:
        raise ConfigError("IMAGE -: standard input holds one image")
    from pipeline.write.sources.base import PassedOver
    from pipeline.write.sources.folders import files_of_images

    files, passed_over = [], PassedOver()
    for name in names:
        if name == "-" or not os.path.isdir(name):  # "" is no folder, but Path("") is one
            files.append(name)
            continue
        inside = []
        for file in sorted(files_of_images(Path(name), passed_over)):
            if os.path.exists(file) and not os.path.isfile(file):  # a pipe would wait
                passed_over.add("pipes and devices", file)
            else:
                inside.append(file)
        if not inside:
            raise DataError(f"{name}: holds no image; name a folder of images, or the files themselves")
        files += inside
    if passed_over:
        print(cli.printable(f"passed over: {passed_over}"), file=sys.stderr)
    return files


def read(name: str, viewer: Any, pictured: object) -> tuple[str, Any, str] | None:
    """Returns the name, the views, (views, 3, crop, crop) float32, and a picture if `pictured`. If the image cannot be
    read, prints a line on stderr and returns None."""
    try:
        pixels = decoded(name)
    except DataError as err:
        print(f"error: {cli.printable(str(err))}", file=sys.stderr)
        return None
    return name, viewer(pixels), thumbnail(pixels, SHOWN) if pictured else ""


def decoded(name: str) -> Any:
    """(height, width, 3) uint8. Raises DataError."""
    from pipeline.decode import BadImage, decode

    try:
        return decode(sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes())
    except BadImage as err:
        raise DataError(f"{name}: {err}") from err
    except OSError as err:
        raise DataError(f"{name}: {err.strerror or err}") from err


def make_viewer(model: Any, args: Any, *, views: int) -> Any:
    """Returns a function from decoded pixels to the net's input. args: the options that name the shards."""
    from pipeline.manifest import open_dataset
    from pipeline.read.portable import Viewer

    dataset = open_dataset(args.shards, check_splits=False, allow_http=args.allow_http) if args.shards else None
    return Viewer(dataclasses.replace(model.card.augment, views=views), model.statistics(dataset))


def predicted(model: Any, views: Any, names: Sequence[str]) -> list[Json]:
    """Returns a row of predictions per image. views: (n, views, 3, crop, crop)."""
    import torch

    from train.evaluation import best_classes, logits_by_view, mean_scores

    known = model.card.inputs
    with torch.no_grad():
        best, probabilities = best_classes(mean_scores(logits_by_view(model.net, views)))
    return [
        {
            "image": name,
            "best": [
                {
                    "class": known.classes[label] if known else str(label),
                    "name": known.class_names[label] if known else f"class {label}",
                    "probability": probability,
                }
                for label, probability in zip(*row, strict=True)
            ],
        }
        for name, *row in zip(names, best.tolist(), probabilities.tolist(), strict=True)
    ]


# Output


def label_of(row: Json) -> str:
    return row["name"] if row["class"] in (row["name"], "") else f"{row['name']} ({row['class']})"


if __name__ == "__main__":
    cli.run(main)
