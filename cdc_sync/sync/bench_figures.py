"""Figures of ``bench``: what was measured, and within which bounds."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass

from cdc_sync.rows import Row


class Measured(enum.Enum):
    """What a figure is of; the values are stable names."""

    COPY_LIMIT = "copy_limit"
    COPY_UNSENT = "copy_unsent"
    COPY = "copy"
    SINK_LIMIT = "sink_limit"
    DRAIN_LIMIT = "drain_limit"
    STREAM_UNSENT = "stream_unsent"
    STREAM = "stream"
    UPDATES_UNSENT = "updates_unsent"
    UPDATES = "updates"


#: In the order in which they are shown, with what they are.
LABELS: dict[Measured, str] = {
    Measured.COPY_LIMIT: "COPY, read and dropped",
    Measured.COPY_UNSENT: "  rows read and encoded, not sent",
    Measured.COPY: "  copied into Qdrant by one worker",
    Measured.SINK_LIMIT: "encoded requests into Qdrant",
    Measured.DRAIN_LIMIT: "stream, read and dropped",
    Measured.STREAM_UNSENT: "  new rows decoded and encoded, not sent",
    Measured.STREAM: "  new rows into Qdrant",
    Measured.UPDATES_UNSENT: "  metadata updates decoded and encoded, not sent",
    Measured.UPDATES: "  metadata updates into Qdrant",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement: so many rows, with values of so many bytes, in so many seconds, and the CPU
    seconds that this process took for them."""

    measured: Measured
    rows: int
    bytes: int
    seconds: float
    cpu_seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows a second of wall time; 0 if nothing was measured."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes of values a second of wall time."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def cpu_per_row(self) -> float:
        """CPU seconds a row."""
        return self.cpu_seconds / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a figure may take: rows, and seconds."""

    rows: int
    seconds: float


@dataclass(slots=True)
class Clock:
    """Adds up what a figure takes; ``with clock:`` around what counts."""

    bounds: Bounds
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _started: tuple[float, float] | None = None

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        assert self._started is not None
        wall, cpu = self._started
        self._started = None
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    @property
    def left_seconds(self) -> float:
        """What is left of the time; 0 or less once it is up."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started[0]
        return self.bounds.seconds - self.seconds - running

    @property
    def over(self) -> bool:
        """Whether the rows or the seconds are used up."""
        return self.rows >= self.bounds.rows or self.left_seconds <= 0

    def count(self, rows: int, size: int) -> None:
        """Add rows that are done."""
        self.rows += rows
        self.bytes += size

    def figure(self, measured: Measured) -> Figure:
        """What it has added up to."""
        return Figure(measured, self.rows, self.bytes, self.seconds, self.cpu_seconds)


def row_bytes(row: Row) -> int:
    """Bytes of the values of a row."""
    return sum(len(value) for value in row if isinstance(value, bytes))
