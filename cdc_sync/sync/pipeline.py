"""The pipeline: from a configuration to a stream that goes on, through every restart of either side.

    starting ──▶ (standby) ──▶ snapshotting ──▶ catching_up ──▶ streaming ──▶ draining
                    ▲                                │   ▲
                    └─────── slot in use             └───┘ connection lost

The replay position lives in the replication slot alone. Beside the data we keep which slot on which cluster filled the
collections, by which plan, and whether the first copy was completed. A copy that was not is done again from nothing: its
points are cleared, and its slot is created anew, so that rows deleted meanwhile cannot stay behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from cdc_sync import __version__
from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError, ErrorKind, SinkError, SourceError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.values import needs_text
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics, State
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.preflight import preflight_source
from cdc_sync.postgres.publication import create_publication
from cdc_sync.postgres.refetch import fetch_rows
from cdc_sync.postgres.replication import CreatedSlot, ReplicationConnection, StreamOptions
from cdc_sync.postgres.slot import drop_slot, read_slot
from cdc_sync.postgres.snapshot import SnapshotHolder, TableRewrittenError
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import PipelineState, Sink, TableState
from cdc_sync.rows import RawValue, Row
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.copying import ChunkResult
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.monitor import SourceMonitor
from cdc_sync.sync.planning import PipelinePlan, fingerprint, plan_pipeline, same_configuration
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.resync import Resync
from cdc_sync.sync.retry import retrying
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.stream import Positions, StreamSession

log = get_logger(__name__)

T = TypeVar("T")

_FETCH_TIMEOUT_SECONDS = 60.0


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
        self._resync: Resync | None = None
        self._stop = asyncio.Event()
        self._reading: PgConnection | None = None

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

    async def run(self, stop: asyncio.Event, *, restart: bool = False) -> None:
        """Run until ``stop`` is set; then finish the batch in flight, confirm it, and return.

        ``restart`` forgets what was copied and copies again. Raises :class:`CdcSyncError` for what does not get better by
        trying again. Cancel it to stop without a grace period; that is safe too.
        """
        self._stop = stop
        self._state("starting")
        try:
            work = asyncio.create_task(self._run(restart))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._state("draining")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(work, self.settings.pipeline.shutdown_timeout_seconds)
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
            if self._reading is not None:
                self._reading.close()
            if self._sink is not None:
                await self._sink.close()

    async def _run(self, restart: bool) -> None:
        self._sink = await self._until(lambda: self._open_sink(), "sink")
        plan = self._plan = await self._until(lambda: self._in_thread(self._make_plan), "source")
        self._announce(plan)
        self._relations = Relations(plan.tables, self.settings, self.metrics)
        self._dead_letters = DeadLetterOffice(
            self.sink.state,
            self.settings.pipeline.name,
            self.settings.pipeline.dead_letter_limit,
            self.metrics,
        )
        state = await self._until(lambda: self.sink.state.load(self.settings.pipeline.name), "sink")
        if self._stop.is_set():
            return
        if await self._must_copy(plan, state, restart):
            if not await self._interruptible(self._copy_everything(plan, state)):
                return
        else:
            assert state is not None
            for planned in plan.tables:
                await self._until(lambda p=planned: self.sink.inspect(p.plan), "sink")  # type: ignore[misc]
            self._relations.compare(state)
        await self._until(self._dead_letters.open, "sink")
        await self._stream_on()

    # -- preparation -----------------------------------------------------------------------------------------------

    async def _open_sink(self) -> Sink:
        sink = await open_sink(self.settings.qdrant)
        try:
            await sink.ping()
        except BaseException:
            await sink.close()
            raise
        return sink

    def _make_plan(self) -> PipelinePlan:
        with connect(self.settings.source) as connection:
            plan = plan_pipeline(connection, self.settings)
            preflight_source(
                connection,
                self.settings.source,
                tables=[planned.table for planned in plan.tables],
                slot_exists=read_slot(connection, self.settings.source.slot) is not None,
                publication=plan.publication,
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

    async def _must_copy(
        self, plan: PipelinePlan, state: PipelineState | None, restart: bool
    ) -> bool:
        """Decide between copying and streaming on. Raises what keeps the two stores from being joined."""
        source = self.settings.source
        slot = await self._until(lambda: self._in_thread(self._read_slot), "source")
        if restart:
            return True
        if state is None:
            if slot is not None:
                raise SourceError(
                    ErrorKind.SLOT_LOST,
                    f"the replication slot {source.slot} exists, but there is no record of a copy made from it",
                    f"If nothing else uses it run: SELECT pg_drop_replication_slot('{source.slot}'); "
                    "else choose another name (source.slot).",
                )
            return True
        if state.system_identifier not in ("", plan.server.system_identifier):
            raise SourceError(
                ErrorKind.SOURCE_CHANGED,
                f"the collections were filled from the cluster {state.system_identifier}, "
                f"this one is {plan.server.system_identifier}",
            )
        if not state.tables or not all(table.copied for table in state.tables):
            return True
        self._check_same_tables(plan, state)
        if slot is None:
            raise SourceError(
                ErrorKind.SLOT_LOST,
                f"the replication slot {source.slot} is gone: changes made since are not to be had any more",
            )
        if slot.wal_status == "lost":
            raise SourceError(
                ErrorKind.SLOT_LOST,
                f"the replication slot {source.slot} was invalidated ({slot.invalidation_reason or 'WAL removed'})",
            )
        return False

    def _check_same_tables(self, plan: PipelinePlan, state: PipelineState) -> None:
        known = {table.table: table for table in state.tables}
        for planned in plan.tables:
            before = known.pop(planned.name, None)
            if before is None:
                raise ConfigError(
                    f"table {planned.name} was added to the pipeline {state.pipeline!r} after its first copy",
                    "Copy anew with --migration.restart, or give the table a pipeline of its own "
                    "(other pipeline.name, source.slot and source.publication).",
                )
            if not same_configuration(before.plan_fingerprint, fingerprint(planned)):
                raise ConfigError(
                    f"the configuration of table {planned.name} is not the one its collection was filled by",
                    "Undo the change, or copy anew with --migration.restart.",
                )
        if known:
            raise ConfigError(
                f"the pipeline {state.pipeline!r} also keeps {', '.join(sorted(known))}, which is not configured any more",
                "Put it back, or copy anew with --migration.restart.",
            )

    def _read_slot(self):  # type: ignore[no-untyped-def]
        with connect(self.settings.source) as connection:
            return read_slot(connection, self.settings.source.slot)

    # -- the first copy --------------------------------------------------------------------------------------------

    async def _copy_everything(self, plan: PipelinePlan, state: PipelineState | None) -> None:
        self._state("snapshotting")
        await self._until(lambda: self._check_collections(plan, state), "sink")
        await self._until(lambda: self._in_thread(self._prepare_source, plan), "source")
        record = self._record(plan, copied=False)
        # Before the slot exists: whatever happens from here on is known to be ours and unfinished.
        await self._until(lambda: self.sink.state.save(record), "sink")
        for planned in plan.tables:
            await self._until(lambda p=planned: self._empty(p, state), "sink")  # type: ignore[misc]
        while True:
            try:
                lsn = await self._until(lambda: self._copy_from_new_slot(plan), "source")
                break
            except (_SnapshotLost, TableRewrittenError) as lost:
                log.warning("copy_abandoned", reason=str(lost))
                await asyncio.sleep(1)
                for planned in plan.tables:
                    await self._until(self.sink.writer(planned.plan).clear, "sink")
                plan = await self._replan()
        done = dataclasses.replace(self._record(plan, copied=True), slot_lsn=lsn)
        await self._until(lambda: self.sink.make_durable(), "sink")
        await self._until(lambda: self.sink.state.save(done), "sink")
        self.positions.applied = self.positions.confirmed = lsn
        log.info("copy_completed", tables=len(plan.tables), lsn=str(Lsn(lsn)))

    async def _replan(self) -> PipelinePlan:
        """Read the catalog again: a table was rewritten or changed before its copy could begin (R54)."""
        plan = self._plan = await self._until(lambda: self._in_thread(self._make_plan), "source")
        self._relations = Relations(plan.tables, self.settings, self.metrics)
        for planned in plan.tables:
            await self._until(lambda p=planned: self.sink.ensure_collection(p.plan), "sink")  # type: ignore[misc]
        return plan

    async def _check_collections(self, plan: PipelinePlan, state: PipelineState | None) -> None:
        """Refuse collections with points that no run of this pipeline has written."""
        ours = {table.collection for table in state.tables} if state is not None else set()
        for planned in plan.tables:
            found = await self.sink.inspect(planned.plan)
            if found.points and planned.plan.collection not in ours:
                raise SinkError(
                    ErrorKind.COLLECTION_MISMATCH,
                    f"collection {planned.plan.collection!r} already holds {found.points} points "
                    f"that the pipeline {self.settings.pipeline.name!r} has not written",
                    "Choose another collection, or drop this one first.",
                )

    def _prepare_source(self, plan: PipelinePlan) -> None:
        """Create the publication where absent (R56: before the slot), and remove the slot of an unfinished copy."""
        source = self.settings.source
        with connect(source) as connection:
            if plan.publication is None:
                create_publication(
                    connection, source.publication, plan.published_columns, plan.server
                )
                log.info("publication_created", publication=source.publication)
            if read_slot(connection, source.slot) is not None:
                drop_slot(connection, source.slot)
                log.info("slot_dropped", slot=source.slot)

    async def _empty(self, planned: PlannedTable, state: PipelineState | None) -> None:
        await self.sink.ensure_collection(planned.plan)
        if state is not None:
            await self.sink.writer(planned.plan).clear()

    async def _copy_from_new_slot(self, plan: PipelinePlan) -> int:
        """Create the slot, copy every table under its snapshot, return the slot's consistent point."""
        replication, created = await self._in_thread(self._create_slot)
        holder: SnapshotHolder | None = None
        try:
            holder = await self._in_thread(
                SnapshotHolder.imported,
                self.settings.source,
                created.snapshot,
                [planned.table for planned in plan.tables],
            )
            # Workers import from the holder, so the connection that created the slot is not needed any more.
            replication.close()
            log.info("copy_started", slot=created.name, lsn=str(Lsn(created.consistent_point)))
            backfill = Backfill(
                self.settings, self.sink, self.metrics, self._on_chunk, self._park_copied
            )
            for planned in plan.tables:
                self.board.table(planned.name).update(state="copying")
            totals = await backfill.copy(plan.tables, holder.snapshot_id)
            for planned in plan.tables:
                self.board.table(planned.name).update(state="catching_up")
                log.info(
                    "table_copied",
                    table=planned.name,
                    rows=totals[planned.plan.oid].rows,
                    bytes=totals[planned.plan.oid].bytes,
                    refused=totals[planned.plan.oid].refused,
                )
        except SourceError as error:
            replication.close()
            await self._in_thread(self._abandon_slot)
            if error.kind is ErrorKind.SOURCE_UNAVAILABLE:
                raise _SnapshotLost(error.message) from error
            raise
        finally:
            replication.close()
            if holder is not None:
                holder.close()
        return int(created.consistent_point)

    def _create_slot(self) -> tuple[ReplicationConnection, CreatedSlot]:
        source = self.settings.source
        replication = ReplicationConnection.open(source)
        try:
            return replication, replication.create_slot(
                source.slot, lock_timeout_seconds=source.slot_creation_timeout_seconds
            )
        except BaseException:
            replication.close()
            raise

    def _abandon_slot(self) -> None:
        with contextlib.suppress(SourceError), connect(self.settings.source) as connection:
            drop_slot(connection, self.settings.source.slot)

    def _on_chunk(self, planned: PlannedTable, result: ChunkResult) -> None:
        self.board.table(planned.name).add(rows_copied=result.rows)

    async def _park_copied(self, planned: PlannedTable, refused: Sequence[tuple[str, str]]) -> None:
        assert self._dead_letters is not None
        office = self._dead_letters
        await self._until(
            lambda: office.park(planned.name, refused, lsn=0, commit_time=0.0), "sink"
        )

    def _record(self, plan: PipelinePlan, *, copied: bool) -> PipelineState:
        return PipelineState(
            pipeline=self.settings.pipeline.name,
            slot=self.settings.source.slot,
            publication=self.settings.source.publication,
            system_identifier=plan.server.system_identifier,
            timeline=plan.server.timeline,
            slot_lsn=0,
            tables=tuple(
                TableState(planned.name, planned.plan.collection, fingerprint(planned), copied)
                for planned in plan.tables
            ),
        )

    # -- streaming -------------------------------------------------------------------------------------------------

    async def _stream_on(self) -> None:
        """Stream, and connect again whenever the connection is lost."""
        assert self._dead_letters is not None
        applier = Applier(self.sink, self._fetch, self._dead_letters, self.metrics, self._on_stall)
        assert self._relations is not None
        resync = self._resync = Resync(
            self.settings,
            self.sink,
            self._relations,
            self.metrics,
            Backfill(self.settings, self.sink, self.metrics, self._on_chunk, self._park_copied),
            self._until,
        )
        monitor = SourceMonitor(
            self.settings,
            self.metrics,
            self.board,
            self.positions,
            self._relations,
            resync.observe,
        )
        await self._until(lambda: self._in_thread(resync.open), "source")
        watching = asyncio.create_task(monitor.run())
        try:
            while not self._stop.is_set():
                await self._until(lambda: self._session(applier), "source")
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _session(self, applier: Applier) -> None:
        if self._stop.is_set():
            return
        assert self._relations is not None
        connection, status_seconds = await self._in_thread(self._start_stream)
        try:
            gatherer = Gatherer(
                self._relations.route,
                batch_rows=self.settings.pipeline.batch_rows,
                batch_bytes=self.settings.pipeline.batch_bytes,
                applied=self.positions.applied,
                on_type=self._relations.forget_type,
            )
            session = StreamSession(
                connection=connection,
                gatherer=gatherer,
                applier=applier,
                positions=self.positions,
                metrics=self.metrics,
                make_durable=self.sink.make_durable,
                stop=self._stop,
                status_seconds=min(status_seconds, self.settings.pipeline.status_interval_seconds),
                board=self.board,
                between=self._between,
            )
            self._state("streaming")
            for planned in self.tables:
                self.board.table(planned.name).update(state="streaming")
            self.board.set_source(True)
            await session.run()
            await self._in_thread(connection.stop)
        finally:
            connection.close()

    @property
    def _binary(self) -> bool:
        """Whether the stream can be binary.

        A type without binary output below an array, composite or range would stop the server's decoding for good (R12).
        """
        return not any(
            needs_text(column.type) for planned in self.tables for column in planned.table.columns
        )

    def _start_stream(self) -> tuple[ReplicationConnection, float]:
        source = self.settings.source
        assert self._plan is not None
        connection = ReplicationConnection.open(source)
        try:
            identity = connection.identify()
            if identity.system_identifier != self._plan.server.system_identifier:
                raise SourceError(
                    ErrorKind.SOURCE_CHANGED,
                    f"the cluster behind the connection changed from {self._plan.server.system_identifier} "
                    f"to {identity.system_identifier}",
                )
            timeout = connection.wal_sender_timeout_seconds
            connection.start(
                source.slot,
                source.publication,
                options=StreamOptions(binary=self._binary),
            )
        except BaseException:
            connection.close()
            raise
        log.info("streaming_started", slot=source.slot, applied=str(Lsn(self.positions.applied)))
        return connection, timeout / 3 if timeout > 0 else 10.0

    async def _between(self, batch: Batch | None) -> None:
        """With the applier at rest: keep book, and read stale tables again."""
        assert self._relations is not None
        assert self._resync is not None
        if batch is not None:
            self._keep_book(batch)
        if self._relations.stale:
            await self._resync.run()

    def _keep_book(self, batch: Batch) -> None:
        assert self._relations is not None
        assert self._resync is not None
        assert self._resync.recent is not None
        for xid in batch.xids:
            self._resync.recent.add(xid)
        self._relations.note(batch)
        for oid, table in batch.tables.items():
            self.board.table(batch.bindings[oid].planned.name).add(changes_applied=len(table))
        self.board.positions(
            received=self.positions.received,
            applied=self.positions.applied,
            acknowledged=self.positions.confirmed,
            server=self.positions.server_end,
        )
        self.board.set_sink(True)

    def _fetch(
        self,
        plan: TablePlan,
        row_filter: str | None,
        keys: Sequence[Sequence[RawValue]],
        xids: Collection[int],
    ) -> list[Row]:
        if self._reading is None:
            self._reading = connect(self.settings.source, application_name="cdc_sync read")
        try:
            return fetch_rows(
                self._reading, plan, keys, xids, row_filter, timeout_seconds=_FETCH_TIMEOUT_SECONDS
            )
        except SourceError:
            self._reading.close()
            self._reading = None
            raise

    # -- trying again ----------------------------------------------------------------------------------------------

    async def _until(self, operation: Callable[[], Awaitable[T]], side: str) -> T:
        def on_retry(error: CdcSyncError, seconds: float) -> None:
            if error.kind is ErrorKind.SLOT_ACTIVE:
                self._state("standby")
            if side == "source":
                self.metrics.source_reconnects[error.kind].inc()
            self._on_stall(error, seconds)

        return await retrying(operation, on_retry)

    def _on_stall(self, error: CdcSyncError, seconds: float) -> None:
        if isinstance(error, SinkError):
            self.board.set_sink(False, error.message)
            self.metrics.sink_retries[error.kind].inc()
        elif isinstance(error, SourceError) and error.kind is ErrorKind.SOURCE_UNAVAILABLE:
            self.board.set_source(False, error.message)
        self.metrics.count_error(error.kind)
        log.warning(
            "retrying", kind=error.kind.value, error=error.message, seconds=round(seconds, 2)
        )

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.to_thread(function, *arguments)

    async def _interruptible(self, work: Awaitable[None]) -> bool:
        """Run until done or stopped; a copy that is stopped is abandoned (the next start does it again)."""
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


class _SnapshotLost(Exception):
    """The connection that held the snapshot of the copy is gone."""
