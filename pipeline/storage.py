"""The folder to which shards are written, and checks of URLs. bucket.py has the same methods for an object store."""

import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from .errors import ConfigError
from .files import LOCK_SECONDS, atomic_write, locked

Result = TypeVar("Result")
SCHEMES = ("s3", "gs", "az", "hf", "https", "http")
ALLOW = "add --data.allow-http (make_shards.py: --allow-http; in a script: open_dataset(…, allow_http=True))"
CREATE_SECONDS = 10.0  # all tasks of a job array may start in one moment


def is_url(place: object) -> bool:
    return "://" in str(place)


def absolute(place: str) -> str:
    """Returns a folder's absolute path, or a URL unchanged; file:// becomes a path."""
    if place.startswith("file://"):
        place = unquote(re.sub("^file://(localhost(?=/))?", "", place))
    return place if is_url(place) else os.path.abspath(place)


def check_url(url: str, *, allow_http: bool) -> None:
    """Raises ConfigError for a URL that cannot be read or contains credentials, which the message omits."""
    scheme = url.partition(":")[0]
    # A password may contain slashes and brackets.
    plain = re.sub(r"(?s)^([^/]*//)([^/@:[]*:(?!\d+/).*|[^/]*)@", r"\1", url)
    try:
        parts = urlsplit(plain)
    except ValueError as err:  # a bracket in the host
        raise ConfigError(
            f"{re.split('[?#]', plain)[0]}: names no bucket or server; write {scheme}://NAME/FOLDER"
        ) from err
    shown = f"{scheme}://{parts.netloc}{parts.path}"
    if scheme not in SCHEMES:
        raise ConfigError(f"{shown}: begin it with {'://, '.join(SCHEMES[:-1])}://, or name a folder")
    if plain != url or parts.query or parts.fragment or ".." in parts.path.split("/"):
        raise ConfigError(f"{shown}: leave user, password, ?, # and .. out; credentials come from the environment")
    if not parts.hostname:
        raise ConfigError(f"{shown}: names no bucket or server; write {scheme}://NAME/FOLDER")
    if scheme == "http" and not allow_http:
        raise ConfigError(f"{shown}: is not encrypted; use https://, or {ALLOW}")


def file_size(path: Path) -> int | None:
    """The file's size in bytes; None if there is no such file."""
    try:
        return path.stat().st_size if path.is_file() else None
    except FileNotFoundError:  # it was just renamed or deleted
        return None


@dataclass(frozen=True)
class Copies:
    """A local folder for copies of whole shards, made in the order in which they are read: docs/remote.md.

    bytes: limit for all copies together. wait: images are read only from copies, as far as the copies fit; otherwise
    they are read from the shards themselves until a copy exists.
    """

    folder: Path
    bytes: float = math.inf
    wait: bool = True

    def path(self, sha256: str) -> Path:
        """The path of a shard's copy, which gets this name once it is whole."""
        return self.folder / f"{sha256}.tar"


@dataclass
class Folder:
    """A local folder. A name may have one folder before it: `parts/lock`."""

    path: Path
    allow_http = False

    def __str__(self) -> str:
        return str(self.path)

    def apart(self, function: Callable[[], Result]) -> Result:
        """Returns function(); for calls that are made before workers are forked."""
        return function()

    def is_visible(self) -> bool:
        return self.path.is_dir()

    def names(self, below: str = "") -> list[str]:
        """Returns the sorted names of files and folders in it, or in its folder `below`. Creates the folder."""
        path = self.path / below
        path.mkdir(parents=True, exist_ok=True)
        return sorted(os.listdir(path))

    def size(self, name: str) -> int | None:
        """The file's size in bytes; None if there is no such file."""
        return file_size(self.path / name)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def publish(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Opens a file that gets its name when the block succeeds: see atomic_write."""
        return atomic_write(self._with_folder(name))

    def write(self, name: str, data: bytes | memoryview) -> None:
        with self.publish(name) as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> None:
        """Writes a file unless it exists."""
        with self.lock(f"{name}.lock", wait_seconds=CREATE_SECONDS):
            if self.size(name) is None:
                self.write(name, data)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def lock(self, name: str, *, shared: bool = False, wait_seconds: float = LOCK_SECONDS) -> BinaryIO:
        """Locks a file; the lock is held while the returned file is open. shared: other shared locks are allowed.

        Raises StorageError if another process does not release the lock within `wait_seconds`.
        """
        while True:
            try:
                return open(locked(self._with_folder(name), shared=shared, wait_seconds=wait_seconds), "rb")
            except FileNotFoundError:  # the process that held it has removed the folder
                continue

    def _with_folder(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def folder_at(place: str, *, allow_http: bool = False) -> Folder:
    """The folder at a path or a URL."""
    if not is_url(place):
        return Folder(Path(place))
    from .bucket import Bucket, Url

    check_url(place, allow_http=True)  # first, so that later messages may show the URL
    if not place.startswith(("s3:", "gs:", "az:")):
        raise ConfigError(f"{place}: shards are written to a folder, or to s3://, gs:// or az://")
    return Bucket(Url(place.rstrip("/")), allow_http)
