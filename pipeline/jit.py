"""Compiles the inner loops with Numba, once per machine; they run without the GIL."""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numba
from numba.core import config

from .errors import StorageError
from .files import OpenFile, locked

NUMBA: Any = config
PACKAGE = Path(__file__).parent
LONGEST = 600.0  # seconds that another process may compile one function


def compiled(function: Callable[..., Any], *, fastmath: bool = True) -> Any:
    made: Any = numba.njit(nogil=True, fastmath=fastmath)(function)
    # No folder for the machine code: a read-only installation without a home
    with suppress(RuntimeError), _set("CACHE_DIR", _cache_folder()):
        made.enable_caching()
        made.compile = partial(_compile, made.compile)
    return made


# For floating-point results that must be the same on every processor: without fastmath.
exactly_compiled = partial(compiled, fastmath=False)


@lru_cache
def _cache_folder() -> str:
    """The folder for machine code: one for each name of this package and each version of its compiled modules.

    Machine code refers to its module by name: `pipeline` in the tools, `imagenet_express.pipeline` in a user's script.
    Numba checks only the modification time of a function's own file, and would reuse machine code that contains an
    older version of a function from another file.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        if b"jit import" in (source := path.read_bytes()):
            digest.update(source)
    own = PACKAGE / "__pycache__"
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    base = Path(NUMBA.CACHE_DIR or (own if os.access(PACKAGE, os.W_OK) else home.expanduser() / "imagenet-express"))
    folder = base / f"{__package__}-{digest.hexdigest()[:16]}"
    if base == own and not folder.exists():
        for older in own.glob(f"{__package__}-*"):
            shutil.rmtree(older, ignore_errors=True)
    return str(folder)


@contextmanager
def _set(name: str, value: Any) -> Iterator[None]:
    """Changes one of Numba's settings inside the block."""
    before = getattr(NUMBA, name)
    setattr(NUMBA, name, value)
    try:
        yield
    finally:
        setattr(NUMBA, name, before)


_lock, _held = threading.RLock(), list[OpenFile | None]()


def _compile(compile: Callable[..., Any], *args: Any) -> Any:
    """Compiles or loads a function under a lock between processes: if ranks start together, only one compiles.

    The functions that it calls are compiled under the same lock.
    """
    with _lock:
        if _held:
            return compile(*args)
        _held.append(_locked())
        try:
            with _set("SLP_VECTORIZE", 1):  # off by default in Numba; makes crops 4 times as fast
                return compile(*args)
        finally:
            _held.clear()


def _locked() -> OpenFile | None:
    with suppress(OSError, StorageError):  # without a lock, two processes may compile the same function
        return OpenFile(locked(Path(_cache_folder(), "lock"), wait_seconds=LONGEST))
    return None
