"""What a net's inputs and outputs are: how pixels are normalised, and which class each output stands for.

Kept in the run folder and in exported files, so that a net can be used where its training data are not.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.files import write_json
from pipeline.manifest import Dataset, Statistics
from pipeline.read.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig

NAME = "inputs.json"
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
        write_json(run / NAME, self.as_json())


def read(run: Path) -> Inputs | None:
    """A run's, or None where it was begun before runs kept them. Raises DataError where they are damaged."""
    path = run / NAME
    try:
        return Inputs.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(f"{path}: cannot be read ({err}); start or resume the run again, which writes it") from err
