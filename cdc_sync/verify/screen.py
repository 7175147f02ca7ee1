"""The progress of a verification on a terminal."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Final, Protocol, TextIO

from cdc_sync.sync.progress import ProgressScreen, TableProgress, on_terminal

_RATE_SECONDS: Final = 30.0
_SECONDS: Final = 0.25


class Screen(Protocol):
    """Shows how far a verification is."""

    def show(self, table: str, done: int, expected: int, doing: str, different: int) -> None:
        """Of a table: rows compared, or ids looked up, and differences found."""
        ...


class _Silent:
    def show(self, table: str, done: int, expected: int, doing: str, different: int) -> None:
        """Nothing is shown."""


class _Live:
    def __init__(self, screen: ProgressScreen) -> None:
        self._screen = screen
        self._tables: dict[str, TableProgress] = {}
        self._samples: deque[tuple[float, int]] = deque()
        self._stage = ("", "")
        self._shown = 0.0

    def show(self, table: str, done: int, expected: int, doing: str, different: int) -> None:
        now = time.monotonic()
        if self._stage != (table, doing):
            self._stage = (table, doing)
            self._samples.clear()
        self._samples.append((now, done))
        while now - self._samples[0][0] > _RATE_SECONDS:
            self._samples.popleft()
        if now - self._shown < _SECONDS:
            return
        self._shown = now
        seconds, more = now - self._samples[0][0], done - self._samples[0][1]
        rate = more / seconds if seconds > 0 and more > 0 else None
        eta = (expected - done) / rate if rate and expected > done else None
        label = f"{table} {doing}" + (f" ({different:,} differ)" if different else "")
        # The display knows how far a copy is: it is the same here.
        self._tables = {name: one for name, one in self._tables.items() if name.split()[0] != table}
        self._tables[label] = TableProgress(label, "copying", done, expected, False, 0, rate, eta)
        self._screen.show(list(self._tables.values()), (None, None))


@contextlib.contextmanager
def open_screen(stream: TextIO) -> Iterator[Screen]:
    """A display on a terminal, and nothing elsewhere."""
    if not on_terminal(stream):
        yield _Silent()
        return
    screen = ProgressScreen(stream)
    try:
        yield _Live(screen)
    finally:
        screen.show(None, (None, None))
