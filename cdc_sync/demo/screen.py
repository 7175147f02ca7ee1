"""What the demo shows: progress bars and a live table on a terminal, elsewhere plain lines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cdc_sync.demo.dataset import Query
from cdc_sync.demo.table import Hit
from cdc_sync.demo.verdict import SHOWN, Verdict
from cdc_sync.demo.writer import Tally

#: Seconds between two plain lines about the same thing.
PLAIN_INTERVAL: Final = 2.0

_PLAIN_WIDTH: Final = 110


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at everything: the writer, Postgres, Qdrant, and the distance between the two.

    ``applied`` counts changes that the pipeline has written to Qdrant. ``lag_bytes`` is WAL not yet
    confirmed; ``lag_seconds`` the age of the writer's oldest commit that is not in Qdrant yet.
    ``changes_per_second`` are the writer's. ``elapsed_seconds`` counts from the writer's start.
    """

    state: str
    tally: Tally
    rows: int
    points: int
    applied: int
    lag_bytes: int
    lag_seconds: float
    changes_per_second: float
    elapsed_seconds: float


class Progressing(Protocol):
    """Takes how many are done."""

    def __call__(self, done: int, label: str | None = None) -> None: ...


class Watching(Protocol):
    """Takes the latest reading."""

    def __call__(self, reading: Reading) -> None: ...


class Screen:
    """The demo's output. ``live`` false prints lines only: no colour, no cursor movement."""

    def __init__(self, console: Console, live: bool) -> None:
        self.console = console
        self.live = live

    @classmethod
    def open(cls, plain: bool = False) -> Screen:
        """Standard output; plain also without a terminal, and where ``NO_COLOR`` is set."""
        live = not plain and "NO_COLOR" not in os.environ and Console().is_terminal
        if live:
            return cls(Console(highlight=False), live=True)
        return cls(
            Console(highlight=False, no_color=True, force_terminal=False, width=_PLAIN_WIDTH),
            live=False,
        )

    def heading(self, text: str) -> None:
        """Begin a part of the demo."""
        self.console.print()
        self.console.print(f"[bold]{escape(text)}[/bold]")

    def note(self, text: str) -> None:
        """Say something, in a line."""
        self.console.print(escape(text), soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progressing]:
        """Show how far something is that has ``total`` steps."""
        if not self.live:
            yield _PlainProgress(self, label, total)
            return
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(label, total=total)

            def advance(done: int, label: str | None = None) -> None:
                bars.update(task, completed=done, description=label)

            yield advance

    @contextmanager
    def watch(self) -> Iterator[Watching]:
        """Show readings as they come."""
        if not self.live:
            yield _PlainWatch(self)
            return
        with Live(console=self.console, refresh_per_second=8) as live:

            def update(reading: Reading) -> None:
                live.update(_reading_table(reading))

            yield update

    def hits(self, query: Query, postgres: Sequence[Hit], qdrant: Sequence[Hit]) -> None:
        """Show the results of one search from both sides, side by side."""
        table = Table(box=box.SIMPLE, title=f"“{query.text}”", title_justify="left")
        for column in ("", "pgvector", "score", "Qdrant", "score"):
            table.add_column(column, justify="right" if column in ("", "score") else "left")
        for rank in range(max(len(postgres), len(qdrant))):
            cells = [str(rank + 1)]
            for hits in (postgres, qdrant):
                hit = hits[rank] if rank < len(hits) else None
                cells += [escape(hit.name), f"{hit.score:.4f}"] if hit is not None else ["-", "-"]
            table.add_row(*cells)
        self.console.print(table)

    def verdict(self, verdict: Verdict) -> None:
        """Print the verdict and the first differences."""
        for line in verdict.differences:
            self.note(f"  {line}")
        if verdict.different > len(verdict.differences) == SHOWN:
            self.note(f"  ... and more: {verdict.different} points in all")
        counts = f"{verdict.rows} rows, {verdict.points} points, {verdict.different} different"
        colour, word = ("green", "EQUAL") if verdict.equal else ("red", "DIFFERENT")
        self.console.print(f"[bold {colour}]{word}[/bold {colour}]  {counts}")


class _PlainProgress:
    """Prints a line at the end, and now and then before."""

    def __init__(self, screen: Screen, label: str, total: int) -> None:
        self._screen = screen
        self._label = label
        self._total = total
        self._printed_at = time.monotonic()

    def __call__(self, done: int, label: str | None = None) -> None:
        self._label = label if label is not None else self._label
        now = time.monotonic()
        if done >= self._total or now - self._printed_at >= PLAIN_INTERVAL:
            self._printed_at = now
            self._screen.note(f"{self._label}: {done} of {self._total}")


class _PlainWatch:
    """Prints a line now and then."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._printed_at = float("-inf")
        self._printed: tuple[object, ...] = ()

    def __call__(self, reading: Reading) -> None:
        now = time.monotonic()
        tally = reading.tally
        news = (reading.state, tally, reading.rows, reading.points, reading.applied)
        if now - self._printed_at < PLAIN_INTERVAL or news == self._printed:
            return
        self._printed_at, self._printed = now, news
        self._screen.note(
            f"{reading.elapsed_seconds:5.1f} s  {reading.state}"
            f"  +{tally.inserted} ~{tally.metadata} v{tally.vectors}"
            f" >{tally.moved} -{tally.deleted}"
            f"  rows {reading.rows}  points {reading.points}  applied {reading.applied}"
            f"  lag {_bytes(reading.lag_bytes)}, {reading.lag_seconds:.2f} s"
            f"  {reading.changes_per_second:.0f} changes/s"
        )


def _reading_table(reading: Reading) -> Table:
    """The live table."""
    tally = reading.tally
    table = Table(
        box=box.ROUNDED,
        show_header=False,
        title=f"{reading.state}, {reading.elapsed_seconds:.0f} s",
    )
    for justify in ("left", "right", "left", "right"):
        table.add_column(justify=justify, min_width=10)
    cells = (
        ("inserted", f"{tally.inserted}", "rows in Postgres", f"{reading.rows}"),
        ("metadata updated", f"{tally.metadata}", "points in Qdrant", f"{reading.points}"),
        ("vectors updated", f"{tally.vectors}", "WAL not confirmed", _bytes(reading.lag_bytes)),
        ("moved to another key", f"{tally.moved}", "lag", f"{reading.lag_seconds:.2f} s"),
        ("deleted", f"{tally.deleted}", "changes written", f"{reading.changes_per_second:.0f}/s"),
        ("rolled back", f"{tally.rolled_back}", "applied", f"{reading.applied}"),
    )
    for row in cells:
        table.add_row(*row)
    return table


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
