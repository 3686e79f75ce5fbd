"""The plan of a sharding: which image goes into which shard. A function of the source and the options alone."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import PIL
import simplejpeg

from ..cuts import file_name
from ..errors import ConfigError
from ..files import Json
from ..settings import BelowOne, Positive, validate
from .images import Encoding
from .sources.base import Item, Items, Source, key_hashes


@dataclass(frozen=True)
class Options:
    """How a source becomes shards. stats: measure the training pixels. check: how images that are kept are checked."""

    encoding: Encoding = field(default_factory=Encoding)
    samples_per_shard: Positive = 1000
    seed: int = 0
    max_bad_fraction: BelowOne = 0.0
    stats: bool = True
    check: Literal["full", "header"] = "full"

    def __post_init__(self) -> None:
        validate(self)
        if self.check == "header" and (self.stats or self.encoding.kind != "keep"):
            raise ConfigError("check=header goes with encode=keep and stats off: all else decodes every image anyway")


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    split: str
    name: str
    cuts_name: str  # of pipeline/cuts.py's file
    source: Items
    rows: np.ndarray  # positions in `source`, in the shard's order

    @property
    def items(self) -> list[Item]:
        return [self.source[row] for row in self.rows.tolist()]

    @property
    def digest(self) -> str:
        """A hash of everything that determines the shard, except options and the images' bytes."""
        return hashlib.sha256(repr([item[:3] for item in self.items]).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Which image goes into which shard."""

    source: Source
    options: Options
    cuts: int = 0  # a .cuts beside each shard, with one image in so many compared; 0: none. Changes no other file

    @cached_property
    def tasks(self) -> list[Task]:
        tasks, per = [], self.options.samples_per_shard
        for split, items in self.source.splits.items():
            shuffled = np.lexsort(key_hashes(f"{self.options.seed}/{split}", items))
            for number, start in enumerate(range(0, len(shuffled), per)):
                name = f"{self.source.name}-{split}-{number:06d}.tar"
                tasks.append(Task(split, name, file_name(split, number), items, shuffled[start : start + per]))
        return tasks

    def images(self, numbers: Iterable[int]) -> int:
        """How many images these shards are made of."""
        return sum(len(self.tasks[n].rows) for n in numbers)

    @property
    def bad_allowed(self) -> float:
        """How many images may be left out."""
        return self.options.max_bad_fraction * sum(map(len, self.source.splits.values()))

    @cached_property
    def identity(self) -> Json:
        """Everything that determines the bytes, except the images: runs with equal identities may share a folder."""
        options = asdict(self.options)
        del options["max_bad_fraction"]
        return {
            "dataset": self.source.name,
            "source": self.source.describe(),
            "options": options,
            "images": {split: items.digest() for split, items in self.source.splits.items()},
            # the decoders and encoders that make the pixels and bytes
            "software": {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__},
        }


def numbers(text: str, shards: int) -> range:
    """ "0:64" → range(0, 64); "3/16" → the fourth of 16 slices, which differ by one shard at most and may be empty."""
    if match := re.fullmatch(r"(\d+)/(\d+)", text):
        number, slices = map(int, match.groups())
        if number < slices:
            return range(number * shards // slices, (number + 1) * shards // slices)
    if "/" in text:
        raise ConfigError(f"--shards {text}: write I/N, with I from 0 to N - 1")
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match:
        raise ConfigError(f"--shards {text}: write A:B, the first and the one after the last, or I/N, slice I of N")
    first, last = match.groups()
    chosen = range(int(first or 0), min(int(last or shards), shards))
    if not chosen:
        raise ConfigError(f"--shards {text}: there are {shards} shards, 0 to {shards - 1}")
    return chosen
