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
    """Yields a file that is renamed to `path` when the block succeeds: partial → fsync → rename.

    After an exception, an earlier file at `path` is unchanged. Raises StorageError if another process is writing the
    same file.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(locked(partial), "wb") as file:
            try:
                file.truncate()  # left by a killed process
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as err:  # the error of a full disk names no file
        err.filename = err.filename or str(path)
        raise
    fsync_path(path.parent)


def locked(path: Path, *, shared: bool = False, wait_seconds: float = LOCK_SECONDS) -> int:
    """Creates the file if needed, locks it and returns its descriptor; closing the descriptor releases the lock.

    Raises StorageError if another process holds the lock for longer than `wait_seconds`. On a filesystem without locks,
    the file is not locked.
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
    """Returns indented JSON. File names that are not UTF-8 survive the round trip."""
    # Python keeps their bytes as surrogates, and backslashreplace writes these as JSON's own escapes.
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Publishes `text`. Bytes of file names that are not UTF-8 are escaped."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Publishes `value` as indented JSON."""
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def read_object(path: Path) -> Json:
    """The object in a JSON file; {} if the file is missing or was not written completely."""
    with suppress(OSError, ValueError):
        if isinstance(value := json.loads(path.read_bytes()), dict):
            return value
    return {}


class OpenFile:
    """A file descriptor that is closed when its last reference is deleted."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)
