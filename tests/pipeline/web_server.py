"""A web server of a folder, with ranges and ETags, that fails on demand."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class WebServer:
    """log: (file, first byte, last byte + 1) of each request for a range, (file, 0, 0) of others.

    fault: called with the number of the request, from 0, and its file: cut, delay, 503, 403, wrong, whole or "".
    wrong at first: only when the range is requested for the first time.
    """

    folder: Path
    fault: Callable[[int, str], str] = lambda number, name: ""
    log: list[tuple[str, int, int]] = field(default_factory=list)
    url: str = ""
    requested: int = 0
    rejected: list[str] = field(default_factory=list)
    headers: set[str] = field(default_factory=set)  # names of those that clients have sent

    def ranges(self) -> list[tuple[str, int, int]]:
        return [each for each in self.log if each[0].endswith(".tar")]


def listing(folder: Path) -> bytes:
    """The answer of S3 to a LIST."""
    one = "<Contents><Key>{}</Key><Size>{}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
    objects = [one.format(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]
    return f"<ListBucketResult>{''.join(objects)}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    state, lock = WebServer(folder), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            return

        def do_GET(self) -> None:
            name = self.path.removeprefix("/data/")
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            with lock:
                number, state.requested = state.requested, state.requested + 1
            state.headers |= {header.lower() for header in self.headers}
            fault = state.fault(number, name)
            if fault == "delay":
                time.sleep(0.3)
            path = state.folder / name
            if "list-type=2" in self.path:
                self._answer(200, listing(state.folder), {})
                return
            if fault in ("503", "403") or not path.is_file():
                state.rejected.append(repr(self.headers.items()))  # S3 too repeats what the client has sent
                self._answer(int(fault) if fault.isdigit() else 404, state.rejected[-1].encode(), {})
                return
            data = path.read_bytes()
            start, end = (int(found[1]), min(int(found[2]) + 1, len(data))) if found else (0, len(data))
            if start >= end:
                self._answer(416, b"", {})
                return
            if fault == "wrong at first":
                fault = "" if (name, start, end) in state.log else "wrong"
            state.log.append((name, start, end) if found else (name, 0, 0))
            headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
            if not found or fault == "whole":
                self._answer(200, data, headers)
                return
            part = data[start:end]
            if fault == "wrong":  # a bit of each byte, as a broken memory would
                part = bytes(byte ^ 1 for byte in part)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            self._answer(206, part, headers, sent=len(part) // 2 if fault == "cut" else len(part))

        def _answer(self, status: int, body: bytes, headers: dict[str, str], sent: int = -1) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[:sent] if sent >= 0 else body)
            if 0 <= sent < len(body):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/data"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
