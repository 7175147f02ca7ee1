"""The applier: writes batches, one after the other, and knows when one is really there.

One batch is in flight at a time and no point id stands in two of its requests, so changes of one
point are never in flight together (invariant 2). An unknown outcome sends the same batch again
before anything newer (invariant 1); that is harmless, because an upsert carries the whole point and
partials carry final values (invariant 3).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Protocol, TypeVar

from cdc_sync.errors import CdcSyncError, ErrorKind, MappingError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics, Operation, ToastResolution
from cdc_sync.postgres.key_texts import KeyTextError
from cdc_sync.postgres.refetch import TableRedefinedError
from cdc_sync.qdrant.sink import Applied, Changes, Sink, TableWriter
from cdc_sync.rows import PointId, RawValue, Row
from cdc_sync.sync.coalesce import Pending, TableBatch
from cdc_sync.sync.control import ResyncRows
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.reading import Reread
from cdc_sync.sync.retry import is_sink_trouble, retrying
from cdc_sync.sync.routing import Binding, PlannedTable
from cdc_sync.sync.writing import writing

log = get_logger(__name__)

T = TypeVar("T")

#: Reads rows by key as they are now, once the given transactions are visible (R84); blocking.
FetchRows = Callable[
    [TablePlan, str | None, Sequence[Sequence[RawValue]], Collection[int]], list[Row]
]

#: Reads the rows of a request as they are now, once what was applied lately and the given
#: transactions are visible. None: the table must be read as a whole.
RereadRows = Callable[[ResyncRows, Collection[int]], Awaitable[Reread | None]]


class StaleTables(Protocol):
    """Keeps book of tables that must be read again as a whole. All of it is on record when the
    methods return."""

    async def note(self, batch: Batch) -> None:
        """The batch is going to be written."""
        ...

    async def outdated(self, planned: PlannedTable) -> None:
        """Rows of the table could not be read by key, because its columns have changed."""
        ...

    async def request(self, planned: PlannedTable, reason: str) -> None:
        """The table is to be read again as a whole."""
        ...

    def may_be_older(self, planned: PlannedTable) -> bool:
        """Whether points of the table may be older than the stream: it is being read again, and a
        row may escape that by moving."""
        ...


class Applier:
    """Writes batches to the sink."""

    def __init__(
        self,
        sink: Sink,
        fetch: FetchRows,
        dead_letters: DeadLetterOffice,
        metrics: Metrics,
        on_stall: Callable[[CdcSyncError, float], None],
        stale: StaleTables,
        reread: RereadRows,
    ) -> None:
        self._sink = sink
        self._fetch = fetch
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._on_stall = on_stall
        self._stale = stale
        self._reread_rows = reread
        self._sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self._progress: Callable[[], None] = lambda: None
        self._writers: dict[TablePlan, TableWriter] = {}

    async def apply(
        self,
        batch: Batch,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the whole batch; returns when Qdrant has completed all of it.

        Transient failures of the sink are retried until ``sleep``, which passes the time between
        two tries, raises. Raises that, and every other failure, with nothing in flight any more.
        ``progress`` is called whenever part of the batch has been completed.
        """
        self._sleep = sleep
        self._progress = progress
        await self._retry(lambda: self._stale.note(batch))
        if batch.truncates:
            for oid in batch.truncates:
                await self._clear(batch.bindings[oid])
            return
        for planned in batch.resync_tables:
            await self._request(planned, "it was asked for")
        for request in batch.rereads:
            await self._reread(batch, request)
        for oid, table in batch.tables.items():
            await self._apply_table(batch, batch.bindings[oid], table)
        for lost in batch.unmappable:
            await self._retry(
                lambda lost=lost: self._dead_letters.park(  # type: ignore[misc]
                    lost.binding.planned.name,
                    [(lost.key, lost.reason)],
                    lsn=lost.lsn,
                    commit_time=lost.commit_time,
                    kind=ErrorKind.MAPPING,
                )
            )
        self._count(batch)

    def writer(self, plan: TablePlan) -> TableWriter:
        """The writer of a plan, with its encoders compiled once."""
        writer = self._writers.get(plan)
        if writer is None:
            # A table has one plan at a time; older ones are not needed any more.
            self._writers = {p: w for p, w in self._writers.items() if p.oid != plan.oid}
            writer = self._writers[plan] = self._sink.writer(plan)
        return writer

    # -- steps

    async def _apply_table(self, batch: Batch, binding: Binding, table: TableBatch) -> None:
        changes, rootless = table.split()
        rootless += self._unreliable(binding, changes)
        if rootless:
            rows = await self._fetch_points(binding, table, rootless)
            changes.upserts += rows
            self._resolved(binding, "refetched", len(rows))
        applied = await self._write(binding.planned, changes)
        if applied.missing:
            rows = await self._fetch_points(binding, table, list(applied.missing))
            self._resolved(binding, "refetched", len(rows))
            again = await self._write(binding.planned, Changes(upserts=rows))
            applied = Applied(frozenset(), applied.refused + again.refused)
        self._resolved(binding, "kept", len(changes.partials) - len(applied.missing))
        name = binding.planned.name
        await self._settle(name, table.pending, applied, batch)
        if table.superseded:
            self._metrics.add_table(name).coalesced.inc(table.superseded)

    async def _settle(
        self, table: str, ids: Collection[PointId], applied: Applied, batch: Batch
    ) -> None:
        """Park what was refused, and forget dead letters of what was not."""
        await self._keep_refused(table, applied.refused, batch.last_lsn, batch.last_commit)
        refused = {point_id for point_id, _ in applied.refused}
        await self._retry(
            lambda: self._dead_letters.release(table, (i for i in ids if i not in refused))
        )

    def _unreliable(self, binding: Binding, changes: Changes) -> list[PointId]:
        """Take out partials of points that cannot be relied on for what the update leaves
        unchanged, and return their ids: the last version was refused, or the point is older."""
        name = binding.planned.name
        older = self._stale.may_be_older(binding.planned)
        ids = [i for i, _ in changes.partials if older or self._dead_letters.holds(name, i)]
        if ids:
            taken = set(ids)
            changes.partials = [change for change in changes.partials if change[0] not in taken]
        return ids

    async def _keep_refused(
        self, table: str, refused: Iterable[tuple[PointId, str]], lsn: int, commit_time: float
    ) -> None:
        letters = [(str(point_id), reason) for point_id, reason in refused]
        if letters:
            await self._retry(
                lambda: self._dead_letters.park(table, letters, lsn=lsn, commit_time=commit_time)
            )

    async def _fetch_points(
        self, binding: Binding, table: TableBatch, ids: Sequence[PointId]
    ) -> list[tuple[PointId, Row]]:
        """Read rows by key as they are now. A row that is gone needs nothing: the event that took
        it will come. Neither do rows of a table that has other columns by now: it is going to be
        read as a whole."""
        planned = binding.planned
        pending: list[tuple[PointId, Pending]] = [(i, table.pending[i]) for i in ids]
        keys = [
            [change.row[k] for k in binding.key] for _, change in pending if change.row is not None
        ]
        xids = {change.xid for _, change in pending}
        try:
            rows = await self._retry(
                lambda: asyncio.to_thread(self._fetch, planned.plan, planned.selection, keys, xids)
            )
        except TableRedefinedError:
            await self._retry(lambda: self._stale.outdated(planned))
            return []
        found = {binding.point_id(row): row for row in rows}
        return [(point_id, found[point_id]) for point_id in ids if point_id in found]

    async def _reread(self, batch: Batch, request: ResyncRows) -> None:
        """Write rows as they are now, and remove the points of keys that have none."""
        planned = request.planned
        try:
            found = await self._reread_rows(request, batch.xids)
        except (KeyTextError, MappingError) as error:
            # Whoever asked for them, the pipeline goes on.
            self._metrics.control_requests["unreadable"].inc()
            log.warning("request_refused", table=planned.name, reason=str(error))
            return
        if found is None:
            await self._request(planned, "rows were asked for that cannot be read by themselves")
            return
        changes = Changes(upserts=found.rows, deletes=found.absent)
        applied = await self._write(planned, changes)
        await self._settle(
            planned.name,
            [*(point_id for point_id, _ in found.rows), *found.absent],
            applied,
            batch,
        )
        table = self._metrics.add_table(planned.name)
        table.rows_reread["written"].inc(len(found.rows) - len(applied.refused))
        table.rows_reread["deleted"].inc(len(found.absent))
        log.info(
            "rows_reread", table=planned.name, written=len(found.rows), deleted=len(found.absent)
        )

    async def _request(self, planned: PlannedTable, reason: str) -> None:
        await self._retry(lambda: self._stale.request(planned, reason))

    async def _write(self, planned: PlannedTable, changes: Changes) -> Applied:
        if not len(changes):
            return Applied()
        writer = self.writer(planned.plan)
        nulled = writer.values_nulled
        try:
            return await self._retry(writing(writer, changes, self._progress))
        finally:
            self._metrics.add_table(planned.name).values_nulled.inc(writer.values_nulled - nulled)

    async def _clear(self, binding: Binding) -> None:
        log.info("table_truncated", table=binding.planned.name)
        writer = self.writer(binding.planned.plan)
        await self._retry(writer.clear)
        self._metrics.add_table(binding.planned.name).changes["truncate"].inc()

    async def _retry(self, operation: Callable[[], Awaitable[T]]) -> T:
        return await retrying(operation, self._on_stall, self._sleep, is_sink_trouble)

    def _resolved(self, binding: Binding, resolution: ToastResolution, rows: int) -> None:
        if rows > 0:
            self._metrics.add_table(binding.planned.name).unchanged_toast[resolution].inc(rows)

    def _count(self, batch: Batch) -> None:
        operations: dict[Operation, dict[int, int]] = {
            "insert": batch.inserts,
            "update": batch.updates,
            "delete": batch.deletes,
        }
        for operation, counts in operations.items():
            for oid, count in counts.items():
                table = self._metrics.add_table(batch.bindings[oid].planned.name)
                table.changes[operation].inc(count)
