"""The model card of a file of weights: JSON inside the file and beside it; tools/templates/card.md is for people.

It holds the configuration of the net, how it sees images, its inputs, the recipe, and each accuracy with the command
that measured it. A run folder keeps the inputs alone, in the same form, as inputs.json.
"""

import base64
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model import ModelConfig
from pipeline.errors import reading
from pipeline.files import Json
from pipeline.manifest import Dataset, Statistics
from pipeline.read.augment import IMAGENET_STATISTICS, AugmentConfig
from pipeline.settings import updated

from .config import Config
from .run_folder import read_json

INPUTS = "inputs.json"


@dataclass(frozen=True)
class Inputs:
    """The properties of the training data on which a trained net depends. Fields have the names of the JSON.

    statistics: the statistics of the training images that `augment.normalize` needs; in JSON: mean, std, mean_image.
    """

    dataset: str
    fingerprint: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    statistics: Statistics
    class_ids: tuple[int, ...] = ()  # the official numbers of ImageNet's kits

    @classmethod
    def of(cls, dataset: Dataset, augment: AugmentConfig) -> "Inputs":
        """Raises DataError if the dataset has no statistics."""
        statistics = IMAGENET_STATISTICS
        if augment.statistics != "imagenet":
            mean_image = dataset.mean_image if augment.normalize == "mean-image" else None
            statistics = Statistics(dataset.mean, dataset.std, mean_image)
        return cls(
            str(dataset.manifest.get("dataset")),
            dataset.fingerprint,
            tuple(dataset.classes),
            tuple(dataset.class_names),
            statistics,
            tuple(dataset.manifest.get("class_ids", ())),
        )

    @classmethod
    def from_json(cls, values: Json) -> "Inputs":
        """Raises ValueError, KeyError or TypeError for values that `as_json` did not return."""
        pixels = None
        if image := values.get("mean_image"):
            pixels = np.frombuffer(base64.b64decode(image["float32"]), "<f4").reshape(image["shape"])
        mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        classes, names = (tuple(values[name]) for name in ("classes", "class_names"))
        if len(mean) != 3 or len(std) != 3 or len(classes) != len(names):
            raise ValueError("mean, std or class names of another number")
        statistics, ids = Statistics(mean, std, pixels), tuple(values.get("class_ids", ()))
        return cls(values["dataset"], values["fingerprint"], classes, names, statistics, ids)

    def as_json(self) -> Json:
        s = self.statistics
        values = {**vars(self), "mean": s.mean, "std": s.std}
        del values["statistics"]
        if s.mean_image is not None:
            data = base64.b64encode(np.ascontiguousarray(s.mean_image, "<f4").tobytes()).decode()
            values["mean_image"] = {"shape": s.mean_image.shape, "float32": data}
        return values


def read_inputs(run: Path) -> Inputs | None:
    """The inputs of a run; None for runs of older versions, which did not keep them. Raises DataError if damaged."""
    path, cure = run / INPUTS, "start or resume the run again, which writes it"
    values = read_json(path, cure=cure)
    with reading(f"{path}:", cure):
        return None if values is None else Inputs.from_json(values)


FORMAT, VERSION = "imagenet-express model card", 1
METADATA = "card"  # its name in the metadata of safetensors and ONNX files


@dataclass(frozen=True)
class Card:
    """weights: {"classes"}; of a run also {"step", "averaged"}. recipe: from config.json.

    accuracy: rows with the command that measured them.
    """

    model: ModelConfig
    augment: AugmentConfig
    inputs: Inputs | None
    weights: Json
    recipe: Json = field(default_factory=dict)
    accuracy: list[Json] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Any) -> "Card":
        """Raises ValueError, KeyError, TypeError or AttributeError if `values` are no card."""
        if (values["format"], values["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {values['format']!r} version {values['version']!r}")
        config = updated(Config(), {name: values[name] for name in ("model", "augment")})
        return cls(
            config.model,
            config.augment,
            Inputs.from_json(values["inputs"]) if values["inputs"] else None,
            {**values["weights"], "classes": int(values["weights"]["classes"])},
            dict(values["recipe"]),
            list(values["accuracy"]),
        )

    def as_json(self) -> Json:
        inputs = self.inputs and self.inputs.as_json()
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self), "inputs": inputs}


def read_beside(path: Path) -> Card | None:
    """The card beside weights that hold none themselves. Raises DataError if it cannot be read."""
    beside = path.with_suffix(".json")
    values = read_json(beside, cure="remove it, or export the weights again")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return None  # missing, or some other JSON
    with reading(f"{beside}: its model card", "export the weights again"):
        return Card.from_json(values)
