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
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError, DimensionMismatchError, ErrorKind
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.connect import answering, connect
from cdc_sync.postgres.snapshot import SnapshotHolder, TableRewrittenError
from cdc_sync.postgres.watch import SourcePosition, transaction_horizon
from cdc_sync.qdrant.sink import NEVER, CollectionState, Sink, TableState
from cdc_sync.sync.backfill import Backfill, Retry
from cdc_sync.sync.barriers import Barriers
from cdc_sync.sync.copying import LOCK_SECONDS
from cdc_sync.sync.fingerprints import is_recorded_stale
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.ledger import unrecorded
from cdc_sync.sync.opening import opening
from cdc_sync.sync.planning import Unplanned
from cdc_sync.sync.recent_transactions import RecentTransactions
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.replanning import (
    Replanner,
    WindowPostponedError,
    check_unshared,
    unless_locked,
)
from cdc_sync.sync.retention import WAIT_SECONDS
from cdc_sync.sync.routing import PlannedTable, Unusable
from cdc_sync.sync.stopped_tables import StoppedTables, concerns_one_table
from cdc_sync.sync.table_records import TableRecords

log = get_logger(__name__)

#: How long the stream goes on before a snapshot is taken again.
_RETRY_SECONDS = 1.0


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
        #: Definitions that were put on record since the tables were compared with it.
        self._kept: dict[str, str] = {}
        self._uncopied: set[str] = set()
        #: Tables of which points may be there, be they copied or not.
        self._touched: set[str] = set()
        #: Tables of which their next window puts on record where the stream stood: it brings old
        #: changes once more, or has begun their ledger.
        self._replayed: set[str] = set()
        self._barriers = Barriers(settings, relations, self.applied_lately)
        self._next_try = 0.0
        self._replanner = Replanner(settings)
        self.stopped = StoppedTables(metrics, board)
        #: What the tables that stopped were like while their collections fitted them.
        self._before: dict[str, PlannedTable] = {}
        #: Tables that get a window of their own, because one of them has failed one for all.
        self._alone: set[int] = set()
        #: Tables found unusable in the catalog, which stop once the applier is at rest.
        self._found: dict[str, CdcSyncError] = {}
        #: Called when a stopped table is published again.
        self.on_taken: Callable[[], Awaitable[None]] | None = None
        #: Whether tables may stop; else the pipeline does.
        self.tolerant = True
        self.recent: RecentTransactions | None = None
        #: Whether tables are compared with the record, so that what changes from then on shows.
        self._follows = False
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
        with (
            connect(self._settings.source, application_name="cdc_sync watch") as connection,
            answering(connection),
        ):
            horizon = transaction_horizon(connection)
            if self.recent is None:
                self.recent = RecentTransactions(horizon)
            self.recent.raise_horizon(horizon)

    def observe(self, position: SourcePosition, definitions: dict[int, str]) -> None:
        """Mark tables that were redefined since they were read as a whole."""
        if self.recent is not None:
            self.recent.forget(position.xmin, position.xmax, position.running)
        for oid, definition in definitions.items() if self._follows else ():
            self._relations.observe(oid, definition)

    async def keep(self) -> None:
        """Put on record how tables are defined by now of which nothing is to be read: the next life
        is to find only what has changed since."""
        now = self._relations.settled_definitions
        if now != self._kept:
            await self._records.defined(now)
            self._kept = now

    async def compare(self, begins: int | None = None) -> None:
        """Mark tables that are not as the record says, or not copied yet; ``begins`` is where the
        stream does, if it does. Errors as of the state store."""
        state = await self._records.load()
        if state is None:
            return
        configured = {planned.name for planned in self._relations.tables} | self.stopped.names
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
        self._kept = {}
        self._barriers.clear()
        for name in self.stopped.names:
            await self._records.stopped(name)
        followed = [p for p in self._relations.tables if not self.stopped.holds(p.name)]
        for planned in await asyncio.to_thread(self._replanner.as_recorded, followed, state):
            self._relations.reading(planned)
        self._relations.compare(state)
        self._uncopied = {table.table for table in state.tables if not table.copied}
        self._touched = {t.table for t in state.tables if is_recorded_stale(t.plan_fingerprint)}
        for planned in self._relations.tables:
            if planned.name in self._uncopied:
                self._relations.mark(planned, "not copied yet")
        replayed = [] if begins is None else self._relations.mark_replayed(state, begins)
        for planned, rows in replayed:
            await self._records.reading(planned, NEVER, rows=rows)
        self._replayed = {planned.name for planned, _ in replayed}
        self._touched |= self._replayed
        ledgers = await self._sink.state.ledgers(self._settings.pipeline.name)
        self._relations.mark_begun(unrecorded(ledgers, state))
        wanted = self._relations.wanted
        names = {p.name for p in self._relations.tables if p.plan.oid in wanted}
        for ledger in ledgers:
            if ledger.table not in names:
                # Its copy was completed, and put on record so.
                await self._sink.state.drop_ledger(ledger.pipeline, ledger.table)
        self._backfill.take_up(ledger for ledger in ledgers if ledger.table in names)
        for planned in self._relations.tables:
            if self.stopped.holds(planned.name) or planned.name in self._replayed:
                await self._backfill.restart(planned)
        self._follows = begins is not None

    def let_go(self) -> None:
        """The slot is another's, or may be: what the catalog shows is its concern."""
        self._follows = False

    async def note(self, batch: Batch) -> None:
        """Mark tables which the batch is going to write by other columns than they were copied by,
        or of which it may write rows that nobody sees go; also on record. Errors as of the state
        store."""
        for planned in self._relations.note(batch):
            if self.stopped.holds(planned.name):
                continue
            # A copy under way has written rows by columns that are not the table's any more.
            if self._backfill.has_begun(planned.name):
                await self._backfill.restart(planned)
                self._barriers.forget(planned.plan.oid)
            await self._record_stale(planned)
        for planned in self._relations.note_leaves(batch):
            if not self.stopped.holds(planned.name):
                await self._note_leaves(planned)

    async def _note_leaves(self, planned: PlannedTable) -> None:
        """Points may be there from here on whose partition goes before the next look."""
        sweep = planned.plan.oid in self._relations.unswept
        begun = self._backfill.has_begun(planned.name)
        if planned.plan.oid in self._relations.stale and not begun:
            # It is swept once it has been read.
            self._touched.add(planned.name)
            await self._record_stale(planned)
        elif sweep or not begun:
            self._replayed.add(planned.name)
            await self._look_through(planned, sweep=sweep)

    async def outdated(self, planned: PlannedTable) -> None:
        """Mark a table whose rows could not be read by key, since its columns have changed. Errors
        as of the state store."""
        if self.stopped.holds(planned.name):
            return
        self._relations.mark(planned, "columns changed before rows were read again")
        await self._backfill.restart(planned)
        await self._record_stale(planned)
        self._barriers.forget(planned.plan.oid)

    async def request(self, planned: PlannedTable, reason: str) -> None:
        """Have the whole table read again, after the copy that may be under way: anybody may ask,
        and must not keep it from ending. On record when this returns; errors as of the state
        store."""
        if self.stopped.holds(planned.name):
            self.stopped.hurry(planned.name)
            return
        if self._backfill.has_begun(planned.name):
            await self._backfill.once_more(planned)
            return
        self._relations.mark(planned, reason)
        await self._record_stale(planned)
        self._barriers.forget(planned.plan.oid)

    def is_stopped(self, table: str) -> bool:
        """Whether the table's changes are dropped."""
        return self.stopped.holds(table)

    async def stop(self, table: str, error: CdcSyncError) -> None:
        """The table cannot be followed any more; its changes may be dropped once this returns. It
        is on record then, and nothing that was copied of it counts. Errors as of the state store;
        raises ``error`` where no table may stop."""
        if not self.tolerant:
            raise error
        planned = self._relations.find(table)
        if not self.stopped.holds(table):
            if planned is not None:
                await self._backfill.restart(planned)
                if error.kind is not ErrorKind.COLLECTION_MISMATCH:
                    self._before[table] = planned
                self._relations.mark(planned, "stopped")
            await self._records.stopped(table)
            self._touched.add(table)
        if planned is not None:
            self._barriers.forget(planned.plan.oid)
        self.stopped.stop(table, error)

    async def start_stopped(self, table: Unplanned) -> None:
        """The table is on record as copied, and cannot be followed as it is found."""
        if self._relations.find(table.name) is None:
            self._relations.leave_unplanned(table.oid, Unusable(table.name, table.error))
        await self.stop(table.name, table.error)
        # Its collection may be of another plan.
        self._before.pop(table.name, None)

    def found(
        self, errors: Mapping[str, CdcSyncError], signs: Mapping[str, str], began: float
    ) -> None:
        """What the catalog shows: tables that cannot be followed, by name, and whatever tells
        whether something has changed about a table. ``began``: when the look did, on the monotonic
        clock; a table may have been mended and started since."""
        self.stopped.observe(signs)
        for name, error in errors.items() if self._follows else ():
            if not self.stopped.holds(name) and not self.stopped.has_started_since(name, began):
                self._found[name] = error

    @property
    def wanted(self) -> bool:
        """Whether there is something to do with the applier at rest."""
        return bool(self._relations.wanted or self._found or self.stopped)

    def may_be_older(self, planned: PlannedTable) -> bool:
        """Whether points of the table may be older than the stream. A row of a block that is left
        may move into a chunk that is done, and no window reads it then; so what an update does not
        send must not be taken from its point (R69)."""
        return self._backfill.may_be_older(planned.name)

    async def run(self, applied: int) -> None:
        """Open a window if there is something to copy and it is time. The applier must be at rest
        until this returns; ``applied`` is where it stands."""
        if time.monotonic() < self._next_try:
            return
        await self._look_at_stopped()
        ready = []
        for oid in sorted(self._relations.wanted):
            if self.stopped.waits(self._relations.name(oid)):
                continue
            if await self._barriers.reached(oid, applied):
                ready.append(oid)
        if not ready:
            return
        if self._alone:
            self._alone &= set(ready)
            ready = [self._alone.pop()] if self._alone else ready
        names = [p.name for p in self._relations.tables if p.plan.oid in ready]
        if not await self._backfill.has_room(names):
            # It is the stream that frees WAL.
            self._next_try = time.monotonic() + WAIT_SECONDS
            return
        waits: str | None = None
        try:
            await self._retry(lambda: self._window(ready))
        except (TableRewrittenError, WindowPostponedError) as error:
            # The stream goes on meanwhile.
            self._next_try = time.monotonic() + _RETRY_SECONDS
            waits = str(error)
            log.info("window_postponed", reason=waits)
            return
        except CdcSyncError as error:
            if not concerns_one_table(error):
                raise
            await self._blame(ready, error)
            return
        finally:
            for name in names:
                self._board.table(name).update(waiting=waits)
        for oid in ready:
            self._barriers.forget(oid)

    async def _blame(self, oids: Sequence[int], error: CdcSyncError) -> None:
        """A window failed because of one of its tables; if there were several, that will be the one
        which fails alone."""
        if len(oids) == 1:
            await self.stop(self._relations.name(oids[0]), error)
            return
        log.info("window_divided", tables=len(oids), reason=error.message)
        self._alone = set(oids)

    async def _look_at_stopped(self) -> None:
        """Stop what was found unusable, and plan again what may start again."""
        for oid in list(self._relations.unsent):
            self._barriers.forget(oid)
            name = self._relations.name(oid)
            planned = self._relations.find(name)
            # What is under way may have missed changes.
            if planned and self._backfill.has_begun(name) and not self.stopped.holds(name):
                await self._backfill.once_more(planned)
        while self._found:
            name, error = self._found.popitem()
            if not self.stopped.holds(name):
                await self.stop(name, error)
        for name in self.stopped.due():
            state = await self._records.load()
            record = next((t for t in state.tables if t.table == name), None) if state else None
            if state is None or record is None:
                continue
            oid = self._relations.oids.get(name, record.oid)
            sign = await asyncio.to_thread(self._replanner.sign, name, oid)
            self.stopped.trying(name, sign)
            try:
                planned = await asyncio.to_thread(
                    self._replanner.stopped,
                    self._before.get(name),
                    record,
                    owned=state.owns_publication,
                )
            except WindowPostponedError:
                self._next_try = time.monotonic() + _RETRY_SECONDS
                continue
            except CdcSyncError as error:
                if not concerns_one_table(error):
                    raise
                self.stopped.stop(name, error)
                continue
            await self._take(planned, record)

    async def _take(self, planned: PlannedTable, record: TableState) -> None:
        """A stopped table can be planned again. It starts with its window, once the stream has come
        to where the server is now: what is received from here on is bound to this plan."""
        if planned.plan.oid != record.oid:
            log.info("table_created_again", table=planned.name)
            await self._records.recreated(planned)
        self._relations.take(planned, record.oid)
        if self.on_taken is not None:
            await self.on_taken()
        # What was not bound, or not published, was not noted as applied either.
        self._relations.unsent.add(planned.plan.oid)
        self._barriers.forget(planned.plan.oid)
        self.stopped.planned(planned.name)
        self._board.table(planned.name).update(collection=planned.plan.collection)

    async def _window(self, oids: Sequence[int]) -> None:
        tables = await self._ready(oids)
        if not tables:
            return
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
                self.stopped.start(planned.name)
                self._before.pop(planned.name, None)
            # Whoever waits for a lock of ours has the workers wait behind him.
            with unless_locked():
                completed = await self._backfill.window(tables, holder)
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

    async def _ready(self, oids: Sequence[int]) -> list[PlannedTable]:
        """Plan the tables and make their collections ready; those that cannot be stop."""
        # A window that is tried again may have completed some.
        left = self._relations.wanted.intersection(oids)
        wanted = [
            p
            for p in self._relations.tables
            if p.plan.oid in left and not self.stopped.waits(p.name)
        ]
        planned, failed = await asyncio.to_thread(self._replanner.again, wanted)
        for name, error in failed.items():
            await self.stop(name, error)
        ready = []
        for one in planned:
            try:
                await self._make_ready(one)
            except CdcSyncError as error:
                if not concerns_one_table(error):
                    raise
                await self.stop(one.name, error)
            else:
                ready.append(one)
        return ready

    async def _make_ready(self, planned: PlannedTable) -> None:
        oid = planned.plan.oid
        position = self._barriers.position(planned)
        # It may have changed since the last look, whatever it is wanted for.
        self._relations.observe(oid, planned.table.definition)
        found = await self._inspect(planned)
        await self._sink.ensure_collection(
            planned.plan, create=self._settings.migration.create_collection
        )
        attached = oid in self._relations.unread
        reads = oid in self._relations.stale or attached
        # A first copy meets what the stream does not bring only once the table has changed.
        first = planned.name in self._uncopied and not attached
        fresh = not self._backfill.has_begun(planned.name)
        if fresh and not first:
            # Before the ledger, since whoever goes on with that does not come here again.
            await self._records.reading(planned, position, rows=reads)
        if fresh:
            await self._begin(planned)
        outdated = self._backfill.is_outdated(planned) or planned.name in self._replayed
        if outdated or (fresh and first and self._backfill.may_be_older(planned.name)):
            await self._records.reading(planned, position, rows=reads and outdated)
            self._replayed.discard(planned.name)
        if not found.exists:
            # Whatever was copied is gone with it.
            await self._backfill.restart(planned)

    async def _inspect(self, planned: PlannedTable) -> CollectionState:
        """The table's collection; one of other dimensions is dropped, if that is wanted."""
        try:
            return await self._sink.inspect(planned.plan)
        except DimensionMismatchError as error:
            if not (self.stopped.holds(planned.name) and self._replanner.rebuilds(planned.name)):
                raise
            check_unshared(planned, error)
        log.warning("collection_dropped", table=planned.name, collection=planned.plan.collection)
        await self._sink.drop_collection(planned.plan)
        return CollectionState(exists=False)

    async def _begin(self, planned: PlannedTable) -> None:
        first = planned.name in self._uncopied
        if not first and planned.plan.oid not in self._relations.stale:
            await self._look_through(planned, sweep=planned.plan.oid in self._relations.unswept)
            return
        if not first:
            log.info("resync_started", table=planned.name)
            # Should its columns be as they were again by the next start, no comparison would show
            # that it was read by others.
            await self._record_stale(planned)
        # Rows deleted while their changes were not followed are found by the sweep; nothing was
        # there before a first copy, unless the table has stopped, or lost a partition, before it.
        older = planned.name in self._touched or planned.plan.oid in self._relations.unswept
        await self._backfill.begin(
            planned,
            sweep=not first or self._settings.migration.adopt or older,
            repair=first and self._settings.migration.adopt,
        )

    async def _look_through(self, planned: PlannedTable, *, sweep: bool) -> None:
        unread = self._relations.unread.get(planned.plan.oid, ())
        await self._backfill.look_through(planned, unread, sweep=sweep)

    async def complete(self, planned: PlannedTable) -> None:
        """Every chunk of the table is copied: put that on record."""
        first = planned.name in self._uncopied
        swept = not first and planned.plan.oid not in self._relations.stale
        read = planned.plan.oid in self._relations.unread
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
            "table_copied"
            if first
            else "resync_completed"
            if not swept
            else "partitions_copied"
            if read
            else "sweep_completed",
            table=planned.name,
            rows=ledger.rows,
            bytes=ledger.bytes,
            orphans=ledger.orphans,
        )
        if ledger.again:
            self._relations.mark(planned, "asked for while it was being copied")
            self._recorded.add(planned.plan.oid)

    async def _snapshot(self, tables: Sequence[PlannedTable]) -> SnapshotHolder:
        assert self.recent is not None
        with unless_locked():
            holder = await opening(
                SnapshotHolder.fresh,
                self._settings.source,
                [planned.table for planned in tables],
                lock_timeout_seconds=LOCK_SECONDS,
            )
        try:
            # With the lock of windows in hand: whoever takes the slot from now on waits for that.
            slot = self._settings.source.slot
            if not await asyncio.to_thread(holder.has_slot, slot, self.walsender):
                raise WindowPostponedError(
                    "another process has taken the slot, or the snapshot is of another server"
                )
            seen = holder.snapshot
            if not self.recent.all_visible(seen.xmin, seen.xmax, seen.xip):
                raise WindowPostponedError(
                    "transactions that may have been applied are still open on the server"
                )
        except BaseException:
            await asyncio.to_thread(holder.close)
            raise
        return holder

    async def _record_stale(self, planned: PlannedTable) -> None:
        if planned.plan.oid not in self._recorded:
            await self._records.stale(planned)
            self._recorded.add(planned.plan.oid)
