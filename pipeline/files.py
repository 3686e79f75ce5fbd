"""Files that are published whole or not at all."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import StorageError

Json = dict[str, Any]  # an object of JSON
PARTIAL = ".partial"
LOCK_SECONDS = 3.0  # workers whose parent was killed live for half a second longer


def fsync_path(path: Path) -> None:
    """Makes a file's content, or a rename inside a folder, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the name `path` when the block ends well: partial → fsync → rename.

    After an exception, what was at `path` before is unchanged. Raises StorageError if another process is writing the
    same file.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(locked(partial), "wb") as file:
            try:
                file.truncate()  # what a killed process left
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as err:  # of a full disk: it names no file
        err.filename = err.filename or str(path)
        raise
    fsync_path(path.parent)


def locked(path: Path, *, shared: bool = False, wait_seconds: float = LOCK_SECONDS) -> int:
    """A descriptor of the file, made if need be, that holds its lock until it is closed.

    Raises StorageError if another process holds it for longer than `wait_seconds`. On a filesystem without locks, the
    file is not locked.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as err:
            os.close(fd)
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise StorageError(f"{path}: another process is writing there; wait until it ends") from err
        except OSError:
            pass
        try:  # while we waited for the lock, its holder may have renamed or removed the file
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


def json_bytes(value: Any) -> bytes:
    """Indented JSON. A file's name that is no UTF-8 comes back from it unchanged."""
    # Such a byte is a surrogate in Python's strings, whose replacement by a backslash is JSON's own way to write it.
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Publishes `text`. Bytes of a file's name that are no UTF-8 are escaped."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Publishes `value` as indented JSON."""
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def read_object(path: Path) -> Json:
    """The object in a JSON file; empty if there is none, or if it was not written to its end."""
    with suppress(OSError, ValueError):
        if isinstance(value := json.loads(path.read_bytes()), dict):
            return value
    return {}


class OpenFile:
    """A descriptor that is closed when nobody refers to it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)
