"""The applier: writes batches, one after the other, and knows when one is really there.

One batch is in flight at a time and no point id stands in two of its requests, so changes of one
point are never in flight together (invariant 2). Tables of one batch are written side by side,
those of one collection one after the other, since that has one pace. An unknown outcome sends the
same batch again before anything newer (invariant 1); that is harmless, because an upsert carries
the whole point and partials carry final values (invariant 3).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from cdc_sync.errors import CdcSyncError, ErrorKind, MappingError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import LetterRetry, Metrics, Operation, ToastResolution
from cdc_sync.postgres.key_texts import KeyTextError
from cdc_sync.postgres.refetch import TableRedefinedError
from cdc_sync.qdrant.sink import Applied, Changes, Sink, TableWriter
from cdc_sync.rows import PointId, RawValue, Row
from cdc_sync.sync.coalesce import Pending, TableBatch
from cdc_sync.sync.control import ResyncRows
from cdc_sync.sync.dead_letter_retries import LetterRetries
from cdc_sync.sync.dead_letters import DeadLetterOffice, Refusal, refusals
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.reading import Reread
from cdc_sync.sync.retry import is_sink_trouble, retrying
from cdc_sync.sync.routing import Binding, PlannedTable
from cdc_sync.sync.side_by_side import Work, side_by_side
from cdc_sync.sync.stopped_tables import concerns_one_table
from cdc_sync.sync.writing import writing

log = get_logger(__name__)

T = TypeVar("T")

#: How often a collection is looked at, at the most, because it refuses rows.
_INSPECT_SECONDS = 10.0

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

    def is_stopped(self, table: str) -> bool:
        """Whether the table cannot be followed now, so that its changes are dropped."""
        ...

    async def stop(self, table: str, error: CdcSyncError) -> None:
        """The table cannot be followed any more."""
        ...


class Applier:
    """Writes batches to the sink."""

    def __init__(
        self,
        sink: Sink,
        fetch: FetchRows,
        dead_letters: DeadLetterOffice,
        retries: LetterRetries,
        metrics: Metrics,
        on_stall: Callable[[CdcSyncError, float], None],
        stale: StaleTables,
        reread: RereadRows,
    ) -> None:
        self._sink = sink
        self._fetch = fetch
        self._dead_letters = dead_letters
        self._retries = retries
        self._metrics = metrics
        self._on_stall = on_stall
        self._stale = stale
        self._reread_rows = reread
        self._sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self._progress: Callable[[], None] = lambda: None
        #: By the OID of the table, which has one plan at a time.
        self._writers: dict[int, TableWriter] = {}
        self._parked = False
        #: Tables are written side by side, and all else is done one thing at a time.
        self._alone = asyncio.Lock()
        #: When collections were looked at last, by the OID of the table.
        self._inspected: dict[int, float] = {}

    async def apply(
        self,
        batch: Batch,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the whole batch; returns when Qdrant has completed all of it.

        Transient failures of the sink are retried until ``sleep``, which passes the time between
        two tries, raises. Raises that, and every other failure, with nothing in flight any more;
        DEAD_LETTER_LIMIT when too many rows could not be written, though all of the others were.
        ``progress`` is called whenever part of the batch has been completed.
        """
        self._sleep = sleep
        self._progress = progress
        self._parked = False
        for name, dropped in batch.unusable.items():
            await self._drop(name, dropped.changes, dropped.unusable.error)
        await self._retry(lambda: self._stale.note(batch))
        if batch.truncates:
            for oid in batch.truncates:
                binding = batch.bindings[oid]
                await self._unless_stopped(binding.planned, lambda b=binding: self._clear(b))  # type: ignore[misc]
            return
        for planned in batch.resync_tables:
            await self._request(planned, "it was asked for")
        for request in batch.rereads:
            await self._reread_unless_stopped(batch, request)
        await side_by_side(self._by_collection(batch), self._sink.parallel)
        for lost in batch.unmappable:
            if self._stale.is_stopped(lost.binding.planned.name):
                continue
            self._parked = True
            await self._retry(
                lambda lost=lost: self._dead_letters.park(  # type: ignore[misc]
                    lost.binding.planned.name,
                    [Refusal(lost.key, lost.reason, ErrorKind.MAPPING)],
                    lsn=lost.lsn,
                    commit_time=lost.commit_time,
                )
            )
        if self._parked:
            await self._check_limit(batch)
        self._count(batch)

    def writer(self, plan: TablePlan) -> TableWriter:
        """The writer of a plan, with its encoders compiled once."""
        writer = self._writers.get(plan.oid)
        if writer is None or (writer.plan is not plan and writer.plan != plan):
            writer = self._writers[plan.oid] = self._sink.writer(plan)
        return writer

    # -- tables that stop

    async def _unless_stopped(
        self, planned: PlannedTable, step: Callable[[], Awaitable[None]], changes: int = 0
    ) -> None:
        """Do something with one table unless it has stopped; an error of its own stops it."""
        if self._stale.is_stopped(planned.name):
            self._metrics.add_table(planned.name).changes_dropped.inc(changes)
            return
        try:
            await step()
        except CdcSyncError as error:
            if not concerns_one_table(error):
                raise
            await self._drop(planned.name, changes, error)

    async def _drop(self, table: str, changes: int, error: CdcSyncError) -> None:
        if not self._stale.is_stopped(table):
            await self._retry_alone(lambda: self._stale.stop(table, error))
        self._metrics.add_table(table).changes_dropped.inc(changes)

    async def _reread_unless_stopped(self, batch: Batch, request: ResyncRows) -> None:
        if self._stale.is_stopped(request.planned.name) and not request.retry:
            await self._request(request.planned, "rows were asked for")
        await self._unless_stopped(request.planned, lambda: self._reread(batch, request))

    async def _check_collection(self, planned: PlannedTable) -> None:
        """Raise COLLECTION_MISMATCH if rows were refused because the collection has been replaced
        by one that does not fit; then it is not the rows that are wrong."""
        looked = self._inspected.get(planned.plan.oid)
        if looked is None or time.monotonic() - looked > _INSPECT_SECONDS:
            self._inspected[planned.plan.oid] = time.monotonic()
            await self._retry_alone(lambda: self._sink.inspect(planned.plan))

    # -- steps

    def _by_collection(self, batch: Batch) -> list[Work]:
        """Writing the tables of a batch, those of one collection together."""
        tables: dict[str, list[int]] = {}
        for oid in batch.tables:
            tables.setdefault(batch.bindings[oid].planned.plan.collection, []).append(oid)
        total = sum(len(table) for table in batch.tables.values())
        return [partial(self._apply_tables, batch, oids, total) for oids in tables.values()]

    async def _apply_tables(self, batch: Batch, oids: Sequence[int], total: int) -> None:
        for oid in oids:
            binding, table = batch.bindings[oid], batch.tables[oid]
            beside = total - len(table)
            await self._unless_stopped(
                binding.planned,
                partial(self._apply_table, batch, binding, table, beside),
                len(table),
            )

    async def _apply_table(
        self, batch: Batch, binding: Binding, table: TableBatch, beside: int
    ) -> None:
        changes, rootless = table.split()
        changes.large, changes.beside = batch.large, beside
        rootless += self._unreliable(binding, changes)
        if rootless:
            rows = await self._fetch_points(binding, table, rootless)
            changes.upserts += rows
            changes.large = True
            self._resolved(binding, "refetched", len(rows))
        applied = await self._write(binding.planned, changes)
        if applied.missing:
            rows = await self._fetch_points(binding, table, list(applied.missing))
            self._resolved(binding, "refetched", len(rows))
            again = await self._write(binding.planned, Changes(upserts=rows, large=True))
            applied = Applied(
                frozenset(),
                applied.refused + again.refused,
                applied.unmappable | again.unmappable,
            )
        self._resolved(binding, "kept", len(changes.partials) - len(applied.missing))
        planned = binding.planned
        if applied.refused:
            await self._check_collection(planned)
        refused = refusals(planned.plan, applied, table.known_rows()) if applied.refused else []
        await self._settle(planned, table.pending, refused, batch)
        if table.superseded:
            self._metrics.add_table(planned.name).coalesced.inc(table.superseded)

    async def _settle(
        self,
        planned: PlannedTable,
        ids: Iterable[PointId],
        refused: Sequence[Refusal],
        batch: Batch,
        *,
        retried: bool = False,
    ) -> None:
        """Park what was refused, and forget dead letters of what was not."""
        if refused:
            self._parked |= not retried
            await self._retry_alone(
                lambda: self._dead_letters.park(
                    planned.name,
                    refused,
                    lsn=batch.last_lsn,
                    commit_time=batch.last_commit,
                    retried=retried,
                )
            )
        if not self._dead_letters.pending:
            return
        bad = {refusal.key for refusal in refused}
        await self._retry_alone(
            lambda: self._dead_letters.release(
                planned.name, [i for i in ids if str(i) not in bad] if bad else ids
            )
        )

    async def _check_limit(self, batch: Batch) -> None:
        """Raise DEAD_LETTER_LIMIT if too many rows cannot be written as they are now. They are read
        again before that: what has been put right since would be found after the place at which
        the stream would stop, at every start."""
        if self._dead_letters.over_limit:
            await self._retry(self._dead_letters.open)
        if self._dead_letters.over_limit:
            for request in self._retries.requests():
                await self._reread_unless_stopped(batch, request)
        await self._retry(self._dead_letters.check_limit)

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
            rows = await self._retry_alone(
                lambda: asyncio.to_thread(self._fetch, planned.plan, planned.selection, keys, xids)
            )
        except TableRedefinedError:
            await self._retry_alone(lambda: self._stale.outdated(planned))
            return []
        found = {binding.point_id(row): row for row in rows}
        return [(point_id, found[point_id]) for point_id in ids if point_id in found]

    async def _reread(self, batch: Batch, request: ResyncRows) -> None:
        """Write rows as they are now, and remove the points of keys that have none."""
        planned = request.planned
        try:
            found = await self._reread_rows(request, batch.xids)
        except (KeyTextError, MappingError) as error:
            await self._unreadable(batch, request, error)
            return
        if found is None:
            # One row is no reason to read a whole table unless somebody asks.
            if not request.retry:
                await self._request(
                    planned, "rows were asked for that cannot be read by themselves"
                )
            return
        changes = Changes(upserts=found.rows, deletes=found.absent, large=True)
        applied = await self._write(planned, changes)
        refused = refusals(planned.plan, applied, found.rows)
        ids = [*(point_id for point_id, _ in found.rows), *found.absent]
        letters = {i for i in ids if self._dead_letters.holds(planned.name, i)}
        await self._settle(planned, ids, refused, batch, retried=True)
        absent = len(letters.intersection(found.absent))
        bad = len(letters.intersection(point_id for point_id, _ in applied.refused))
        results: dict[LetterRetry, int] = {
            "written": len(letters) - absent - bad,
            "deleted": absent,
            "refused": bad,
        }
        self._dead_letters.count_retries(planned.name, results)
        if request.retry:
            self._retries.tried(request)
            return
        table = self._metrics.add_table(planned.name)
        table.rows_reread["written"].inc(len(found.rows) - len(applied.refused))
        table.rows_reread["deleted"].inc(len(found.absent))
        log.info(
            "rows_reread", table=planned.name, written=len(found.rows), deleted=len(found.absent)
        )

    async def _unreadable(
        self, batch: Batch, request: ResyncRows, error: KeyTextError | MappingError
    ) -> None:
        """A key of a request is none. Whoever has asked for it, the pipeline goes on."""
        planned, keys = request.planned, request.keys
        if not request.retry:
            self._metrics.control_requests["unreadable"].inc()
            log.warning("request_refused", table=planned.name, reason=str(error))
        elif len(keys) > 1:
            half = len(keys) // 2
            for some in (keys[:half], keys[half:]):
                await self._reread(batch, dataclasses.replace(request, keys=some))
        else:
            # It was one when the row was parked: the key's columns have other types now.
            self._dead_letters.count_retries(planned.name, {"unreadable": 1})
            self._retries.tried(request)

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
        await self._retry(lambda: self._dead_letters.release_table(binding.planned.name))
        self._metrics.add_table(binding.planned.name).changes["truncate"].inc()

    async def _retry(self, operation: Callable[[], Awaitable[T]]) -> T:
        return await retrying(operation, self._on_stall, self._sleep, is_sink_trouble)

    async def _retry_alone(self, operation: Callable[[], Awaitable[T]]) -> T:
        async def alone() -> T:
            async with self._alone:
                return await operation()

        return await self._retry(alone)

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
                name = batch.bindings[oid].planned.name
                if not self._stale.is_stopped(name):
                    self._metrics.add_table(name).changes[operation].inc(count)
