"""Shard folders behind URLs: object stores and web servers, through obstore. Imported only if a URL is given.

Credentials come from the environment (docs/remote.md). No message repeats what a server or a library says: answers to
rejected requests hold signatures and tokens.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import LOG, ConfigError, DataError, StorageError
from .files import atomic_write, locked
from .shards import Shard, file_sha256
from .storage import ALLOW, check_url

try:
    import obstore as obstore
    from obstore.store import from_url
except ImportError as err:
    raise ConfigError("shards at a URL need obstore: pip install 'imagenet-express[remote]'") from err

HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?((?:/.*)?)")
PATIENCE = 180.0  # seconds in which a request is retried
AT_OPENING = 30.0  # the same when a dataset is opened: a wrong name should be reported sooner
REJECTED = 5.0  # the same for a request without permission: credentials may be in renewal
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 15.0
WARN_EVERY = 30.0
RETRIED = (408, 425, 429)  # the 4xx status codes that are retried
BEYOND_END = "416"
# obstore's default is 30 s for a whole request, too short on a slow shared line, and none for a server that stalls.
TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "20s", "timeout": "600s"}


class RemoteFolder:
    """The objects under a URL. Thread-safe.

    allow_http: also allow http://. fetch_memory: MB of images that a rank may fetch ahead.
    Raises ConfigError for a URL that cannot work.
    """

    def __init__(self, url: str, *, allow_http: bool = False, fetch_memory: float = 0) -> None:
        check_url(url, allow_http=allow_http)
        self.url, self.allow_http, self.fetch_memory = url.rstrip("/"), allow_http, fetch_memory
        options: dict[str, Any] = TIMEOUTS | ({"allow_http": True} if allow_http else {})
        more = {"credential_provider": _profile()} if url.startswith("s3:") and os.environ.get("AWS_PROFILE") else {}
        # obstore's retries reuse the first attempt's signature and stop at a truncated body: `request` retries instead.
        more["retry_config"] = {"max_retries": 0, "retry_timeout": timedelta(seconds=AT_OPENING)}
        make: Any = from_url  # its types have a signature for each kind of URL

        def connected(address: str) -> Any:
            try:
                return make(address, client_options=options, **more)
            except Exception as err:
                raise ConfigError(
                    f"{self.url}: settings in the environment are missing or wrong, or the URL is wrong"
                    f" ({type(err).__name__}); see docs/remote.md"
                ) from None

        self._versions: dict[str, str] = {}
        self._warned = 0.0
        address = self.url
        if url.startswith("hf:"):
            if token := os.environ.get("HF_TOKEN"):
                options["default_headers"] = {"Authorization": f"Bearer {token}"}
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
            self._store = connected(hub)
            address = f"{hub}/{self._pinned()}"
        self._store = connected(address)

    def _pinned(self) -> str:
        """Returns the folder's path on the Hub at the branch's current commit, and puts that commit into the URL."""
        found = HUB.fullmatch(self.url)
        if not found:
            raise ConfigError(f"{self.url}: write hf://datasets/OWNER/NAME/FOLDER, or NAME@REVISION")
        name, revision, folder = found.groups()
        try:
            commit = json.loads(bytes(self.get(f"api/datasets/{name}/revision/{revision or 'main'}")))["sha"]
        except (DataError, ValueError, KeyError, TypeError):
            raise DataError(f"{self.url}: the Hub has no such dataset or revision; check the URL") from None
        self.url = f"hf://datasets/{name}@{commit}{folder}"
        return f"datasets/{name}/resolve/{commit}{folder}"

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{name}"

    def get(self, name: str, start: int = 0, end: int = 0, *, size: int = 0, **options: Any) -> Any:
        """Returns the bytes [start, end) of an object as a buffer; all bytes if `end` is 0.

        size: the size in bytes that the object must have. options: see `request`.
        Raises StorageError if it cannot be read; DataError if it is missing, was replaced, or has another size.
        """
        what = self / name

        def get(store: Any) -> Any:
            found = obstore.get(store, name, options={"range": (start, end)} if end else {})
            self._check(name, found.meta, size)
            data = found.bytes()
            if end and len(data) != end - start:
                raise DataError(f"{what}: ends before byte {end}; copy the shard again")
            return data

        try:
            return self.request(what, get, **options)
        except FileNotFoundError:
            raise DataError(f"{what}: there is no such object; check the URL, or copy the shards again") from None

    def request(
        self,
        what: str,
        function: Callable[[Any], Any],
        *,
        patience: float = 0,
        stop: threading.Event | None = None,
        doing: str = "read",
    ) -> Any:
        """function(store), retried for `patience` seconds, by default AT_OPENING.

        what: the object, for messages. stop: gives up as soon as it is set.
        Raises StorageError; FileNotFoundError if there is no such object, FileExistsError if there must not be one.
        """
        pause, stop = FIRST_PAUSE, stop or threading.Event()
        started = time.monotonic()
        while True:
            try:
                return function(self._store)
            except (DataError, FileNotFoundError):
                raise
            except obstore.exceptions.AlreadyExistsError:
                raise FileExistsError(what) from None
            except Exception as err:  # obstore has a class for each way
                reason, seconds = _why(err)
            if BEYOND_END in reason:
                raise DataError(f"{what}: ends before the first byte that is needed; copy the shard again")
            waited = time.monotonic() - started
            if waited + pause > min(seconds, patience or AT_OPENING) or stop.wait(pause):
                raise StorageError(f"{what}: cannot be {doing}, tried for {waited:.0f} s: {reason}")
            if waited > 2 and time.monotonic() > self._warned + WARN_EVERY:
                self._warned = time.monotonic()
                LOG.warning("%s: %s; retrying", what, reason)
            pause = min(2 * pause, LONGEST_PAUSE)

    def length(self, name: str) -> int:
        """The size of an object, in bytes. Raises as `get` does."""
        try:
            # Not HEAD: the storage to which the Hub redirects may accept only GET.
            first = lambda store: obstore.get(store, name, options={"range": (0, 1)})  # noqa: E731
            return self.request(self / name, first).meta["size"]
        except FileNotFoundError:
            raise DataError(f"{self / name}: there is no such object; check the URL") from None

    def _check(self, name: str, meta: Any, size: int) -> None:
        if size and meta["size"] != size:
            raise DataError(f"{self / name}: {meta['size']} bytes, {size} in the manifest; copy the shard again")
        version = str(meta["e_tag"] or meta["last_modified"])
        if self._versions.setdefault(name, version) != version:
            raise DataError(f"{self / name}: was replaced while it was in use; start again with shards that stay")

    def size(self, shard: Shard) -> int | None:
        """The shard's size in bytes; None if it is missing. Web servers have no listing: the manifest's size."""
        if shard.name.startswith("../"):
            raise DataError(f"{self.url}: its tars lie outside it ({shard.name}); copy shards and tars to this machine")
        if self.url.startswith(("http", "hf")) or "/" in shard.name:
            return shard.bytes
        return self._sizes.get(shard.name)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self.listed()[0]

    def listed(self, below: str = "") -> tuple[dict[str, int], list[str]]:
        """Returns {object: bytes} and the folders directly under the URL, or under the folder `below`, by one LIST."""
        found = self.request(self / below, lambda store: obstore.list_with_delimiter(store, below), doing="listed")
        return {meta["path"]: meta["size"] for meta in found["objects"]}, found["common_prefixes"]

    @staticmethod
    def copy(name: str, *, sha256: str) -> Path:
        """The path of this machine's copy of a file."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return home / "imagenet-express" / f"{sha256}{Path(name).suffix}"

    def cached(self, name: str, *, sha256: str, stop: threading.Event | None = None) -> Path:
        """Returns the path of a local copy of a file; fetches it if no copy has this sha256. stop: see request."""
        path = self.copy(name, sha256=sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(locked(path.with_suffix(".lock"), wait_seconds=PATIENCE), "rb"):
            if not path.is_file() or file_sha256(path) != sha256:
                with atomic_write(path) as file:
                    file.write(self.get(name, stop=stop))
                if file_sha256(path) != sha256:
                    raise DataError(f"{self / name}: its bytes are not those in the manifest (sha256); upload it again")
        return path


def _profile() -> Any:
    """A credential provider by boto3, for profiles, SSO and roles; it renews credentials before they expire."""
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as err:
        raise ConfigError("AWS_PROFILE needs boto3: pip install 'imagenet-express[aws]'") from err
    try:
        return Boto3CredentialProvider()
    except Exception as err:  # botocore has a class for each way
        raise ConfigError(
            f"AWS_PROFILE={os.environ['AWS_PROFILE']}: gives no credentials ({type(err).__name__})"
        ) from None


def _why(err: Exception) -> tuple[str, float]:
    """Returns the reason of a failed request, without secrets, and for how many seconds to retry."""
    text = str(err)
    if isinstance(err, obstore.exceptions.NotSupportedError):
        return "the server ignores Range; use another server, or copy the shards", 0.0
    if "builder error" in text:
        return f"the server's URL, or where it redirects to, is not encrypted; use https://, or {ALLOW}", 0.0
    if "configured region" in text:
        return "the bucket is in another region (set AWS_REGION), or the server redirects without an address", 0.0
    if found := re.search(r"status code: (\d{3})[A-Za-z -]*", text):
        status = int(found[1])
        if status in (401, 403):
            return f"{found[0]}; check the credentials in the environment", REJECTED
        return found[0], 0.0 if 400 <= status < 500 and status not in RETRIED else PATIENCE
    kind = re.search(r"kind: (Connect|Timeout|Interrupted|Request|Decode)", text)
    return {"Connect": "no connection", "Timeout": "timed out"}.get(
        kind[1] if kind else "", "the connection broke, or the response is invalid"
    ), PATIENCE
