"""Resync: reading tables again as a whole under the running stream.

The applier stands still, a snapshot S is taken, the tables are copied under S, and the stream goes
on. That is exact iff every transaction applied so far, be it in part, is visible in S (design,
section 5.4): a commit is streamed before it is visible, so a snapshot in which an applied
transaction is still running is thrown away and taken again. What was applied by an earlier life of
the daemon is not known by id; all of that had begun before this life did, so the first resync waits
until every transaction of that time is over. Everything later than S comes by the stream and is
written over the copy.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

from cdc_sync.config import Settings
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.postgres.catalog import read_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.publication import read_publication
from cdc_sync.postgres.refetch import widen_xid
from cdc_sync.postgres.snapshot import SnapshotHolder
from cdc_sync.postgres.watch import SourcePosition, transaction_horizon
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.planning import fingerprint, plan_table
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.routing import PlannedTable

log = get_logger(__name__)

#: How long to wait before a snapshot is taken again.
_RETRY_SECONDS = 0.05


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

    async def run(self) -> None:
        """Read all stale tables again. The applier must be at rest until this returns."""
        stale = sorted(self._relations.stale)
        for oid in stale:
            await self._retry(lambda oid=oid: self._table(oid))  # type: ignore[misc]

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
        await self._remember(planned)
        self._relations.synced(planned)
        self._metrics.add_table(planned.name).schema_changes["resynced"].inc()
        log.info("resync_completed", table=planned.name, rows=totals[oid].rows)

    def _plan(self, oid: int) -> PlannedTable:
        before = next(p for p in self._relations.tables if p.plan.oid == oid)
        with connect(self._settings.source, application_name="cdc_sync watch") as connection:
            publication = read_publication(connection, self._settings.source.publication)
            return plan_table(read_table(connection, oid), before.options, publication)

    async def _snapshot(self, planned: PlannedTable) -> SnapshotHolder:
        assert self.recent is not None
        while True:
            holder = await asyncio.to_thread(
                SnapshotHolder.fresh, self._settings.source, [planned.table]
            )
            seen = holder.snapshot
            if self.recent.all_visible(seen.xmin, seen.xmax, frozenset(seen.xip)):
                return holder
            await asyncio.to_thread(holder.close)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _remember(self, planned: PlannedTable) -> None:
        state = await self._sink.state.load(self._settings.pipeline.name)
        if state is None:
            return
        tables = tuple(
            dataclasses.replace(t, plan_fingerprint=fingerprint(planned))
            if t.table == planned.name
            else t
            for t in state.tables
        )
        await self._sink.state.save(dataclasses.replace(state, tables=tables))
