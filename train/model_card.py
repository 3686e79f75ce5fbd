"""The model card: a file of weights explains itself. JSON inside the file and beside it, Markdown for people.

It holds the net's configuration, how it sees images, its inputs (train.inputs), the recipe, and each accuracy with the
command that measured it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import ModelConfig
from pipeline.errors import DataError
from pipeline.files import atomic_write, write_json
from pipeline.read.augment import AugmentConfig

from .inputs import Inputs
from .resume import as_saved

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
            return cls(
                model=as_saved(ModelConfig(), values["model"]),
                augment=as_saved(AugmentConfig(), values["augment"]),
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
