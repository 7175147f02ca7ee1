"""Resync: copying tables under the running stream, window by window.

The applier stands still, a snapshot S is taken, chunks are copied under S until the window's time
is up, and the stream goes on until it has passed the end of the window; then comes the next window.
So a first copy goes on after its first window or after a crash, a table joins a running pipeline,
and a stale table is read again.

That is exact iff every transaction applied so far, be it in part, is visible in S (design, section
5.4): a commit is streamed before it is visible, so a snapshot in which an applied transaction is
still running is thrown away and taken again. What was applied by an earlier life of the daemon is
not known by id; all of that had begun before this life did, so the first window waits until every
transaction of that time is over. Everything later than S comes by the stream and is written over
the copy.

That a table is stale is found by comparing it with what is on record of its last copy. Rows that
were written by columns which it had only for a while leave no such difference, so there the record
says so, before they are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.planner import replan
from cdc_sync.mapping.table import Table
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.catalog import read_table
from cdc_sync.postgres.connect import PgConnection, connect, set_lock_timeout
from cdc_sync.postgres.publication import Publication, read_publication
from cdc_sync.postgres.refetch import widen_xid
from cdc_sync.postgres.slot import read_slot
from cdc_sync.postgres.snapshot import SnapshotHolder, TableRewrittenError
from cdc_sync.postgres.watch import (
    SourcePosition,
    definitions,
    source_position,
    transaction_horizon,
)
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.backfill import Backfill, Retry
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.planning import plan_table
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.table_records import TableRecords

log = get_logger(__name__)

#: How long the stream goes on before a snapshot is taken again.
_RETRY_SECONDS = 1.0
#: How long a lock on the table may be waited for, with the stream at rest.
_LOCK_SECONDS = 2.0
_LOCK_NOT_AVAILABLE = "55P03"


class RecentTransactions:
    """The transactions applied lately, by the 32-bit ids that the stream gives."""

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._applied: set[int] = set()

    def raise_horizon(self, horizon: int) -> None:
        """Take every transaction below as possibly applied."""
        self._horizon = max(self._horizon, horizon)

    @property
    def horizon(self) -> int:
        """A 64-bit id: of the transactions below, which are applied is not known."""
        return self._horizon

    def pending(self) -> frozenset[int]:
        """The 32-bit ids of transactions applied that are not known to be visible everywhere."""
        return frozenset(self._applied)

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


class WindowPostponedError(Exception):
    """No window can be opened now; the stream goes on meanwhile."""


@dataclass(frozen=True, slots=True)
class _Barrier:
    """Where the stream has to be before a table is read, and the table's definition before that."""

    lsn: int
    definition: str


@contextlib.contextmanager
def _unless_locked() -> Iterator[None]:
    try:
        yield
    except SourceError as error:
        if getattr(error.__cause__, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        raise WindowPostponedError("a table is locked") from error


class Resync:
    """Opens windows for tables that are stale or not copied yet."""

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        relations: Relations,
        metrics: Metrics,
        board: StatusBoard,
        records: TableRecords,
        backfill: Backfill,
        retry: Retry,
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._relations = relations
        self._metrics = metrics
        self._board = board
        self._backfill = backfill
        self._retry = retry
        self._records = records
        self._recorded: set[int] = set()
        self._uncopied: set[str] = set()
        self._barriers: dict[int, _Barrier] = {}
        self._next_try = 0.0
        self.recent: RecentTransactions | None = None
        #: Process of Postgres that streams to us, while one does.
        self.walsender: int | None = None

    @property
    def copying(self) -> bool:
        """Whether tables of the pipeline have not been copied yet."""
        return bool(self._uncopied)

    def applied_lately(self) -> RecentTransactions:
        """The transactions applied lately, once :meth:`open` was called."""
        assert self.recent is not None, "no session has begun yet"
        return self.recent

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
        """Mark tables that are not as the record says, or not copied yet. Errors as of the state
        store."""
        state = await self._records.load()
        if state is None:
            return
        configured = {planned.name for planned in self._relations.tables}
        recorded = {table.table for table in state.tables}
        if configured != recorded:
            # Their changes would be confirmed without having been applied.
            raise ConfigError(
                "another process has given the pipeline other tables: "
                + ", ".join(sorted(configured ^ recorded)),
                "Start every process of the pipeline with one configuration.",
            )
        # Another process may have had the slot, and put other things on record.
        self._recorded.clear()
        self._barriers.clear()
        self._relations.compare(state)
        self._uncopied = {table.table for table in state.tables if not table.copied}
        for planned in self._relations.tables:
            if planned.name in self._uncopied:
                self._relations.mark(planned, "not copied yet")
        wanted = self._relations.stale | self._relations.unswept
        names = {p.name for p in self._relations.tables if p.plan.oid in wanted}
        ledgers = await self._sink.state.ledgers(self._settings.pipeline.name)
        for ledger in ledgers:
            if ledger.table not in names:
                # Its copy was completed, and put on record so.
                await self._sink.state.drop_ledger(ledger.pipeline, ledger.table)
        self._backfill.take_up(ledger for ledger in ledgers if ledger.table in names)

    async def note(self, batch: Batch) -> None:
        """Mark tables which the batch is going to write by other columns than they were copied by,
        also on record. Errors as of the state store."""
        for planned in self._relations.note(batch):
            # A copy under way has written rows by columns that are not the table's any more.
            if self._backfill.has_begun(planned.name):
                await self._backfill.restart(planned)
                self._barriers.pop(planned.plan.oid, None)
            await self._record_stale(planned)

    async def outdated(self, planned: PlannedTable) -> None:
        """Mark a table whose rows could not be read by key, since its columns have changed. Errors
        as of the state store."""
        self._relations.mark(planned, "columns changed before rows were read again")
        await self._backfill.restart(planned)
        await self._record_stale(planned)
        self._barriers.pop(planned.plan.oid, None)

    async def request(self, planned: PlannedTable, reason: str) -> None:
        """Have the whole table read again, after the copy that may be under way: anybody may ask,
        and must not keep it from ending. On record when this returns; errors as of the state
        store."""
        if self._backfill.has_begun(planned.name):
            await self._backfill.once_more(planned)
            return
        self._relations.mark(planned, reason)
        await self._record_stale(planned)
        self._barriers.pop(planned.plan.oid, None)

    def may_be_older(self, planned: PlannedTable) -> bool:
        """Whether points of the table may be older than the stream. A row of a block that is left
        may move into a chunk that is done, and no window reads it then; so what an update does not
        send must not be taken from its point (R69)."""
        return self._backfill.may_be_older(planned.name)

    async def run(self, applied: int) -> None:
        """Open a window if there is something to copy and it is time. The applier must be at rest
        until this returns; ``applied`` is where it stands.

        While the stream is behind, rows of the old columns are still to come and would make the
        table stale again, so first it has to come to where the server was when this was seen, or
        when the last window ended.
        """
        if time.monotonic() < self._next_try:
            return
        ready = []
        for oid in sorted(self._relations.stale | self._relations.unswept):
            if oid not in self._barriers:
                self._barriers[oid] = await asyncio.to_thread(self._barrier, oid)
            if applied >= self._barriers[oid].lsn:
                ready.append(oid)
        if not ready:
            return
        try:
            await self._retry(lambda: self._window(ready))
        except (TableRewrittenError, WindowPostponedError) as error:
            # The stream goes on meanwhile.
            self._next_try = time.monotonic() + _RETRY_SECONDS
            log.info("window_postponed", reason=str(error))
            return
        for oid in ready:
            self._barriers.pop(oid, None)

    def _barrier(self, oid: int) -> _Barrier:
        """Where the stream has to be before the table is read. The definition first: what it was
        changed by before is then below the position."""
        with connect(self._settings.source, application_name="cdc_sync watch") as connection:
            definition = definitions(connection, [oid]).get(oid, "")
            position = source_position(connection, self._settings.source.slot)
        return _Barrier(int(position.current), definition)

    async def _window(self, oids: Sequence[int]) -> None:
        tables = await asyncio.to_thread(self._plan, oids)
        for planned in tables:
            await self._make_ready(planned)
        holder = await self._snapshot(tables)
        # Rows of blocks that were left may have moved before the last snapshot into chunks that
        # were done; where points were there before, what says so has to come by the stream first.
        settled = {
            p.name
            for p in tables
            if self._backfill.is_complete(p.name) or not self._backfill.may_be_older(p.name)
        }
        try:
            started = time.monotonic()
            for planned in tables:
                # What comes by the stream from here on is bound to this plan.
                self._relations.reading(planned)
            completed = await self._backfill.window(tables, holder.snapshot_id)
        finally:
            await asyncio.to_thread(holder.close)
        for planned in completed:
            if planned.name in settled:
                await self.complete(planned)
        log.info(
            "window_closed",
            tables=len(tables),
            completed=len(completed),
            seconds=round(time.monotonic() - started, 3),
        )

    async def _make_ready(self, planned: PlannedTable) -> None:
        oid = planned.plan.oid
        if planned.table.definition != self._barriers[oid].definition:
            # Rows of before may still be to come, and a truncated partition's would stay.
            del self._barriers[oid]
            raise WindowPostponedError(f"{planned.name} was altered meanwhile")
        found = await self._sink.inspect(planned.plan)
        await self._sink.ensure_collection(
            planned.plan, create=self._settings.migration.create_collection
        )
        if not self._backfill.has_begun(planned.name):
            await self._begin(planned)
        if not found.exists:
            # Whatever was copied is gone with it.
            await self._backfill.restart(planned)

    async def _begin(self, planned: PlannedTable) -> None:
        first = planned.name in self._uncopied
        if not first and planned.plan.oid not in self._relations.stale:
            await self._backfill.begin(planned, sweep=True, sweep_only=True)
            return
        if not first:
            log.info("resync_started", table=planned.name)
            # Should its columns be as they were again by the next start, no comparison would show
            # that it was read by others.
            await self._record_stale(planned)
        # Rows deleted while their changes were not followed are found by the sweep; nothing was
        # there before a first copy.
        await self._backfill.begin(
            planned,
            sweep=not first or self._settings.migration.adopt,
            repair=first and self._settings.migration.adopt,
        )

    async def complete(self, planned: PlannedTable) -> None:
        """Every chunk of the table is copied: put that on record."""
        first = planned.name in self._uncopied
        swept = not first and planned.plan.oid not in self._relations.stale
        await self._sink.make_durable()
        # Where it was deferred for the load; before the record, after which nobody would do it.
        await self._sink.build_index(planned.plan)
        await self._records.copied(planned, stale=self._backfill.is_wanted_again(planned.name))
        ledger = await self._backfill.end(planned)
        self._uncopied.discard(planned.name)
        self._recorded.discard(planned.plan.oid)
        self._relations.synced(planned)
        self._board.table(planned.name).update(state="streaming")
        if not first and not swept:
            self._metrics.add_table(planned.name).schema_changes["resynced"].inc()
        log.info(
            "table_copied" if first else "sweep_completed" if swept else "resync_completed",
            table=planned.name,
            rows=ledger.rows,
            bytes=ledger.bytes,
            orphans=ledger.orphans,
        )
        if ledger.again:
            self._relations.mark(planned, "asked for while it was being copied")
            self._recorded.add(planned.plan.oid)

    def _plan(self, oids: Sequence[int]) -> list[PlannedTable]:
        by_oid = {planned.plan.oid: planned for planned in self._relations.tables}
        with (
            _unless_locked(),
            connect(self._settings.source, application_name="cdc_sync watch") as connection,
        ):
            # Reading a table's size waits for whoever has locked it.
            set_lock_timeout(connection, _LOCK_SECONDS)
            publication = read_publication(connection, self._settings.source.publication)
            return [
                self._plan_again(by_oid[oid], _read(connection, by_oid[oid]), publication)
                for oid in oids
            ]

    def _plan_again(
        self, before: PlannedTable, table: Table, publication: Publication | None
    ) -> PlannedTable:
        planned = plan_table(table, before.options, publication, changed=True)
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

    async def _snapshot(self, tables: Sequence[PlannedTable]) -> SnapshotHolder:
        assert self.recent is not None
        with _unless_locked():
            holder = await asyncio.to_thread(
                SnapshotHolder.fresh,
                self._settings.source,
                [planned.table for planned in tables],
                lock_timeout_seconds=_LOCK_SECONDS,
            )
        if not await asyncio.to_thread(self._has_slot):
            await asyncio.to_thread(holder.close)
            raise WindowPostponedError("another process has taken the slot")
        seen = holder.snapshot
        if self.recent.all_visible(seen.xmin, seen.xmax, frozenset(seen.xip)):
            return holder
        await asyncio.to_thread(holder.close)
        raise WindowPostponedError(
            "transactions that may have been applied are still open on the server"
        )

    def _has_slot(self) -> bool:
        """Whether the slot is still ours, with the lock of windows in hand: whoever takes it from
        now on waits for that."""
        with connect(self._settings.source, application_name="cdc_sync watch") as connection:
            slot = read_slot(connection, self._settings.source.slot)
        return slot is not None and slot.active_pid == self.walsender

    async def _record_stale(self, planned: PlannedTable) -> None:
        if planned.plan.oid not in self._recorded:
            await self._records.stale(planned)
            self._recorded.add(planned.plan.oid)


def _read(connection: PgConnection, planned: PlannedTable) -> Table:
    try:
        return read_table(connection, planned.plan.oid)
    except SourceError as error:
        if error.kind is not ErrorKind.TABLE_UNUSABLE:
            raise
        raise SourceError(
            error.kind,
            f"table {planned.name} cannot be read any more: {error.message}",
            error.remedy,
        ) from error
