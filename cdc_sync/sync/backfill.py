"""Backfill: copying tables window by window, for the first copy, resyncs, added tables and
adoption alike.

In a window somebody holds a snapshot and the applier stands still; chunks are copied under that
snapshot until the window's time is up, or the slot retains too much WAL
(:mod:`cdc_sync.sync.retention`). The ledger of each table says what is left. Once all chunks of a
table are done, points without a row are swept where there may be any. Whether a snapshot may be
used, and when the next window opens, is not decided here but in :mod:`cdc_sync.sync.resync`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Protocol, TypeVar

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.connect import connect, set_lock_timeout
from cdc_sync.postgres.snapshot import SnapshotHolder, import_snapshot, key_query
from cdc_sync.qdrant.sink import Changes, Sink, TableLedger
from cdc_sync.rows import PointId
from cdc_sync.sync.copying import LOCK_SECONDS, ChunkResult, CopyTask
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.executors import open_executor
from cdc_sync.sync.fingerprints import fingerprint
from cdc_sync.sync.ledger import Ledger
from cdc_sync.sync.opening import opening
from cdc_sync.sync.orphans import sweep
from cdc_sync.sync.retention import RetainedWal, WindowCutError, WindowTime
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.worker_pool import ChunkExecutor

log = get_logger(__name__)

T = TypeVar("T")

#: How often the ledger is written at the least, while chunks are being finished.
_SAVE_SECONDS = 1.0
#: How long that may take when a window has failed, or is cancelled.
_LAST_SAVE_SECONDS = 3.0
#: Orphans removed in one request to the sink.
_REMOVE_POINTS = 1_000


class Retry(Protocol):
    """Runs an operation on Qdrant until it works, or fails for good."""

    async def __call__(self, operation: Callable[[], Awaitable[T]]) -> T: ...


class Backfill:
    """Copies tables under snapshots that somebody holds open."""

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        metrics: Metrics,
        board: StatusBoard,
        dead_letters: DeadLetterOffice,
        retry: Retry,
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._metrics = metrics
        self._board = board
        self._dead_letters = dead_letters
        self._retry = retry
        self._retained = RetainedWal(settings, metrics, board)
        self._executor: ChunkExecutor | None = None
        self._ledgers: dict[str, Ledger] = {}
        self._tables: dict[int, PlannedTable] = {}
        self._saved = 0.0
        self._finished = 0

    # -- what is under way

    def take_up(self, records: Iterable[TableLedger]) -> None:
        """Go on with exactly these copies, which are on record: of an earlier life, or of another
        process that had the slot meanwhile."""
        before = self._ledgers
        self._ledgers = {}
        for record in records:
            self._ledgers[record.table] = Ledger(record, self._settings.migration.chunk_rows)
            if record.table not in before:
                log.info("copy_resumed", table=record.table, rows=record.rows)

    def has_begun(self, table: str) -> bool:
        """Whether a copy of the table is under way."""
        return table in self._ledgers

    def is_outdated(self, planned: PlannedTable) -> bool:
        """Whether the table is not as it was when the copy under way was last gone on with."""
        return self._ledgers[planned.name].record.fingerprint != fingerprint(planned)

    def may_be_older(self, table: str) -> bool:
        """Whether a copy of the table is under way that found points there, or may have."""
        ledger = self._ledgers.get(table)
        return ledger is not None and ledger.record.sweep

    async def begin(
        self,
        planned: PlannedTable,
        *,
        sweep: bool,
        repair: bool = False,
    ) -> None:
        """Begin a copy of the table from nothing. On record when this returns."""
        # Points of rows that were refused are older than the stream, and no letter says so any
        # more once it is released.
        sweep = sweep or self._dead_letters.has_letters(planned.name)
        ledger = self._open(planned, sweep=sweep, repair=repair)
        # Every row is read again: those that still cannot be written are parked again.
        await self._retry(lambda: self._dead_letters.release_table(planned.name))
        await self._save([ledger])

    async def look_through(
        self, planned: PlannedTable, unread: Collection[int], *, sweep: bool
    ) -> None:
        """Have the leaves of the OIDs ``unread`` copied, and then points without a row looked for
        if ``sweep``; with a copy under way only the latter, after it, since the ledger meets what
        has changed. On record when this returns."""
        ledger = self._ledgers.get(planned.name)
        if ledger is None:
            # Points of rows that were refused, and those without a row that are left as they are,
            # may be older than rows that come now.
            left = self._settings.migration.extra_points == "report"
            sweep = sweep or left or self._dead_letters.has_letters(planned.name)
            ledger = self._open(planned, sweep=sweep, repair=False)
            ledger.take_as_copied(unread)
        elif sweep:
            ledger.want_sweep()
        await self._save([ledger])

    def _open(self, planned: PlannedTable, *, sweep: bool, repair: bool) -> Ledger:
        ledger = self._ledgers[planned.name] = Ledger.new(
            self._settings.pipeline.name,
            planned,
            self._settings.migration.chunk_rows,
            sweep=sweep,
            repair=repair,
        )
        return ledger

    async def restart(self, planned: PlannedTable) -> None:
        """Take nothing of the table as done any more, if a copy is under way. On record when this
        returns."""
        ledger = self._ledgers.get(planned.name)
        if ledger is not None and (ledger.record.leaves or ledger.complete):
            ledger.restart()
            await self._save([ledger])
            log.info("copy_restarted", table=planned.name)

    async def once_more(self, planned: PlannedTable) -> None:
        """Have the copy under way followed by another. On record when this returns."""
        ledger = self._ledgers[planned.name]
        ledger.want_again()
        await self._save([ledger])

    def is_complete(self, table: str) -> bool:
        """Whether nothing of the copy under way is left."""
        return self._ledgers[table].complete

    def is_wanted_again(self, table: str) -> bool:
        """Whether the copy under way is to be followed by another."""
        return self._ledgers[table].record.again

    async def end(self, planned: PlannedTable) -> TableLedger:
        """Forget the ledger of a completed copy, which is returned. Workers end with the last."""
        record = self._ledgers.pop(planned.name).record
        await self._retry(
            lambda: self._sink.state.drop_ledger(self._settings.pipeline.name, planned.name)
        )
        if not self._ledgers:
            await self.close()
        return record

    async def close(self) -> None:
        """Stop the workers."""
        await self._retained.close()
        if self._executor is not None:
            await self._executor.close()
            self._executor = None

    # -- one window

    async def has_room(self, tables: Sequence[str]) -> bool:
        """Whether a window may be opened for the tables, by the WAL that the slot retains; if not,
        the stream is to go on. Raises :class:`SourceError`."""
        return await self._retained.has_room(tables)

    async def window(
        self, tables: Sequence[PlannedTable], holder: SnapshotHolder
    ) -> list[PlannedTable]:
        """Copy what is left of the tables under a snapshot, as far as the window's time goes.

        Returns the tables of which nothing is left. Raises :class:`SourceError` when the snapshot
        or the server is gone; what was finished before stays so. However it ends, nothing is in
        flight any more.
        """
        window = WindowTime(time.monotonic() + self._settings.migration.window_seconds)
        for planned in tables:
            ledger = self._ledgers[planned.name]
            ledger.meet(planned)
            self._tables[planned.plan.oid] = planned
            self._show(planned, ledger)
        ledgers = [self._ledgers[planned.name] for planned in tables]
        await self._save(ledgers)
        self._finished = 0
        log.debug("window_opened", tables=[planned.name for planned in tables])
        watch = self._retained.watch(window, holder)
        try:
            if not await _while_watched(self._copy(tables, holder.snapshot_id, window), watch):
                self._cut_short(ledgers)
        except BaseException:
            # What is finished need not be done again, whatever ended the window.
            await self._save_if_possible(ledgers)
            raise
        finally:
            for planned in tables:
                self._show_chunks(planned, self._ledgers[planned.name])
        await self._save(ledgers)
        return [planned for planned in tables if self._ledgers[planned.name].complete]

    async def _copy(
        self, tables: Sequence[PlannedTable], snapshot: str, window: WindowTime
    ) -> None:
        queue = _Queue(self._tasks(tables, snapshot), window, self._moved)
        if queue.left:
            await self._chunk_executor().copy(queue, self._done)
        await self._save([self._ledgers[planned.name] for planned in tables])
        for planned in tables:
            if self._ledgers[planned.name].copied:
                await self._sweep(planned, snapshot, window)

    def _cut_short(self, ledgers: Sequence[Ledger]) -> None:
        """Chunks in progress were given up. If none was finished, none ever would be, so from now
        on they are smaller."""
        log.warning("window_cut_short", chunks_finished=self._finished)
        if not self._finished:
            for ledger in ledgers:
                ledger.halve_chunks()

    def _chunk_executor(self) -> ChunkExecutor:
        if self._executor is None:
            self._executor = open_executor(self._settings, self._sink)
        return self._executor

    def _tasks(self, tables: Sequence[PlannedTable], snapshot: str) -> list[CopyTask]:
        migration = self._settings.migration
        return [
            CopyTask(
                source=self._settings.source,
                qdrant=self._settings.qdrant,
                snapshot=snapshot,
                plan=planned.plan,
                row_filter=planned.selection,
                chunk=chunk,
                batch_rows=migration.batch_size,
                batch_delay_seconds=migration.batch_delay / 1000,
                repair=self._ledgers[planned.name].record.repair,
            )
            for planned in tables
            for chunk in self._ledgers[planned.name].left(planned)
        ]

    async def _done(self, result: ChunkResult) -> None:
        chunk = result.chunk
        planned = self._tables[chunk.table_oid]
        if result.refused:
            # Durable before the chunk is.
            await self._retry(
                lambda: self._dead_letters.park(
                    planned.name, result.refused, lsn=0, commit_time=0.0
                )
            )
            await self._retry(self._dead_letters.check_limit)
        ledger = self._ledgers[planned.name]
        ledger.finish(chunk, result.rows, result.bytes)
        self._finished += 1
        log.debug(
            "chunk_copied",
            table=planned.name,
            leaf=f"{chunk.leaf.schema}.{chunk.leaf.name}",
            leaf_oid=chunk.leaf.oid,
            start=chunk.start_block,
            end=chunk.end_block,
            rows=result.rows,
        )
        self._count(planned, ledger, result)
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            await self._save(list(self._ledgers.values()))

    async def _save_if_possible(self, ledgers: Sequence[Ledger]) -> None:
        """Try once, and not for long: the slot's connection may be waiting to be closed, since
        Qdrant is away."""
        try:
            async with asyncio.timeout(_LAST_SAVE_SECONDS):
                await self._save(ledgers, _once)
        except (CdcSyncError, TimeoutError) as error:
            # Chunks that are not on record are copied again.
            log.info("ledger_not_saved", error=str(error))

    async def _save(self, ledgers: Sequence[Ledger], retry: Retry | None = None) -> None:
        """Put ledgers on record, once their chunks are safe from a power loss."""
        changed = [ledger for ledger in ledgers if ledger.dirty]
        if not changed:
            return
        retry = self._retry if retry is None else retry
        await retry(self._sink.make_durable)
        for ledger in changed:
            record = ledger.record
            ledger.dirty = False
            try:
                await retry(lambda r=record: self._sink.state.save_ledger(r))  # type: ignore[misc]
            except BaseException:
                ledger.dirty = True
                raise
            log.debug(
                "ledger_saved",
                table=record.table,
                leaves={str(leaf.oid): leaf.done for leaf in record.leaves},
            )
        self._saved = time.monotonic()

    def _show(self, planned: PlannedTable, ledger: Ledger) -> None:
        table = self._metrics.add_table(planned.name)
        estimate = sum(max(0.0, leaf.estimated_rows) for leaf in planned.table.leaves)
        table.snapshot_rows_estimated.set(estimate)
        self._show_chunks(planned, ledger)
        self._board.table(planned.name).update(
            state="copying", rows_copied=ledger.record.rows, bytes_copied=ledger.record.bytes
        )

    def _show_chunks(self, planned: PlannedTable, ledger: Ledger) -> None:
        """While none is in progress."""
        chunks = self._metrics.add_table(planned.name).snapshot_chunks
        total, done = ledger.chunks_total, ledger.chunks_done
        chunks["pending"].set(total - done)
        chunks["running"].set(0)
        chunks["done"].set(done)

    def _moved(self, task: CopyTask, chunks: int) -> None:
        """A chunk is being copied from here on, or (-1) is not after all."""
        states = self._metrics.add_table(self._tables[task.chunk.table_oid].name).snapshot_chunks
        states["pending"].dec(chunks)
        states["running"].inc(chunks)

    def _count(self, planned: PlannedTable, ledger: Ledger, result: ChunkResult) -> None:
        table = self._metrics.add_table(planned.name)
        table.snapshot_rows.inc(result.rows)
        table.snapshot_bytes.inc(result.bytes)
        table.values_nulled.inc(result.nulled)
        table.snapshot_chunks["running"].dec()
        table.snapshot_chunks["done"].inc()
        self._metrics.snapshot_chunk_duration_seconds.observe(result.seconds)
        for kind, retries in result.retries.items():
            self._metrics.sink_retries[kind].inc(retries)
        board = self._board.table(planned.name)
        board.update(rows_copied=ledger.record.rows, bytes_copied=ledger.record.bytes)
        board.add(retries=sum(result.retries.values()))

    # -- points without a row

    async def _sweep(self, planned: PlannedTable, snapshot: str, window: WindowTime) -> None:
        """Look for points that have no row in the snapshot, and remove them.

        Exact for the same reason as the copy: whatever was applied is visible in the snapshot, and
        rows that came later come by the stream (R72, design 5.6).
        """
        ledger = self._ledgers[planned.name]
        if not ledger.record.sweep or ledger.complete:
            return
        plan = planned.plan
        writer = self._sink.writer(plan)
        queries = [key_query(plan, leaf, planned.selection) for leaf in planned.table.leaves]
        if ledger.record.buckets == 0:
            ledger.divide(await self._retry(writer.count))
        connection = await opening(
            connect, self._settings.source, application_name="cdc_sync copy", autocommit=False
        )
        try:
            await asyncio.to_thread(import_snapshot, connection, snapshot)
            await asyncio.to_thread(set_lock_timeout, connection, LOCK_SECONDS)
            while not ledger.complete:
                part, parts = ledger.record.swept, ledger.record.buckets
                orphans = await self._retry(
                    lambda p=part, n=parts: sweep(connection, writer, plan, queries, p, n)  # type: ignore[misc]
                )
                await self._remove(planned, orphans)
                ledger.finish_sweep(len(orphans))
                self._metrics.add_table(planned.name).sweep_parts.inc()
                await self._save([ledger])
                if window.over:
                    return
        finally:
            connection.close()

    async def _remove(self, planned: PlannedTable, orphans: Sequence[PointId]) -> None:
        if not orphans:
            return
        report_only = self._settings.migration.extra_points == "report"
        log.warning(
            "points_without_row", table=planned.name, points=len(orphans), removed=not report_only
        )
        self._metrics.add_table(planned.name).orphans.inc(len(orphans))
        if report_only:
            return
        writer = self._sink.writer(planned.plan)
        for start in range(0, len(orphans), _REMOVE_POINTS):
            changes = Changes(deletes=list(orphans[start : start + _REMOVE_POINTS]))
            await self._retry(lambda c=changes: writer.apply(c))  # type: ignore[misc]


async def _once(operation: Callable[[], Awaitable[T]]) -> T:
    return await operation()


async def _while_watched(work: Awaitable[None], watch: Awaitable[None]) -> bool:
    """Do the work as long as the watch goes on; neither does when this returns. Returns whether the
    work was done: not if the watch wants it cut short. Raises what either raises."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
    if not working.cancelled():
        working.result()
        return True
    try:
        watching.result()
    except WindowCutError:
        pass
    return False


class _Queue:
    """The chunks left in a window; none any more once its time is up.

    There is always one, so that every window gets further.
    """

    def __init__(
        self,
        tasks: Iterable[CopyTask],
        window: WindowTime,
        moved: Callable[[CopyTask, int], None],
    ) -> None:
        self._tasks = deque(tasks)
        self._window = window
        self._moved = moved
        self._given = False

    @property
    def left(self) -> int:
        """Number of chunks nobody has taken."""
        return len(self._tasks)

    def next(self) -> CopyTask | None:
        """Take a chunk."""
        if not self._tasks or (self._given and self._window.over):
            return None
        self._given = True
        task = self._tasks.popleft()
        self._moved(task, 1)
        return task

    def put_back(self, task: CopyTask) -> None:
        """Give back a chunk that was lost with its worker."""
        self._moved(task, -1)
        self._tasks.appendleft(task)
