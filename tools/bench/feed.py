"""The DALI feed's Python work: the part of it that holds the interpreter's lock."""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline import AugmentConfig, Loader, LoaderConfig
from pipeline.read import dali, fetch, reader
from tools.bench import data, harness

WHAT = (
    "CPU microseconds an image of Python's threads, feeding DALI on a CPU without decoding;"
    " compiled functions, which do not hold the GIL, are left out"
)


class NoDecode(dali.Graph):
    """The real graph's external source, with an operator behind it that does nothing."""

    def _cropped(self, stored: Any, a: Any, b: Any) -> Any:
        return stored, a, b

    _resampled = _cropped

    def _normalised(self, images: Any, mirror: Any, _: Any) -> Any:
        return *images, mirror


class CpuTime:
    """CPU seconds of every thread inside the wrapped functions."""

    def __init__(self) -> None:
        self.seconds, self._lock = 0.0, threading.Lock()

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds += time.thread_time() - started

        return timed


def add_arguments(p: argparse.ArgumentParser) -> None:
    harness.add_images(p)
    harness.add_options(p, rounds=5, batch=256, batches=200)


def microseconds(shards: Path, *, batch: int, batches: int) -> float:
    """CPU time an image of the Python threads; see WHAT."""
    pool, compiled = CpuTime(), CpuTime()
    with (
        patch.object(reader.Reader, "_read_ahead", pool.of(reader.Reader._read_ahead)),
        patch.object(reader, "fetch_images", compiled.of(fetch.fetch_images)),
        patch.object(reader, "not_plain_jpegs", compiled.of(fetch.not_plain_jpegs)),
    ):
        view, config = AugmentConfig(square=False), LoaderConfig("dali-cpu", threads=1)
        with Loader(shards, batch=batch, dtype="uint8", augment=view, config=config) as loader:
            engine: Any = loader._engine
            engine.graph = NoDecode(**vars(engine.graph))
            works = loader._plan_and_read()
            engine.start(works.__next__)
            for number in range(batches + 8):
                if number == 8:  # after the first batches: pages and compiled functions are warm
                    started = time.thread_time()
                    pool.seconds = compiled.seconds = 0.0
                engine._pipeline.run()
                engine._decoding.popleft()
            consumer = time.thread_time() - started
            engine.stop()
            works.close()
    return round((consumer + pool.seconds - compiled.seconds) / (batches * batch) * 1e6, 2)


def run(args: argparse.Namespace, record: harness.Record, scratch: Path) -> None:
    rounds = []
    data.shard(data.unpacked(args.images, scratch / "images"), scratch / "jpeg")
    for _ in range(args.rounds):
        rounds.append(microseconds(scratch / "jpeg", batch=args.batch, batches=args.batches))
        median = statistics.median(rounds)
        record.keep(medians={"python_and_dali": median}, rounds=[{"python_and_dali": one} for one in rounds])
    print(f"{median} µs an image")
