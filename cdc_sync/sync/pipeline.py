"""The pipeline: from a configuration to a stream that goes on, through every restart of either
side.

    starting ──▶ (standby) ──▶ snapshotting ──▶ streaming ──▶ draining
                    ▲               │   ▲         │   ▲
                    └─ slot in use  └───┘         └───┘ connection lost

While it is snapshotting, windows of the copy and the stream take turns. The replay position lives
in the replication slot alone. Beside the data we keep which slot on which cluster filled the
collections, by which plan, which tables have been copied, and of the others how far they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cdc_sync import __version__
from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ErrorKind, SinkError, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics, State
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.exclusive import lock_pipeline, wait_for_window
from cdc_sync.postgres.preflight import preflight_source
from cdc_sync.postgres.slot import read_slot
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import PipelineState, Sink
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.control import ControlChannel
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.first_copy import CopyAbandonedError, FirstCopy, added_tables
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.monitor import SourceMonitor
from cdc_sync.sync.planning import PipelinePlan, plan_pipeline, without_new_vectors
from cdc_sync.sync.reading import RowReader
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.requests import RequestMetrics
from cdc_sync.sync.resync import RecentTransactions, Resync
from cdc_sync.sync.retry import is_sink_trouble, is_transient, retrying
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.stream import LetGoError, Positions, StreamSession
from cdc_sync.sync.table_records import TableRecords
from cdc_sync.sync.taking_slot import confirmed_position, server_position, start_stream

log = get_logger(__name__)

T = TypeVar("T")

#: Batches in memory at the most: one being written, one sealed, one being gathered.
_BUFFERED_BATCHES = 3
#: A session that ends sooner is a failed try.
_SHORT_SESSION_SECONDS = 10.0
#: How long Postgres may say nothing where wal_sender_timeout does not say it.
_SILENCE_SECONDS = 120.0
#: Between two questions to Qdrant.
_SINK_LOOK_SECONDS = 2.0


class Pipeline:
    """One slot, one publication, some tables. :meth:`run` is called once."""

    def __init__(
        self,
        settings: Settings,
        *,
        metrics: Metrics | None = None,
        board: StatusBoard | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics if metrics is not None else Metrics()
        self.board = (
            board
            if board is not None
            else StatusBoard(
                settings.pipeline.name,
                slot=settings.source.slot,
                publication=settings.source.publication,
                metrics=self.metrics,
            )
        )
        self.positions = Positions()
        self._sink: Sink | None = None
        self._plan: PipelinePlan | None = None
        self._relations: Relations | None = None
        self._dead_letters: DeadLetterOffice | None = None
        self._backfill: Backfill | None = None
        self._resync: Resync | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._reader = RowReader(settings.source, self._recent)
        self._once = False
        self._goal: int | None = None

    @property
    def sink(self) -> Sink:
        """The sink, once :meth:`run` has opened it."""
        assert self._sink is not None, "the pipeline has not opened its sink yet"
        return self._sink

    @property
    def tables(self) -> tuple[PlannedTable, ...]:
        """The planned tables, once :meth:`run` has read the catalog."""
        assert self._plan is not None, "the pipeline has not planned its tables yet"
        return self._plan.tables

    async def run(self, stop: asyncio.Event, *, restart: bool = False, once: bool = False) -> None:
        """Run until ``stop`` is set; then finish the batch in flight, confirm it, and return.

        ``restart`` forgets what was copied and copies again. ``once``: return by itself when every
        table is copied and all that was committed by then is applied. Raises
        :class:`CdcSyncError` for what does not get better by trying again. Cancel it to stop
        without a grace period; that is safe too.
        """
        self._stop = stop
        self._once = once
        self._state("starting")
        try:
            work = asyncio.create_task(self._run(restart))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._state("draining")
                try:
                    await asyncio.wait_for(work, self.settings.pipeline.shutdown_timeout_seconds)
                except TimeoutError:
                    # Safe: what is not confirmed is sent again.
                    log.warning(
                        "drain_abandoned", seconds=self.settings.pipeline.shutdown_timeout_seconds
                    )
            else:
                stopping.cancel()
                work.result()
        except BaseException:
            self._state("failed")
            raise
        finally:
            work.cancel()
            stopping.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            self._reader.close()
            if self._backfill is not None:
                await self._backfill.close()
            if self._sink is not None:
                await self._sink.close()

    async def _run(self, restart: bool) -> None:
        try:
            await self._live(restart)
        except _StoppedError:
            log.info("stopped_while_waiting")

    async def _live(self, restart: bool) -> None:
        watching = asyncio.create_task(self._watch_sink())
        try:
            if await self._interruptible(self._prepare(restart)):
                await self._stream_on()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _prepare(self, restart: bool) -> None:
        """All that comes before the stream: connections, the plan, and the first copy if there must
        be one."""
        budget = self.settings.pipeline.startup_timeout_seconds
        self._sink = await self._until(self._open_sink, budget)
        self.board.set_sink(True)
        self.board.set_versions(qdrant=self.sink.version)
        plan = self._plan = await self._until(self._make_plan, budget)
        self.board.set_source(True)
        self._announce(plan)
        self._dead_letters = DeadLetterOffice(
            self.sink.state,
            self.settings.pipeline.name,
            self.settings.pipeline.dead_letter_limit,
            self.metrics,
            self.board,
        )
        self._backfill = Backfill(
            self.settings,
            self.sink,
            self.metrics,
            self.board,
            self._dead_letters,
            lambda operation: self._until(operation, retry=is_sink_trouble),
        )
        while not await self._copy_under_lock(restart):
            # What was asked for is on record as unfinished; another process may finish it now.
            restart = False

    async def _copy_under_lock(self, restart: bool) -> bool:
        """Begin the first copy if there must be one; returns False if it has to be done again.

        The lock goes with the connection that holds it, so a copy that lost its connections is not
        done again under the same lock.
        """
        lock = await self._until(lambda: self._in_thread(lock_pipeline, self.settings.source))
        try:
            # Another process may have held the lock and changed everything meanwhile.
            # Tables may have been rewritten too, before their copy began (R54).
            await self._copy_if_needed(await self._until(self._make_plan), restart)
            return True
        except CopyAbandonedError as abandoned:
            log.warning("copy_abandoned", reason=str(abandoned))
            return False
        finally:
            await self._in_thread(lock.close)

    async def _copy_if_needed(self, plan: PipelinePlan, restart: bool) -> None:
        state = await self._until(lambda: self.sink.state.load(self.settings.pipeline.name))
        copy = self._assemble(plan)
        if await copy.is_needed(plan, state, restart):
            self._state("snapshotting")
            lsn = await copy.run(plan, state, restart=restart)
            self.positions.applied = self.positions.confirmed = lsn
            return
        assert state is not None
        added = added_tables(plan, state)
        if added:
            await copy.add(added, plan)
        self._adopt(plan, state)
        for planned in self.tables:
            await self._until(lambda p=planned: self.sink.inspect(p.plan))  # type: ignore[misc]

    def _adopt(self, plan: PipelinePlan, state: PipelineState) -> None:
        """Go on with the collections as they were made."""
        vectors = {table.table: table.vectors for table in state.tables}
        tables = tuple(
            without_new_vectors(p, vectors[p.name]) if p.name in vectors else p for p in plan.tables
        )
        for before, now in zip(plan.tables, tables, strict=True):
            for warning in now.warnings[len(before.warnings) :]:
                log.warning("plan_warning", table=now.name, warning=warning)
        self._assemble(dataclasses.replace(plan, tables=tables))

    def _assemble(self, plan: PipelinePlan) -> FirstCopy:
        """Take the plan into force."""
        assert self._dead_letters is not None
        assert self._backfill is not None
        self._plan = plan
        self._relations = Relations(plan.tables, self.settings, self.metrics)
        self._resync = Resync(
            self.settings,
            self.sink,
            self._relations,
            self.metrics,
            self.board,
            self._backfill,
            lambda operation: self._until(operation, retry=is_sink_trouble),
        )
        return FirstCopy(
            self.settings,
            self.sink,
            self._dead_letters,
            self._backfill,
            self._resync,
            self._until,
        )

    # -- preparation

    async def _open_sink(self) -> Sink:
        sink = await open_sink(self.settings.qdrant, RequestMetrics(self.metrics))
        try:
            await sink.ping()
        except BaseException:
            await sink.close()
            raise
        return sink

    async def _make_plan(self) -> PipelinePlan:
        state = await self.sink.state.load(self.settings.pipeline.name)
        owned = state is not None and state.owns_publication
        try:
            return await self._in_thread(self._read_plan, owned)
        except SourceError as error:
            if error.kind is ErrorKind.PUBLICATION_UNUSABLE and state is not None:
                # Changes made until it is mended are not sent.
                await TableRecords(self.sink.state, state.pipeline).all_stale()
            raise

    def _read_plan(self, owned: bool) -> PipelinePlan:
        with connect(self.settings.source) as connection:
            plan = plan_pipeline(connection, self.settings, owned=owned)
            preflight_source(
                connection,
                self.settings.source,
                tables=[planned.table for planned in plan.tables],
                slot_exists=read_slot(connection, self.settings.source.slot) is not None,
                publication=plan.publication,
                wanted=plan.published_columns,
                row_filters=plan.row_filters,
            )
            return plan

    def _announce(self, plan: PipelinePlan) -> None:
        source = self.settings.source
        self.metrics.set_pipeline(
            slot=source.slot,
            publication=source.publication,
            database=plan.server.database,
            protocol=1,
        )
        self.metrics.buffer_limit_bytes.set(_BUFFERED_BATCHES * self.settings.pipeline.batch_bytes)
        self.board.set_versions(postgres=str(plan.server.version_num))
        for planned in plan.tables:
            self.metrics.add_table(planned.name)
            self.board.table(planned.name).update(
                collection=planned.plan.collection,
                state="pending",
                rows_estimated=_estimated_rows(planned),
            )
            for warning in planned.warnings:
                log.warning("plan_warning", table=planned.name, warning=warning)
        log.info(
            "pipeline_planned",
            version=__version__,
            tables=len(plan.tables),
            slot=source.slot,
            publication=source.publication,
            server_version=plan.server.version_num,
        )

    # -- streaming

    async def _stream_on(self) -> None:
        """Stream, and connect again whenever the connection is lost."""
        assert self._dead_letters is not None
        assert self._relations is not None
        assert self._plan is not None
        assert self._resync is not None
        plan, relations, resync = self._plan, self._relations, self._resync
        applier = Applier(
            self.sink,
            self._reader.fetch,
            self._dead_letters,
            self.metrics,
            self._on_stall,
            resync,
            self._reader.reread,
        )
        control = ControlChannel(
            self.settings.pipeline.name, lambda: relations.tables, self.metrics
        )
        monitor = SourceMonitor(
            self.settings,
            self.metrics,
            self.board,
            self.positions,
            self._relations,
            plan.server,
            resync.observe,
        )
        await self._until(lambda: self._in_thread(resync.open))
        watching = self._watching = asyncio.create_task(self._watch(monitor))
        try:
            while not self._stop.is_set():
                await self._until(lambda: self._session(applier, control))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, monitor: SourceMonitor) -> None:
        """Watch the source. What it finds may mean that changes were not sent, so that is put on
        record before the pipeline ends: the tables are read again at the next start."""
        assert self._resync is not None
        resync = self._resync
        try:
            await monitor.run()
        except SourceError:
            for planned in self.tables:
                await self._until(lambda p=planned: resync.outdated(p))  # type: ignore[misc]
            raise

    async def _session(self, applier: Applier, control: ControlChannel) -> None:
        if self._stop.is_set():
            return
        assert self._relations is not None
        assert self._resync is not None
        assert self._dead_letters is not None
        assert self._plan is not None
        connection = await self._in_thread(
            start_stream, self.settings.source, self._plan, self.tables, self.positions.applied
        )
        try:
            self._resync.walsender = connection.backend_pid
            # Workers of whoever had the slot before may still write.
            await self._in_thread(wait_for_window, self.settings.source)
            # It may have parked rows and applied transactions.
            self.positions.go_back(await self._in_thread(confirmed_position, self.settings.source))
            await self._dead_letters.open()
            await self._in_thread(self._resync.open)
            await self._resync.compare()
            timeout = connection.wal_sender_timeout_seconds
            gatherer = Gatherer(
                self._relations.route,
                batch_rows=self.settings.pipeline.batch_rows,
                batch_bytes=self.settings.pipeline.batch_bytes,
                applied=self.positions.applied,
                on_type=self._relations.forget_type,
                on_message=control.accept,
            )
            session = StreamSession(
                connection=connection,
                gatherer=gatherer,
                applier=applier,
                positions=self.positions,
                metrics=self.metrics,
                make_durable=self.sink.make_durable,
                stop=self._stop,
                status_seconds=min(
                    timeout / 3 or 10.0, self.settings.pipeline.status_interval_seconds
                ),
                board=self.board,
                between=self._between,
                let_go_seconds=self.settings.pipeline.let_go_seconds,
                silence_seconds=2 * timeout or _SILENCE_SECONDS,
            )
            log.info(
                "streaming_started",
                slot=self.settings.source.slot,
                applied=str(Lsn(self.positions.applied)),
            )
            self._show_tables()
            self.board.set_source(True)
            await self._run_session(session)
            await self._in_thread(connection.stop)
        finally:
            connection.close()

    async def _run_session(self, session: StreamSession) -> None:
        """Run until it ends. A connection lost after a while is no failed try: the next session
        starts with the first backoff."""
        started = time.monotonic()
        try:
            await session.run()
        except LetGoError as error:
            log.warning("slot_let_go", reason=error.message)
            session.connection.close()
            await self._until(self.sink.ping)
        except SourceError as error:
            if not is_transient(error) or time.monotonic() - started < _SHORT_SESSION_SECONDS:
                raise
            self._on_stall(error, 0.0)

    async def _between(self, batch: Batch | None) -> None:
        """With the applier at rest: keep book, and read stale tables again."""
        assert self._relations is not None
        assert self._resync is not None
        if self._watching is not None and self._watching.done():
            self._watching.result()
        if batch is not None:
            self._keep_book(batch)
        if self._relations.stale or self._relations.unswept:
            copying = self._resync.copying
            await self._resync.run(self.positions.applied)
            if copying and not self._resync.copying:
                log.info("copy_completed", tables=len(self.tables))
                self._state("streaming")
        elif self._once:
            await self._end_when_caught_up()

    async def _end_when_caught_up(self) -> None:
        """Stop once the stream has passed the position at which nothing was left to copy."""
        if self._goal is None:
            self._goal = await self._in_thread(server_position, self.settings.source)
        if self.positions.applied >= self._goal:
            self._stop.set()

    def _recent(self) -> RecentTransactions:
        assert self._resync is not None
        assert self._resync.recent is not None, "no session has begun yet"
        return self._resync.recent

    def _show_tables(self) -> None:
        assert self._relations is not None
        assert self._resync is not None
        for planned in self.tables:
            copying = planned.plan.oid in self._relations.stale
            self.board.table(planned.name).update(state="copying" if copying else "streaming")
        self._state("snapshotting" if self._resync.copying else "streaming")

    def _keep_book(self, batch: Batch) -> None:
        assert self._relations is not None
        assert self._resync is not None
        assert self._resync.recent is not None
        for xid in batch.xids:
            self._resync.recent.add(xid)
        for oid, table in batch.tables.items():
            self.board.table(batch.bindings[oid].planned.name).add(changes_applied=len(table))
        self.board.positions(
            received=self.positions.received,
            applied=self.positions.applied,
            acknowledged=self.positions.confirmed,
            server=self.positions.server_end,
        )
        self.board.set_sink(True)

    # -- trying again

    async def _until(
        self,
        operation: Callable[[], Awaitable[T]],
        budget_seconds: float | None = None,
        retry: Callable[[BaseException], bool] = is_transient,
    ) -> T:
        """Try until it works; raises :class:`_StoppedError` rather than wait when it is to stop."""

        async def sleep(seconds: float) -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
            if self._stop.is_set():
                raise _StoppedError

        started = time.monotonic()
        failed: set[type[CdcSyncError]] = set()

        def on_retry(error: CdcSyncError, seconds: float) -> None:
            if budget_seconds is not None and time.monotonic() - started > budget_seconds:
                raise error
            failed.add(SinkError if isinstance(error, SinkError) else SourceError)
            self._on_stall(error, seconds)

        result = await retrying(operation, on_retry, sleep, retry)
        if SinkError in failed:
            self.board.set_sink(True)
        if SourceError in failed:
            self.board.set_source(True)
        return result

    def _on_stall(self, error: CdcSyncError, seconds: float) -> None:
        if isinstance(error, SinkError):
            self.board.set_sink(False, error.message)
            self.metrics.sink_retries[error.kind].inc()
        elif isinstance(error, SourceError):
            self.metrics.source_reconnects[error.kind].inc()
            if error.kind is ErrorKind.SLOT_ACTIVE:
                self._state("standby")
            else:
                self.board.set_source(False, error.message)
        self.metrics.count_error(error.kind)
        log.warning(
            "retrying", kind=error.kind.value, error=error.message, seconds=round(seconds, 2)
        )

    async def _watch_sink(self) -> None:
        """Ask Qdrant how it is, now and then: while nothing is written, or workers write, nobody
        else would notice."""
        lost = False
        while True:
            await asyncio.sleep(_SINK_LOOK_SECONDS)
            if self._sink is None:
                continue
            try:
                await self._sink.ping()
            except SinkError as error:
                lost = True
                self.board.set_sink(False, error.message)
            else:
                if lost:
                    self.board.set_sink(True)
                lost = False

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.to_thread(function, *arguments)

    async def _interruptible(self, work: Awaitable[None]) -> bool:
        """Run until done or stopped; a copy that is stopped is abandoned (the next start does it
        again)."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False

    def _state(self, state: State) -> None:
        self.board.set_state(state)
        log.info("state", state=state)


def _estimated_rows(planned: PlannedTable) -> int | None:
    estimates = [leaf.estimated_rows for leaf in planned.table.leaves]
    return None if any(e < 0 for e in estimates) else round(sum(estimates))


class _StoppedError(Exception):
    """The pipeline is to stop while it waits for something to come back."""
