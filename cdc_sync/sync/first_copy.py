"""The first copy: deciding whether there must be one, and making it.

The replay position lives in the replication slot alone. Beside the data we keep which slot on
which cluster filled the collections, by which plan, and whether the first copy was completed. A
copy that was not is done again from nothing: its points are cleared, and its slot is created anew,
so that rows deleted meanwhile cannot stay behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError, ErrorKind, SinkError, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.publication import create_publication
from cdc_sync.postgres.replication import CreatedSlot, ReplicationConnection
from cdc_sync.postgres.slot import SlotInfo, drop_slot, read_slot
from cdc_sync.postgres.snapshot import SnapshotHolder, TableRewrittenError
from cdc_sync.qdrant.sink import PipelineState, Sink, TableState
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.copying import ChunkResult
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.planning import PipelinePlan, fingerprint, same_configuration
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.routing import PlannedTable

log = get_logger(__name__)

T = TypeVar("T")


class Until(Protocol):
    """Runs an operation until it works, or fails for good."""

    async def __call__(self, operation: Callable[[], Awaitable[T]]) -> T: ...


class FirstCopy:
    """Decides, and copies. ``until`` retries."""

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        metrics: Metrics,
        board: StatusBoard,
        dead_letters: DeadLetterOffice,
        until: Until,
    ) -> None:
        self.settings = settings
        self.sink = sink
        self.metrics = metrics
        self.board = board
        self._dead_letters = dead_letters
        self._until = until
        self.backfill = Backfill(settings, sink, metrics, self._on_chunk, self._park_copied)

    async def is_needed(
        self, plan: PipelinePlan, state: PipelineState | None, restart: bool
    ) -> bool:
        """Decide between copying and streaming on. Raises what keeps the two stores from being
        joined."""
        source = self.settings.source
        slot = await self._until(lambda: asyncio.to_thread(self._read_slot))
        if state is None:
            if slot is not None:
                raise SourceError(
                    ErrorKind.SLOT_LOST,
                    f"the replication slot {source.slot} exists, but there is no record of a copy "
                    "made from it",
                    f"If nothing else uses it run: SELECT "
                    f"pg_drop_replication_slot('{source.slot}'); "
                    "else choose another name (source.slot).",
                )
            return True
        if restart:
            return True
        if state.slot != source.slot:
            raise ConfigError(
                f"the pipeline {state.pipeline!r} was started with the slot {state.slot}, "
                f"not {source.slot}",
                "Put the slot's name back (source.slot), or give the new pipeline a name of its "
                "own.",
            )
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
                f"the replication slot {source.slot} is gone: changes made since are not to be had "
                "any more",
            )
        if slot.wal_status == "lost":
            raise SourceError(
                ErrorKind.SLOT_LOST,
                f"the replication slot {source.slot} was invalidated "
                f"({slot.invalidation_reason or 'WAL removed'})",
            )
        if plan.publication is None:
            # A new one would not exist for the changes that the slot still holds (R56).
            raise SourceError(
                ErrorKind.PUBLICATION_UNUSABLE,
                f"the publication {source.publication} is gone, and the slot {source.slot} cannot "
                "go on without it",
                "Changes older than a publication do not see it: copy anew with "
                "--migration.restart, which makes both again.",
            )
        return False

    def _check_same_tables(self, plan: PipelinePlan, state: PipelineState) -> None:
        known = {table.table: table for table in state.tables}
        for planned in plan.tables:
            before = known.pop(planned.name, None)
            if before is None:
                raise ConfigError(
                    f"table {planned.name} was added to the pipeline {state.pipeline!r} after its "
                    "first copy",
                    "Copy anew with --migration.restart, or give the table a pipeline of its own "
                    "(other pipeline.name, source.slot and source.publication).",
                )
            if before.oid != planned.plan.oid:
                raise SourceError(
                    ErrorKind.TABLE_UNUSABLE,
                    f"table {planned.name} is not the one that was copied: it was dropped and "
                    "created again, or another was renamed to it",
                    "Copy anew with --migration.restart.",
                )
            if not same_configuration(before.plan_fingerprint, fingerprint(planned)):
                raise ConfigError(
                    f"the configuration of table {planned.name}, or its key, is not the one its "
                    "collection was filled by",
                    "Undo the change, or copy anew with --migration.restart.",
                )
        if known:
            raise ConfigError(
                f"the pipeline {state.pipeline!r} also keeps {', '.join(sorted(known))}, which is "
                "not configured any more",
                "Put it back, or copy anew with --migration.restart.",
            )

    def _read_slot(self) -> SlotInfo | None:
        with connect(self.settings.source) as connection:
            return read_slot(connection, self.settings.source.slot)

    # -- the first copy

    async def run(self, plan: PipelinePlan, state: PipelineState | None) -> int:
        """Copy every table; returns the position at which the stream goes on.

        ``state`` is what an earlier run left. Creates publication, collections and slot. Raises
        what trying again does not mend, with nothing created if that was found beforehand; and
        :class:`CopyAbandonedError` when all has to be done again, under a new plan and a new lock.
        """
        await self._until(lambda: self._check_collections(plan, state))
        await self._until(lambda: asyncio.to_thread(self._prepare_source, plan))
        record = self._record(plan, copied=False)
        # Before the slot exists: whatever happens from here on is known to be ours and unfinished.
        await self._until(lambda: self.sink.state.save(record))
        await self._until(self._forget_dead_letters)
        for planned in plan.tables:
            await self._until(lambda p=planned: self._empty(p, state))  # type: ignore[misc]
        lsn = await self._copy_from_new_slot(plan)
        done = dataclasses.replace(self._record(plan, copied=True), slot_lsn=lsn)
        await self._until(lambda: self.sink.make_durable())
        await self._until(lambda: self.sink.state.save(done))
        log.info("copy_completed", tables=len(plan.tables), lsn=str(Lsn(lsn)))
        return lsn

    async def _forget_dead_letters(self) -> None:
        letters = await self.sink.state.dead_letters(self.settings.pipeline.name)
        await self.sink.state.release(
            self.settings.pipeline.name, [(letter.table, letter.key) for letter in letters]
        )

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
        """Create the publication where absent (R56: before the slot), and remove the slot of an
        unfinished copy."""
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
        """Create the slot, copy every table under its snapshot, return the slot's consistent
        point."""
        replication, created = await self._until(self._new_slot)
        holder: SnapshotHolder | None = None
        try:
            holder = await asyncio.to_thread(
                SnapshotHolder.imported,
                self.settings.source,
                created.snapshot,
                [planned.table for planned in plan.tables],
            )
            # Workers import from the holder, so the connection that created the slot is not needed
            # any more.
            replication.close()
            log.info("copy_started", slot=created.name, lsn=str(Lsn(created.consistent_point)))
            for planned in plan.tables:
                self.board.table(planned.name).update(state="copying")
            totals = await self.backfill.copy(plan.tables, holder.snapshot_id)
            for planned in plan.tables:
                self.board.table(planned.name).update(state="catching_up")
                log.info(
                    "table_copied",
                    table=planned.name,
                    rows=totals[planned.plan.oid].rows,
                    bytes=totals[planned.plan.oid].bytes,
                    refused=totals[planned.plan.oid].refused,
                )
        except CdcSyncError as error:
            replication.close()
            # It may not succeed; the next copy drops the slot before anything else.
            await asyncio.to_thread(self._abandon_slot)
            if is_transient(error) or isinstance(error, TableRewrittenError):
                raise CopyAbandonedError(error.message) from error
            raise
        finally:
            replication.close()
            if holder is not None:
                holder.close()
        return int(created.consistent_point)

    async def _new_slot(self) -> tuple[ReplicationConnection, CreatedSlot]:
        try:
            return await asyncio.to_thread(self._create_slot)
        except SourceError as error:
            if error.kind is ErrorKind.SLOT_ACTIVE:
                # Made by a command whose answer was lost: its snapshot is not to be had any more.
                raise CopyAbandonedError(error.message) from error
            raise

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
        await self._until(
            lambda: self._dead_letters.park(planned.name, refused, lsn=0, commit_time=0.0)
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
                TableState(
                    planned.name,
                    planned.plan.collection,
                    fingerprint(planned),
                    copied,
                    planned.plan.oid,
                    tuple(c.name for c in planned.plan.columns if c.vector is not None),
                )
                for planned in plan.tables
            ),
        )


class CopyAbandonedError(Exception):
    """The copy cannot be completed from its snapshot, and has to be done again from nothing."""
