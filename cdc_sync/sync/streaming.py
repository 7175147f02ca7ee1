"""Streaming from the slot, session after session, with the windows of copies in between.

standby ──▶ snapshotting ──▶ streaming ──▶ draining
   ▲            │   ▲         │   ▲
   └─ in use    └───┘         └───┘ connection lost
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TypeVar

from cdc_sync.config import Settings
from cdc_sync.errors import SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.exclusive import wait_for_window
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.control import ControlChannel
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.monitor import SourceMonitor
from cdc_sync.sync.planning import PipelinePlan
from cdc_sync.sync.reading import RowReader
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.resync import Resync
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.sink_watch import LetGoError, SinkWatch
from cdc_sync.sync.stream import Positions, StreamSession
from cdc_sync.sync.taking_slot import confirmed_position, server_position, start_stream
from cdc_sync.sync.trials import Trials

log = get_logger(__name__)

T = TypeVar("T")

#: A session that ends sooner is a failed try.
_SHORT_SESSION_SECONDS = 10.0
#: How long Postgres may say nothing where wal_sender_timeout does not say it.
_SILENCE_SECONDS = 120.0


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
    once: bool = False
    watching: asyncio.Task[None] | None = None
    reader: RowReader = field(init=False)
    _goal: int | None = None

    def __post_init__(self) -> None:
        self.reader = RowReader(self.settings.source, self.resync.applied_lately)

    async def run(self) -> None:
        """Stream until the pipeline is to stop, and connect again whenever the connection is lost.

        Raises :class:`CdcSyncError` for what does not get better by connecting again.
        """
        relations, resync = self.relations, self.resync
        applier = Applier(
            self.sink,
            self.reader.fetch,
            self.dead_letters,
            self.metrics,
            self.trials.stalled,
            resync,
            self.reader.reread,
        )
        control = ControlChannel(
            self.settings.pipeline.name, lambda: relations.tables, self.metrics
        )
        monitor = SourceMonitor(
            self.settings,
            self.metrics,
            self.board,
            self.positions,
            self.relations,
            self.plan.server,
            resync.observe,
        )
        await self.trials.until(lambda: asyncio.to_thread(resync.open))
        watching = self.watching = asyncio.create_task(self._watch(monitor))
        try:
            while not self.trials.stop.is_set():
                await self.trials.until(lambda: self._session(applier, control))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self.reader.close()

    async def _watch(self, monitor: SourceMonitor) -> None:
        """Watch the source. What it finds may mean that changes were not sent, so that is put on
        record before the pipeline ends: the tables are read again at the next start."""
        resync = self.resync
        try:
            await monitor.run()
        except SourceError:
            for planned in self.relations.tables:
                await self.trials.until(lambda p=planned: resync.outdated(p))  # type: ignore[misc]
            raise

    async def _session(self, applier: Applier, control: ControlChannel) -> None:
        if self.trials.stop.is_set():
            return
        source = self.settings.source
        connection = await asyncio.to_thread(
            start_stream,
            self.settings.source,
            self.plan,
            self.relations.tables,
            self.positions.applied,
        )
        try:
            self.resync.walsender = connection.backend_pid
            # Workers of whoever had the slot before may still write.
            await asyncio.to_thread(wait_for_window, source)
            # It may have parked rows and applied transactions.
            self.positions.go_back(await asyncio.to_thread(confirmed_position, source))
            await self.dead_letters.open()
            await asyncio.to_thread(self.resync.open)
            await self.resync.compare()
            timeout = connection.wal_sender_timeout_seconds
            gatherer = Gatherer(
                self.relations.route,
                batch_rows=self.settings.pipeline.batch_rows,
                batch_bytes=self.settings.pipeline.batch_bytes,
                applied=self.positions.applied,
                on_type=self.relations.forget_type,
                on_message=control.accept,
            )
            session = StreamSession(
                connection=connection,
                gatherer=gatherer,
                applier=applier,
                positions=self.positions,
                metrics=self.metrics,
                make_durable=self.sink.make_durable,
                stop=self.trials.stop,
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
            await asyncio.to_thread(connection.stop)
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
            await self.trials.until(self.sink.ping)
        except SourceError as error:
            if not is_transient(error) or time.monotonic() - started < _SHORT_SESSION_SECONDS:
                raise
            self.trials.stalled(error, 0.0)

    async def _between(self, batch: Batch | None) -> None:
        """With the applier at rest: keep book, and read stale tables again."""
        if self.watching is not None and self.watching.done():
            self.watching.result()
        if batch is not None:
            self._keep_book(batch)
        if self.relations.stale or self.relations.unswept:
            copying = self.resync.copying
            await self.sink_watch.unless_away(
                self.resync.run(self.positions.applied), self.settings.pipeline.let_go_seconds
            )
            if copying and not self.resync.copying:
                log.info("copy_completed", tables=len(self.relations.tables))
                self.trials.state("streaming")
        elif self.once:
            await self._end_when_caught_up()

    async def _end_when_caught_up(self) -> None:
        """Stop once the stream has passed the position at which nothing was left to copy."""
        if self._goal is None:
            self._goal = await asyncio.to_thread(server_position, self.settings.source)
        if self.positions.applied >= self._goal:
            self.trials.stop.set()

    def _show_tables(self) -> None:
        for planned in self.relations.tables:
            copying = planned.plan.oid in self.relations.stale
            self.board.table(planned.name).update(state="copying" if copying else "streaming")
        self.trials.state("snapshotting" if self.resync.copying else "streaming")

    def _keep_book(self, batch: Batch) -> None:
        recent = self.resync.applied_lately()
        for xid in batch.xids:
            recent.add(xid)
        for oid, table in batch.tables.items():
            self.board.table(batch.bindings[oid].planned.name).add(changes_applied=len(table))
        self.board.positions(
            received=self.positions.received,
            applied=self.positions.applied,
            acknowledged=self.positions.confirmed,
            server=self.positions.server_end,
        )
        self.board.set_sink(True)
