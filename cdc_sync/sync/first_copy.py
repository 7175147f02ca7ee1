"""The first copy: deciding how the pipeline starts, and making its first window.

The replay position lives in the replication slot alone. Beside the data we keep which slot on
which cluster filled the collections, by which plan, and which tables have been copied. The slot is
created first; under the snapshot that it exports the first window is copied, which joins the stream
exactly. What is left then, or after a crash, is copied in further windows under the stream
(:mod:`cdc_sync.sync.resync`). Only a copy that got no slot, or lost it, is done again from nothing:
its points are cleared, so that rows deleted meanwhile cannot stay behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError, ErrorKind, SinkError, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import answering, closed_on_error, connect
from cdc_sync.postgres.publication import add_to_publication, create_publication
from cdc_sync.postgres.replication import CreatedSlot, ReplicationConnection
from cdc_sync.postgres.slot import SlotInfo, drop_slot, read_slot
from cdc_sync.postgres.snapshot import SnapshotHolder, TableRewrittenError
from cdc_sync.qdrant.sink import PipelineState, Sink, SourceMark
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.fingerprints import as_stale, fingerprint, same_configuration, stale_fingerprint
from cdc_sync.sync.opening import opening
from cdc_sync.sync.planning import PipelinePlan
from cdc_sync.sync.resync import Resync
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.source_history import SourceHistory, check_history
from cdc_sync.sync.table_records import TableRecords, table_state

log = get_logger(__name__)

T = TypeVar("T")


class Beginning(enum.Enum):
    """How the pipeline begins."""

    COPY = "copy"  #: from nothing
    GO_ON = "go on"  #: where the slot stands
    ANEW = "anew"  #: with a new slot, and every table read again


class _NewSlot(NamedTuple):
    """A slot, and the connection that has made it and keeps its snapshot."""

    connection: ReplicationConnection
    slot: CreatedSlot

    def close(self) -> None:
        """Close the connection; the slot stays."""
        self.connection.close()


class Until(Protocol):
    """Runs an operation until it works, or fails for good."""

    async def __call__(self, operation: Callable[[], Awaitable[T]]) -> T: ...


class FirstCopy:
    """Decides, and copies the first window. ``until`` retries."""

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        history: SourceHistory,
        records: TableRecords,
        dead_letters: DeadLetterOffice,
        backfill: Backfill,
        resync: Resync,
        until: Until,
    ) -> None:
        self.settings = settings
        self.sink = sink
        self.backfill = backfill
        self.resync = resync
        self._dead_letters = dead_letters
        self._history = history
        self._records = records
        self._until = until
        self._adopting = settings.migration.adopt

    async def decide(
        self,
        plan: PipelinePlan,
        state: PipelineState | None,
        restart: bool,
        met: SourceError | None = None,
    ) -> Beginning:
        """Decide how to begin. ``met``: what the slot was lost by in this life. Raises what keeps
        the two stores from being joined."""
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
            return Beginning.COPY
        if restart:
            return Beginning.COPY
        if state.slot != source.slot:
            raise ConfigError(
                f"the pipeline {state.pipeline!r} was started with the slot {state.slot}, "
                f"not {source.slot}",
                "Put the slot's name back (source.slot), or give the new pipeline a name of its "
                "own.",
            )
        lost = _changed(plan, state)
        if lost is None and state.slot_lsn == 0 and not any(t.copied for t in state.tables):
            return Beginning.COPY
        check_same_tables(plan, state, by_oid=lost is None)
        if lost is None:
            lost = self._why_lost(slot, plan) or met or await self._why_rewound()
        if lost is None:
            return Beginning.GO_ON
        if lost.kind is ErrorKind.SOURCE_CHANGED:
            if source.on_source_changed == "stop":
                raise lost
        elif not any(table.copied for table in state.tables):
            log.warning("copy_begins_anew", reason=lost.message)
            return Beginning.COPY
        elif source.on_slot_lost == "stop":
            raise lost
        log.warning("stream_begins_anew", reason=lost.message)
        return Beginning.ANEW

    async def _why_rewound(self) -> SourceError | None:
        """What the source has lost of what was received from it."""
        mark = await self._until(lambda: self.sink.state.mark(self.settings.pipeline.name))
        try:
            await self._until(lambda: asyncio.to_thread(self._check_history, mark))
        except SourceError as error:
            if error.kind is ErrorKind.SOURCE_REWOUND:
                return error
            raise
        return None

    def _check_history(self, mark: SourceMark | None) -> None:
        replication = ReplicationConnection.open(self.settings.source)
        try:
            check_history(replication, mark, applied=0)
        finally:
            replication.close()

    def _why_lost(self, slot: SlotInfo | None, plan: PipelinePlan) -> SourceError | None:
        """What keeps the stream from going on where it was."""
        source = self.settings.source
        if slot is None:
            return SourceError(
                ErrorKind.SLOT_LOST,
                f"the replication slot {source.slot} is gone: changes made since are not to be had "
                "any more",
            )
        if slot.wal_status == "lost":
            return SourceError(
                ErrorKind.SLOT_LOST,
                f"the replication slot {source.slot} was invalidated "
                f"({slot.invalidation_reason or 'WAL removed'})",
            )
        if plan.publication is None:
            # A new one would not exist for the changes that the slot still holds (R56).
            return SourceError(
                ErrorKind.PUBLICATION_UNUSABLE,
                f"the publication {source.publication} is gone, and the slot {source.slot} cannot "
                "go on without it",
                "Changes older than a publication do not see it: copy anew with "
                "--migration.restart, which makes both again.",
            )
        return None

    def _read_slot(self) -> SlotInfo | None:
        with connect(self.settings.source) as connection, answering(connection):
            return read_slot(connection, self.settings.source.slot)

    # -- the first window

    async def run(
        self, plan: PipelinePlan, state: PipelineState | None, *, restart: bool = False
    ) -> int:
        """Create publication, collections and slot, and copy the first window; returns the position
        at which the stream goes on.

        ``state`` is what an earlier run left; an adoption that it began goes on as one, unless it
        is to ``restart``. Raises what trying again does not mend, with nothing
        created if that was found beforehand; and :class:`CopyAbandonedError` when all has to be
        done again, under a new plan and a new lock.
        """
        if state is not None and state.adopting and not restart:
            self._adopting = True
        await self._until(lambda: self._check_collections(plan.tables, state))
        owned = await self._until(lambda: asyncio.to_thread(self._prepare_source, plan, state))
        record = self._record(plan, state, slot_lsn=0, owned=owned)
        # Before the slot exists: whatever happens from here on is known to be ours and unfinished.
        await self._until(lambda: self._records.save(record))
        await self._until(lambda: self._forget(plan.tables))
        for planned in plan.tables:
            await self._until(lambda p=planned: self._empty(p, state))  # type: ignore[misc]
        return await self._copy_from_new_slot(plan, record)

    async def begin_anew(self, plan: PipelinePlan, state: PipelineState) -> int:
        """Make a new slot, for tables that are then all read again under the stream; returns the
        position at which it begins.

        Changes were lost, so nothing that was copied counts, and rows may be gone without a
        message. Until the tables have been read again they are as they were, and what comes by the
        stream is applied to them. Raises as :meth:`run`.
        """
        stale = self._stale(plan, state)
        # Before the slot is there: whoever goes on with it reads the tables again.
        await self._until(lambda: self._records.save(stale))
        await self._until(self._drop_ledgers)
        owned = await self._until(lambda: asyncio.to_thread(self._prepare_source, plan, state))
        # What was known of the source does not hold for what comes from the new slot.
        await self._until(lambda: self._history.begin(plan.tables))
        replication, created = await self._until(self._new_slot)
        replication.close()
        lsn = int(created.consistent_point)
        record = dataclasses.replace(
            stale,
            slot=self.settings.source.slot,
            publication=self.settings.source.publication,
            system_identifier=plan.server.system_identifier,
            timeline=plan.server.timeline,
            slot_lsn=lsn,
            owns_publication=owned,
        )
        await self._until(lambda: self._records.save(record))
        log.info("slot_recreated", slot=created.name, lsn=str(Lsn(lsn)), tables=len(plan.tables))
        return lsn

    def _stale(self, plan: PipelinePlan, state: PipelineState) -> PipelineState:
        """The record with every table to be read again, whether it has been copied as a whole or
        not: points of it may be there."""
        known = {table.table: table for table in state.tables}
        tables = []
        for planned in plan.tables:
            before = known.get(planned.name)
            if before is not None:
                again = dataclasses.replace(
                    before,
                    plan_fingerprint=stale_fingerprint(planned),
                    copied=True,
                    oid=planned.plan.oid,
                )
                tables.append(again)
        for stopped in plan.stopped:
            before = known[stopped.name]
            stale = as_stale(before.plan_fingerprint)
            tables.append(dataclasses.replace(before, plan_fingerprint=stale))
        return dataclasses.replace(state, tables=tuple(tables), adopting=False)

    async def add(self, tables: Sequence[PlannedTable], plan: PipelinePlan) -> None:
        """Let tables join the pipeline: create their collections, publish them, and put them on
        record; they are copied in windows under the stream. Errors as :meth:`run`."""
        await self._until(lambda: self._check_collections(tables, None))
        await self._until(lambda: asyncio.to_thread(self._publish, plan))
        for planned in tables:
            await self._until(lambda p=planned: self._empty(p, None))  # type: ignore[misc]
        await self._until(lambda: self._records.add(tables))
        log.info("tables_added", tables=[planned.name for planned in tables])

    def _publish(self, plan: PipelinePlan) -> None:
        with connect(self.settings.source) as connection:
            add_to_publication(
                connection,
                self.settings.source.publication,
                plan.unpublished,
                plan.server,
                plan.row_filters,
            )

    async def _forget(self, tables: Sequence[PlannedTable]) -> None:
        """Forget what an earlier copy left."""
        pipeline = self.settings.pipeline.name
        letters = await self.sink.state.dead_letters(pipeline)
        await self.sink.state.release(pipeline, [(letter.table, letter.key) for letter in letters])
        await self._drop_ledgers()
        await self._history.begin(tables)
        await self._dead_letters.open()

    async def _drop_ledgers(self) -> None:
        for ledger in await self.sink.state.ledgers(self.settings.pipeline.name):
            await self.sink.state.drop_ledger(ledger.pipeline, ledger.table)

    async def _check_collections(
        self, tables: Sequence[PlannedTable], state: PipelineState | None
    ) -> None:
        """Refuse collections with points that no run of this pipeline has written, unless they are
        to be adopted."""
        ours = {table.collection for table in state.tables} if state is not None else set()
        for planned in tables:
            found = await self.sink.inspect(planned.plan)
            if not found.exists and not self.settings.migration.create_collection:
                # Refused by the sink, before anything else is made.
                await self.sink.ensure_collection(planned.plan, create=False)
            if self._adopting:
                continue
            if found.points and planned.plan.collection not in ours:
                raise SinkError(
                    ErrorKind.COLLECTION_MISMATCH,
                    f"collection {planned.plan.collection!r} already holds {found.points} points "
                    f"that the pipeline {self.settings.pipeline.name!r} has not written",
                    "Choose another collection, or drop this one first; or, if it was filled from "
                    "this table, take it over with --adopt.",
                )

    def _prepare_source(self, plan: PipelinePlan, state: PipelineState | None) -> bool:
        """Create the publication where absent (R56: before the slot), and remove the slot of an
        unfinished copy. Returns whether the publication is ours."""
        source = self.settings.source
        owned = state is not None and state.owns_publication
        with connect(source) as connection:
            if plan.publication is None:
                create_publication(
                    connection,
                    source.publication,
                    plan.published_columns,
                    plan.server,
                    plan.row_filters,
                )
                owned = True
                log.info("publication_created", publication=source.publication)
            elif plan.unpublished:
                add_to_publication(
                    connection,
                    source.publication,
                    plan.unpublished,
                    plan.server,
                    plan.row_filters,
                )
            # One under another name is what --migration.restart leaves behind.
            before = [state.slot] if state is not None and state.slot != source.slot else []
            for slot in (source.slot, *before):
                if read_slot(connection, slot) is not None:
                    drop_slot(connection, slot)
                    log.info("slot_dropped", slot=slot)
        return owned

    async def _empty(self, planned: PlannedTable, state: PipelineState | None) -> None:
        migration = self.settings.migration
        notes = await self.sink.ensure_collection(
            planned.plan, create=migration.create_collection, defer_hnsw=migration.defer_hnsw
        )
        for note in notes:
            log.warning("collection_differs", table=planned.name, note=note)
        if state is not None and not self._adopting:
            await self.sink.writer(planned.plan).clear()
            if migration.defer_hnsw:
                # One that existed has its index already.
                await self.sink.defer_indexing(planned.plan)

    async def _copy_from_new_slot(self, plan: PipelinePlan, record: PipelineState) -> int:
        """Create the slot, copy the first window under its snapshot, return the slot's consistent
        point."""
        replication, created = await self._until(self._new_slot)
        lsn = int(created.consistent_point)
        holder: SnapshotHolder | None = None
        try:
            holder = await opening(
                SnapshotHolder.imported,
                self.settings.source,
                created.snapshot,
                [planned.table for planned in plan.tables],
            )
        except CdcSyncError as error:
            replication.close()
            # It may not succeed; the next copy drops the slot before anything else.
            await asyncio.to_thread(self._abandon_slot)
            if is_transient(error) or isinstance(error, TableRewrittenError):
                raise CopyAbandonedError(error.message) from error
            raise
        finally:
            # Workers import from the holder, so the connection that created the slot is not needed
            # any more.
            replication.close()
        try:
            log.info("copy_started", slot=created.name, lsn=str(Lsn(lsn)))
            await self._until(self.resync.compare)
            for planned in plan.tables:
                await self.backfill.begin(planned, sweep=self._adopting, repair=self._adopting)
            # From here on the copy is resumed, by those ledgers.
            await self._until(lambda: self._records.save(dataclasses.replace(record, slot_lsn=lsn)))
            await self._first_window(plan, holder)
        finally:
            await asyncio.to_thread(holder.close)
        return lsn

    async def _first_window(self, plan: PipelinePlan, holder: SnapshotHolder) -> None:
        try:
            completed = await self.backfill.window(plan.tables, holder)
        except SourceError as error:
            if not is_transient(error):
                raise
            # The slot keeps what is to come; the rest is copied in further windows.
            log.warning("window_lost", kind=error.kind.value, error=error.message)
            return
        # One that found points there needs a last look, once the stream has passed this window.
        completed = [p for p in completed if not self.backfill.may_be_older(p.name)]
        for planned in completed:
            await self._until(lambda p=planned: self.resync.complete(p))  # type: ignore[misc]
        log.info(
            "copy_completed" if len(completed) == len(plan.tables) else "first_window_closed",
            tables=len(plan.tables),
            completed=len(completed),
        )

    async def _new_slot(self) -> _NewSlot:
        try:
            return await opening(self._create_slot)
        except SourceError as error:
            if error.kind is ErrorKind.SLOT_ACTIVE:
                # Made by a command whose answer was lost: its snapshot is not to be had any more.
                raise CopyAbandonedError(error.message) from error
            raise

    def _create_slot(self) -> _NewSlot:
        source = self.settings.source
        replication = ReplicationConnection.open(source)
        with closed_on_error(replication):
            created = replication.create_slot(
                source.slot,
                failover=source.failover,
                lock_timeout_seconds=source.slot_creation_timeout_seconds,
            )
        return _NewSlot(replication, created)

    def _abandon_slot(self) -> None:
        with contextlib.suppress(SourceError), connect(self.settings.source) as connection:
            drop_slot(connection, self.settings.source.slot)

    def _record(
        self, plan: PipelinePlan, before: PipelineState | None, *, slot_lsn: int, owned: bool
    ) -> PipelineState:
        # What settings are in force does not change by copying anew.
        known = {t.table: t.rebuild for t in before.tables} if before is not None else {}
        return PipelineState(
            pipeline=self.settings.pipeline.name,
            slot=self.settings.source.slot,
            publication=self.settings.source.publication,
            system_identifier=plan.server.system_identifier,
            timeline=plan.server.timeline,
            slot_lsn=slot_lsn,
            tables=tuple(
                dataclasses.replace(table_state(p, copied=False), rebuild=known.get(p.name))
                for p in plan.tables
            ),
            owns_publication=owned,
            adopting=self._adopting,
        )


def added_tables(plan: PipelinePlan, state: PipelineState) -> list[PlannedTable]:
    """The tables that are configured and not on record yet."""
    known = {table.table for table in state.tables}
    return [planned for planned in plan.tables if planned.name not in known]


def _changed(plan: PipelinePlan, state: PipelineState) -> SourceError | None:
    """What is wrong with the cluster, if it is not the one that filled the collections."""
    if state.system_identifier in ("", plan.server.system_identifier):
        return None
    return SourceError(
        ErrorKind.SOURCE_CHANGED,
        f"the collections were filled from the cluster {state.system_identifier}, "
        f"this one is {plan.server.system_identifier}",
    )


def check_same_tables(plan: PipelinePlan, state: PipelineState, *, by_oid: bool = True) -> None:
    """Make sure that the tables on record are still the ones configured, by the same settings; in
    another cluster the same table has another OID. Raises :class:`CdcSyncError` otherwise."""
    known = {table.table: table for table in state.tables}
    for stopped in plan.stopped:
        known.pop(stopped.name, None)
    for planned in plan.tables:
        before = known.pop(planned.name, None)
        if before is None:
            continue
        if by_oid and before.oid != planned.plan.oid:
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


class CopyAbandonedError(Exception):
    """The copy cannot be completed from its snapshot, and has to be done again from nothing."""
