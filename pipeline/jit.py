"""How the inner loops are compiled: by Numba, once for a machine, without the GIL."""

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
    except RuntimeError:  # nowhere to keep machine code: a read-only installation without a home
        return numba.njit(nogil=True, fastmath=fastmath)(function)


# For floating point that is not in whole numbers: the same on every processor.
exactly_compiled = partial(compiled, fastmath=False)


class straight_lines_vectorised:
    """Lets LLVM join neighbouring scalar operations in what is compiled meanwhile, which Numba leaves off: 4 times."""

    _lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._before = NUMBA.SLP_VECTORIZE
        NUMBA.SLP_VECTORIZE = 1

    def __exit__(self, *_: object) -> None:
        NUMBA.SLP_VECTORIZE = self._before
        self._lock.release()
