"""A headless Chromium, driven over its debugging pipe (DevTools protocol, without a library)."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
_PATIENCE_SECONDS: Final = 60.0
#: Chromium reads its commands from descriptor 3 and answers on 4. High numbers first: neither may
#: be 3 or 4 before it is moved there.
_START: Final = """
import fcntl, os, sys
r, w = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 50) for n in sys.argv[1:3])
os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The program, where it is installed."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


class Browser:
    """A browser process; use as a context manager."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._numbers = itertools.count(1)
        self._unread = b""
        self._open = contextlib.ExitStack()
        self.events: list[dict[str, object]] = []

    def __enter__(self) -> Browser:
        profile = self._open.enter_context(
            tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        )
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        arguments = [
            self._program, "--headless=new", "--remote-debugging-pipe", "--no-first-run",
            "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars",
            "--disable-background-networking", "--force-color-profile=srgb",
            f"--user-data-dir={profile}",
        ]  # fmt: skip
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(commands), str(answers), *arguments],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._open.close()

    def call(
        self,
        method: str,
        parameters: Mapping[str, object] | None = None,
        session: str | None = None,
    ) -> dict[str, object]:
        """Send a command; returns its result."""
        number = next(self._numbers)
        message: dict[str, object] = {"id": number, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            answer = self._read(end)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                result = answer["result"]
                assert isinstance(result, dict)
                return result
            self.events.append(answer)

    def _read(self, end: float) -> dict[str, object]:
        while b"\0" not in self._unread:
            readable, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert readable, "the browser does not answer"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._unread += data
        message, _, self._unread = self._unread.partition(b"\0")
        found = json.loads(message)
        assert isinstance(found, dict)
        return found

    @contextlib.contextmanager
    def page(self, *, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Tab]:
        """An empty tab of that size, in CSS pixels, in light or dark."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        tab = Tab(self, str(attached["sessionId"]))
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme, still])
        try:
            yield tab
        finally:
            self.call("Target.closeTarget", {"targetId": target})


class Tab:
    """A tab of the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **parameters: object) -> dict[str, object]:
        """Send a command to the tab; returns its result."""
        return self._browser.call(method, parameters, self._session)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the viewport."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def go(self, url: str) -> None:
        """Open a page."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> object:
        """The value of a JavaScript expression, as JSON; a promise is awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        value = result["result"]
        assert isinstance(value, dict)
        return value.get("value")

    def wait(self, expression: str) -> object:
        """Wait until the expression is true; returns its value."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} did not become true"
            time.sleep(0.05)
        return value

    def text(self) -> str:
        """What a reader sees."""
        return str(self.evaluate("document.body.innerText"))

    def complaints(self) -> list[str]:
        """Errors so far: exceptions, and what the policy forbade."""
        found = []
        for event in self._browser.events:
            parameters = event.get("params")
            if event.get("sessionId") != self._session or not isinstance(parameters, dict):
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(parameters["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(parameters["entry"]["text"])
        return found

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(str(shot["data"])))
