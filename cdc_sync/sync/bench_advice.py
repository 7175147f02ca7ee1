"""What the figures of ``bench`` mean: what is the slow part, how many workers help, what rate and
what time to expect.

The model: a copy of n workers goes as fast as the slowest of Postgres (n times the limit of one
connection), our processes (as many as have a CPU, each a row in the CPU time that one took), and
Qdrant (what it takes of requests that are encoded already), but not faster than n times what one
worker did. The stream is one process. Where Postgres or Qdrant share the CPUs with us, what they
need is in the rate of one worker, but not in what several would reach: the figures are then too
good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cdc_sync.sync.bench_figures import Figure, Measured

#: "waiting": none of the three is busy; requests and answers are under way.
Bottleneck = Literal["postgres", "cdc-sync", "qdrant", "waiting"]

#: Below this part of every limit, it is none of them that holds the copy up.
_IDLE: Final = 0.6
#: More than this many workers are not advised, whatever the figures say.
MAX_WORKERS: Final = 64


@dataclass(frozen=True, slots=True)
class CopyAdvice:
    """Of the copy: the rate to expect with so many ``workers``, and what keeps it from being
    higher. With more than ``enough_workers`` it does not grow; ``best_rows_per_second`` is the rate
    then.
    """

    workers: int
    rows_per_second: float
    bottleneck: Bottleneck
    enough_workers: int
    best_rows_per_second: float


@dataclass(frozen=True, slots=True)
class StreamAdvice:
    """Of the stream: new rows and metadata updates a second (None: not measured), what keeps the
    first from being higher, and bytes of WAL a second that it can follow."""

    rows_per_second: float
    updates_per_second: float | None
    bottleneck: Bottleneck
    wal_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class TableSize:
    """A table of the configuration: the planner's estimate of its rows, and bytes on disk."""

    table: str
    rows: int
    bytes: int

    @property
    def row_bytes(self) -> float:
        """Bytes on disk a row."""
        return self.bytes / self.rows if self.rows else 0.0


def copy_advice(
    figures: Mapping[Measured, Figure], *, workers: int, cpus: int, several: bool = True
) -> CopyAdvice | None:
    """Say what to expect of a copy with so many workers on so many CPUs; None without the figures
    that it needs. ``several``: more than one worker can write to this sink."""
    one = figures.get(Measured.COPY)
    postgres = figures.get(Measured.COPY_LIMIT)
    sink = figures.get(Measured.SINK_LIMIT)
    if not (one and postgres and sink and one.rows and postgres.rows and sink.rows):
        return None

    def limits(count: int) -> dict[Bottleneck, float]:
        return {
            "postgres": count * postgres.rows_per_second,
            "cdc-sync": _per_cpu(one) * min(count, cpus),
            # What one worker did into it, it can.
            "qdrant": max(sink.rows_per_second, one.rows_per_second),
        }

    def rate(count: int) -> float:
        return min(count * one.rows_per_second, *limits(count).values())

    if not several:
        workers = 1
    most = MAX_WORKERS if several else 1
    best = rate(most)
    # The smallest number with (nearly) the rate of the largest.
    enough = next(count for count in range(1, most + 1) if rate(count) >= 0.98 * best)
    bound = limits(workers)
    slowest = min(bound, key=lambda name: bound[name])
    waiting = rate(workers) < _IDLE * bound[slowest]
    return CopyAdvice(workers, rate(workers), "waiting" if waiting else slowest, enough, best)


def _per_cpu(figure: Figure) -> float:
    return 1 / figure.cpu_per_row if figure.cpu_per_row > 0 else math.inf


def stream_advice(
    figures: Mapping[Measured, Figure], *, wal_bytes_per_row: float, updates: float = 0.0
) -> StreamAdvice | None:
    """Say what to expect of the stream; None without the figures that it needs.

    ``wal_bytes_per_row``: what a change takes in the WAL, with all that is written beside it;
    ``updates``: the part of the changes, from 0 to 1, that are no new rows.
    """
    stream = figures.get(Measured.STREAM)
    sink = figures.get(Measured.SINK_LIMIT)
    if stream is None or sink is None or not stream.rows:
        return None
    changed = figures.get(Measured.UPDATES)
    rate = stream.rows_per_second
    bottleneck: Bottleneck = "qdrant" if sink.rows_per_second < _per_cpu(stream) else "cdc-sync"
    mixed = rate
    if changed is not None and changed.rows:
        mixed = 1 / ((1 - updates) / rate + updates / changed.rows_per_second)
    drain = figures.get(Measured.DRAIN_LIMIT)
    if drain is not None and drain.rows:
        if drain.rows_per_second < rate:
            rate, bottleneck = drain.rows_per_second, "postgres"
        mixed = min(mixed, drain.rows_per_second)
    return StreamAdvice(
        rows_per_second=rate,
        updates_per_second=None if changed is None else changed.rows_per_second,
        bottleneck=bottleneck,
        wal_bytes_per_second=mixed * wal_bytes_per_row,
    )


def copy_seconds(
    sizes: Sequence[TableSize], measured: str, rows_per_second: float
) -> dict[str, float]:
    """Seconds that the first copy of each table takes, at a rate that was measured with one of
    them. Rows that are larger on disk than its own take longer in proportion; smaller ones count
    like its own, since they do not cost less in proportion.
    """
    known = {size.table: size for size in sizes}[measured].row_bytes
    return {
        size.table: size.rows / rows_per_second * max(1.0, size.row_bytes / known if known else 1.0)
        for size in sizes
    }
