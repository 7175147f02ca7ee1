"""The summary of a copy: what it did, and the exact number of rows beside that of points.

Both are counted at moments of their own. While the source is being written they may differ without
anything being wrong, so before a difference is called one the counts are read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from prometheus_client.registry import Collector

from cdc_sync.config import Settings, SourceSettings
from cdc_sync.errors import SourceError
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.catalog import read_table
from cdc_sync.postgres.connect import PgConnection, connect, interrupt
from cdc_sync.postgres.counting import LeafCount, changes_waiting, count_rows, expect_rows
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.opening import opening
from cdc_sync.sync.routing import PlannedTable

T = TypeVar("T")

#: How often, and in what intervals, counts that differ are read.
_READINGS: Final = 5
_BETWEEN_SECONDS: Final = 1.0
#: Tables up to this size (64 MB) are counted before their copy, so that progress is exact.
_COUNTED_PAGES: Final = 8_192


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows and points of a table, as far as they could be compared.

    ``agree`` is None while the source is being written and the two were never equal; ``leaves`` are
    the rows by leaf partition, where there are any.
    """

    source_rows: int
    points: int
    agree: bool | None
    meaning: str
    leaves: tuple[LeafCount, ...] = ()


@dataclass(frozen=True, slots=True)
class TableSummary:
    """One table's copy. ``rows`` were copied, ``bytes`` of values read, by all processes that took
    part; ``rows_here`` by this one, in ``seconds`` (None: nothing) with ``retries`` of requests;
    ``dead_letters`` wait."""

    table: str
    collection: str
    rows: int
    rows_here: int
    bytes: int
    seconds: float | None
    retries: int
    dead_letters: int
    counts: Counts

    @property
    def rows_per_second(self) -> float | None:
        """None where this process has copied nothing."""
        return self.rows_here / self.seconds if self.seconds and self.rows_here else None

    def to_json(self) -> dict[str, object]:
        """As ``--json`` and the log show it."""
        counts = self.counts
        return {
            "table": self.table,
            "collection": self.collection,
            "rows": self.rows,
            "points": counts.points,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "rows_per_second": _rounded(self.rows_per_second),
            "retries": self.retries,
            "dead_letters": self.dead_letters,
            "source_rows": counts.source_rows,
            "agree": counts.agree,
            "meaning": counts.meaning,
            "partitions": [{"name": leaf.name, "source_rows": leaf.rows} for leaf in counts.leaves],
        }


@dataclass(frozen=True, slots=True)
class CopySummary:
    """All tables. ``seconds`` is the time of the copy as a whole; ``retries`` are those of requests
    to Qdrant, for the stream too."""

    tables: tuple[TableSummary, ...]
    seconds: float | None
    retries: int = 0

    @property
    def agree(self) -> bool | None:
        """False if any table's counts do not agree, None if some are not known to."""
        answers = [table.counts.agree for table in self.tables]
        return False if False in answers else None if None in answers else True

    def total(self) -> dict[str, object]:
        """Sums over the tables, as ``--json`` and the log show them."""
        here = sum(table.rows_here for table in self.tables)
        rate = here / self.seconds if self.seconds and here else None
        return {
            "tables": len(self.tables),
            "rows": sum(table.rows for table in self.tables),
            "points": sum(table.counts.points for table in self.tables),
            "bytes": sum(table.bytes for table in self.tables),
            "seconds": self.seconds,
            "rows_per_second": _rounded(rate),
            "retries": self.retries,
            "dead_letters": sum(table.dead_letters for table in self.tables),
            "source_rows": sum(table.counts.source_rows for table in self.tables),
            "agree": self.agree,
        }

    def to_json(self) -> dict[str, object]:
        """As ``--json`` shows it."""
        return {"total": self.total(), "tables": [table.to_json() for table in self.tables]}


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 1)


class Summarizer:
    """Makes the summary of a copy from the board, Postgres and Qdrant.

    ``live``: a stream goes on applying changes meanwhile; else it has ended, and whether the slot
    holds newer changes tells whether the source is being written.
    """

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        tables: Sequence[PlannedTable],
        board: StatusBoard,
        metrics: Metrics,
        *,
        live: bool,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._tables = tables
        self._board = board
        self._metrics = metrics
        self._live = live
        self._sleep = sleep

    async def run(self) -> CopySummary:
        """Count and compare. Reads every table whole, or an index of it, at least once. Raises
        :class:`SourceError` or :class:`SinkError`."""
        letters = await self._sink.state.dead_letters(self._settings.pipeline.name)
        waiting: dict[str, int] = {}
        for letter in letters:
            waiting[letter.table] = waiting.get(letter.table, 0) + 1
        entries = self._entries()
        async with _Reader(self._settings.source) as reader:
            tables = [
                await self._summary(
                    reader, planned, entries.get(planned.name, {}), waiting.get(planned.name, 0)
                )
                for planned in self._tables
            ]
        retries = sum(map(_value, self._metrics.sink_retries.values()))
        return CopySummary(tuple(tables), self._board.copy_seconds(), retries)

    def _entries(self) -> dict[str, Mapping[str, object]]:
        tables = self._board.snapshot()["tables"]
        assert isinstance(tables, list)
        return {str(entry["name"]): entry for entry in tables}

    async def _summary(
        self,
        reader: _Reader,
        planned: PlannedTable,
        entry: Mapping[str, object],
        dead_letters: int,
    ) -> TableSummary:
        counts = await self._compare(reader, planned, dead_letters)
        seconds = entry.get("copy_seconds")
        rows_here, bytes_here = self._copied_here(planned.name)
        return TableSummary(
            table=planned.name,
            collection=planned.plan.collection,
            rows=max(_number(entry.get("rows_copied")), rows_here),
            rows_here=rows_here,
            bytes=max(_number(entry.get("bytes_copied")), bytes_here),
            seconds=seconds if isinstance(seconds, float) else None,
            retries=_number(entry.get("retries")),
            dead_letters=dead_letters,
            counts=counts,
        )

    async def _compare(self, reader: _Reader, planned: PlannedTable, dead_letters: int) -> Counts:
        writer = self._sink.writer(planned.plan)
        seen: set[tuple[int, int]] = set()
        moving: bool | None = False
        for reading in range(_READINGS):
            if reading:
                await self._sleep(_BETWEEN_SECONDS)
            leaves = await reader.run(lambda c: _count(c, planned))
            points = await writer.count()
            rows = sum(leaf.rows for leaf in leaves)
            seen.add((rows, points))
            parts = leaves if len(leaves) > 1 or planned.table.partitioned else ()
            if rows == points:
                return Counts(rows, points, True, "as many points as rows", parts)
            if not self._live:
                moving = await reader.run(lambda c: self._waiting(c, planned))
                if moving is not False:
                    break
        if self._live:
            moving = len(seen) > 1
        agree = None if moving is not False else False
        return Counts(
            rows, points, agree, difference(rows, points, dead_letters, moving, self._live), parts
        )

    def _copied_here(self, table: str) -> tuple[int, int]:
        """Rows and bytes by the metrics, which begin with the process."""
        bound = self._metrics.add_table(table)
        return _value(bound.snapshot_rows), _value(bound.snapshot_bytes)

    def _waiting(self, connection: PgConnection, planned: PlannedTable) -> bool | None:
        source = self._settings.source
        return changes_waiting(connection, source.slot, source.publication, planned.table.oid)


async def set_expected(
    settings: Settings, tables: Sequence[PlannedTable], board: StatusBoard
) -> None:
    """Put on the board how many rows each table has: counted where that costs little, else as the
    planner expects.

    Raises :class:`SourceError`.
    """
    async with _Reader(settings.source) as reader:
        for planned in tables:
            pages = sum(leaf.pages for leaf in planned.table.leaves)
            exact = pages <= _COUNTED_PAGES
            query = functools.partial(_expected, planned=planned, exact=exact)
            rows = await reader.run(query)
            board.table(planned.name).update(rows_estimated=rows, rows_exact=exact)


def _expected(connection: PgConnection, *, planned: PlannedTable, exact: bool) -> int:
    if exact:
        return sum(leaf.rows for leaf in _count(connection, planned))
    return expect_rows(connection, planned.table.leaves, planned.selection)


def difference(rows: int, points: int, dead_letters: int, moving: bool | None, live: bool) -> str:
    """What it means that the counts differ, in a sentence.

    ``moving``: whether the source is being written (None: not known).
    """
    if moving and live:
        return "the source is being written: the counts are of different moments"
    if moving:
        return (
            "the source has been written since: the changes wait in the slot, and cdc-sync run "
            "applies them"
        )
    if moving is None:
        return "not known whether the source has been written since; compare again after a run"
    if rows > points:
        missing = f"{rows - points} rows have no point"
        if dead_letters >= rows - points:
            return f"{missing}: {dead_letters} could not be written and are dead letters"
        return f"{missing}: rows of equal keys share one, or points were removed by others"
    return f"{points - rows} points have no row: others wrote them, or an earlier run left them"


def _count(connection: PgConnection, planned: PlannedTable) -> tuple[LeafCount, ...]:
    # Partitions come and go: those of now count, not those of the plan.
    table = read_table(connection, planned.table.oid)
    return count_rows(connection, table.leaves, planned.selection)


def _value(counter: Collector) -> int:
    """What a counter without further labels stands at."""
    return sum(int(sample.value) for family in counter.collect() for sample in family.samples)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


class _Reader:
    """A connection whose queries run in a thread, and are interrupted when their task is
    cancelled."""

    def __init__(self, source: SourceSettings) -> None:
        self._source = source
        self._connection: PgConnection | None = None
        self._lock = threading.Lock()

    async def __aenter__(self) -> _Reader:
        self._connection = await opening(connect, self._source, application_name="cdc_sync count")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._connection is not None
        if self._lock.acquire(blocking=False):
            self._connection.close()
            self._lock.release()
        else:
            # A thread cannot be cancelled: the query fails, and the thread closes the connection.
            interrupt(self._connection)

    async def run(self, query: Callable[[PgConnection], T]) -> T:
        """Run it in a thread."""
        return await asyncio.to_thread(self._locked, query)

    def _locked(self, query: Callable[[PgConnection], T]) -> T:
        assert self._connection is not None
        with self._lock:
            try:
                return query(self._connection)
            except SourceError:
                with contextlib.suppress(Exception):
                    self._connection.close()
                raise
