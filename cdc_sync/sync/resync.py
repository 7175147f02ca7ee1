"""Resync: reading tables again as a whole under the running stream.

The applier stands still, a snapshot S is taken, the tables are copied under S, and the stream goes
on. That is exact iff every transaction applied so far, be it in part, is visible in S (design,
section 5.4): a commit is streamed before it is visible, so a snapshot in which an applied
transaction is still running is thrown away and taken again. What was applied by an earlier life of
the daemon is not known by id; all of that had begun before this life did, so the first resync waits
until every transaction of that time is over. Everything later than S comes by the stream and is
written over the copy.

That a table is stale is found by comparing it with what is on record of its last copy. Rows that
were written by columns which it had only for a while leave no such difference, so there the record
says so, before they are written.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable

from cdc_sync.config import Settings
from cdc_sync.mapping.planner import replan
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.postgres.catalog import read_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.publication import read_publication
from cdc_sync.postgres.refetch import widen_xid
from cdc_sync.postgres.snapshot import SnapshotHolder, TableRewrittenError
from cdc_sync.postgres.watch import SourcePosition, source_position, transaction_horizon
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.planning import fingerprint, plan_table, stale_fingerprint
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.routing import PlannedTable

log = get_logger(__name__)

#: How long the stream goes on before a snapshot is taken again.
_RETRY_SECONDS = 1.0
#: How long a lock on the table may be waited for, with the stream at rest.
_LOCK_SECONDS = 2.0


class RecentTransactions:
    """The transactions applied lately, by the 32-bit ids that the stream gives."""

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._applied: set[int] = set()

    def raise_horizon(self, horizon: int) -> None:
        """Take every transaction below as possibly applied."""
        self._horizon = max(self._horizon, horizon)

    def add(self, xid: int) -> None:
        """A transaction has been applied, in part or as a whole."""
        self._applied.add(xid)

    def all_visible(self, xmin: int, xmax: int, running: frozenset[int]) -> bool:
        """Whether everything applied is visible in the snapshot. Forgets what every later snapshot
        will see too."""
        if xmin < self._horizon:
            return False
        invisible = set()
        for xid32 in self._applied:
            xid = widen_xid(xid32, xmax)
            if xid >= xmin:
                if xid >= xmax or xid in running:
                    return False
                invisible.add(xid32)
        self._applied = invisible
        return True

    def forget(self, xmin: int, xmax: int) -> None:
        """Forget transactions that every snapshot from now on will see."""
        self._applied = {x for x in self._applied if widen_xid(x, xmax) >= xmin}


class NotYetVisibleError(Exception):
    """A snapshot that cannot be used: what was applied may not be visible in it."""


class Resync:
    """Reads stale tables again."""

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        relations: Relations,
        metrics: Metrics,
        backfill: Backfill,
        retry: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._relations = relations
        self._metrics = metrics
        self._backfill = backfill
        self._retry = retry
        self._recorded: set[int] = set()
        self._barriers: dict[int, int] = {}
        self._next_try = 0.0
        self.recent: RecentTransactions | None = None

    def open(self) -> None:
        """Read the horizon of this life. Blocking. Raises :class:`SourceError`.

        Called again with the slot in hand: another process may have applied transactions in
        between.
        """
        with connect(self._settings.source, application_name="cdc_sync watch") as connection:
            horizon = transaction_horizon(connection)
            if self.recent is None:
                self.recent = RecentTransactions(horizon)
            self.recent.raise_horizon(horizon)

    def observe(self, position: SourcePosition, definitions: dict[int, str]) -> None:
        """Mark tables that were redefined since they were read as a whole."""
        if self.recent is not None:
            self.recent.forget(position.xmin, position.xmax)
        for oid, definition in definitions.items():
            self._relations.observe(oid, definition)

    async def compare(self) -> None:
        """Mark tables that are not as the record says. Errors as of the state store."""
        state = await self._sink.state.load(self._settings.pipeline.name)
        if state is not None:
            self._relations.compare(state)

    async def note(self, batch: Batch) -> None:
        """Mark tables which the batch is going to write by other columns than they were copied by,
        also on record. Errors as of the state store."""
        for planned in self._relations.note(batch):
            await self._record_stale(planned)

    async def outdated(self, planned: PlannedTable) -> None:
        """Mark a table whose rows could not be read by key, since its columns have changed. Errors
        as of the state store."""
        self._relations.mark(planned, "columns changed before rows were read again")
        await self._record_stale(planned)

    async def run(self, applied: int) -> None:
        """Read stale tables again. The applier must be at rest until this returns; ``applied`` is
        where it stands.

        While the stream is behind, rows of the old columns are still to come and would make the
        table stale again, so first it has to come to where the server was when this was seen.
        """
        if time.monotonic() < self._next_try:
            return
        for oid in sorted(self._relations.stale):
            if oid not in self._barriers:
                await self._retry(lambda oid=oid: self._set_barrier(oid))  # type: ignore[misc]
            if applied < self._barriers[oid]:
                continue
            try:
                await self._retry(lambda oid=oid: self._table(oid))  # type: ignore[misc]
            except (TableRewrittenError, NotYetVisibleError) as error:
                # The stream goes on meanwhile.
                self._next_try = time.monotonic() + _RETRY_SECONDS
                log.info("resync_postponed", reason=str(error))
                continue
            del self._barriers[oid]

    async def _set_barrier(self, oid: int) -> None:
        self._barriers[oid] = await asyncio.to_thread(self._position)

    def _position(self) -> int:
        with connect(self._settings.source, application_name="cdc_sync watch") as connection:
            return int(source_position(connection, self._settings.source.slot).current)

    async def _table(self, oid: int) -> None:
        planned = await asyncio.to_thread(self._plan, oid)
        await self._sink.inspect(planned.plan)
        await self._sink.ensure_collection(planned.plan)
        holder = await self._snapshot(planned)
        try:
            log.info("resync_started", table=planned.name)
            totals = await self._backfill.copy([planned], holder.snapshot_id)
        finally:
            await asyncio.to_thread(holder.close)
        await self._sink.make_durable()
        await self._record(planned, fingerprint(planned))
        self._recorded.discard(oid)
        self._relations.synced(planned)
        self._metrics.add_table(planned.name).schema_changes["resynced"].inc()
        log.info("resync_completed", table=planned.name, rows=totals[oid].rows)

    def _plan(self, oid: int) -> PlannedTable:
        before = next(p for p in self._relations.tables if p.plan.oid == oid)
        with connect(self._settings.source, application_name="cdc_sync watch") as connection:
            publication = read_publication(connection, self._settings.source.publication)
            planned = plan_table(read_table(connection, oid), before.options, publication)
        # As the stream does it: changes that stop the stream are not for a copy either, and a new
        # vector column is not in the collection.
        again = replan(
            before.plan, [(c.name, c.type) for c in planned.plan.columns], before.options
        )
        # A table that was renamed stays what it is on record, in its collection.
        plan = dataclasses.replace(
            planned.plan,
            columns=again.columns,
            key=again.key,
            schema=before.plan.schema,
            table=before.plan.table,
            collection=before.plan.collection,
        )
        return dataclasses.replace(planned, plan=plan)

    async def _snapshot(self, planned: PlannedTable) -> SnapshotHolder:
        assert self.recent is not None
        holder = await asyncio.to_thread(
            SnapshotHolder.fresh,
            self._settings.source,
            [planned.table],
            lock_timeout_seconds=_LOCK_SECONDS,
        )
        seen = holder.snapshot
        if self.recent.all_visible(seen.xmin, seen.xmax, frozenset(seen.xip)):
            return holder
        await asyncio.to_thread(holder.close)
        raise NotYetVisibleError(
            "transactions that may have been applied are still open on the server"
        )

    async def _record_stale(self, planned: PlannedTable) -> None:
        if planned.plan.oid not in self._recorded:
            await self._record(planned, stale_fingerprint(planned))
            self._recorded.add(planned.plan.oid)

    async def _record(self, planned: PlannedTable, text: str) -> None:
        state = await self._sink.state.load(self._settings.pipeline.name)
        if state is None:
            return
        tables = tuple(
            dataclasses.replace(t, plan_fingerprint=text) if t.table == planned.name else t
            for t in state.tables
        )
        await self._sink.state.save(dataclasses.replace(state, tables=tables))
