"""The sharder: a plan says which image goes into which shard, `build_shard` makes one, `build` makes them all.

Same source, options and seed give the same bytes with any number of workers: a shard is a pure function of the plan.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np

from .. import manifest
from ..errors import ConfigError, DataError, StorageError
from ..files import PARTIAL, write_json
from ..shards import Sample, Shard, write_index, write_shard
from .images import BadImage, Encoding, prepare
from .measures import Statistics
from .sources import Item, Source

INFO = "_info.json"  # what timm's reader_wds asks for


@dataclass(frozen=True)
class Options:
    """How a source becomes shards."""

    encoding: Encoding = field(default_factory=Encoding)
    samples_per_shard: int = 1000
    seed: int = 0
    max_bad_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(f"samples-per-shard={self.samples_per_shard}: must be at least 1")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"max-bad-fraction={self.max_bad_fraction}: must be in [0, 1)")


@dataclass(frozen=True)
class Task:
    """One shard to be."""

    split: str
    number: int
    name: str
    items: list[Item]


@dataclass(frozen=True)
class Plan:
    """Which image goes where: a function of the source and the options alone."""

    source: Source
    options: Options

    @cached_property
    def tasks(self) -> list[Task]:
        tasks, per = [], self.options.samples_per_shard
        for split, items in self.source.splits.items():
            shuffled = sorted(items, key=lambda item: _shuffle_key(self.options.seed, split, item))
            for number, start in enumerate(range(0, len(shuffled), per)):
                name = f"{self.source.name}-{split}-{number:06d}.tar"
                tasks.append(Task(split, number, name, shuffled[start : start + per]))
        return tasks

    @property
    def samples(self) -> int:
        return sum(len(items) for items in self.source.splits.values())

    @property
    def mean_image_name(self) -> str:
        return f"{self.source.name}-mean.npy"

    def index_name(self, split: str) -> str:
        return f"{self.source.name}-{split}.index.npy"


def _shuffle_key(seed: int, split: str, item: Item) -> bytes:
    # A hash of the key and not a generator's stream: the same on every Python and NumPy, for good.
    return hashlib.sha256(f"{seed}/{split}/{item.key}".encode()).digest()


@dataclass
class Built:
    """What became of one task."""

    task: Task
    shard: Shard
    rows: np.ndarray  # (n,) INDEX_DTYPE
    statistics: Statistics
    converted: list[dict[str, str]] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)


def build_shard(plan: Plan, number: int, out: Path) -> Built:
    """Makes task `number` of the plan in `out`. Images that cannot be used are listed in `bad`, not stored."""
    task, encoding = plan.tasks[number], plan.options.encoding
    built = Built(task, Shard(task.name, 0, 0, ""), np.empty(0), Statistics(encoding.size))

    def samples() -> Iterator[Sample]:
        for item in task.items:
            try:
                image = prepare(plan.source.read(item), encoding)
            except BadImage as err:
                built.bad.append({"image": item.where, "reason": str(err)})
                continue
            if image.converted:
                built.converted.append({"image": item.where, "was": image.converted})
            built.statistics.add(image.measured)
            yield Sample(item.key, image.image, item.label, image.width, image.height)

    built.shard, built.rows = write_shard(
        out / task.name, samples(), number=task.number, extension="raw" if encoding.kind == "raw" else "jpg"
    )
    return built


def build(
    plan: Plan, out: Path, *, workers: int, progress: Callable[[int], None] = lambda samples: None
) -> dict[str, Any]:
    """Makes every shard of the plan and then the manifest, which it returns.

    Raises DataError, after all images were looked at, where more than max_bad_fraction cannot be used, and StorageError
    where `out` cannot be written. Without a manifest the folder is no dataset, whatever else lies in it.
    """
    try:
        _claim(plan, out)
        statistics = Statistics(plan.options.encoding.size)
        done = []
        for built in _run(plan, out, workers, progress):
            if built.task.split == "train":
                statistics.merge(built.statistics)
            del built.statistics  # a mean image a shard would be a gigabyte for ImageNet
            done.append(built)
        done.sort(key=lambda built: (built.task.split, built.task.number))
        _refuse_bad(plan, done)
        return _publish(plan, out, done, statistics)
    except BrokenProcessPool as err:
        raise StorageError(f"{out}: a worker was killed, perhaps for want of memory; use fewer --workers") from err
    except OSError as err:
        raise StorageError(f"{err.filename or out}: {err.strerror or err}") from err


def _run(plan: Plan, out: Path, workers: int, progress: Callable[[int], None]) -> Iterator[Built]:
    if workers == 1:
        for number, task in enumerate(plan.tasks):
            yield build_shard(plan, number, out)
            progress(len(task.items))
        return
    global _PLAN
    _PLAN = plan, out  # forked workers inherit the plan; sending it would cost 100 MB for ImageNet
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=follow_the_parent) as pool:
        futures: list[Future[Built]] = [pool.submit(_forked, n) for n in range(len(plan.tasks))]
        try:
            for future in as_completed(futures):
                yield (built := future.result())
                progress(len(built.task.items))
        except BaseException:
            # A shard appears whole or not at all, so nobody need wait for those in the making.
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.terminate()
            raise


def follow_the_parent() -> None:
    """A worker leaves Ctrl-C to the parent, and ends when the parent was killed: its queue alone would not tell it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_PLAN: tuple[Plan, Path] | None = None


def _forked(number: int) -> Built:
    assert _PLAN is not None
    return build_shard(_PLAN[0], number, _PLAN[1])


def _claim(plan: Plan, out: Path) -> None:
    """Takes the folder: a finished dataset and foreign files are left alone, leftovers of a broken run go."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / manifest.NAME).exists():
        raise ConfigError(f"{out}: holds a finished dataset already; choose another --out or remove it")
    ours = {plan.index_name(split) for split in plan.source.splits} | {INFO, manifest.NAME, plan.mean_image_name}
    splits = "|".join(map(re.escape, plan.source.splits))
    leftovers = []
    for entry in sorted(out.iterdir()):
        name = entry.name.removesuffix(PARTIAL)
        is_shard = re.fullmatch(rf"{re.escape(plan.source.name)}-({splits})-\d{{6}}\.(tar|idx)", name)
        if not (is_shard or name in ours):
            raise ConfigError(f"{out}: holds {entry.name}, which is none of ours; choose an empty --out")
        leftovers.append(entry)
    for entry in leftovers:
        entry.unlink()


def _refuse_bad(plan: Plan, done: list[Built]) -> None:
    bad = _listed(built.bad for built in done)
    if len(bad) <= plan.options.max_bad_fraction * plan.samples:
        return
    listed = "; ".join(f"{b['image']}: {b['reason']}" for b in bad)
    raise DataError(
        f"{len(bad)} of {plan.samples} images cannot be used ({listed});"
        " repair or remove them, or allow them with --max-bad-fraction"
    )


def _listed(parts: Iterable[list[dict[str, str]]]) -> list[dict[str, str]]:
    """By name, as people look for it, and not in the order of the shuffle."""
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry["image"])


def _publish(plan: Plan, out: Path, done: list[Built], statistics: Statistics) -> dict[str, Any]:
    splits, info = {}, {}
    for split in plan.source.splits:
        mine = [built for built in done if built.task.split == split]
        index_name = plan.index_name(split)
        rows = np.concatenate([built.rows for built in mine])
        if not len(rows):
            raise DataError(f"{split}: no usable image is left in this split")
        splits[split] = manifest.split_record(
            [built.shard for built in mine], index_name, write_index(out / index_name, rows)
        )
        info[split] = {
            "name": split,
            "num_samples": len(rows),
            "filenames": [built.shard.name for built in mine],
            "shard_lengths": [built.shard.samples for built in mine],
        }
    write_json(out / INFO, {"splits": info})
    return manifest.write_manifest(
        out,
        {
            "dataset": plan.source.name,
            "label_kind": "class index, 0-based",
            "classes": plan.source.classes,
            "splits": splits,
            "statistics": statistics.publish(out, plan.mean_image_name),
            "source": plan.source.describe(),
            "options": asdict(plan.options),
            "converted": _listed(built.converted for built in done),
            "quarantine": _listed(built.bad for built in done),
        },
    )
