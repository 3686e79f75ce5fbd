"""Calls a function in a process of its own and prints each result as a line of JSON; harness.run starts it.

    python tools/bench/alone.py tools.bench.cells:batches '{"name": "jpeg-portable", "seconds": 2, "shards": …}' …

The function is called once for each object of options. It returns a result, or it is a generator. With "seconds" it
yields the sizes of batches without end, and they are counted for so long; otherwise it yields twice: when its work can
begin, and the number of images when that is done. A module may have VERSIONS of its environment.
The standard library alone: FFCV runs in an environment that has none of our packages.
"""

import inspect
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

# The page cache is warm, but a process's own caches and the memory behind a file that nobody read for minutes are not.
WARM_SECONDS = 1.0
WARM_BATCHES = 8  # the first ones fill queues, allocate memory, load kernels and compile


def rate(batches: Iterator[int], seconds: float) -> dict[str, float]:
    """Counts images for `seconds` after a warm-up; returns images, seconds and ended (Unix time)."""
    warm_until = time.perf_counter() + min(WARM_SECONDS, seconds)
    for number, _ in enumerate(batches, 1):
        if number >= WARM_BATCHES and time.perf_counter() > warm_until:
            break
    images, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        images += next(batches)
    return {"images": images, "seconds": elapsed, "ended": time.time()}


def once(steps: Iterator[int]) -> dict[str, float]:
    """Times `steps` from its first to its second yield. megabytes: resident, of the largest child process."""
    next(steps)
    started = time.perf_counter()
    images = next(steps)
    seconds = time.perf_counter() - started
    next(steps, None)  # removes what was made
    megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"images": images, "seconds": seconds, "megabytes": megabytes}


def end_with_parent() -> None:
    """Ends this process and its children when its parent ends: in its own session, no signal would reach it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def attempt(function: Callable[[], Any]) -> Any:
    """Returns the function's result, or any error as a result, so that other measurements can continue."""
    try:
        return function()
    except Exception as err:
        return {"error": f"{type(err).__name__}: {err}".partition("\n")[0]}


def call(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    if not inspect.isgeneratorfunction(function):
        return function(**options)
    seconds = options.pop("seconds", None)
    with closing(function(**options)) as steps:
        return rate(steps, seconds) if seconds else once(steps)


def main() -> None:
    end_with_parent()
    path, _, name = sys.argv[1].partition(":")
    started = time.perf_counter()
    module = import_module(path)
    about = {"import_seconds": time.perf_counter() - started, "versions": getattr(module, "VERSIONS", None)}
    function = getattr(module, name)
    for options in map(json.loads, sys.argv[2:]):
        print(json.dumps(about | attempt(partial(call, function, options))), flush=True)


if __name__ == "__main__":
    main()
