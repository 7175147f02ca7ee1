"""The status page of a daemon that lives through the incident: that it says what matters in each
phase, and its pictures in docs/images, which are taken anew by

    python -m tests.operate.screenshots [DIRECTORY]

(a quarter of an hour; needs Chromium, Prometheus and pngquant, which Debian has under these names).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from tests.operate.dashboard import ROOT
from tests.support.chromium import Browser, Tab, find_chromium

_DIRECTORY: Final = "TEST_STATUS_PICTURES"
WIDE: Final = 1120
PHONE: Final = 360
#: Without what a first look does not need: for the README.
_SHORT: Final = """
(() => {
  const style = new CSSStyleSheet();
  style.replaceSync("#events-section, footer { display: none }");
  document.adoptedStyleSheets = [style];
})()
"""
_LOADED: Final = "document.querySelector('#tables td') !== null"


class Camera:
    """Looks at status pages; writes what it sees if it has a directory. Without a Chromium it
    does nothing."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._browser: Browser | None = None

    @classmethod
    def of_this_run(cls) -> Camera:
        """The one for a run of the incident: with a directory if a variable names one."""
        directory = os.environ.get(_DIRECTORY)
        return cls(Path(directory) if directory else None)

    def __enter__(self) -> Self:
        program = find_chromium()
        if program is not None:
            self._browser = Browser(program).__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._browser is not None:
            self._browser.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def page(self, port: int, *, width: int = WIDE, dark: bool = False) -> Iterator[View]:
        """The page of the daemon at that port, in a tab of that width (CSS pixels)."""
        if self._browser is None:
            yield View(None, None)
            return
        with self._browser.page(width=width, height=200, dark=dark) as tab:
            tab.go(f"http://127.0.0.1:{port}/")
            tab.wait(_LOADED)
            yield View(tab, self._directory)

    def take(
        self,
        name: str,
        port: int,
        *words: str,
        width: int = WIDE,
        dark: bool = False,
        short: bool = False,
    ) -> None:
        """Open the page, wait until it says all that, and take its picture; ``short``: without
        events."""
        with self.page(port, width=width, dark=dark) as view:
            view.take(name, *words, short=short)


class View:
    """A page that is looked at."""

    def __init__(self, tab: Tab | None, directory: Path | None) -> None:
        self._tab = tab
        self._directory = directory

    def take(self, name: str, *words: str, short: bool = False) -> None:
        """Wait until the page says all that, and take its picture."""
        tab = self._tab
        if tab is None:
            return
        for said in words:
            tab.wait(f"document.body.innerText.includes({said!r})")
        # A daemon that is gone is no fault of the page.
        assert [text for text in tab.complaints() if "net::ERR_" not in text] == []
        # Nothing may have to be scrolled sideways.
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        if short:
            tab.evaluate(_SHORT)
        if self._directory is not None:
            self._write(tab, self._directory / f"status-{name}.png")

    @staticmethod
    def _write(tab: Tab, path: Path) -> None:
        height = tab.evaluate("Math.ceil(document.querySelector('.page').offsetHeight) + 40")
        width = tab.evaluate("window.innerWidth")
        assert isinstance(height, int)
        assert isinstance(width, int)
        tab.resize(width, height)
        path.parent.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path)
        command = ["pngquant", "--force", "--strip", "--speed=1", "--ext=.png", "256", str(path)]
        subprocess.run(command, check=True)


def main(directory: Path) -> int:
    """Live through the incident, and take the pictures; returns the exit code of pytest."""
    for package, found in (("chromium", find_chromium()), ("pngquant", shutil.which("pngquant"))):
        if found is None:
            raise SystemExit(f"apt-get install --no-install-recommends {package}, first")
    os.environ[_DIRECTORY] = str(directory.absolute())
    incident = Path(__file__).with_name("test_grafana_incident.py")
    return int(pytest.main(["-q", "-m", "campaign", "-p", "no:randomly", str(incident)]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"))
