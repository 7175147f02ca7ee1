"""The stream and the copy in this process, with the engine's own parts, into a sink that drops all:
session, gatherer, applier and writer, or the copy of chunks. Nothing is confirmed to Postgres, so
the same changes can be read again.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from cdc_sync.config import QdrantSettings, SourceSettings
from cdc_sync.errors import CdcSyncError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.messages import Relation
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.snapshot import copy_query, copy_rows, import_snapshot
from cdc_sync.qdrant.sink import Sink
from cdc_sync.rows import PointId, RawValue, Row
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.control import ResyncRows
from cdc_sync.sync.copying import Chunk, CopyTask, copy_chunk
from cdc_sync.sync.dead_letter_retries import LetterRetries
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.reading import Reread
from cdc_sync.sync.routing import Binding, PlannedTable, ResolveType, bind
from cdc_sync.sync.stream import Positions, StreamSession
from tests.bench.nulls import NullRpc, NullSink
from tests.bench.usage import Cost, Meter, Reading

_BATCH_ROWS = 4096
_BATCH_BYTES = 16 << 20


class _Unconfirmed(ReplicationConnection):
    """Never tells the server that anything is durable."""

    def send_status(self, write: int, flush: int, reply: bool = False) -> None:
        super().send_status(write, 0, reply)


class _NothingStale:
    """No table is ever read again."""

    async def note(self, batch: Batch) -> None:
        pass

    async def outdated(self, planned: PlannedTable) -> None:
        raise AssertionError(f"{planned.name} has changed under the benchmark")

    async def request(self, planned: PlannedTable, reason: str) -> None:
        raise AssertionError(f"{planned.name} was to be read again: {reason}")

    def may_be_older(self, planned: PlannedTable) -> bool:
        return False

    def is_stopped(self, table: str) -> bool:
        return False

    async def stop(self, table: str, error: CdcSyncError) -> None:
        raise error


def _fetch(
    plan: TablePlan, where: str | None, keys: Sequence[Sequence[RawValue]], xids: Collection[int]
) -> list[Row]:
    raise AssertionError("no row of the benchmark has to be read again")


async def _reread(request: ResyncRows, xids: Collection[int]) -> Reread | None:
    raise AssertionError("nothing was asked for")


def _on_stall(error: CdcSyncError, seconds: float) -> None:
    raise error


@dataclass
class _Progress:
    """Counts changes up to the end, which is a position or their number, and reads the clocks once
    some are skipped. ``told`` is called with the number of each batch."""

    end: int
    rows: int | None = None
    told: Callable[[int], None] = lambda changes: None
    skip: int = 0
    meter: Meter | None = None
    began: Reading | None = None
    skipped: int = 0
    changes: int = 0

    def at(self, batch: Batch | None, applied: int) -> bool:
        """Whether it is the end."""
        if batch is not None:
            changes = sum(len(table) for table in batch.tables.values())
            self.changes += changes
            self.told(changes)
        if self.meter is not None and self.began is None and self.changes >= self.skip:
            self.began, self.skipped = self.meter.begin(), self.changes
        return applied >= self.end if self.rows is None else self.changes >= self.rows


@dataclass(frozen=True)
class StreamEngine:
    """The engine's stream over some tables. ``slot`` names the publication too."""

    source: SourceSettings
    tables: Sequence[PlannedTable]
    resolve: ResolveType
    path: Path
    embedded: bool = False

    def run(self, end: int, meter: Meter) -> Cost:
        """Stream until all before ``end`` is applied. The clocks run from START_REPLICATION on."""
        return asyncio.run(self._run(end, meter, _Progress(end)))

    def run_after(self, skip: int, end: int, meter: Meter) -> tuple[Cost, int]:
        """The same, with the clocks running from the end of the batch on with which so many changes
        are applied; returns the cost and the number of changes after it."""
        progress = _Progress(end, skip=skip, meter=meter)
        cost = asyncio.run(self._run(end, meter, progress))
        return cost, progress.changes - progress.skipped

    def follow(self, rows: int, told: Callable[[int], None]) -> None:
        """Stream until so many changes are applied; told of each batch how many it had."""
        asyncio.run(self._run(0, Meter(), _Progress(0, rows, told)))

    async def _run(self, end: int, meter: Meter, progress: _Progress) -> Cost:
        sink = NullSink(self.path, embedded=self.embedded)
        connection = _Unconfirmed.open(self.source)
        try:
            stop, positions = asyncio.Event(), Positions()
            session = self._session(connection, sink, positions, stop, progress)
            for planned in self.tables:
                sink.writer(planned.plan)
            connection.start(self.source.slot, self.source.publication)
            began = meter.begin()
            await session.run()
            cost = (progress.began or began).until(meter.end())
            if positions.applied < end:
                raise AssertionError("the stream ended before its last change was applied")
            return cost
        finally:
            connection.close()
            await sink.close()

    def _session(
        self,
        connection: ReplicationConnection,
        sink: Sink,
        positions: Positions,
        stop: asyncio.Event,
        progress: _Progress,
    ) -> StreamSession:
        metrics = Metrics()
        name = self.source.slot
        board = StatusBoard(name, slot=name, publication=name, metrics=metrics)
        letters = DeadLetterOffice(sink.state, name, 0, metrics, board)
        retries = LetterRetries(letters, sink, lambda: self.tables, frozenset, 0.0)
        by_oid = {leaf.oid: p for p in self.tables for leaf in p.table.leaves}

        def route(relation: Relation) -> Binding | None:
            planned = by_oid.get(relation.oid)
            return None if planned is None else bind(planned, relation, self.resolve)

        async def between(batch: Batch | None) -> Batch | None:
            if progress.at(batch, positions.applied):
                stop.set()
            return None

        return StreamSession(
            connection=connection,
            gatherer=Gatherer(route, batch_rows=_BATCH_ROWS, batch_bytes=_BATCH_BYTES),
            applier=Applier(
                sink, _fetch, letters, retries, metrics, _on_stall, _NothingStale(), _reread
            ),
            positions=positions,
            metrics=metrics,
            make_durable=sink.make_durable,
            stop=stop,
            status_seconds=10.0,
            board=board,
            between=between,
            let_go_seconds=3600.0,
            silence_seconds=3600.0,
        )


@contextmanager
def exported_snapshot(url: str) -> Iterator[str]:
    """A snapshot that other connections can import meanwhile."""
    with psycopg.connect(url) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        row = connection.execute("SELECT pg_export_snapshot()").fetchone()
        assert row is not None
        yield str(row[0])


def copy_blocks(
    source: SourceSettings,
    snapshot: str,
    planned: PlannedTable,
    blocks: tuple[int, int | None],
    path: Path,
    meter: Meter,
    *,
    embedded: bool = False,
    keep: Callable[[bytes], None] | None = None,
    begin: Callable[[], object] = lambda: None,
) -> tuple[Cost, int]:
    """Copy a range of a table's blocks as one chunk into nothing; returns the cost, and the number
    of rows. The clocks run from the moment on at which connection and encoders are ready, and
    ``begin`` has returned."""
    task = CopyTask(
        source=source,
        qdrant=QdrantSettings(),
        snapshot=snapshot,
        plan=planned.plan,
        row_filter=None,
        chunk=Chunk(planned.plan.oid, planned.table.leaves[0], *blocks),
    )

    async def run() -> tuple[Cost, int]:
        sink = NullSink(path, NullRpc(keep), embedded=embedded)
        connection = connect(source, autocommit=False)
        try:
            import_snapshot(connection, snapshot)
            writer = sink.writer(planned.plan)
            begin()
            began = meter.begin()
            result = await copy_chunk(connection, writer, task)
            return began.until(meter.end()), result.rows
        finally:
            connection.close()
            await sink.close()

    return asyncio.run(run())


def read_rows(source: SourceSettings, planned: PlannedTable) -> list[tuple[PointId, Row]]:
    """All rows of a table, raw, with the ids of their points."""
    point_id = compile_point_id(planned.plan)
    with connect(source, autocommit=False) as connection:
        query, text = copy_query(planned.plan, planned.table.leaves[0], 0, None, None)
        return [(point_id(row), row) for rows in copy_rows(connection, query, text) for row in rows]


class Scratch:
    """A temporary directory for records and data of sinks."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="cdc_sync_bench_")
        self._number = 0
        self._lock = threading.Lock()

    def new(self) -> Path:
        """A path in it that does not exist yet."""
        with self._lock:
            self._number += 1
            return Path(self._directory.name) / str(self._number)

    def close(self) -> None:
        """Remove it with everything in it."""
        self._directory.cleanup()
