"""Names what is in images: the five likeliest classes of each, with probabilities.

    python tools/predict.py runs/demo docs/seven.png

IMAGE is a file, a folder (with all below it), or - for an image on standard input; all that Pillow reads.
Exit codes: 0 done, 2 usage, 65 an image or the net cannot be used (the other images are answered all the same).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import base64
import dataclasses
import html
import io
from collections.abc import Iterator
from typing import Any

from pipeline.errors import BAD_DATA, ConfigError, DataError
from pipeline.files import atomic_write, write_json
from tools import cli

AT_ONCE = 32  # images
BEST = 5
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"}
SHOWN = 320  # pixels of a picture's longer side on the page


def parser() -> cli.Parser:
    p = cli.Parser(prog="predict.py", description=__doc__)
    p.add_argument("model", type=Path, metavar="MODEL", help="a run, a checkpoint, .safetensors, .pth or .onnx")
    p.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or - for standard input")
    p.add_argument("--views", type=int, choices=(1, 10), default=1, help="centre, or ten as the paper (%(default)s)")
    cli.add_model_options(p)
    p.add_argument("--data.shards", dest="shards", default="", metavar="DIR", help="the training data, if asked for")
    p.add_argument("--html", type=cli.new_file, metavar="FILE", help="a page with the pictures and bars")
    p.add_argument("--json", type=cli.new_file, metavar="FILE", help="all answers")
    return p


def main() -> None:
    args = parser().parse_args()
    files, failed = found(args.images), 0

    import torch

    from train.classifier import open_classifier

    model = open_classifier(
        args.model, preset=args.preset, which=args.checkpoint, averaged=not args.raw, shards=args.shards
    )
    viewer = make_viewer(model, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.net.to(device)
    answers: list[dict[str, Any]] = []
    thumbnails: list[str] = []
    for start in range(0, len(files), AT_ONCE):
        names, views, pictures = [], [], []
        for name in files[start : start + AT_ONCE]:
            try:
                pixels = decoded(name)
            except DataError as err:
                print(f"error: {cli.printable(str(err))}", file=sys.stderr)
                failed += 1
                continue
            names.append(name)
            views.append(torch.from_numpy(viewer(pixels)))
            pictures.append(thumbnail(pixels) if args.html else "")
        if names:
            found_here = answered(model, torch.stack(views).to(device), names)
            answers += found_here
            thumbnails += pictures
            for one in found_here:
                show(one)
    if args.json:
        write_json(args.json, {"model": str(model), "views": args.views, "answers": answers})
    if args.html:
        write_page(args.html, str(model), answers, thumbnails)
        print(f"page: {args.html}")
    if failed:
        print(f"error: {failed} of {len(files)} images cannot be read; the others are answered", file=sys.stderr)
        sys.exit(BAD_DATA)


def found(names: list[str]) -> list[str]:
    """Folders become the images in them. Raises DataError for what is not there, ConfigError for - twice."""
    if names.count("-") > 1:
        raise ConfigError("IMAGE -: standard input holds one image")
    return [file for name in names for file in ([name] if name == "-" else _in(Path(name)))]


def _in(path: Path) -> Iterator[str]:
    if not path.is_dir():
        yield str(path)
        return
    inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not inside:
        raise DataError(f"{path}: holds no image; name a folder of images, or the files themselves")
    yield from map(str, inside)


def decoded(name: str) -> Any:
    """(height, width, 3) uint8."""
    from pipeline.write.images import BadImage, decode

    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return decode(data)
    except BadImage as err:
        raise DataError(f"{name}: {err}") from err
    except OSError as err:
        raise DataError(f"{name}: {err.strerror or err}") from err


def make_viewer(model: Any, args: argparse.Namespace) -> Any:
    from pipeline.manifest import open_dataset
    from pipeline.read.portable import Viewer
    from train.model_card import Inputs

    augment = dataclasses.replace(model.card.augment, views=args.views)
    if model.card.inputs:
        statistics = model.card.inputs.statistics
    elif augment.statistics == "imagenet":
        from train.model_card import PLAIN as statistics
    elif args.shards:
        statistics = Inputs.of(open_dataset(args.shards, check_splits=False), augment).statistics
    else:
        raise ConfigError(
            f"{model.source}: how its images were normalised is not known; name the shards by --data.shards"
        )
    return Viewer(augment, statistics)


def answered(model: Any, views: Any, names: list[str]) -> list[dict[str, Any]]:
    """views: (n, views, 3, crop, crop)."""
    import torch

    from train.predictions import joined

    known = model.card.inputs
    with torch.no_grad():
        logits = model.net(views.flatten(0, 1)).float().view(*views.shape[:2], -1)
        best = joined(logits.unbind(1)).softmax(1).sort(descending=True, stable=True)
    answers = []
    for name, classes, probabilities in zip(names, best.indices.tolist(), best.values.tolist(), strict=True):
        rows = [
            {
                "class": known.classes[label] if known else str(label),
                "name": known.class_names[label] if known else f"class {label}",
                "probability": probability,
            }
            for label, probability in zip(classes[:BEST], probabilities[:BEST], strict=True)
        ]
        answers.append({"image": name, "best": rows})
    return answers


# What is told


def show(answer: dict[str, Any]) -> None:
    print(cli.printable(answer["image"]))
    for row in answer["best"]:
        print(f"  {row['probability']:7.2%}  {label_of(row)}")


def label_of(row: dict[str, Any]) -> str:
    return row["name"] if row["class"] in (row["name"], "") else f"{row['name']} ({row['class']})"


def thumbnail(pixels: Any) -> str:
    """A JPEG as a data URL."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SHOWN, SHOWN))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1.5rem }}
figure {{ margin: 0 }}
figure img {{ width: 100%; height: 180px; object-fit: contain; background: #f4f4f4 }}
figcaption {{ font-weight: 600; margin: .3rem 0; overflow-wrap: anywhere }}
.bar {{ position: relative; margin: 2px 0; padding: 1px 4px; background: #f4f4f4 }}
.bar i {{ position: absolute; inset: 0 auto 0 0; background: #f3b6b0 }}
.bar span {{ position: relative; display: flex; justify-content: space-between; gap: .5rem }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
</html>
"""


def write_page(path: Path, title: str, answers: list[dict[str, Any]], pictures: list[str]) -> None:
    """Needs nothing beside itself: pictures and style are inside."""
    figures = "\n".join(figure(answer, picture) for answer, picture in zip(answers, pictures, strict=True))
    with atomic_write(path) as file:
        file.write(PAGE.format(title=html.escape(title), figures=figures).encode())


def figure(answer: dict[str, Any], picture: str) -> str:
    name = html.escape(answer["image"])
    bars = "".join(
        f'<div class="bar"><i style="width:{row["probability"]:.2%}"></i>'
        f"<span><b>{html.escape(label_of(row))}</b>{row['probability']:.1%}</span></div>"
        for row in answer["best"]
    )
    return f'<figure><img src="{picture}" alt="{name}"><figcaption>{name}</figcaption>{bars}</figure>'


if __name__ == "__main__":
    cli.run(main)
