"""Copying one chunk: a pure function of connection, snapshot, chunk and plan, whoever runs it.

Sharing of work: :mod:`cdc_sync.sync.backfill` cuts tables into chunks and has them copied, by
worker processes on one exported snapshot, or in the daemon's own process where the sink can be
opened only once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cdc_sync.config import QdrantSettings, SourceSettings
from cdc_sync.errors import CdcSyncError, MappingError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.table import Leaf
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.snapshot import copy_query, copy_rows, import_snapshot
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Changes, Sink, TableWriter
from cdc_sync.rows import PointId, Row
from cdc_sync.sync.retry import retrying
from cdc_sync.sync.writing import writing


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
    """All that a worker needs for one chunk."""

    source: SourceSettings
    qdrant: QdrantSettings
    snapshot: str
    plan: TablePlan
    row_filter: str | None
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What became of a chunk. ``refused``: point ids (or a note where there is none) and reasons,
    for the dead letters. ``nulled``: NaN and infinities written as null."""

    chunk: Chunk
    rows: int
    bytes: int
    seconds: float
    retries: int
    nulled: int
    refused: tuple[tuple[str, str], ...]


async def copy_chunk(connection: PgConnection, writer: TableWriter, task: CopyTask) -> ChunkResult:
    """Copy the chunk over a connection that has imported the snapshot.

    The next rows are read while the last ones are written. Transient sink errors are retried
    without end.
    """
    started = time.monotonic()
    plan = task.plan
    query, text_columns = copy_query(
        plan, task.chunk.leaf, task.chunk.start_block, task.chunk.end_block, task.row_filter
    )
    batches = copy_rows(connection, query, text_columns)
    point_id = compile_point_id(plan)
    refused: list[tuple[str, str]] = []
    nulled = writer.values_nulled
    retries = 0
    rows_copied = size = 0

    def on_retry(error: CdcSyncError, seconds: float) -> None:
        nonlocal retries
        retries += 1

    rows = await asyncio.to_thread(_next_rows, batches)
    while rows:
        changes, unmappable = _upserts(rows, point_id)
        refused += unmappable
        rows_copied += len(rows)
        size += sum(len(v) for row in rows for v in row if isinstance(v, bytes))
        reading = asyncio.ensure_future(asyncio.to_thread(_next_rows, batches))
        try:
            applied = await retrying(writing(writer, changes), on_retry)
        finally:
            # The thread cannot be cancelled; the connection is used by nobody else until it is
            # done.
            rows = await reading
        refused += [(str(i), reason) for i, reason in applied.refused]
    return ChunkResult(
        chunk=task.chunk,
        rows=rows_copied,
        bytes=size,
        seconds=time.monotonic() - started,
        retries=retries,
        nulled=writer.values_nulled - nulled,
        refused=tuple(refused),
    )


def _next_rows(batches: Iterator[list[Row]]) -> list[Row]:
    return next(batches, [])


def _upserts(
    rows: list[Row], point_id: Callable[[Row], PointId]
) -> tuple[Changes, list[tuple[str, str]]]:
    changes = Changes()
    unmappable: list[tuple[str, str]] = []
    for row in rows:
        try:
            changes.upserts.append((point_id(row), row))
        except MappingError as error:
            unmappable.append(("(key cannot be mapped)", error.message))
    return changes, unmappable


class _Worker:
    """What a worker process keeps between chunks: one connection on the snapshot, one channel to
    Qdrant."""

    def __init__(self, task: CopyTask) -> None:
        self.snapshot = task.snapshot
        self.connection = connect(task.source, application_name="cdc_sync copy", autocommit=False)
        import_snapshot(self.connection, task.snapshot)
        self.loop = asyncio.new_event_loop()
        self.sink: Sink = self.loop.run_until_complete(
            retrying(lambda: open_sink(task.qdrant), lambda error, seconds: None)
        )
        self.writers: dict[TablePlan, TableWriter] = {}

    def copy(self, task: CopyTask) -> ChunkResult:
        writer = self.writers.get(task.plan)
        if writer is None:
            writer = self.writers[task.plan] = self.sink.writer(task.plan)
        return self.loop.run_until_complete(copy_chunk(self.connection, writer, task))

    def close(self) -> None:
        self.loop.run_until_complete(self.sink.close())
        self.loop.close()
        self.connection.close()


_worker: _Worker | None = None


def copy_in_worker(task: CopyTask) -> ChunkResult:
    """Entry point of worker processes: copy one chunk, opening what is needed at the first."""
    global _worker
    if _worker is not None and _worker.snapshot != task.snapshot:
        _worker.close()
        _worker = None
    if _worker is None:
        _worker = _Worker(task)
    try:
        return _worker.copy(task)
    except BaseException:
        # The connection may be in the middle of a COPY: start afresh with the next chunk.
        _worker.connection.close()
        _worker = None
        raise
