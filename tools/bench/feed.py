"""CPU microseconds an image of Python's threads that feed DALI: the work that holds the interpreter's lock.

On a CPU, without decoding; compiled functions, which do not hold that lock, are left out.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline import AugmentConfig, Loader, LoaderConfig
from pipeline.read import backend, dali, fetch, reader
from tools.bench import data, harness


class NoDecode(dali.Graph):
    """The real graph's external source, with an operator behind it that does nothing."""

    def _crops(self, stored: Any, a: Any, b: Any, mirror: Any, mean: Any) -> Any:
        return stored, a, b, mirror


def timed(function: Callable[..., Any], spent: list[float], sign: int) -> Callable[..., Any]:
    """Wraps a function: each call appends its thread's CPU seconds times `sign` to `spent`."""

    def call(*args: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args)
        finally:
            spent.append(sign * (time.thread_time() - started))

    return call


OPTIONS = {"images": Path, "rounds": 5, "batch": 256, "batches": 200}


def microseconds(shards: Path, *, batch: int, batches: int) -> float:
    """CPU time an image of the Python threads."""
    spent: list[float] = []  # beside the consumer's thread
    compiled = {
        module: {name: timed(getattr(fetch, name), spent, -1) for name in names}
        for module, names in ((reader, ("fetch_images", "zero_rest")), (dali, ("not_plain_jpegs",)))
    }
    with ExitStack() as patched:
        for module, functions in compiled.items():
            patched.enter_context(patch.multiple(module, **functions))
        patched.enter_context(patch.object(reader.Reader, "_read_ahead", timed(reader.Reader._read_ahead, spent, 1)))
        view = AugmentConfig(square=False)
        config = LoaderConfig("dali-cpu", threads=1)
        with Loader(shards, batch=batch, dtype="uint8", augment=view, config=config) as loader:
            engine: Any = loader._engine
            engine.graph = NoDecode(loader._setup)
            ahead = backend.works(loader.plan, loader._reader, 0, 0, ahead=config.prefetch_batches)
            engine.start(ahead.__next__)
            for number in range(batches + 8):
                if number == 8:  # after the first batches: pages and compiled functions are warm
                    started = time.thread_time()
                    spent.clear()
                engine._pipeline.run()
                engine._decoding.popleft()
            consumer = time.thread_time() - started
            engine.stop()
            ahead.close()
    return round((consumer + sum(spent)) / (batches * batch) * 1e6, 2)


def run(args: harness.Namespace, record: harness.Record, scratch: Path) -> None:
    rounds = []
    data.shard(data.unpacked(args.images, scratch / "images"), scratch / "jpeg")
    large = data.enlarge(scratch / "jpeg", scratch / "large")  # small sets are shuffled every few batches
    for _ in range(args.rounds):
        rounds.append(microseconds(large, batch=args.batch, batches=args.batches))
        median = statistics.median(rounds)
        record.keep(medians={"python_and_dali": median}, rounds=[{"python_and_dali": one} for one in rounds])
    print(f"{median} µs an image")
