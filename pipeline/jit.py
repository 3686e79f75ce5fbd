"""Compiles the inner loops with Numba: once per machine; they run without the GIL."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
from numba.core import config

NUMBA: Any = config


def compiled(function: Callable[..., Any], *, fastmath: bool = True) -> Any:
    try:
        return numba.njit(nogil=True, fastmath=fastmath, cache=True)(function)
    except RuntimeError:  # no folder for the machine code: a read-only installation without a home
        return numba.njit(nogil=True, fastmath=fastmath)(function)


# For floating point with fractions: without fastmath the result is the same on every processor.
exactly_compiled = partial(compiled, fastmath=False)


class straight_lines_vectorised:
    """LLVM vectorises straight-line code that is compiled in the block: 4 times as fast; Numba turns this off."""

    _lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._before = NUMBA.SLP_VECTORIZE
        NUMBA.SLP_VECTORIZE = 1

    def __exit__(self, *_: object) -> None:
        NUMBA.SLP_VECTORIZE = self._before
        self._lock.release()
