"""A folder in an object store (s3:// or gs://) to which shards are written, with the methods of a local folder.

Each object is written by one PUT, so it appears whole or not at all; a multipart upload that is killed would leave
parts behind. Object stores have no locks, and need none here: two runs of one plan write the same bytes, and the first
of two different plans excludes the second by a conditional write.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

from . import pool, remote
from .remote import obstore  # its error names the package to install
from .storage import Folder, Result


class Url(str):
    """A URL that supports `url / name`, as a Path does."""

    def __truediv__(self, name: str) -> str:
        return f"{self}/{name}"


@dataclass
class Bucket(Folder):
    """See Folder. allow_http: also allow http://. Each process connects when it first reads or writes."""

    path: Url  # type: ignore[assignment]
    allow_http: bool = False

    @cached_property
    def _remote(self) -> remote.RemoteFolder:
        return remote.RemoteFolder(self.path, allow_http=self.allow_http)

    def _request(self, name: str, function: Callable[[Any], Any], **options: Any) -> Any:
        return self._remote.request(self.path / name, function, patience=remote.PATIENCE, **options)

    def apart(self, function: Callable[[], Result]) -> Result:
        return pool.apart(function, place=self)  # obstore's threads do not survive a fork

    def is_visible(self) -> bool:
        self.names()
        return True

    def names(self, below: str = "") -> list[str]:
        sizes, folders = self._remote.listed(below)
        if not below:
            self._sizes = sizes
        # Without the empty object that a web console creates for the folder itself
        return sorted(filter(None, (path.removeprefix(below).strip("/") for path in (*sizes, *folders))))

    def size(self, name: str) -> int | None:
        if size := getattr(self, "_sizes", {}).get(name):
            return int(size)
        with suppress(FileNotFoundError):
            return int(self._request(name, lambda store: obstore.head(store, name)["size"]))
        return None

    def read(self, name: str) -> bytes:
        return bytes(self._request(name, lambda store: obstore.get(store, name).bytes()))

    @contextmanager
    def publish(self, name: str) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        yield file
        self._put(name, file.getvalue())

    def create(self, name: str, data: bytes) -> None:
        with suppress(FileExistsError):
            self._put(name, data, mode="create")

    def _put(self, name: str, data: bytes, **options: Any) -> None:
        put = lambda store: obstore.put(store, name, data, use_multipart=False, **options)  # noqa: E731
        self._request(name, put, doing="written")

    def remove(self, name: str) -> None:
        def delete(store: Any) -> None:
            obstore.delete(store, [meta["path"] for part in obstore.list(store, f"{name}/") for meta in part] or [name])

        self._request(name, delete, doing="removed")

    def lock(self, name: str, *, shared: bool = False, wait_seconds: float = 0) -> BinaryIO:
        return io.BytesIO()
