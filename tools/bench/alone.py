"""Calls a function in a process of its own and prints its result as a line of JSON; harness.run starts it.

    python tools/bench/alone.py tools.bench.peers.decode:batches '{"seconds": 2, "data": "shards", …}'

A generator yields the sizes of batches without end: they are counted for "seconds". A module may have VERSIONS of its
environment. The standard library alone, as in timing.py.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from importlib import import_module
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.bench.timing import rate


def main() -> None:
    path, _, name = sys.argv[1].partition(":")
    options = json.loads(sys.argv[2])
    started = time.perf_counter()
    module = import_module(path)
    about = {"import_seconds": time.perf_counter() - started, "versions": getattr(module, "VERSIONS", None)}
    function = getattr(module, name)
    if inspect.isgeneratorfunction(function):
        seconds = options.pop("seconds")
        result = rate(function(**options), seconds)
    else:
        result = function(**options)
    print(json.dumps(about | result))


if __name__ == "__main__":
    main()
