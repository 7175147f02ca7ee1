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
from collections.abc import Awaitable
from dataclasses import dataclass

from cdc_sync import __version__
from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ErrorKind, SinkError, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.connect import answering, connect
from cdc_sync.postgres.exclusive import lock_pipeline
from cdc_sync.postgres.preflight import preflight_source
from cdc_sync.postgres.slot import read_slot
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import PipelineState, Sink
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.first_copy import Beginning, CopyAbandonedError, FirstCopy, added_tables
from cdc_sync.sync.opening import opening
from cdc_sync.sync.planning import (
    PipelinePlan,
    Unplanned,
    in_force,
    plan_pipeline,
    without_new_vectors,
)
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.requests import RequestMetrics
from cdc_sync.sync.resync import Resync
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.sink_watch import SinkWatch
from cdc_sync.sync.source_history import SourceHistory
from cdc_sync.sync.stopped_tables import concerns_one_table
from cdc_sync.sync.stream import Positions
from cdc_sync.sync.streaming import Streaming
from cdc_sync.sync.supervision import supervised
from cdc_sync.sync.swaps import (
    PipelineSwaps,
    Swaps,
    TablesChangedError,
    rebuilt_tables,
)
from cdc_sync.sync.table_records import TableRecords
from cdc_sync.sync.trials import StoppedError, Trials

log = get_logger(__name__)

#: Batches in memory at the most: one being written, one sealed, one being gathered.
_BUFFERED_BATCHES = 3


#: After these the slot is of no use any more.
_STREAM_LOST = frozenset(
    {ErrorKind.SLOT_LOST, ErrorKind.SOURCE_REWOUND, ErrorKind.PUBLICATION_UNUSABLE}
)
#: Before a lost stream is looked at.
_LOST_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Parts:
    """What lives as long as the sink is open."""

    history: SourceHistory
    records: TableRecords
    dead_letters: DeadLetterOffice
    backfill: Backfill
    sink_watch: SinkWatch
    watching: asyncio.Task[None]


class Pipeline:
    """One slot, one publication, some tables. :meth:`run` is called once."""

    def __init__(
        self,
        settings: Settings,
        *,
        metrics: Metrics | None = None,
        board: StatusBoard | None = None,
        swaps: Swaps | None = None,
    ) -> None:
        self._configured = settings
        #: Those in force: a table that was rebuilt may be kept by others than are configured.
        self.settings = settings
        self._swaps = swaps
        #: The collections of such tables, by name.
        self._rebuilt: dict[str, str] = {}
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
        self._stop = asyncio.Event()
        self._trials = Trials(self.metrics, self.board, self._stop)
        self._once = False
        #: Put together once the sink is open.
        self._parts: _Parts | None = None
        self._relations: Relations | None = None
        self._resync: Resync | None = None
        self._streaming: Streaming | None = None
        #: Position of the slot that is streamed from, as on record, and what the stream from it
        #: has met that looking at the source does not show.
        self._slot_lsn = 0
        self._lost: SourceError | None = None

    @property
    def sink(self) -> Sink:
        """The sink, once :meth:`run` has opened it."""
        assert self._sink is not None, "the pipeline has not opened its sink yet"
        return self._sink

    @property
    def has_sink(self) -> bool:
        """Whether :meth:`run` has opened the sink."""
        return self._sink is not None

    @property
    def tables(self) -> tuple[PlannedTable, ...]:
        """The planned tables, once :meth:`run` has read the catalog."""
        assert self._plan is not None, "the pipeline has not planned its tables yet"
        return self._plan.tables

    @property
    def stopped_tables(self) -> list[str]:
        """Why tables have stopped, a sentence each."""
        tables = self.board.snapshot()["tables"]
        assert isinstance(tables, list)
        return [str(table["error"]) for table in tables if table["state"] == "stopped"]

    async def run(self, stop: asyncio.Event, *, restart: bool = False, once: bool = False) -> None:
        """Run until ``stop`` is set; then finish the batch in flight, confirm it, and return.

        ``restart`` forgets what was copied and copies again. ``once``: return by itself when every
        table is copied and all that was committed by then is applied. Raises
        :class:`CdcSyncError` for what does not get better by trying again. Cancel it to stop
        without a grace period; that is safe too.
        """
        self._stop = stop
        self._trials = Trials(self.metrics, self.board, stop)
        self._once = once
        self._trials.state("starting")
        try:
            work = asyncio.create_task(self._run(restart))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._trials.state("draining")
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
        except BaseException as error:
            self._trials.state("failed", error.message if isinstance(error, CdcSyncError) else None)
            raise
        finally:
            work.cancel()
            stopping.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            if self._parts is not None:
                await self._parts.backfill.close()
            if self._sink is not None:
                await self._sink.close()

    async def _run(self, restart: bool) -> None:
        try:
            await self._live(restart)
        except StoppedError:
            log.info("stopped_while_waiting")

    async def _live(self, restart: bool) -> None:
        try:
            while await self._interruptible(self._prepare(restart)):
                if await self._stream():
                    return
                restart = False
        finally:
            if self._parts is not None:
                self._parts.watching.cancel()
                await asyncio.gather(self._parts.watching, return_exceptions=True)
                self._parts.history.close()

    async def _prepare(self, restart: bool) -> None:
        """All that comes before the stream: connections, the plan, and the first copy if there must
        be one."""
        budget = self.settings.pipeline.startup_timeout_seconds
        if self._sink is None:
            self._sink = await self._trials.until(self._open_sink, budget)
            self.board.set_sink(True)
            self.board.set_versions(qdrant=self.sink.version)
            self._parts = self._put_together(self.sink)
        plan = self._plan = await self._trials.until(lambda: self._make_plan(restart), budget)
        self.board.set_source(True)
        self._announce(plan)
        while not await self._copy_under_lock(restart):
            # What was asked for is on record as unfinished; another process may finish it now.
            restart = False

    def _put_together(self, sink: Sink) -> _Parts:
        pipeline = self.settings.pipeline
        dead_letters = DeadLetterOffice(
            sink.state, pipeline.name, pipeline.dead_letter_limit, self.metrics, self.board
        )
        backfill = Backfill(
            self.settings, sink, self.metrics, self.board, dead_letters, self._trials.until_sink
        )
        watch = SinkWatch(sink.ping, self.board)
        return _Parts(
            history=SourceHistory(self.settings, sink.state),
            records=TableRecords(
                sink.state, pipeline.name, self.settings.source if sink.multi_process else None
            ),
            dead_letters=dead_letters,
            backfill=backfill,
            sink_watch=watch,
            watching=supervised(watch.run(), "watch over Qdrant", self.board, vital=True),
        )

    async def _stream(self) -> bool:
        """Stream until stopped; returns False if the stream is lost and has to be begun anew."""
        assert self._plan is not None
        assert self._relations is not None
        assert self._resync is not None
        self._streaming = Streaming(
            settings=self.settings,
            metrics=self.metrics,
            board=self.board,
            positions=self.positions,
            sink=self.sink,
            plan=self._plan,
            relations=self._relations,
            resync=self._resync,
            dead_letters=self._together.dead_letters,
            trials=self._trials,
            sink_watch=self._together.sink_watch,
            history=self._together.history,
            swaps=self._swaps or self._own_swaps(self._plan),
            once=self._once,
        )
        try:
            await self._streaming.run()
        except TablesChangedError:
            log.info("tables_planned_anew", reason="a table is kept in another collection now")
            return False
        except SourceError as error:
            if not self._begins_anew(error.kind):
                raise
            log.warning("stream_lost", kind=error.kind.value, reason=error.message)
            if error.kind is ErrorKind.PUBLICATION_UNUSABLE:
                # It may be there again by now, and is none where the slot stands for all that.
                self._lost = error
            self._trials.stalled(error, _LOST_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOST_SECONDS):
                    await self._stop.wait()
            return False
        return True

    def _own_swaps(self, plan: PipelinePlan) -> Swaps:
        collections = {planned.name: planned.plan.collection for planned in plan.tables}
        return PipelineSwaps(
            self._configured, self.sink, self._together.records, self.metrics, collections
        )

    def stop(self) -> None:
        """Have :meth:`run` end as when its event is set."""
        self._stop.set()

    def _begins_anew(self, kind: ErrorKind) -> bool:
        """Whether to begin the stream anew after such an error, if a closer look says so too."""
        source = self.settings.source
        if kind is ErrorKind.SOURCE_CHANGED:
            return source.on_source_changed == "recreate"
        return kind in _STREAM_LOST and source.on_slot_lost == "recreate"

    @property
    def _together(self) -> _Parts:
        assert self._parts is not None, "the pipeline has not opened its sink yet"
        return self._parts

    async def _copy_under_lock(self, restart: bool) -> bool:
        """Begin the first copy if there must be one; returns False if it has to be done again.

        The lock goes with the connection that holds it, so a copy that lost its connections is not
        done again under the same lock.
        """
        lock = await self._trials.until(lambda: opening(lock_pipeline, self.settings.source))
        try:
            # Another process may have held the lock and changed everything meanwhile.
            # Tables may have been rewritten too, before their copy began (R54).
            plan = await self._trials.until(lambda: self._make_plan(restart))
            return await self._begin(plan, restart)
        except CopyAbandonedError as abandoned:
            log.warning("copy_abandoned", reason=str(abandoned))
            return False
        finally:
            await asyncio.to_thread(lock.close)

    async def _begin(self, plan: PipelinePlan, restart: bool) -> bool:
        """Begin as the two stores are found; returns False if they must be looked at again."""
        state = await self._trials.until(lambda: self.sink.state.load(self.settings.pipeline.name))
        copy = self._assemble(plan)
        # Another process may have made a new slot meanwhile.
        same = state is not None and state.slot_lsn == self._slot_lsn
        beginning = await copy.decide(plan, state, restart, self._lost if same else None)
        self._lost = self._lost if beginning is Beginning.ANEW else None
        if beginning is Beginning.COPY:
            for stopped in plan.stopped:
                raise stopped.error
            self._trials.state("snapshotting")
            self._slot_lsn = await copy.run(plan, state, restart=restart)
            self.positions.begin(self._slot_lsn)
            return True
        assert state is not None
        if beginning is Beginning.ANEW:
            self.positions.begin(await copy.begin_anew(plan, state))
            # What is on record of the tables has changed, and the publication may be a new one.
            return False
        self._slot_lsn = state.slot_lsn
        added = added_tables(plan, state)
        if added:
            await copy.add(added, plan)
        self._adopt(plan, state)
        await self._stop_unfit(state)
        return True

    async def _stop_unfit(self, state: PipelineState) -> None:
        """Have tables start stopped that cannot be planned, or whose collections do not fit; others
        than those on record as copied are refused."""
        assert self._resync is not None
        assert self._plan is not None
        start = self._resync.start_stopped
        for stopped in self._plan.stopped:
            await self._trials.until(lambda s=stopped: start(s))  # type: ignore[misc]
        copied = {table.table for table in state.tables if table.copied}
        for planned in self.tables:
            try:
                await self._trials.until(lambda p=planned: self.sink.inspect(p.plan))  # type: ignore[misc]
            except SinkError as error:
                if planned.name not in copied or not concerns_one_table(error):
                    raise
                unfit = Unplanned(planned.name, planned.plan.oid, error)
                await self._trials.until(lambda u=unfit: start(u))  # type: ignore[misc]

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
        parts = self._together
        parts.history.plan_anew()
        self._plan = plan
        self._relations = Relations(plan.tables, self.settings, self.metrics)
        self._resync = Resync(
            self.settings,
            self.sink,
            self._relations,
            self.metrics,
            self.board,
            parts.records,
            parts.backfill,
            self._trials.until_sink,
        )
        self._resync.tolerant = not self._once
        return FirstCopy(
            self.settings,
            self.sink,
            parts.history,
            parts.records,
            parts.dead_letters,
            parts.backfill,
            self._resync,
            self._trials.until,
        )

    # -- preparation

    async def _open_sink(self) -> Sink:
        sink = await open_sink(self.settings.qdrant, RequestMetrics(self.metrics, self.board))
        try:
            await sink.ping()
        except BaseException:
            await sink.close()
            raise
        return sink

    async def _make_plan(self, restart: bool) -> PipelinePlan:
        state = await self.sink.state.load(self.settings.pipeline.name)
        self.settings = in_force(self._configured, state)
        self._rebuilt = rebuilt_tables(self._configured, state)
        self.board.set_rebuilt(self._rebuilt)
        owned = state is not None and state.owns_publication
        try:
            # Where everything is copied anew, or has to be complete, no table may be missing.
            strict = restart or self._once
            return await asyncio.to_thread(self._read_plan, owned, None if strict else state)
        except SourceError as error:
            if error.kind is ErrorKind.PUBLICATION_UNUSABLE and state is not None:
                # Changes made until it is mended are not sent.
                await self._together.records.all_stale()
            raise

    def _read_plan(self, owned: bool, state: PipelineState | None) -> PipelinePlan:
        with connect(self.settings.source) as connection, answering(connection):
            plan = plan_pipeline(connection, self.settings, owned=owned, state=state)
            preflight_source(
                connection,
                self.settings.source,
                tables=[planned.table for planned in plan.tables],
                slot_exists=read_slot(connection, self.settings.source.slot) is not None,
                publication=plan.publication,
                wanted=plan.published_columns,
                row_filters=plan.row_filters,
                columns_read=plan.columns_read,
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
        major, minor = divmod(plan.server.version_num, 10_000)
        self.board.set_versions(postgres=f"{major}.{minor}")
        for planned in plan.tables:
            self.metrics.add_table(planned.name)
            self.board.table(planned.name).update(
                collection=planned.plan.collection,
                state="pending",
                rows_estimated=_estimated_rows(planned),
            )
            for warning in planned.warnings:
                log.warning("plan_warning", table=planned.name, warning=warning)
        for table, collection in self._rebuilt.items():
            log.warning("configuration_outdated", table=table, collection=collection)
        log.info(
            "pipeline_planned",
            version=__version__,
            tables=len(plan.tables),
            slot=source.slot,
            publication=source.publication,
            server_version=plan.server.version_num,
        )

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


def _estimated_rows(planned: PlannedTable) -> int | None:
    estimates = [leaf.estimated_rows for leaf in planned.table.leaves]
    return None if any(e < 0 for e in estimates) else round(sum(estimates))
