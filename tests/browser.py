"""A headless Chromium, driven over pipes by the DevTools protocol: it needs no driver and no package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

SECONDS = 300  # that it may take for an answer, on a machine that is busy
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip


class Browser(contextlib.AbstractContextManager["Browser"]):
    """`events` are those of the page that is open. Skips the test if the machine has no Chromium."""

    def __init__(self, profile: Path) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip("no Chromium here: apt-get install chromium, or put google-chrome on the PATH")
        ours, theirs = os.pipe(), os.pipe()
        argv = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        moved = f'exec 103<&{ours[0]} 104>&{theirs[1]} 3<&103 4>&104 103<&- 104>&-; exec "$@"'  # it reads 3, writes 4
        self.process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *argv],
            pass_fds=[ours[0], theirs[1]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb")
        self._number, self._session, self._rest = 0, "", b""
        self.events: list[dict] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Performance"):
            self(f"{domain}.enable")

    def __exit__(self, kind: type | None, err: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._session = ""
            self("Browser.close")
        self._to.close()
        self._from.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __call__(self, method: str, **params: Any) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], SECONDS)[0]:
                raise TimeoutError(f"the browser has sent nothing for {SECONDS} s")
            more = os.read(self._from.fileno(), 1 << 20)
            if not more:
                raise EOFError("the browser has ended")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Opens a file and waits until it is loaded."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, script: str) -> Any:
        """The value of an expression or promise of the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def errors(self) -> list[str]:
        """The errors and exceptions that the console shows."""
        kinds = {"Log.entryAdded": "entry", "Runtime.exceptionThrown": "exceptionDetails"}
        found = [event["params"][kinds[event["method"]]] for event in self.events if event.get("method") in kinds]
        calls = [e["params"] for e in self.events if e.get("method") == "Runtime.consoleAPICalled"]
        found = [one for one in found if one.get("level", "error") in ("error", "warning")]
        return [json.dumps(one) for one in [*found, *(call for call in calls if call["type"] in ("error", "assert"))]]

    def requests(self, page: Path) -> list[str]:
        """Addresses that were asked for beside the page itself; data: is no request."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if url != page.as_uri() and not url.startswith("data:")]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(shot["data"]))

    def _clip(self, whole: bool) -> dict:
        if not whole:
            return {}
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
