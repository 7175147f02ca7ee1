"""The progress of a copy, for people: a line a table on a terminal, a log line now and then
elsewhere.

Everything is read from the status board, a few times a second; the copy is not touched.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TextIO

from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.status import StatusBoard

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

log = get_logger(__name__)

#: Rates are of the last so many seconds.
_RATE_SECONDS: Final = 30.0
_SAMPLE_SECONDS: Final = 0.5
_LOG_SECONDS: Final = 10.0
_REFRESHES_A_SECOND: Final = 4
_BAR_WIDTH: Final = 24
_NARROW_BAR_WIDTH: Final = 8
#: Columns of a terminal from which everything is shown.
_WIDE: Final = 130


@dataclass(frozen=True, slots=True)
class TableProgress:
    """How far a table is. ``expected`` rows are counted if ``exact``, else estimated; None: not
    known. The rate is of the last half minute."""

    table: str
    state: str
    rows: int
    expected: int | None
    exact: bool
    bytes: int
    rows_per_second: float | None
    eta_seconds: float | None

    @property
    def fraction(self) -> float | None:
        """From 0 to 1; an estimate that turned out too low does not let it pass 0.99."""
        if self.state not in ("pending", "copying"):
            return 1.0
        if self.expected is None:
            return None
        if self.expected <= 0:
            return 0.0 if self.rows == 0 else 0.99
        return min(self.rows / self.expected, 1.0 if self.exact else 0.99)


class CopyProgress:
    """Turns what the board says into progress; call :meth:`sample` now and then."""

    def __init__(
        self, board: StatusBoard, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._board = board
        self._monotonic = monotonic
        self._rows: dict[str, deque[tuple[float, int]]] = {}

    def sample(self) -> list[TableProgress]:
        """The tables in the order of the configuration."""
        now = self._monotonic()
        tables = self._board.snapshot()["tables"]
        assert isinstance(tables, list)
        return [self._table(now, entry) for entry in tables]

    def lag(self) -> tuple[int | None, float | None]:
        """How far the stream is behind, in bytes and in seconds."""
        lag = self._board.snapshot()["lag"]
        assert isinstance(lag, dict)
        return lag["bytes"], lag["seconds"]

    def _table(self, now: float, entry: dict[str, object]) -> TableProgress:
        name, rows = str(entry["name"]), _number(entry["rows_copied"])
        expected = entry["rows_estimated"]
        expected = expected if isinstance(expected, int) else None
        state = str(entry["state"])
        rate = self._rate(name, now, rows, state)
        left = None if expected is None else expected - rows
        eta = left / rate if rate and left is not None and left >= 0 else None
        return TableProgress(
            table=name,
            state=state,
            rows=rows,
            expected=expected,
            exact=entry["rows_exact"] is True,
            bytes=_number(entry["bytes_copied"]),
            rows_per_second=rate,
            eta_seconds=eta,
        )

    def _rate(self, name: str, now: float, rows: int, state: str) -> float | None:
        if state != "copying":
            self._rows.pop(name, None)
            return None
        samples = self._rows.setdefault(name, deque())
        if samples and rows < samples[-1][1]:
            samples.clear()  # begun anew
        samples.append((now, rows))
        while now - samples[0][0] > _RATE_SECONDS:
            samples.popleft()
        seconds, more = now - samples[0][0], rows - samples[0][1]
        return more / seconds if seconds > 0 and more > 0 else None


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


class ProgressWatch:
    """Shows the progress for as long as a table is being copied, every time one is.

    With ``console`` in a live display there, else by events ``copy_progress``. Run
    :meth:`run` as a task; cancel it at the end.
    """

    def __init__(self, board: StatusBoard, screen: ProgressScreen | None = None) -> None:
        self._progress = CopyProgress(board)
        self._screen = screen

    async def run(self) -> None:
        """Until cancelled."""
        logged = time.monotonic()
        try:
            while True:
                tables = self._progress.sample()
                copying = [table for table in tables if table.state == "copying"]
                if self._screen is not None:
                    self._screen.show(tables if copying else None, self._progress.lag())
                elif not copying:
                    logged = time.monotonic()
                elif time.monotonic() - logged >= _LOG_SECONDS:
                    logged = time.monotonic()
                    log_progress(copying, self._progress.lag())
                await asyncio.sleep(_SAMPLE_SECONDS)
        finally:
            if self._screen is not None:
                self._screen.show(None, (None, None))


def log_progress(tables: Sequence[TableProgress], lag: tuple[int | None, float | None]) -> None:
    """One event a table."""
    for table in tables:
        log.info(
            "copy_progress",
            table=table.table,
            rows=table.rows,
            rows_expected=table.expected,
            expected_by="count" if table.exact else "estimate",
            bytes=table.bytes,
            rows_per_second=_whole(table.rows_per_second),
            eta_seconds=_whole(table.eta_seconds),
            lag_bytes=lag[0],
            lag_seconds=lag[1],
        )


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


# -- terminals


def on_terminal(stream: TextIO) -> bool:
    """Whether a live display can be drawn on the stream."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class ProgressScreen:
    """The live display. Log lines written to :attr:`log_stream` appear above it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        self._stream = sys.stderr if stream is None else stream
        self.console: Console = Console(file=self._stream, highlight=False)
        self.log_stream: TextIO = _Above(self)
        self._live: Live | None = None
        self._shown: tuple[Sequence[TableProgress], tuple[int | None, float | None]] = (
            (),
            (None, None),
        )

    def show(
        self, tables: Sequence[TableProgress] | None, lag: tuple[int | None, float | None]
    ) -> None:
        """Show these tables; None takes the display away, its last state stays as text."""
        if tables is not None:
            self._shown = (tables, lag)
        if tables is not None and self._live is None:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._table,
                console=self.console,
                refresh_per_second=_REFRESHES_A_SECOND,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        elif tables is None and self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Group:
        return progress_table(*self._shown, self.console.width)

    def write(self, text: str) -> None:
        """Write text above the display."""
        if self._live is None:
            self._stream.write(text)
            self._stream.flush()
            return
        from rich.text import Text

        self.console.print(Text.from_ansi(text.rstrip("\n")), soft_wrap=True)


class _Above(io.StringIO):
    """What logs are written to while the display is there."""

    def __init__(self, screen: ProgressScreen) -> None:
        super().__init__()
        self._screen = screen

    def write(self, text: str) -> int:
        self._screen.write(text)
        return len(text)

    def isatty(self) -> bool:
        return True


def progress_table(
    tables: Sequence[TableProgress], lag: tuple[int | None, float | None], width: int
) -> Group:
    """The display, for a terminal of ``width`` columns: a row a table, the stream's lag below."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    wide = width >= _WIDE
    grid = Table.grid(padding=(0, 2 if wide else 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    for _ in range(4 if wide else 2):
        grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    for table in tables:
        fraction = table.fraction
        bar = ProgressBar(
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
            width=_BAR_WIDTH if wide else _NARROW_BAR_WIDTH,
            pulse=fraction is None,
        )
        rate = "" if table.rows_per_second is None else f"{table.rows_per_second:,.0f} rows/s"
        eta = "" if table.eta_seconds is None else f"ETA {duration_text(table.eta_seconds)}"
        state = table.state.replace("_", " ")
        facts = (size_text(table.bytes), rate, eta, state) if wide else (rate, eta or state)
        grid.add_row(Text(table.table), bar, rows_text(table, wide), *facts)
    text = lag_text(*lag)
    return Group(grid) if text is None else Group(grid, Text(f"stream {text}"))


def rows_text(table: TableProgress, wide: bool = True) -> str:
    """``1,200/~90,000 rows (estimated)``: a total that was not counted says so."""
    unit = " rows" if wide else ""
    if table.expected is None:
        return f"{table.rows:,}{unit}"
    if table.exact:
        return f"{table.rows:,}/{table.expected:,}{unit}"
    estimated = "rows (estimated)" if wide else "estimated"
    return f"{table.rows:,}/~{table.expected:,} {estimated}"


def lag_text(lag_bytes: int | None, seconds: float | None) -> str | None:
    """How far the stream is behind, in words."""
    if lag_bytes is None and seconds is None:
        return None
    parts = [size_text(lag_bytes)] if lag_bytes is not None else []
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
    return f"{', '.join(parts)} behind"


def size_text(size: int) -> str:
    """Bytes in a unit that people read."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration_text(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
