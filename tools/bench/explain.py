"""Which stage limits the loader, and what would help: `python tools/bench loader --explain SHARDS`.

Each stage is measured by itself, with the functions and threads that the loader has for it, on the images and crops of
its first steps. The loader's rate is predicted from them, not measured.

Each decoding thread reads some images and decodes them. If storage is slow, the reader keeps many reads in flight
instead, and the slower of the two stages sets the rate. The training thread assembles the batches, which costs the
decoding threads time if there are as many of them as cores.
"""

import copy
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from pipeline import Loader, LoaderConfig
from pipeline.cores import usable_cores
from pipeline.errors import ConfigError
from pipeline.read import reader as reads
from pipeline.read.backend import Work, works
from pipeline.read.fetch import ALL_ROWS, OFFSET, SHARD, SIZE
from tools.bench import harness, layers
from train.build import make_net
from train.networks import compile_net
from train.presets import PRESETS

IMAGES, BYTES = 1024, 256e6  # limits for the first batches of the plan (at least one), which are measured repeatedly
ASSEMBLED = 100  # batches
ENOUGH = 8  # seconds after which no round begins
ON_CPU = 16  # images of a step
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

COLD, WARM, DECODE, ASSEMBLE, STEP = "read, not cached", "read, cached", "decode and crop", "assemble", "step"
LIMITS = {
    "storage": ("storage: reads wait for it", "--data.stage DIR, to copy the shards to a local disk"),
    "threads": ("too few threads: {threads}, of {cores} cores", "--loader.threads {cores}: up to {most:,.0f} img/s"),
    "decode": ("decoding, on all {cores} cores", "more cores for each GPU"),
    "read": ("copying and verifying cached bytes, on all {cores} cores", "more cores for each GPU"),
    "assemble": ("assembling batches, in the training thread", "larger batches, or more ranks"),
    "step": ("the training step", "nothing to do: the loader is faster"),
}
SMALLER = dict.fromkeys([("storage", "keep"), ("storage", "raw"), ("decode", "keep")], ", or shards with --encode jpeg")

Task = Callable[[Work, Any, int, int], None]  # images [a, b) of a batch, and the batch's crops


class Stage(NamedTuple):
    """rate: images per second. cost: CPU seconds per image. slow: whether its threads wait for storage."""

    rate: float
    cost: float
    slow: bool = False


class Stages:
    """Measures each stage of a loader, without iterating over the loader. seconds: of decoding in each measurement.

    The first measurement does not count: it compiles, and shows whether threads wait for storage.
    """

    def __init__(self, loader: Loader, seconds: float) -> None:
        self.loader, self.engine, self.seconds, n = loader, loader._engine, seconds, loader.plan.batch
        self.stored = sum(shard.bytes for shard in loader.split.shards)
        self.image_bytes, side = self.stored / loader.split.samples, loader.augment.crop
        # As many arrays as the loader uses in turn: fewer would stay in the processor's cache.
        shape = loader.config.prefetch_batches + 2, n, 3, side, side
        crops = np.ones(shape, self.engine.made)
        places, step = itertools.cycle(crops), min(self.engine.images_a_task, -(-n // loader.threads))
        each = []
        batches = 1 + int(min(IMAGES, BYTES / self.image_bytes) / n)
        for work in itertools.islice(works(loader.plan, loader._reader, 0, 0, ahead=0), batches):
            if not self.engine.raw:
                loader._reader.ahead(work.read)
                work.read.wait()
                work.read.whole = work.read.buffer.copy()
            each += [(work, next(places), a, min(a + step, n)) for a in range(0, n, step)]
        self.tasks = itertools.cycle(each)
        loader._reader.done = True  # so that it reads nothing while batches are assembled, even if storage is slow
        self.readers = {name: reads.Reader(loader.split) for name in (COLD, WARM)}

    def measured(self) -> dict[str, Stage]:
        found = {name: self.read(reader, cold=name == COLD) for name, reader in self.readers.items()}
        decode = self.by_threads(self.loader.threads, self.engine._decode, restore, self.seconds)
        if self.engine.raw:  # one pass reads and crops: count only the time that cropping adds
            added = 1 / decode.rate - 1 / found[WARM].rate
            decode = Stage(1 / max(added, 1e-9), max(decode.cost - found[WARM].cost, 0.0))
        return found | {DECODE: decode, ASSEMBLE: self.assemble()}

    def read(self, reader: reads.Reader, *, cold: bool) -> Stage:
        """Measures reading, by the decoding threads, or by `read_threads` threads if they wait for storage."""

        def evict(work: Work, crops: Any, a: int, b: int) -> None:
            crops[a:b] = 0  # evicts the images from the processor's cache, as decoding does
            for shard, offset, size in work.rows[a:b, [SHARD, OFFSET, SIZE]].tolist() if cold else ():
                file = reader.source.open(shard)  # it may be this thread's alone, and is open as long as it is known
                os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_DONTNEED)

        def read(work: Work, _: Any, a: int, b: int) -> None:
            batch = reads.ReadBatch(work.ids, work.rows)
            reader.fetch(batch, a, b, lambda block: reads.fetch_images(*block, ALL_ROWS), in_turn=True)

        slow = reader.is_slow
        threads = self.loader.config.read_threads if slow else self.loader.threads
        return self.by_threads(threads, read, evict, self.seconds / 3)._replace(slow=slow)

    def by_threads(self, threads: int, task: Task, before: Task, seconds: float) -> Stage:
        """Measures `task` in `threads` threads. before: called before each task and not counted."""

        def repeat(until: float) -> tuple[int, np.ndarray]:
            images, spent = 0, np.zeros(2)
            while not images or time.perf_counter() < until:
                at = next(self.tasks)
                before(*at)
                began = clocks()
                task(*at)
                images, spent = images + at[3] - at[2], spent + clocks() - began
            return images, spent

        with ThreadPoolExecutor(threads) as pool:
            images, (spent, cpu) = map(sum, zip(*pool.map(repeat, [time.perf_counter() + seconds] * threads)))
        return Stage(threads * images / spent, cpu / images)

    def assemble(self) -> Stage:
        """Measures the delivery of batches to the device, without reading or decoding their images."""
        idle = self.loader._engine = copy.copy(self.engine)
        idle._decode = lambda *_: None
        batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        cpu, began = time.process_time(), time.perf_counter()
        images = sum(len(batch.ids) for batch in itertools.islice(batches, ASSEMBLED))
        layers.synchronize(self.loader.device)
        stage = Stage(images / (time.perf_counter() - began), (time.process_time() - cpu) / images)
        self.loader._stop()
        return stage


def clocks() -> np.ndarray:
    """Returns wall-clock seconds and this thread's CPU seconds."""
    return np.array([time.perf_counter(), time.thread_time()])


def restore(work: Work, _: Any, a: int, b: int) -> None:
    """Restores the bytes of images [a, b) as read: decoding truncates JPEGs in place."""
    if work.read.tasks:
        there = slice(work.read.at[a], work.read.at[b - 1] + work.rows[b - 1, SIZE])
        work.read.buffer[there] = work.read.whole[there]


def predicted(read: Stage, decode: Stage, assemble: Stage, *, threads: int, cores: int) -> tuple[float, str]:
    """Returns the loader's predicted images per second, and the stage that limits them."""
    beside = assemble.cost + read.slow * read.cost if threads >= cores else 0
    busy = 1 / decode.rate + (not read.slow) / read.rate + beside / cores
    which = "decode" if read.slow or decode.rate < read.rate else "read"
    which = "threads" if threads < cores else which
    return min((1 / busy, which), (read.rate, "storage"), (assemble.rate, "assemble"))


def step_rate(preset: str, batch: int, classes: int, seconds: float) -> dict[str, float]:
    """Measures images per second of the preset's net and SGD, on noise. On a CPU, in small batches, not compiled."""
    config, device = PRESETS[preset], torch.device(DEVICE)
    n, precision, compiled = (batch, "bf16", config.train.compile) if DEVICE == "cuda" else (ON_CPU, "fp32", "off")
    crop, net = config.augment.crop, make_net(config, classes=classes, say=len).to(device)
    compile_net(net, compiled, device)
    step, _ = layers.training_step(
        net, layers.noise(n, 3, crop, crop, device=device), classes=classes, precision=precision
    )
    return {"rate": n / layers.median_seconds(step, seconds, device)}


def portable(shards: Path, batch: int, threads: int, preset: str | None = None) -> Loader:
    """Makes the loader that is explained."""
    augment, config = PRESETS[preset or "seed"].augment, LoaderConfig("portable", threads=threads)
    return Loader(shards, batch=batch, device=DEVICE, channels_last=True, augment=augment, config=config)


def middle(rounds: list[dict[str, Stage]]) -> dict[str, Stage]:
    return {name: Stage(*map(median, zip(*(found[name] for found in rounds)))) for name in rounds[0]}


def run(args: harness.Namespace, record: harness.Record) -> None:
    if not args.step_rate >= 0:
        raise ConfigError(f"--step-rate {args.step_rate:g}: choose 0 (unknown) or images a second")
    if ":/" in str(args.explain):
        raise ConfigError("--explain measures files, not URLs; copy some shards to this machine and name their folder")
    step = args.step_rate
    with portable(args.explain, args.batch, args.threads, args.preset) as loader:
        if args.preset and not step:  # in a process whose threads sleep when they wait, as train/run.py's do
            classes = len(loader.dataset.classes)
            net = {"preset": args.preset, "classes": classes, "batch": args.batch, "seconds": args.seconds}
            step = harness.run_once(f"{__name__}:step_rate", net, OMP_WAIT_POLICY="passive")["rate"]
        report(Stages(loader, args.seconds), step, args, record)


def report(stages: Stages, step: float, args: harness.Namespace, record: harness.Record) -> None:
    stages.measured()
    began, rounds = time.monotonic(), []
    while not rounds or (len(rounds) < args.rounds and time.monotonic() < began + ENOUGH):
        rounds.append(stages.measured())
    found = middle(rounds)
    on = {"threads": stages.loader.threads, "cores": usable_cores()}
    rates = {name: predicted(found[name], found[DECODE], found[ASSEMBLE], **on) for name in (COLD, WARM)}
    rate, which = rates[WARM if stages.stored < psutil.virtual_memory().available else COLD]
    if step:
        found[STEP] = Stage(step, 1 / step)
    which = "step" if 0 < step <= rate else which
    because, advice = (text.format(**on, most=rate * on["cores"] / on["threads"]) for text in LIMITS[which])
    advice += SMALLER.get((which, stages.loader.dataset.encoding), "")
    if rate < step:
        advice += f"; the step takes {step / rate:.2g} times as many images"
    rows = [
        {"stage": name, "img/s": s.rate, "MB/s": s.rate * stages.image_bytes / 1e6, "µs an image": 1e6 * s.cost}
        for name, s in found.items()
    ]
    print(harness.table(rows))
    print(f"\npredicted: {rate:,.0f} img/s; while nothing is in the page cache {rates[COLD][0]:,.0f}")
    print(f"limit: {because}\nadvice: {advice}")
    print("measured: the backend portable; not measured: dali-cpu, dali-gpu and resident")
    record.keep(
        stages=rows, rounds=rounds, predicted=rate, first_epoch=rates[COLD][0], limit=which, advice=advice, **on
    )
