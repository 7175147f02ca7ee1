"""Copying one chunk: a pure function of connection, snapshot, chunk and plan, whoever runs it.

:mod:`cdc_sync.sync.executors` has chunks copied, by worker processes or machines on one exported
snapshot, or in the daemon's own process where the sink can be opened only once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from cdc_sync.config import QdrantSettings, SourceSettings
from cdc_sync.errors import CdcSyncError, ErrorKind, MappingError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.table import Leaf
from cdc_sync.postgres.connect import PgConnection, closed_on_error, connect, set_lock_timeout
from cdc_sync.postgres.copy_binary import RowBatch
from cdc_sync.postgres.snapshot import BATCH_BYTES, copy_query, copy_rows, import_snapshot
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Applied, Changes, Sink, TableWriter
from cdc_sync.rows import LARGE_ROW_BYTES, PointId, Row
from cdc_sync.sync.dead_letters import Refusal, refusals, unmapped_key
from cdc_sync.sync.opening import opening
from cdc_sync.sync.repairing import repairing
from cdc_sync.sync.retry import retrying
from cdc_sync.sync.writing import writing

#: How long a lock on a table may be waited for in a window.
LOCK_SECONDS = 2.0
#: Turns of the event loop that a writer needs to send its first requests, and one more.
_TURNS: Final = 3
#: Told of every retry: the error, and the seconds until the next try.
OnRetry = Callable[[CdcSyncError, float], None]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of blocks of one leaf: from ``start_block``, up to but not including ``end_block``
    (None: to the end)."""

    table_oid: int
    leaf: Leaf
    start_block: int
    end_block: int | None


@dataclass(frozen=True, slots=True)
class CopyTask:
    """All that a worker needs for one chunk.

    It reads and writes ``batch_rows`` rows at once, and rests for ``batch_delay_seconds`` after
    each batch. ``repair``: compare the points with the rows and write only those that differ.
    """

    source: SourceSettings
    qdrant: QdrantSettings
    snapshot: str
    plan: TablePlan
    row_filter: str | None
    chunk: Chunk
    batch_rows: int = 1024
    batch_delay_seconds: float = 0.0
    repair: bool = False


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What became of a chunk.

    ``refused``: rows for the dead letters. ``nulled``: NaN and infinities written as null.
    ``retries``: times that something was tried again, by the kind of error. A repair counts the
    points that were as they should be (``same``), ``different`` or ``missing``.
    """

    chunk: Chunk
    rows: int
    bytes: int
    seconds: float
    nulled: int
    refused: tuple[Refusal, ...]
    retries: Mapping[ErrorKind, int] = field(default_factory=dict)
    same: int = 0
    different: int = 0
    missing: int = 0


class CopyStoppedError(Exception):
    """The copy of a chunk was ended early because it was told to stop; nothing is in flight."""


async def copy_chunk(
    connection: PgConnection,
    writer: TableWriter,
    task: CopyTask,
    stop: asyncio.Event | None = None,
    on_retry: OnRetry = lambda error, seconds: None,
) -> ChunkResult:
    """Copy the chunk over a connection that has imported the snapshot.

    The next rows are read, and prepared as far as that goes without the writer, while the last ones
    are written. Transient sink errors are retried without end. Once ``stop`` is set it ends after
    the write in progress and raises :class:`CopyStoppedError`; the connection is then closed.
    """
    started = time.monotonic()
    point_id = compile_point_id(task.plan)
    nulled = writer.values_nulled
    batch = _Batch(task, writer, _Pauses(stop), on_retry)
    batches = _batches(connection, task)
    prepared = await asyncio.to_thread(_next_rows, batches, point_id)
    while prepared is not None:
        batch.pauses.check()
        reading = asyncio.ensure_future(_read_behind(batches, point_id))
        try:
            await batch.write(prepared)
        finally:
            # The thread cannot be cancelled; the connection is used by nobody else until it is
            # done.
            prepared = await reading
    return ChunkResult(
        chunk=task.chunk,
        rows=batch.rows,
        bytes=batch.bytes,
        seconds=time.monotonic() - started,
        nulled=writer.values_nulled - nulled,
        refused=tuple(batch.refused),
        retries=dict(batch.retries),
        same=batch.same,
        different=batch.different,
        missing=batch.missing,
    )


def _batches(connection: PgConnection, task: CopyTask) -> Iterator[RowBatch]:
    chunk = task.chunk
    query, text_columns = copy_query(
        task.plan, chunk.leaf, chunk.start_block, chunk.end_block, task.row_filter
    )
    return copy_rows(connection, query, text_columns, batch_rows=task.batch_rows)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Rows with the ids of their points, and those of which no id could be made."""

    changes: Changes
    unmappable: list[Refusal]
    rows: int
    bytes: int


async def _read_behind(
    batches: Iterator[RowBatch], point_id: Callable[[Row], PointId]
) -> _Prepared | None:
    """Read once the first requests have been sent: while they are encoded Qdrant has nothing to do,
    and a thread that reads meanwhile would make that take longer."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    return await asyncio.to_thread(_next_rows, batches, point_id)


def _next_rows(batches: Iterator[RowBatch], point_id: Callable[[Row], PointId]) -> _Prepared | None:
    rows = next(batches, None)
    if rows is None:
        return None
    changes, unmappable = _upserts(rows, point_id)
    size = rows.value_bytes
    # What is beyond a batch's measure belongs to one row.
    changes.large = size > BATCH_BYTES + LARGE_ROW_BYTES
    return _Prepared(changes, unmappable, len(rows), size)


class _Pauses:
    """Waiting that ends at once, by an error, when the copy is to stop."""

    def __init__(self, stop: asyncio.Event | None) -> None:
        self._stop = asyncio.Event() if stop is None else stop

    def check(self) -> None:
        if self._stop.is_set():
            raise CopyStoppedError

    async def sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        self.check()


class _Batch:
    """Writes batch after batch of a chunk, and adds up what became of them."""

    def __init__(
        self, task: CopyTask, writer: TableWriter, pauses: _Pauses, on_retry: OnRetry
    ) -> None:
        self._task = task
        self._writer = writer
        self._on_retry = on_retry
        self.pauses = pauses
        self.rows = self.bytes = 0
        self.same = self.different = self.missing = 0
        self.refused: list[Refusal] = []
        self.retries: Counter[ErrorKind] = Counter()

    async def write(self, prepared: _Prepared) -> None:
        changes = prepared.changes
        self.refused += prepared.unmappable
        self.rows += prepared.rows
        self.bytes += prepared.bytes
        applied = await (self._repair(changes) if self._task.repair else self._apply(changes))
        self.refused += refusals(self._task.plan, applied, changes.upserts)
        if self._task.batch_delay_seconds > 0:
            await self.pauses.sleep(self._task.batch_delay_seconds)

    async def _apply(self, changes: Changes) -> Applied:
        return await retrying(writing(self._writer, changes), self._count, self.pauses.sleep)

    async def _repair(self, changes: Changes) -> Applied:
        attempt = repairing(self._writer, changes)
        outcome = await retrying(attempt, self._count, self.pauses.sleep)
        self.same += outcome.same
        self.different += outcome.different
        self.missing += outcome.missing
        return outcome.applied

    def _count(self, error: CdcSyncError, seconds: float) -> None:
        self.retries[error.kind] += 1
        self._on_retry(error, seconds)


def _upserts(rows: list[Row], point_id: Callable[[Row], PointId]) -> tuple[Changes, list[Refusal]]:
    changes = Changes()
    unmappable: list[Refusal] = []
    for row in rows:
        try:
            changes.upserts.append((point_id(row), row))
        except MappingError as error:
            unmappable.append(unmapped_key(error))
    return changes, unmappable


class ChunkCopier:
    """Copies chunks one after another, for one worker.

    Between chunks it keeps a connection that has imported the snapshot, until :meth:`rest`, and a
    channel to Qdrant with compiled writers, until :meth:`close`; a ``sink`` that is given is used
    instead, and left open. To be used in one event loop.
    """

    def __init__(self, sink: Sink | None = None) -> None:
        self._given = sink
        self._opened: Sink | None = None
        self._writers: dict[int, TableWriter] = {}
        self._connection: PgConnection | None = None
        self._snapshot: str | None = None

    async def copy(self, task: CopyTask, stop: asyncio.Event, on_retry: OnRetry) -> ChunkResult:
        """Copy a chunk. Raises as :func:`copy_chunk`, and :class:`SnapshotGoneError`."""
        try:
            connection = await self._connect(task, stop)
            writer = await self._writer(task, stop, on_retry)
            return await copy_chunk(connection, writer, task, stop, on_retry)
        except BaseException:
            # The connection may be in the middle of a COPY: start afresh with the next chunk.
            self.rest()
            raise

    def rest(self) -> None:
        """Let go of the snapshot: while it is kept nothing can be vacuumed, and tables stay
        locked."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    async def close(self) -> None:
        """Close everything that was opened here."""
        self.rest()
        if self._opened is not None:
            await self._opened.close()
        self._opened = None
        self._writers.clear()

    async def _connect(self, task: CopyTask, stop: asyncio.Event) -> PgConnection:
        if self._snapshot != task.snapshot:
            self.rest()
        if self._connection is None:
            self._connection = await _unless_stopped(task, stop)
            self._snapshot = task.snapshot
        return self._connection

    async def _writer(self, task: CopyTask, stop: asyncio.Event, on_retry: OnRetry) -> TableWriter:
        writer = self._writers.get(task.plan.oid)
        if writer is None or writer.plan != task.plan:
            sink = self._given or self._opened
            if sink is None:
                sink = self._opened = await retrying(
                    lambda: open_sink(task.qdrant), on_retry, _Pauses(stop).sleep
                )
            writer = self._writers[task.plan.oid] = sink.writer(task.plan)
        return writer


async def _unless_stopped(task: CopyTask, stop: asyncio.Event) -> PgConnection:
    """Connect in a thread; what is opened after that is not needed any more is closed."""
    connecting = asyncio.ensure_future(opening(_import, task))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({connecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            raise CopyStoppedError
        return connecting.result()
    except BaseException:
        connecting.add_done_callback(_close_unused)
        connecting.cancel()
        raise
    finally:
        stopping.cancel()


def _close_unused(connecting: asyncio.Future[PgConnection]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


def _import(task: CopyTask) -> PgConnection:
    connection = connect(task.source, application_name="cdc_sync copy", autocommit=False)
    with closed_on_error(connection):
        import_snapshot(connection, task.snapshot)
        # Somebody may wait for a lock that the holder of the snapshot keeps until the window ends,
        # and who asks for one of the same table now waits behind him: for ever, and unseen.
        set_lock_timeout(connection, LOCK_SECONDS)
    return connection
