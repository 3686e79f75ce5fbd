"""A trained net, ready to be asked: from a run, a checkpoint, or a file of weights."""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError
from pipeline.manifest import open_dataset
from pipeline.settings import updated

from . import model_card as cards
from .checkpoint import BEST, LATEST, RECORD, Checkpoints, Saved, load
from .config import Config
from .evaluation import NAMES
from .model_card import INPUTS, METADATA, PLAIN, Card, Inputs, read_inputs
from .networks import create_net, heads, load_weights, read_weights
from .presets import PRESETS

WHICH = (BEST, LATEST)


@dataclass(frozen=True)
class Classifier:
    """source: the file or folder that was read. net: float32, in evaluation mode: (N, 3, crop, crop) → (N, classes).

    precision: what it was trained in, if that is known.
    """

    source: Path
    net: nn.Module
    card: Card
    precision: str = "fp32"

    @property
    def classes(self) -> int:
        return int(self.card.weights["classes"])

    def __str__(self) -> str:
        w = self.card.weights
        step = f", step {w['step']:,}" if "step" in w else ""
        return f"{self.source} ({self.card.model.name}{step}{', averaged weights' if w.get('averaged') else ''})"


def open_classifier(
    path: Path, *, preset: str = "", which: str = BEST, averaged: bool = True, shards: str = ""
) -> Classifier:
    """A run folder, a checkpoint folder, or weights: .safetensors, .pth, .onnx.

    preset: what weights without a model card are of. which: best or latest, of a run's checkpoints. averaged: the
    averaged weights where there are any. shards: the training data, of a run that does not hold its inputs.
    Raises DataError for what is none of these, is damaged or fits another net, ConfigError for options that do not go
    with it.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name a run, a checkpoint or weights")
    if path.is_dir():
        if preset:
            raise ConfigError(f"--preset {preset}: {path} says itself what net it holds; leave it out")
        return _of_checkpoint(*_found(path, which), averaged=averaged, shards=shards)
    if path.suffix.lower() == ".onnx":
        return _of_onnx(path)
    return _of_weights(path, preset)


# Runs and checkpoints


def _found(path: Path, which: str) -> tuple[Path, Saved]:
    """The run folder and the checkpoint in it that `path` means."""
    if (path / "checkpoints").is_dir():
        checkpoints = Checkpoints(path, keep=1)
        try:
            return path, load(checkpoints.folder / (checkpoints.folder / which).read_text().strip())
        except FileNotFoundError:  # a run that was not evaluated yet has no best
            saved, damaged = checkpoints.newest()
        if saved is None:
            raise DataError(damaged[-1] if damaged else f"{path}: has no checkpoint yet; train on, or name another run")
        return path, saved
    if (path / RECORD).is_file():
        return path.resolve().parent.parent, load(path)
    raise DataError(f"{path}: neither a run nor a checkpoint: it has no checkpoints/ and no {RECORD}")


def _of_checkpoint(run: Path, saved: Saved, *, averaged: bool, shards: str) -> Classifier:
    flat = saved.state["config"]
    config = updated(Config(), flat)
    described = _described(run)
    known = read_inputs(run) or _from_shards(run, shards or described.get("shards", ""), config, flat)
    if known.fingerprint != flat["the dataset's fingerprint"]:
        raise DataError(f"{run}: its {INPUTS} is of another dataset than {saved.path}; copy the run folder whole")
    net = _new_net(config, len(known.classes))
    use = bool(averaged and saved.average)
    try:
        net.load_state_dict(saved.average if use else saved.model)
    except RuntimeError as err:
        raise DataError(f"{saved.path}: its weights are of another net than its configuration says") from err
    told = {"classes": len(known.classes), "step": saved.state["step"], "averaged": use}
    names = ("config", "command", "ranks", "precision", "environment")
    recipe = {name: described[name] for name in names if name in described}
    card = Card(config.model, config.augment, known, told, recipe, _validated(run, told["step"], use, recipe))
    return Classifier(saved.path, net, card, flat["train.precision"])


def _described(run: Path) -> dict[str, Any]:
    try:
        described = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return described if isinstance(described, dict) else {}
    except (OSError, ValueError):  # a checkpoint that was copied out of its run
        return {}


def _from_shards(run: Path, shards: str, config: Config, flat: dict[str, Any]) -> Inputs:
    told = f"{run}: does not hold its {INPUTS}; name the shards that it was trained on by --data.shards"
    try:
        dataset = open_dataset(shards, check_splits=False) if shards else None
    except DataError as err:
        raise DataError(f"{told} ({err})") from err
    if dataset is None or dataset.fingerprint != flat["the dataset's fingerprint"]:
        raise DataError(told)
    return Inputs.of(dataset, config.augment)


def _validated(run: Path, step: int, averaged: bool, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The accuracy that training itself has measured of these weights."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    kind = "val of average" if averaged else "val"
    data, augment = recipe.get("config", {}).get("data", {}), recipe.get("config", {}).get("augment", {})
    of = {"split": data.get("val_split", "val"), "views": augment.get("views", 1), "command": recipe.get("command", "")}
    found = [line for line in lines if line.get("kind") == kind and line.get("step") == step]
    return [{**of, **{name: line[name] for name in NAMES}} for line in found[-1:]]


# Weights


def _of_weights(path: Path, preset: str) -> Classifier:
    card = _card_inside(path) or cards.read_beside(path)
    if card and preset:
        raise ConfigError(f"--preset {preset}: {path} has a model card that says what it is; leave it out")
    if card:
        net = _new_net(Config(model=card.model, augment=card.augment), card.weights["classes"])
    else:
        if not preset:
            known = ", ".join(PRESETS)
            raise ConfigError(f"{path}: has no model card; say by --preset what net it is of: {known}")
        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
        config = PRESETS[preset]
        classes = _classes_in(read_weights(path), config)
        if classes == 0:
            raise DataError(f"{path}: holds no output layer of --preset {preset}; choose the one it is of")
        net = _new_net(config, classes)
        known_inputs = _of_torchvision(classes) if preset == "torchvision" else None
        card = Card(config.model, config.augment, known_inputs, {"classes": classes})
    try:
        note = load_weights(net, path)
    except DataError as err:
        told, other, _ = str(err).removeprefix("model.init: ").partition("; choose its model.name")
        if not other:
            raise DataError(told) from err
        told = told.partition("; it holds")[0]
        raise DataError(
            f"{told}; {f'it is not of --preset {preset}' if preset else 'its card is of other weights'}"
        ) from err
    if note:
        raise DataError(f"{note.partition(':')[0]}, and its model card of {card.weights['classes']}; export it again")
    return Classifier(path, net, card)


def _card_inside(path: Path) -> Card | None:
    """The card in a safetensors file's header. Other files have none."""
    if path.suffix.lower() != ".safetensors":
        return None
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100 << 20)))  # the format's own limit
        text = header.get("__metadata__", {}).get(METADATA)
    except (ValueError, AttributeError, struct.error) as err:
        raise DataError(f"{path}: not a whole safetensors file ({err}); copy or export it again") from err
    return Card.from_json(_parsed(text, path), source=path) if text else None


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as err:
        raise DataError(f"{path}: its model card cannot be read ({err}); export the weights again") from err


def _new_net(config: Config, classes: int) -> nn.Module:
    # On whatever the generator holds now: all that it draws is overwritten.
    with torch.random.fork_rng():
        net = create_net(dataclasses.replace(config.model, freeze="none"), classes=classes, crop=config.augment.crop)
    return net.eval().requires_grad_(False)


def _classes_in(weights: dict[str, Tensor], config: Config) -> int:
    """As many as the output layer has rows; 0 where there is no such layer."""
    named = heads(create_net(config.model, classes=2, crop=config.augment.crop))
    found = [weights[f"{name}.weight"] for name, _ in named if f"{name}.weight" in weights]
    return len(found[0]) if found and found[0].dim() else 0


def _of_torchvision(classes: int) -> Inputs | None:
    """torchvision names the thousand classes, in the order of their WordNet ids."""
    from torchvision.models import AlexNet_Weights

    names = tuple(AlexNet_Weights.DEFAULT.meta["categories"])
    return Inputs("ImageNet", "", names, names, PLAIN) if classes == len(names) else None


# ONNX


class Onnx(nn.Module):
    """An ONNX file on the CPU, by onnxruntime; called like a net."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.input = session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        array = np.ascontiguousarray(images.detach().cpu().numpy(), np.float32)
        logits = torch.from_numpy(self.session.run(None, {self.input: array})[0])
        return logits.to(images.device)


def _of_onnx(path: Path) -> Classifier:
    try:
        import onnxruntime
    except ImportError as err:
        raise ConfigError(f"{path}: needs onnxruntime; pip install 'imagenet-express[export]'") from err
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    except Exception as err:  # of kinds of its own, for every way a file can be wrong
        raise DataError(f"{path}: cannot be read as ONNX ({str(err).splitlines()[0][:120]}); export it again") from err
    card = Card.from_json(_parsed(text, path), source=path) if text else cards.read_beside(path)
    if card is None:
        raise DataError(f"{path}: has no model card, so how it sees images is not known; export it by tools/export.py")
    return Classifier(path, Onnx(session).eval(), card)
