"""The sharder: `build` makes every shard of a plan, and then the manifest.

The same source, options and seed give the same bytes with any number of workers, in one run or in many: a shard is a
pure function of the plan.
"""

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import cuts, manifest, pool
from ..decode import BadImage
from ..errors import ConfigError, DataError, StorageError, reading
from ..files import PARTIAL, Json, json_bytes
from ..shards import Sample, dali_index_name, write_shard
from ..storage import Folder
from . import journal, resize
from .cuts import find, write_file
from .images import prepare
from .journal import Listed, ShardRecord
from .manifest_content import Collected, timm_info, write_statistics
from .plan import Options, Plan, Task
from .resize import Totals
from .sources.base import Items

__all__ = ["Options", "Plan", "build", "forecast"]

TRIED = 64  # images that a forecast processes
AHEAD = 16  # images whose bytes are prefetched by the operating system


def make_shard(plan: Plan, task: Task, folder: Folder) -> ShardRecord:
    """Writes the task's shard. Images that cannot be used are listed in the record's `bad`, not stored."""
    options, source, items = plan.options, plan.source, task.items
    totals = Totals.zeros(options.encoding.size) if options.stats and task.split == "train" else None
    converted = Listed()
    bad = Listed()
    places = list[bytes]()

    def samples() -> Iterator[Sample]:
        for item in items[:AHEAD]:
            source.ahead(item)
        for item, later in zip_longest(items, items[AHEAD:]):
            if later:
                source.ahead(later)
            try:
                image = prepare(source.read(item), options.encoding, totals, check=options.check)
            except BadImage as err:
                bad.append({"image": item.where, "reason": str(err)})
                continue
            if image.converted:
                converted.append({"image": item.where, "was": image.converted})
            if plan.cuts:
                places.append(find(image.image, check_one_in=plan.cuts))
            yield Sample(item.key, image.image, item.label, image.width, image.height)

    shard, rows = write_shard(
        folder, task.name, samples(), extension="raw" if options.encoding.kind == "raw" else "jpg"
    )
    if plan.cuts:
        write_file(folder, task.cuts_name, shard, rows, places)
    return ShardRecord(shard, rows, totals, converted, bad)


class _Nowhere(Folder):
    """A folder that discards everything."""

    def publish(self, name: str) -> AbstractContextManager[BinaryIO]:
        return io.BytesIO()


def forecast(plan: Plan, only: range) -> tuple[ShardRecord, float]:
    """Makes a shard of some of the plan's images without storing it; returns its record and one worker's seconds."""
    resize.prepare()
    items = [item for n in only for item in plan.tasks[n].items[:TRIED]]
    tried = Items(items[:: max(1, len(items) // TRIED)][:TRIED])
    started = time.perf_counter()
    record = make_shard(plan, Task("train", "", "", tried, np.arange(len(tried))), _Nowhere(Path()))
    return record, time.perf_counter() - started


def build(
    plan: Plan,
    out: Path | Folder,
    *,
    workers: int,
    report: Callable[[int, str], None] = lambda images, note: None,
    only: range | None = None,
    merge: bool = True,
    run: Callable[..., Any] = pool.run,
) -> Json | None:
    """Makes every shard of the plan that is not complete yet, then writes the manifest and returns it.

    report: called with the number of images done since its last call, and a note for the user.
    only: make only these shards.
    merge: write the manifest, for which all shards must be complete. False: return None.
    run: distributes the work as pool.run does.
    Raises BadImages, after all images were read, if more than max_bad_fraction cannot be used; DataError if shards are
    missing; ConfigError if the folder holds something else; StorageError if it cannot be written.
    Without a manifest the folder is not a dataset, whatever else is in it.
    """
    folder = out if isinstance(out, Folder) else Folder(out)
    chosen = range(len(plan.tasks)) if only is None else only
    try:
        finished = folder.apart(lambda: _check_folder(plan, folder))
        if not finished:
            with folder.lock(journal.LOCK, shared=not merge):
                # The process that held the lock may have finished it.
                finished, todo = folder.apart(lambda: _begin(plan, folder, chosen))
                if not finished:
                    report(plan.images(chosen) - plan.images(todo), "")
                    _make(plan, folder, todo, partial(run, workers=workers), report)
                    return _publish_or_find(plan, folder) if merge else None
        report(plan.images(chosen), "")
        folder.remove(manifest.PARTS)  # left by a run that was killed just before its end
        return finished
    except OSError as err:
        raise StorageError(f"{StorageError.of(err, out)}; solve that, and run it again to resume") from err


def _begin(plan: Plan, folder: Folder, chosen: range) -> tuple[Json | None, list[int]]:
    """Returns the manifest, if the folder holds this dataset already, and which of the chosen shards are missing."""
    if chosen:
        # Before the check: a bucket has no locks, so another run may just begin or finish.
        folder.create(journal.PLAN, json_bytes(plan.identity))
    finished = _check_folder(plan, folder)
    if finished or not chosen:
        return finished, []
    todo = [n for n in _missing(plan, folder) if n in chosen]
    if todo and 0 in chosen:  # in a job array, one task verifies the input for all
        plan.source.verify(folder)
    return None, todo


def _missing(plan: Plan, folder: Folder) -> list[int]:
    """Returns the shards that are not complete. If more images are bad than allowed, also the shards with bad images,
    since these may have been repaired."""
    records = (journal.load(folder, task) for task in plan.tasks)
    bad = [len(record.bad) if record else None for record in records]
    too_many = sum(filter(None, bad)) > plan.bad_allowed
    return [number for number, count in enumerate(bad) if count is None or (too_many and count)]


def _make(
    plan: Plan, folder: Folder, todo: list[int], run: Callable[..., Any], report: Callable[[int, str], None]
) -> None:
    if not todo:
        return
    resize.prepare()  # before workers are forked: once for all

    def make(number: int) -> tuple[int, int]:
        """Makes a shard; returns its bytes, and how many images are bad."""
        task = plan.tasks[number]
        record = make_shard(plan, task, folder)
        journal.save(folder, task, record)
        return record.shard.bytes, len(record.bad)

    written, bad, started = 0, 0, time.monotonic()
    with run(make, todo, place=folder) as made:
        for number, (size, left_out) in zip(todo, made):
            written, bad = written + size, bad + left_out
            rate = written / 1e6 / (time.monotonic() - started)
            report(plan.images([number]), f"{rate:,.0f} MB/s" + (f", {bad} bad" if bad else ""))


def _check_folder(plan: Plan, folder: Folder) -> Json | None:
    """Returns the manifest if the folder holds the same dataset, already finished.

    Raises ConfigError if the folder holds another dataset, finished or not, or other files.
    """
    names = folder.names()
    held, cure = f"{folder.path}: holds a finished dataset", "remove it, or choose another --out"
    if manifest.NAME in names:
        dataset = manifest.open_dataset(folder.path, allow_http=folder.allow_http)
        if "plan" not in (finished := dataset.manifest):
            raise ConfigError(f"{held} already; choose another --out")
        with reading(f"{folder.path / manifest.NAME}: its plan", "choose another --out or remove it"):
            left_out, before, now = len(finished["quarantine"]), finished["plan"], plan.identity
            journal.reject_other(folder, before | {"images": now["images"]}, now, "a finished dataset")
            if before["images"] != now["images"] and (changes := _changed_images(plan, dataset)):
                raise ConfigError(f"{held} of other images; this run would have {changes}; {cure}")
            journal.reject_other(folder, before, now, "a finished dataset")
        if left_out > plan.bad_allowed:
            raise ConfigError(f"{held} that left out {left_out} images; {cure}")
        return finished
    splits = "|".join(map(re.escape, plan.source.splits))
    if manifest.PARTS in names:  # which is removed with all that is in it
        names += [f"{manifest.PARTS}/{name}" for name in folder.names(manifest.PARTS)]
    ours = rf"({manifest.INFO}|{manifest.NAME}|{journal.NAMES}|{cuts.NAME}|({splits})-\d{{6}}\.cuts"
    ours += rf"|{re.escape(plan.source.name)}-"
    ours += rf"(mean\.npy|({splits})(\.index\.npy|-\d{{6}}\.(tar|idx))))"
    for name in names:
        if not re.fullmatch(ours, name.removesuffix(PARTIAL)):
            raise ConfigError(f"{folder.path}: holds {name}, which is none of ours; choose an empty --out")
    journal.check_plan(folder, plan.identity)
    return None


def _changed_images(plan: Plan, dataset: manifest.Dataset) -> str:
    """Describes the images that only the plan or only the dataset has: by key if they were stored.

    Reads every tar header, except in a bucket.
    """
    if dataset.remote:
        return "others"
    then = {bad["image"] for bad in dataset.manifest["quarantine"]}
    now = {
        item.where if item.where in then else f"{split}/{item.key}"
        for split, items in plan.source.splits.items()
        for item in items
    }
    then |= {f"{name}/{key}" for name, split in dataset.splits.items() for key in split.keys()}  # noqa: SIM118
    changes = {"more": sorted(now - then), "fewer": sorted(then - now)}
    return ", ".join(f"{len(keys)} {word} ({', '.join(keys[:3])})" for word, keys in changes.items() if keys)


def _records(plan: Plan, folder: Folder) -> Iterator[tuple[str, ShardRecord]]:
    missing = []
    for number, task in enumerate(plan.tasks):
        if record := journal.load(folder, task):
            yield task.split, record
        else:
            missing.append(number)
    if missing:
        raise DataError(
            f"{folder.path}: {len(missing)} of {len(plan.tasks)} shards are missing; make them first, with"
            f" --shards {missing[0]}:{missing[0] + 1} and so on"
        )


def _publish_or_find(plan: Plan, folder: Folder) -> Json:
    """Publishes the manifest, or reads the one that another run of this plan has published: a bucket has no locks."""
    try:
        return _publish(plan, folder)
    except DataError:
        if not (finished := _check_folder(plan, folder)):
            raise
        folder.remove(manifest.PARTS)
        return finished


def _publish(plan: Plan, folder: Folder) -> Json:
    """Writes index, statistics and, last, the manifest from the records, then removes the records."""
    source, options, names = plan.source, plan.options, folder.names()
    collected = Collected(_records(plan, folder), size=options.encoding.size, max_bad_fraction=options.max_bad_fraction)
    present = {label for record in collected.of_split.get("train", []) for label in record.rows["label"].tolist()}
    if collected.bad and (emptied := set(range(len(source.classes))) - present):
        raise DataError(
            f"{source.classes[min(emptied)]}: no image of this class can be used;"
            f" remove the class, or repair its images and remove {folder.path / manifest.PARTS}"
        )
    splits = collected.write_splits(folder, source.name)
    measured = write_statistics(collected.totals, folder, f"{source.name}-mean.npy") if options.stats else {}
    folder.write(manifest.INFO, json_bytes(timm_info(splits)))
    content = {
        "dataset": source.name,
        "label_kind": "class index, 0-based; -1 where it is not known",
        "classes": source.classes,
        "class_names": source.class_names or source.classes,
        **({"class_ids": source.class_ids} if source.class_ids else {}),
        "splits": splits,
        "statistics": measured,
        "source": source.describe(),
        "options": asdict(options),
        "converted": collected.converted,
        "quarantine": collected.bad,
        "plan": plan.identity,
    }
    # Half-written files of runs that were killed, and shards of a plan that had more of them.
    shards = {task.name for task in plan.tasks}
    wanted = shards | {dali_index_name(name) for name in shards}
    wanted |= {task.cuts_name for task in plan.tasks if plan.cuts}
    for name in names:
        if name.endswith((PARTIAL, ".tar", ".idx", ".cuts", cuts.NAME)) and name not in wanted:
            folder.remove(name)
    written = manifest.write_manifest(folder, content)
    folder.remove(manifest.PARTS)
    return written
