"""Writes a trained net as a file for others, with its model card, and compares it with the source on real images.

    python tools/export.py runs/demo demo.safetensors

By its ending, FILE is .safetensors, .onnx, or .pth: a state_dict that torchvision's AlexNet or the seed's net loads.
Beside it, NAME.json and NAME.md describe it. Exit codes: 0 done, 1 its logits are not those of the source, 2 usage,
65 bad data, 74 not writable.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import dataclasses
import json
import os
from typing import Any

from pipeline.errors import ConfigError, DataError, ExpressError, reading
from pipeline.files import PARTIAL, Json, fsync_path, write_json
from tools import cli, predict
from tools.page import write_page

KINDS = (".safetensors", ".onnx", ".pth")
COMPARED = 16  # images
# Fields of model.* that change the net for the same weights, or the shapes of weights.
FORM = ("width", "norm", "activation", "overlapping_pool", "towers", "drop")
ONNX_CLOSE = 1e-4  # greatest difference of logits, relative to the greatest logit; other formats must be equal
OPSET = 18


def parser() -> cli.Parser:
    p = cli.Parser(description=__doc__)
    p.path("model", "MODEL", "a run, a checkpoint, or weights")
    p.add_argument("out", type=cli.new_file, metavar="FILE", help=f"what to write: {', '.join(KINDS)}")
    p.model_options()
    p.option("data.shards", "", "images to compare (the run's own)", dest="shards", metavar="DIR")
    p.path("--images", "DIR", "a folder of images to compare, if there are no shards")
    p.path("--evaluation", "FILE", "evaluate.py's --json, for the card", action="append", default=[])
    p.flag("force", "overwrite existing files")
    return p


def main() -> None:
    args = parser().parse_args()
    out, kind = args.out, args.out.suffix.lower()
    if kind not in KINDS:
        raise ConfigError(f"{out}: choose a name that ends with {', '.join(KINDS)}")
    if out.exists() and not args.force:
        raise ConfigError(f"{out}: exists already; choose another name, or --force")

    import torch

    model = cli.open_model(args.model, args)
    model.card.accuracy.extend(evaluated(path) for path in args.evaluation)
    check_exportable(model, kind)
    if not args.force:
        check_cards(model, out)
    images = real_images(model, args)
    partial = out.with_name(out.stem + PARTIAL + out.suffix)
    try:
        write(kind, model, images, partial)
        with torch.no_grad():
            ours, theirs = model.net(images), reloaded(partial, model)(images)
        differs = float((ours - theirs).abs().max())
        if not differs <= (kind == ".onnx") * ONNX_CLOSE * max(1.0, float(ours.abs().max())):
            raise ExpressError(f"{out}: its logits differ by {differs:.3g} from the source's, so it is not kept")
        fsync_path(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    for path in (out, *write_cards(model.card, out)):
        print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"predicts as {model} does on {len(images)} images: logits differ by {differs:.2g} at most")


def check_exportable(model: Any, kind: str) -> None:
    """Raises ConfigError for a net that cannot be written, or would be another net after loading."""
    from train.classifier import Onnx

    if isinstance(model.net, Onnx):
        raise ConfigError(f"{model.source}: nothing is made from ONNX; export from the run, or from its .safetensors")
    if kind == ".pth" and (reason := no_pth(model)):
        raise ConfigError(f"{reason}; choose .safetensors or .onnx")


def no_pth(model: Any) -> str:
    """Returns why neither torchvision's class nor the seed's is this net; "" if one is."""
    from model import AlexNet, ModelConfig

    config, name, crop = model.card.model, model.card.model.name, model.card.augment.crop
    if not isinstance(model.net, AlexNet) or model.net.variant.names not in ("seed", "torchvision"):
        return f"model.name={name}: .pth is for torchvision's AlexNet and the seed's net, which have other layers"
    for field in FORM:
        value, own = getattr(config, field), getattr(ModelConfig(name), field)
        if value != own:
            return f"model.{field}={value}: .pth is for {name}'s own class, which has {own}"
    if name == "seed" and (model.classes, crop) != (1000, 224):
        return f"{model.classes} classes and augment.crop={crop}: the seed's class is for 1000 and 224"
    return ""


def card_files(out: Path) -> tuple[Path, Path]:
    """NAME.json and NAME.md beside the weights NAME.suffix."""
    return out.with_suffix(".json"), out.with_suffix(".md")


def write_cards(card: Any, out: Path) -> tuple[Path, Path]:
    from train.evaluation import BEST

    as_json, as_text = card_files(out)
    write_json(as_json, card.as_json())
    write_page(as_text, "card.md", name=out.stem, card=card, best=BEST)
    return as_json, as_text


def check_cards(model: Any, out: Path) -> None:
    """Raises ConfigError if `out` would replace the card of another net; files of one net may share a card."""
    from train.model_card import read_beside

    existing = next(filter(Path.exists, card_files(out)), None)
    card = read_beside(out)
    if existing and (card is None or card.as_json() != model.card.as_json()):
        raise ConfigError(f"{existing}: exists already, of something else; choose another name, or --force")


def evaluated(path: Path) -> Json:
    """A row of the card from evaluate.py's --json."""
    from train.evaluation import NAMES

    with reading(f"{path}:", "name what evaluate.py --json has written", OSError):
        values = json.loads(path.read_bytes())
        if len(values["models"]) != 1:
            raise DataError(f"{path}: is of {len(values['models'])} nets; name an evaluation of this one")
        return {name: values[name] for name in ("split", "views", "command", *NAMES)}


def real_images(model: Any, args: argparse.Namespace) -> Any:
    """(n, 3, crop, crop) float32: images of a folder, or validation images of the shards."""
    import numpy as np
    import torch

    from pipeline.manifest import open_dataset
    from pipeline.read.loader import Loader
    from pipeline.storage import is_url

    if args.images:
        viewer = predict.make_viewer(model, args, views=1)
        return torch.from_numpy(
            np.concatenate(
                [viewer(predict.decoded(file)) for file in predict.image_files([str(args.images)])[:COMPARED]]
            )
        )
    shards = args.shards or model.card.recipe.get("config", {}).get("data", {}).get("shards", "")
    if not (shards and (is_url(shards) or Path(shards).is_dir())):
        where = f"its shards {shards} are not here" if shards else "it does not record its shards"
        raise ConfigError(f"{model.source}: {where}; name images to compare by --data.shards or --images")
    dataset = open_dataset(shards, check_splits=False, allow_http=args.allow_http)
    split = "val" if "val" in dataset.splits else next(iter(dataset.splits))
    with Loader(
        dataset,
        split=split,
        batch=COMPARED,
        train=False,
        statistics=model.statistics(dataset),
        augment=dataclasses.replace(model.card.augment, views=1),
    ) as loader:
        return next(iter(loader)).images.clone()


# Writers and readers


def write(kind: str, model: Any, images: Any, path: Path) -> None:
    import torch

    from train.checkpoint import write_tensors
    from train.model_card import METADATA

    metadata = {METADATA: json.dumps(model.card.as_json())}
    # Copies that share no memory, in the format of files
    tensors = {name: t.clone().contiguous() for name, t in model.net.state_dict().items()}
    if kind == ".safetensors":
        write_tensors(path, tensors, metadata)
    elif kind == ".pth":
        torch.save(tensors, path)
    else:
        write_onnx(model.net, metadata, images, path)


def write_onnx(net: Any, metadata: dict[str, str], images: Any, path: Path) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise ConfigError(f"{path.suffix}: needs {err.name}; pip install 'imagenet-express[export]'") from err
    import warnings

    import torch

    net = net.to(memory_format=torch.contiguous_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net,
            (images[:2].contiguous(),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
        )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)


def reloaded(path: Path, model: Any) -> Any:
    """The written net, loaded as its users would load it."""
    import torch

    from train.classifier import open_classifier

    if path.suffix != ".pth":
        return open_classifier(path).net
    saved = torch.load(path, weights_only=True)
    if model.net.variant.names == "torchvision":
        from torchvision.models import alexnet

        net = alexnet(num_classes=model.classes)
    else:
        from model import AlexNet, ModelConfig

        net = AlexNet(ModelConfig("seed"), classes=model.classes, crop=model.card.augment.crop)
    net.load_state_dict(saved)
    return net.eval()


if __name__ == "__main__":
    cli.run(main)
