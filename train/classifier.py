"""A trained net, ready to classify images: from a run, a checkpoint, or a file of weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError, first_line, reading
from pipeline.files import Json
from pipeline.manifest import Dataset, Statistics, open_dataset
from pipeline.read.augment import IMAGENET_STATISTICS
from pipeline.settings import flatten, updated

from .checkpoint import BEST, Saved, find
from .config import Config
from .evaluation import NAMES
from .model_card import INPUTS, METADATA, Card, Inputs, read_beside, read_inputs
from .networks import create_net, heads, load_weights, read_weights
from .presets import PRESETS
from .run_folder import CONFIG, read_config, read_metrics


class Classifier(NamedTuple):
    """source: the file or folder that was read. net: float32, in evaluation mode: (N, 3, crop, crop) → (N, classes).

    precision: of its training, if known.
    """

    source: Path
    net: nn.Module
    card: Card
    precision: str = "fp32"

    @property
    def classes(self) -> int:
        return self.card.weights["classes"]

    def statistics(self, dataset: Dataset | None) -> Statistics:
        """The statistics that normalise its input. Raises ConfigError if neither card nor dataset has them."""
        if self.card.inputs:
            return self.card.inputs.statistics
        if self.card.augment.statistics == "imagenet":
            return IMAGENET_STATISTICS
        if dataset is None:
            raise ConfigError(
                f"{self.source}: how its images were normalised is not known; name the shards by --data.shards"
            )
        return Inputs.of(dataset, self.card.augment).statistics

    def __str__(self) -> str:
        w = self.card.weights
        step = f", step {w['step']:,}" if "step" in w else ""
        return f"{self.source} ({self.card.model.name}{step}{', averaged weights' if w.get('averaged') else ''})"


def open_classifier(
    path: Path, *, preset: str = "", which: str = BEST, averaged: bool = True, shards: str = ""
) -> Classifier:
    """Opens a run folder, a checkpoint folder, or weights: .safetensors, .pth, .onnx.

    preset: names the net of weights without a model card. which: best or latest, of a run's checkpoints. averaged:
    prefer averaged weights. shards: the training data of a run whose folder does not hold its inputs.
    Raises DataError for a path that is none of these, is damaged or fits another net, ConfigError for options that do
    not apply to it.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name a run, a checkpoint or weights")
    if path.is_dir():
        if preset:
            raise ConfigError(f"--preset {preset}: {path} records its net; leave it out")
        return _from_checkpoint(*find(path, which), averaged=averaged, shards=shards)
    if path.suffix.lower() == ".onnx":
        return _from_onnx(path)
    return _from_weights(path, preset)


def recorded(path: Path) -> tuple[Json, Inputs | None]:
    """Returns the fields of model and augment, by flat names, and the inputs that a run, checkpoint or card records.

    Returns ({}, None) for weights without a card. Raises DataError if the path cannot be read.
    """
    if path.is_dir():
        run, saved = find(path)
        return saved.state["config"], read_inputs(run)
    card = _card(path) if path.is_file() else None
    return (flatten(card), card.inputs) if card else ({}, None)


# Runs and checkpoints


def _from_checkpoint(run: Path, saved: Saved, *, averaged: bool, shards: str) -> Classifier:
    flat = saved.state["config"]
    config = updated(Config(), flat)
    # A checkpoint that was copied out of its run has none.
    described = read_config(run) if (run / CONFIG).exists() else {}
    known = read_inputs(run) or _inputs_from_shards(run, shards or described.get("shards", ""), config, flat)
    if known.fingerprint != flat["the dataset's fingerprint"]:
        raise DataError(f"{run}: its {INPUTS} is of another dataset than {saved.path}; copy the run folder whole")
    averaged = bool(averaged and saved.average)
    weights = {"classes": len(known.classes), "step": saved.state["step"], "averaged": averaged}
    names = ("config", "command", "ranks", "precision", "environment")
    recipe = {name: described[name] for name in names if name in described}
    card = Card(config.model, config.augment, known, weights, recipe, _validated(run, config, weights, recipe))
    net = _new_net(card)
    try:
        net.load_state_dict(saved.average if averaged else saved.model)
    except RuntimeError as err:
        raise DataError(f"{saved.path}: its weights do not fit the net of its configuration") from err
    return Classifier(saved.path, net, card, flat["train.precision"])


def _inputs_from_shards(run: Path, shards: str, config: Config, flat: Json) -> Inputs:
    missing = f"{run}: does not hold its {INPUTS}; name the shards that it was trained on by --data.shards"
    try:
        dataset = open_dataset(shards, check_splits=False) if shards else None
    except DataError as err:
        raise DataError(f"{missing} ({err})") from err
    if dataset is None or dataset.fingerprint != flat["the dataset's fingerprint"]:
        raise DataError(missing)
    return Inputs.of(dataset, config.augment)


def _validated(run: Path, config: Config, weights: Json, recipe: Json) -> list[Json]:
    """Returns the accuracy that training recorded for these weights, as a row of the card."""
    try:
        lines = read_metrics(run)["val of average" if weights["averaged"] else "val"]
        how = {"split": config.data.val_split, "views": config.augment.views, "command": recipe.get("command", "")}
        found = [line for line in lines if line.get("step") == weights["step"]]
        return [{**how, **{name: line[name] for name in NAMES}} for line in found[-1:]]
    except (DataError, KeyError):
        return []


# Weights


def _from_weights(path: Path, preset: str) -> Classifier:
    card = _card(path)
    if card and preset:
        raise ConfigError(f"--preset {preset}: {path} has a model card that names its net; leave it out")
    card = card or _card_of_preset(path, preset)
    net = _new_net(card)
    whose = f"it is not of --preset {preset}" if preset else "its card is of other weights"
    if note := load_weights(net, path, cure=whose):
        raise DataError(f"{note.partition(':')[0]}, and its model card of {card.weights['classes']}; export it again")
    return Classifier(path, net, card)


def _card_of_preset(path: Path, preset: str) -> Card:
    """Makes the card of weights that have none."""
    weights = read_weights(path)
    if not preset:
        raise ConfigError(f"{path}: has no model card; name its net by --preset: {', '.join(PRESETS)}")
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    model, augment = PRESETS[preset].model, PRESETS[preset].augment
    named = [f"{name}.weight" for name, _ in heads(_new_net(Card(model, augment, None, {"classes": 2})))]
    classes = next((len(weights[name]) for name in named if name in weights and weights[name].dim()), 0)
    if classes == 0:
        raise DataError(f"{path}: holds no output layer of --preset {preset}; choose the one it is of")
    inputs = None
    if preset == "torchvision":
        from torchvision.models import AlexNet_Weights

        names = tuple(AlexNet_Weights.DEFAULT.meta["categories"])  # in the order of their WordNet ids
        inputs = Inputs("ImageNet", "", names, names, IMAGENET_STATISTICS) if classes == len(names) else None
    return Card(model, augment, inputs, {"classes": classes})


def _card(path: Path, text: str | None = None) -> Card | None:
    """The card of a file: `text`, or what a safetensors file's metadata hold, or else the card beside it."""
    if path.suffix.lower() == ".safetensors":
        damaged = f"{path}: not a whole safetensors file: its header"
        with (
            reading(damaged, "copy or export it again", OverflowError, MemoryError, RecursionError),
            open(path, "rb") as file,
        ):
            # Read directly, since safetensors opens no path that is not UTF-8.
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            text = header.get("__metadata__", {}).get(METADATA)
    with reading(f"{path}: its model card", "export the weights again"):
        return Card.from_json(json.loads(text)) if text else read_beside(path)


def _new_net(card: Card) -> nn.Module:
    # The initialisation is overwritten; it must not draw from the caller's generator.
    with torch.random.fork_rng():
        net = create_net(
            dataclasses.replace(card.model, freeze="none"), classes=card.weights["classes"], crop=card.augment.crop
        )
    return net.eval().requires_grad_(False)


# ONNX


class Onnx(nn.Module):
    """An ONNX file on the CPU, by onnxruntime, with the interface of a net."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.input = session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        array = np.ascontiguousarray(images.detach().cpu().numpy(), np.float32)
        return torch.from_numpy(self.session.run(None, {self.input: array})[0]).to(images.device)


def _from_onnx(path: Path) -> Classifier:
    try:
        import onnxruntime
    except ImportError as err:
        raise ConfigError(f"{path}: needs onnxruntime; pip install 'imagenet-express[export]'") from err
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    except Exception as err:  # onnxruntime has a class of its own for every way a file can be wrong
        raise DataError(f"{path}: cannot be read as ONNX ({first_line(err)[:120]}); export it again") from err
    card = _card(path, text)
    if card is None:
        raise DataError(f"{path}: has no model card, so how it sees images is not known; export it by tools/export.py")
    return Classifier(path, Onnx(session).eval(), card)
