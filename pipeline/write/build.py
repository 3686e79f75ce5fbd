"""The sharder: a plan says which image goes into which shard, `build_shard` makes one, `build` makes them all.

Same source, options and seed give the same bytes with any number of workers, in one run or in many: a shard is a pure
function of the plan.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing import active_children, get_context
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import PIL
import simplejpeg

from .. import manifest
from ..errors import ConfigError, DataError, StorageError
from ..files import PARTIAL, write_json
from ..pool import follow_the_parent
from ..shards import Sample, write_index, write_shard
from ..tar import BLOCK, padded
from . import journal, pixels
from .images import BadImage, Encoding, Preparer
from .journal import Part
from .pixels import Sums
from .sources import Item, Items, Source
from .statistics import Statistics

INFO = "_info.json"  # what timm's reader_wds asks for
AHEAD = 16  # images that the system is asked to fetch before they are read
TICK = 16  # images after which a worker says how far it is
NAMED_BAD = 10  # in the error's one line; all of them stand in BadImages.listed

Tell = Callable[[int, str], None]  # images done since the last call, and what is worth reading beside it


class BadImages(DataError):
    """More images cannot be used than are allowed; `listed` names all of them."""

    def __init__(self, listed: list[dict[str, str]], of: int) -> None:
        self.listed = listed
        named = "; ".join(f"{bad['image']}: {bad['reason']}" for bad in listed[:NAMED_BAD])
        more = f"; and {len(listed) - NAMED_BAD} more" if len(listed) > NAMED_BAD else ""
        super().__init__(
            f"{len(listed)} of {of} images cannot be used ({named}{more});"
            " repair or remove them, or allow them with --max-bad-fraction"
        )


@dataclass(frozen=True)
class Options:
    """How a source becomes shards. stats: measure the training pixels. check: how to look at images that are kept."""

    encoding: Encoding = field(default_factory=Encoding)
    samples_per_shard: int = 1000
    seed: int = 0
    max_bad_fraction: float = 0.0
    stats: bool = True
    check: str = "full"

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(f"samples-per-shard={self.samples_per_shard}: must be at least 1")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"max-bad-fraction={self.max_bad_fraction}: must be in [0, 1)")
        if self.check not in ("full", "header"):
            raise ConfigError(f"check={self.check}: choose full or header")
        if self.check == "header" and (self.stats or self.encoding.kind != "keep"):
            raise ConfigError("check=header goes with encode=keep and stats off: all else decodes every image anyway")


@dataclass(frozen=True)
class Task:
    """One shard to be."""

    split: str
    number: int
    name: str
    source: Items
    rows: np.ndarray  # which of the source's images, in the shard's order

    @property
    def items(self) -> list[Item]:
        return [self.source[row] for row in self.rows.tolist()]


@dataclass(frozen=True)
class Plan:
    """Which image goes where: a function of the source and the options alone."""

    source: Source
    options: Options

    @cached_property
    def tasks(self) -> list[Task]:
        tasks, per = [], self.options.samples_per_shard
        for split, items in self.source.splits.items():
            shuffled = _shuffled(self.options.seed, split, items)
            for number, start in enumerate(range(0, len(shuffled), per)):
                name = f"{self.source.name}-{split}-{number:06d}.tar"
                tasks.append(Task(split, number, name, items, shuffled[start : start + per]))
        return tasks

    @property
    def samples(self) -> int:
        return sum(len(items) for items in self.source.splits.values())

    @property
    def mean_image_name(self) -> str:
        return f"{self.source.name}-mean.npy"

    def index_name(self, split: str) -> str:
        return f"{self.source.name}-{split}.index.npy"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes, but for the images themselves: two runs may share a folder where this is the same."""
        options = asdict(self.options)
        del options["max_bad_fraction"]
        return {
            "dataset": self.source.name,
            "source": self.source.describe(),
            "options": options,
            "images": {split: items.digest() for split, items in self.source.splits.items()},
            "software": software(),
        }


def software() -> dict[str, str]:
    """Whose decoders and encoders make the pixels and bytes."""
    return {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__}


def _shuffled(seed: int, split: str, items: Items) -> np.ndarray:
    """(n,) int64. By a hash of the key and not a generator's stream: the same on every Python and NumPy, for good."""
    digests = bytearray(16 * len(items))
    for i, key in enumerate(items.keys):
        digests[16 * i : 16 * i + 16] = hashlib.sha256(f"{seed}/{split}/{key}".encode()).digest()[:16]
    words = np.frombuffer(digests, ">u8").reshape(-1, 2)
    return np.lexsort((words[:, 1], words[:, 0]))


def build_shard(plan: Plan, number: int, out: Path, tell: Callable[[int, int, int], None]) -> Part:
    """Makes shard `number` of the plan in `out`, and the record that it is whole.

    Images that cannot be used are listed in the part's `bad`, not stored. tell: images, bytes and bad ones so far.
    """
    task, options, source = plan.tasks[number], plan.options, plan.source
    measure = options.stats and task.split == "train"
    prepare = Preparer(options.encoding, measure=measure, check=options.check)
    sums = Sums(options.encoding.size) if measure else None
    converted: list[dict[str, str]] = []
    bad: list[dict[str, str]] = []

    def samples() -> Iterator[Sample]:
        items, read = task.items, 0
        for item in items[:AHEAD]:
            source.ahead(item)
        for i, item in enumerate(items, 1):
            if i + AHEAD <= len(items):
                source.ahead(items[i + AHEAD - 1])
            try:
                data = source.read(item)
                read += len(data)
                image = prepare(data)
            except BadImage as err:
                bad.append({"image": item.where, "reason": str(err)})
                continue
            finally:
                if i % TICK == 0 or i == len(items):
                    tell(i, read, len(bad))
            if image.converted:
                converted.append({"image": item.where, "was": image.converted})
            if sums and image.measured:
                sums.add(*image.measured)
            yield Sample(item.key, image.image, item.label, image.width, image.height)

    extension = "raw" if options.encoding.kind == "raw" else "jpg"
    shard, rows = write_shard(out / task.name, samples(), number=task.number, extension=extension)
    part = Part(shard, rows, sums, converted, bad)
    journal.save(out, part)
    return part


class Forecast(NamedTuple):
    """What a run would write, by some images that were tried."""

    bytes: int
    seconds: float  # of one worker
    tried: int
    bad: int


def forecast(plan: Plan, only: range | None = None, *, images: int = 64) -> Forecast:
    """Prepares some images of the plan and stores none."""
    pixels.prepare()
    items = [item for n in _numbers(plan, only) for item in plan.tasks[n].items[:images]]
    items = items[:: max(1, len(items) // images)][:images]
    prepare = Preparer(plan.options.encoding, measure=plan.options.stats, check=plan.options.check)
    sums = Sums(plan.options.encoding.size)
    stored, bad, started = 0, 0, time.perf_counter()
    for item in items:
        try:
            image = prepare(plan.source.read(item))
        except BadImage:
            bad += 1
            continue
        if image.measured:
            sums.add(*image.measured)
        hashlib.sha256(image.image)
        stored += 3 * BLOCK + padded(len(image.image))
    each = (time.perf_counter() - started) / len(items)
    total = _images(plan, _numbers(plan, only))
    return Forecast(stored * total // len(items), each * total, len(items), bad)


def _quiet(images: int, note: str) -> None:
    pass


def build(
    plan: Plan,
    out: Path,
    *,
    workers: int,
    tell: Tell = _quiet,
    only: range | None = None,
    merge: bool = True,
    first: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any] | None:
    """Makes every shard of the plan that is not whole yet, and then the manifest, which it returns.

    only: make no others than these. first: called before any is made, with a folder to keep notes in.
    merge: write the manifest, for which all shards must be whole; otherwise None is returned.
    Raises BadImages, after all images were looked at, where more than max_bad_fraction cannot be used, DataError where
    shards are missing, ConfigError where the folder holds something else, and StorageError where it cannot be written.
    Without a manifest the folder is no dataset, whatever else lies in it.
    """
    try:
        while not (finished := _claim(plan, out)):
            try:
                lock = journal.lock(out, shared=not merge)
            except FileNotFoundError:  # somebody finished it just now
                continue
            with lock:
                if finished := _claim(plan, out):  # by whom we waited for
                    break
                todo = [n for n in _missing(plan, out) if only is None or n in only]
                if todo:
                    first(out / journal.FOLDER)
                tell(_images(plan, _numbers(plan, only)) - _images(plan, todo), "")
                if todo:
                    pixels.prepare()  # before workers are forked: once for all
                    _run(plan, out, todo, workers, tell)
                return _publish(plan, out) if merge else None
        tell(_images(plan, _numbers(plan, only)), "")
        journal.remove(out)  # a run that was killed at its very end leaves them
        return finished
    except BrokenProcessPool as err:
        raise StorageError(f"{out}: a worker was killed, perhaps for want of memory; use fewer --workers") from err
    except OSError as err:
        raise StorageError(f"{err.filename or out}: {err.strerror or err}; run it again to go on from here") from err


def _numbers(plan: Plan, only: range | None) -> list[int]:
    return [n for n in range(len(plan.tasks)) if only is None or n in only]


def _images(plan: Plan, numbers: list[int]) -> int:
    return sum(len(plan.tasks[n].rows) for n in numbers)


def _missing(plan: Plan, out: Path) -> list[int]:
    """The shards that are not whole; and, where more images are bad than allowed, those that hold them.

    Somebody may have repaired them since.
    """
    bad, missing, suspects = 0, [], []
    for number, task in enumerate(plan.tasks):
        part = journal.load(out, task.name)
        if part is None:
            missing.append(number)
        elif part.bad:
            bad += len(part.bad)
            suspects.append(number)
    if bad > plan.options.max_bad_fraction * plan.samples:
        missing = sorted(missing + suspects)
    return missing


class _Told:
    """How far each shard is, in memory that forked workers share; each row has one writer."""

    def __init__(self, tasks: int, tell: Tell) -> None:
        self.rows = np.frombuffer(mmap.mmap(-1, max(tasks, 1) * 24), np.int64).reshape(-1, 3)
        self._tell, self._said, self._started = tell, 0, time.monotonic()

    def say(self) -> None:
        images, read, bad = self.rows.sum(0).tolist()
        rate = read / 1e6 / max(time.monotonic() - self._started, 1e-9)
        self._tell(images - self._said, f"{rate:,.0f} MB/s" + (f", {bad} bad" if bad else ""))
        self._said = images


def _run(plan: Plan, out: Path, todo: list[int], workers: int, tell: Tell) -> None:
    told = _Told(len(plan.tasks), tell)
    workers = min(workers, len(todo))
    if workers == 1:
        for number in todo:

            def set_row(*values: int, row: int = number) -> None:
                told.rows[row] = values
                told.say()

            build_shard(plan, number, out, set_row)
        return
    global _PLAN
    _PLAN = plan, out, told.rows  # forked workers inherit the plan; sending it would cost 100 MB for ImageNet
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=follow_the_parent) as pool:
        pending: set[Future[None]] = {pool.submit(_forked, n) for n in todo}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                told.say()
        except BaseException:
            # A shard appears whole or not at all, so nobody need wait for those in the making.
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.terminate()
            raise


_PLAN: tuple[Plan, Path, np.ndarray] | None = None


class _Ended(BaseException):
    """The parent wants no more."""


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Ended


def _forked(number: int) -> None:
    assert _PLAN is not None
    plan, out, rows = _PLAN
    signal.signal(signal.SIGTERM, _end)

    def set_row(*values: int) -> None:
        rows[number] = values

    try:
        build_shard(plan, number, out, set_row)
    except _Ended:  # what was half written is gone
        os._exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _claim(plan: Plan, out: Path) -> dict[str, Any] | None:
    """Takes the folder. Returns the manifest if the same dataset stands there finished already.

    Raises ConfigError for a folder that holds another one, finished or not, or files that are none of ours.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / manifest.NAME).exists():
        finished = manifest.open_dataset(out).manifest
        if "plan" not in finished:
            raise ConfigError(f"{out}: holds a finished dataset already; choose another --out or remove it")
        journal.refuse_other(out, finished["plan"], plan.identity, "a finished dataset")
        fraction = len(finished["quarantine"]) / plan.samples
        if fraction > plan.options.max_bad_fraction:
            raise ConfigError(
                f"{out}: holds a finished dataset that left out {len(finished['quarantine'])} images;"
                " remove it, or choose another --out"
            )
        return finished
    ours = {plan.index_name(split) for split in plan.source.splits}
    ours |= {INFO, manifest.NAME, plan.mean_image_name, journal.FOLDER}
    splits = "|".join(map(re.escape, plan.source.splits))
    for entry in sorted(out.iterdir()):
        name = entry.name.removesuffix(PARTIAL)
        is_shard = re.fullmatch(rf"{re.escape(plan.source.name)}-({splits})-\d{{6}}\.(tar|idx)", name)
        if not (is_shard or name in ours):
            raise ConfigError(f"{out}: holds {entry.name}, which is none of ours; choose an empty --out")
    journal.claim(out, plan.identity)
    return None


def _listed(entries: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """By name, as people look for it, and not in the order of the shuffle."""
    return sorted(entries, key=lambda entry: entry["image"])


def _publish(plan: Plan, out: Path) -> dict[str, Any]:
    """Index, statistics and, last, the manifest, from the records of the parts; then the records go."""
    statistics = Statistics(plan.options.encoding.size)
    of_split: dict[str, list[Part]] = {split: [] for split in plan.source.splits}
    missing = []
    for number, task in enumerate(plan.tasks):
        if (part := journal.load(out, task.name)) is None:
            missing.append(number)
            continue
        if part.sums is not None:
            statistics.add(part.sums)
        of_split[task.split].append(part._replace(sums=None))  # a mean image a shard would be a gigabyte for ImageNet
    if missing:
        raise DataError(
            f"{out}: {len(missing)} of {len(plan.tasks)} shards are missing; make them first, with"
            f" --shards {missing[0]}:{missing[0] + 1} and so on"
        )
    done = [part for of in of_split.values() for part in of]
    bad = _listed(entry for part in done for entry in part.bad)
    if len(bad) > plan.options.max_bad_fraction * plan.samples:
        raise BadImages(bad, plan.samples)
    splits, info = {}, {}
    for split, of in of_split.items():
        rows = np.concatenate([part.rows for part in of])
        if not len(rows):
            raise DataError(f"{split}: no usable image is left in this split")
        index_name = plan.index_name(split)
        splits[split] = manifest.split_record(
            [part.shard for part in of], index_name, write_index(out / index_name, rows)
        )
        info[split] = {
            "name": split,
            "num_samples": len(rows),
            "filenames": [part.shard.name for part in of],
            "shard_lengths": [part.shard.samples for part in of],
        }
    write_json(out / INFO, {"splits": info})
    content = {
        "dataset": plan.source.name,
        "label_kind": "class index, 0-based; -1 where it is not known",
        "classes": plan.source.classes,
        "class_names": getattr(plan.source, "class_names", plan.source.classes),
        **({"class_ids": plan.source.class_ids} if hasattr(plan.source, "class_ids") else {}),
        "splits": splits,
        "statistics": statistics.publish(out, plan.mean_image_name) if plan.options.stats else {},
        "source": plan.source.describe(),
        "options": asdict(plan.options),
        "converted": _listed(entry for part in done for entry in part.converted),
        "quarantine": bad,
        "plan": plan.identity,
    }
    _remove_leftovers(plan, out)
    written = manifest.write_manifest(out, content)
    journal.remove(out)
    return written


def _remove_leftovers(plan: Plan, out: Path) -> None:
    """Half-written files of runs that were killed, and shards of a plan that had more of them."""
    wanted = {task.name for task in plan.tasks} | {task.name[:-4] + ".idx" for task in plan.tasks}
    for entry in sorted(out.iterdir()):
        if entry.name.endswith(PARTIAL) or (entry.suffix in (".tar", ".idx") and entry.name not in wanted):
            entry.unlink()
