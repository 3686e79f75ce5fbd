"""Loaders and sharders that ours are measured beside; tools/bench/alone.py runs each in a process of its own.

`batches` yields the sizes of a loader's batches without end, `measure` does one piece of work and returns images and
seconds. FFCV's modules import nothing of the project: their environment has none of its packages.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


def threaded(work: Callable[[int], int], threads: int) -> Iterator[int]:
    """The results of work(0), work(1) and so on without end, by threads that never wait for the next call."""
    pending = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number in itertools.count():
            pending.append(pool.submit(work, number))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
