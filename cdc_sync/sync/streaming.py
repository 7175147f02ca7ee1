"""Streaming from the slot, session after session, with the windows of copies in between.

standby ──▶ snapshotting ──▶ streaming ──▶ draining
   ▲            │   ▲         │   ▲
   └─ in use    └───┘         └───┘ connection lost
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ErrorKind, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.pgoutput.messages import LogicalMessage
from cdc_sync.postgres.exclusive import wait_for_window
from cdc_sync.postgres.replication import BinaryRefusedError, ReplicationConnection
from cdc_sync.postgres.watch import SourcePosition
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.control import Accepted, ControlChannel, ResyncRows, SwapRequest
from cdc_sync.sync.dead_letter_retries import LetterRetries
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.heartbeat import Heartbeat
from cdc_sync.sync.monitor import SourceMonitor
from cdc_sync.sync.opening import opening
from cdc_sync.sync.planning import PipelinePlan
from cdc_sync.sync.reading import Reread, RowReader
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.resync import Resync
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.sink_watch import LetGoError, SinkWatch
from cdc_sync.sync.source_history import SourceHistory
from cdc_sync.sync.stream import Positions, StreamSession
from cdc_sync.sync.supervision import supervised
from cdc_sync.sync.swaps import Swaps, TablesChangedError
from cdc_sync.sync.taking_slot import confirmed_position, server_position, start_stream
from cdc_sync.sync.task_dump import dump_tasks
from cdc_sync.sync.trials import Trials
from cdc_sync.sync.watchdog import Watchdog

log = get_logger(__name__)

#: A session that ends sooner is a failed try.
_SHORT_SESSION_SECONDS = 10.0
#: How long Postgres may say nothing where wal_sender_timeout does not say it.
_SILENCE_SECONDS = 120.0

#: What a walsender waits for that has nothing to do, or whose consumer does not read.
_IDLE_WAITS = frozenset({"walsendermain", "walsenderwaitforwal", "walsenderwritedata"})


@dataclass(slots=True)
class Streaming:
    """Applies what the slot sends, for as long as the plan is in force. :meth:`run` is called once.

    ``once``: stop the pipeline when every table is copied and all that was committed by then is
    applied.
    """

    settings: Settings
    metrics: Metrics
    board: StatusBoard
    positions: Positions
    sink: Sink
    plan: PipelinePlan
    relations: Relations
    resync: Resync
    dead_letters: DeadLetterOffice
    trials: Trials
    sink_watch: SinkWatch
    history: SourceHistory
    swaps: Swaps
    once: bool = False
    watching: asyncio.Task[None] | None = None
    reader: RowReader = field(init=False)
    retries: LetterRetries = field(init=False)
    heartbeat: Heartbeat = field(init=False)
    _goal: int | None = None
    _in_window: bool = False
    #: The server has met a value that it cannot send in binary format: of a column that is new, or
    #: of a table that is not ours.
    _as_text: bool = False
    _walsender_waits: str = ""

    def __post_init__(self) -> None:
        self.reader = RowReader(self.settings.source, self.resync.applied_lately)
        self.retries = LetterRetries(
            self.dead_letters,
            self.sink,
            lambda: self.relations.tables,
            lambda: self.relations.stale,
            self.settings.pipeline.dead_letter_retry_seconds,
        )

    async def run(self) -> None:
        """Stream until the pipeline is to stop, and connect again whenever the connection is lost.

        Raises :class:`CdcSyncError` for what does not get better by connecting again.
        """
        relations, resync = self.relations, self.resync
        applier = Applier(
            self.sink,
            self.reader.fetch,
            self.dead_letters,
            self.retries,
            self.metrics,
            self.trials.stalled,
            resync,
            self._reread,
        )
        control = ControlChannel(
            self.settings.pipeline.name,
            lambda: relations.tables,
            self.metrics,
            follows=self.swaps.follows,
        )
        monitor = SourceMonitor(
            self.settings,
            self.metrics,
            self.board,
            self.positions,
            self.relations,
            self.plan.server,
            self._observe,
            resync.found,
            resync.is_stopped,
        )
        pipeline = self.settings.pipeline
        self.heartbeat = Heartbeat(self.settings.source, pipeline.heartbeat_seconds, self.metrics)
        watchdog = Watchdog(
            self.board, self.positions, self._is_busy, dump_tasks, pipeline.stuck_seconds
        )
        resync.on_taken = lambda: self.history.compare(relations)
        await self.trials.until(lambda: asyncio.to_thread(resync.open))
        watching = self.watching = asyncio.create_task(self._watch(monitor))
        beside = [
            supervised(self.heartbeat.run(), "heartbeat", self.board),
            supervised(watchdog.run(), "watchdog", self.board, vital=True),
        ]
        try:
            while not self.trials.stop.is_set():
                await self.trials.until(lambda: self._session(applier, control))
        finally:
            for task in (watching, *beside):
                task.cancel()
            await asyncio.gather(watching, *beside, return_exceptions=True)
            self.board.stuck(None)
            self.reader.close()

    def _is_busy(self) -> bool:
        """Whether something goes on that moves no position: a window, a rebuild that is awaited, or
        work of the walsender."""
        return self._in_window or self._walsender_waits not in _IDLE_WAITS

    def _accept(self, control: ControlChannel, message: LogicalMessage) -> Accepted | None:
        return None if self.heartbeat.arrived(message) else control.accept(message)

    async def _reread(self, request: ResyncRows, xids: Collection[int]) -> Reread | None:
        # A place in the stream, which asks for no rows: it is met with the applier at rest.
        if isinstance(request, SwapRequest):
            return None
        return await self.reader.reread(request, xids)

    def _observe(self, position: SourcePosition, definitions: dict[int, str]) -> None:
        self._walsender_waits = (position.waiting or "").lower()
        self.history.observe(position)
        self.resync.observe(position, definitions)

    async def _watch(self, monitor: SourceMonitor) -> None:
        """Watch the source. A publication that was dropped means that changes were not sent, which
        is put on record before the pipeline ends: the tables are read again at the next start."""
        resync = self.resync
        try:
            await monitor.run()
        except SourceError as error:
            # Not a password that was changed, say.
            if error.kind is ErrorKind.PUBLICATION_UNUSABLE:
                for planned in self.relations.tables:
                    await self.trials.until(lambda p=planned: resync.outdated(p))  # type: ignore[misc]
            raise

    async def _session(self, applier: Applier, control: ControlChannel) -> None:
        if self.trials.stop.is_set():
            return
        source = self.settings.source
        # Another process may have had the slot meanwhile, and have put a mark.
        mark = await self.history.load()
        taken = await opening(
            start_stream,
            source,
            self.plan,
            self.relations.tables,
            mark,
            self.positions.applied,
            text=self._as_text,
        )
        connection = taken.connection
        self._guard(connection)
        try:
            self.resync.walsender = connection.backend_pid
            self.history.taken(taken.timeline)
            # Workers of whoever had the slot before may still write.
            await asyncio.to_thread(wait_for_window, source)
            # It may have parked rows and applied transactions.
            self.positions.go_back(await asyncio.to_thread(confirmed_position, source))
            await self.dead_letters.open()
            await self.swaps.compare()
            # The publication before the horizon: what was not sent until then is below that.
            await self.history.compare(self.relations)
            await asyncio.to_thread(self.resync.open)
            await self.resync.compare(self.positions.applied)
            session = self._stream_session(connection, applier, control)
            log.info(
                "streaming_started",
                slot=self.settings.source.slot,
                applied=str(Lsn(self.positions.applied)),
            )
            self._show_tables()
            self.board.set_source(True)
            try:
                await self._run_session(session)
            except BinaryRefusedError as error:
                log.info("stream_becomes_text", reason=error.message)
                self._as_text = True
                return
            except SourceError:
                raise
            except (CdcSyncError, TablesChangedError):
                # What was confirmed last has to arrive, since the stream begins there again; it is
                # lost with a connection that is closed while something is left to be read.
                await asyncio.to_thread(connection.stop)
                raise
            await asyncio.to_thread(connection.stop)
        finally:
            self.resync.let_go()
            self._guard(None)
            connection.close()

    def _guard(self, connection: ReplicationConnection | None) -> None:
        """Nothing is written once the slot may be another's, however late that would be noticed: a
        process may have been stopped meanwhile, or nobody reads since enough waits to be
        written."""
        if isinstance(self.sink, ServerSink):
            self.sink.guard(None if connection is None else connection.check)

    def _stream_session(
        self, connection: ReplicationConnection, applier: Applier, control: ControlChannel
    ) -> StreamSession:
        pipeline, relations = self.settings.pipeline, self.relations
        timeout = connection.wal_sender_timeout_seconds
        gatherer = Gatherer(
            relations.route,
            batch_rows=pipeline.batch_rows,
            batch_bytes=pipeline.batch_bytes,
            applied=self.positions.applied,
            on_type=relations.forget_type,
            on_message=lambda message: self._accept(control, message),
            generation=lambda: relations.generation,
        )
        return StreamSession(
            connection=connection,
            gatherer=gatherer,
            applier=applier,
            positions=self.positions,
            metrics=self.metrics,
            make_durable=self.sink.make_durable,
            stop=self.trials.stop,
            status_seconds=min(timeout / 3 or 10.0, pipeline.status_interval_seconds),
            board=self.board,
            between=self._between,
            let_go_seconds=pipeline.let_go_seconds,
            silence_seconds=2 * timeout or _SILENCE_SECONDS,
            sink_away=lambda: self.sink_watch.away_seconds,
        )

    async def _run_session(self, session: StreamSession) -> None:
        """Run until it ends. A connection lost after a while is no failed try: the next session
        starts with the first backoff."""
        started = time.monotonic()
        try:
            await session.run()
        except LetGoError as error:
            log.warning("slot_let_go", reason=error.message)
            session.connection.close()
            await self.trials.until(self.sink.ping)
            self.sink_watch.answered()
        except SourceError as error:
            if not is_transient(error) or time.monotonic() - started < _SHORT_SESSION_SECONDS:
                raise
            self.trials.stalled(error, 0.0)

    async def _between(self, batch: Batch | None) -> Batch | None:
        """With the applier at rest: keep book, read stale tables again, and return dead letters to
        be tried again."""
        if self.watching is not None and self.watching.done():
            self.watching.result()
        if batch is not None:
            self._keep_book(batch)
            await self._meet_requests(batch)
        self.heartbeat.applied(self.positions.applied)
        if self.history.due:
            keep = self.history.keep
            received = self.positions.received
            await self.trials.until_sink(lambda: keep(self.relations, received))
            await self.trials.until_sink(self.resync.keep)
        reading = self.resync.wanted
        if reading:
            copying = self.resync.copying
            self._in_window = True
            try:
                await self.resync.run(self.positions.applied)
            finally:
                self._in_window = False
            if copying and not self.resync.copying:
                log.info("copy_completed", tables=len(self.relations.tables))
                self.trials.state("streaming")
        letters = await self.retries.next(self.positions.applied)
        if self.once and not reading and letters is None:
            await self._end_when_caught_up()
        return letters

    async def _meet_requests(self, batch: Batch) -> None:
        """Where a table may go over to a rebuilt collection, decide about it."""
        for request in batch.rereads:
            if not isinstance(request, SwapRequest):
                continue
            if self.swaps.follows is not None:
                # What was not sent must not be missing in a collection that is taken.
                await self.history.compare(self.relations)
            settled = not self.resync.wanted
            self._in_window = True
            try:
                await self.trials.until_sink(
                    lambda r=request, s=settled: self.swaps.meet(r, batch.last_lsn, settled=s)  # type: ignore[misc]
                )
            finally:
                self._in_window = False

    async def _end_when_caught_up(self) -> None:
        """Stop once the stream has passed the position at which nothing was left to copy."""
        if self._goal is None:
            self._goal = await asyncio.to_thread(server_position, self.settings.source)
        if self.positions.applied >= self._goal:
            self.trials.stop.set()

    def _show_tables(self) -> None:
        for planned in self.relations.tables:
            copying = planned.plan.oid in self.relations.stale
            if not self.resync.is_stopped(planned.name):
                self.board.table(planned.name).update(
                    state="copying" if copying else "streaming", error=None, remedy=None
                )
        self.trials.state("snapshotting" if self.resync.copying else "streaming")

    def _keep_book(self, batch: Batch) -> None:
        recent = self.resync.applied_lately()
        for xid in batch.xids:
            recent.add(xid)
            self.history.applied(xid)
        for oid, table in batch.tables.items():
            name = batch.bindings[oid].planned.name
            if not self.resync.is_stopped(name):
                self.board.table(name).add(changes_applied=len(table))
        self.board.positions(
            received=self.positions.received,
            applied=self.positions.applied,
            acknowledged=self.positions.confirmed,
            server=self.positions.server_end,
        )
        self.board.set_sink(True)
