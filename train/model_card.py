"""The model card: a file of weights explains itself. JSON inside the file and beside it, Markdown for people.

It holds the net's configuration, how it sees images, its inputs, the recipe, and each accuracy with the
command that measured it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model import ModelConfig
from pipeline.errors import DataError
from pipeline.files import atomic_write, write_json
from pipeline.manifest import Dataset, Statistics
from pipeline.read.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from pipeline.settings import updated

from .config import Config

INPUTS = "inputs.json"
PLAIN = Statistics(IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class Inputs:
    """statistics: those that `augment.normalize` wants of the training images."""

    dataset: str
    fingerprint: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    statistics: Statistics
    class_ids: tuple[int, ...] = field(default=())  # the official numbers of ImageNet's kits

    @classmethod
    def of(cls, dataset: Dataset, augment: AugmentConfig) -> Inputs:
        """Raises DataError where the dataset was not measured."""
        measured = PLAIN if augment.statistics == "imagenet" else None
        return cls(
            dataset=str(dataset.manifest["dataset"]),
            fingerprint=dataset.fingerprint,
            classes=tuple(dataset.classes),
            class_names=tuple(dataset.class_names),
            statistics=measured or dataset.statistics(mean_image=augment.normalize == "mean-image"),
            class_ids=tuple(dataset.manifest.get("class_ids", ())),
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Inputs:
        """Raises ValueError, KeyError or TypeError for what `as_json` did not write."""
        image = values.get("mean_image")
        pixels = None
        if image is not None:
            pixels = np.frombuffer(base64.b64decode(image["float32"]), "<f4").reshape(image["shape"])
        mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or len(values["classes"]) != len(values["class_names"]):
            raise ValueError("mean, std or class names of another number")
        return cls(
            dataset=values["dataset"],
            fingerprint=values["fingerprint"],
            classes=tuple(values["classes"]),
            class_names=tuple(values["class_names"]),
            statistics=Statistics(mean, std, pixels),
            class_ids=tuple(values.get("class_ids", ())),
        )

    def as_json(self) -> dict[str, Any]:
        s = self.statistics
        values: dict[str, Any] = {
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "class_names": list(self.class_names),
            "mean": list(s.mean),
            "std": list(s.std),
        }
        if self.class_ids:
            values["class_ids"] = list(self.class_ids)
        if s.mean_image is not None:
            data = base64.b64encode(np.ascontiguousarray(s.mean_image, "<f4").tobytes()).decode()
            values["mean_image"] = {"shape": list(s.mean_image.shape), "float32": data}
        return values

    def same_pixels(self, other: Inputs) -> bool:
        """Whether images are normalised alike."""
        ours, theirs = self.statistics, other.statistics
        return (ours.mean, ours.std) == (theirs.mean, theirs.std) and (
            np.array_equal(ours.mean_image, theirs.mean_image)  # type: ignore[arg-type]  # two Nones are equal
        )

    def write(self, run: Path) -> None:
        write_json(run / INPUTS, self.as_json())


def read_inputs(run: Path) -> Inputs | None:
    """A run's, or None where it was begun before runs kept them. Raises DataError where they are damaged."""
    path = run / INPUTS
    try:
        return Inputs.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(f"{path}: cannot be read ({err}); start or resume the run again, which writes it") from err


FORMAT, VERSION = "imagenet-express model card", 1
METADATA = "card"  # its name in the metadata of safetensors and ONNX files


@dataclass(frozen=True)
class Card:
    """weights: {"classes"}, of a run also {"step", "averaged"}. recipe: of config.json.

    accuracy: what measured how much, by which command.
    """

    model: ModelConfig
    augment: AugmentConfig
    inputs: Inputs | None
    weights: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    accuracy: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Any, *, source: Path) -> Card:
        """Raises DataError for anything but a card."""
        try:
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {values['format']!r} version {values['version']!r}")
            config = updated(Config(), {name: values[name] for name in ("model", "augment")})
            return cls(
                model=config.model,
                augment=config.augment,
                inputs=Inputs.from_json(values["inputs"]) if values["inputs"] else None,
                weights={**values["weights"], "classes": int(values["weights"]["classes"])},
                recipe=dict(values["recipe"]),
                accuracy=list(values["accuracy"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise DataError(f"{source}: its model card cannot be read ({err}); export the weights again") from err

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": dataclasses.asdict(self.model),
            "augment": dataclasses.asdict(self.augment),
            "inputs": self.inputs.as_json() if self.inputs else None,
            "weights": self.weights,
            "recipe": self.recipe,
            "accuracy": self.accuracy,
        }

    def write_beside(self, path: Path) -> tuple[Path, Path]:
        """NAME.json and NAME.md beside the weights NAME.suffix; returns their paths."""
        beside, told = path.with_suffix(".json"), path.with_suffix(".md")
        write_json(beside, self.as_json())
        with atomic_write(told) as file:
            file.write(self.as_markdown(path.stem).encode())
        return beside, told

    def as_markdown(self, name: str) -> str:
        a, config = self.augment, self.recipe.get("config", {})
        lines = [f"# {name}", "", f"An AlexNet, `{self.model.name}`, of imagenet-express.", ""]
        if self.inputs:
            i = self.inputs
            lines += [f"- Data: {i.dataset}, {len(i.classes):,} classes, fingerprint `{i.fingerprint[:16]}`"]
        lines += [f"- Sees: short side {a.resize}, {a.crop} × {a.crop} pixels, normalised by `{a.normalize}`"]
        if self.weights:
            averaged = ", the average of the weights" if self.weights.get("averaged") else ""
            lines += [f"- Weights: of step {self.weights.get('step', 0):,}{averaged}"]
        if self.recipe:
            train, optim = config.get("train", {}), config.get("optim", {})
            lines += [
                f"- Recipe: {train.get('epochs')} epochs of batches of {train.get('batch')},"
                f" {optim.get('name')} at {optim.get('lr')}, {optim.get('schedule')};"
                f" in full in {name}.json",
                f"- Trained by: `{self.recipe.get('command')}`, {self.recipe.get('precision')},"
                f" {self.recipe.get('ranks')} ranks",
            ]
        lines += [
            "",
            "| accuracy on | images | views | top-1 | top-5 | measured by |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in self.accuracy:
            lines += [
                f"| {row['split']} | {row['images']:,} | {row['views']} | {row['top1']:.2%} | {row['top5']:.2%}"
                f" | `{row['command']}` |"
            ]
        if not self.accuracy:
            lines += ["| not measured | | | | | |"]
        return "\n".join([*lines, ""])


def read_beside(path: Path) -> Card | None:
    """The card beside weights that hold none themselves. Raises DataError where it cannot be read."""
    beside = path.with_suffix(".json")
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise DataError(f"{beside}: cannot be read as JSON ({err}); remove it, or export the weights again") from err
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return None  # some other JSON
    return Card.from_json(values, source=beside)
