"""Deliberate mistakes, each of which a test must notice: made in a pipeline's process before
anything runs."""

from __future__ import annotations

import dataclasses

from cdc_sync.qdrant.server_state import ServerStateStore
from cdc_sync.qdrant.sink import TableLedger
from cdc_sync.rows import UNCHANGED, PointId, Row
from cdc_sync.sync import coalesce, gather
from cdc_sync.sync.coalesce import TableBatch
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.resync import Resync
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.stream import StreamSession


def unchanged_becomes_null() -> None:
    """Coalescing writes NULL where the message said: unchanged."""

    def fill(newer: Row, older: Row) -> Row:
        return [None if value is UNCHANGED else value for value in newer]

    coalesce.fill = fill
    gather.fill = fill  # type: ignore[attr-defined]


def one_delete_is_dropped() -> None:
    """The first delete is taken for done."""
    delete = TableBatch.delete
    dropped: list[PointId] = []

    def drop_one(self: TableBatch, point_id: PointId, xid: int) -> None:
        if dropped:
            delete(self, point_id, xid)
        else:
            dropped.append(point_id)

    TableBatch.delete = drop_one  # type: ignore[method-assign]


def a_moved_row_stays() -> None:
    """A change of the key leaves the old point behind."""

    def move(self: TableBatch, old_id: PointId, new_id: PointId, row: Row, xid: int) -> None:
        self.create(new_id, row, xid)

    TableBatch.move = move  # type: ignore[method-assign]


def confirmed_before_it_is_written() -> None:
    """The position moves when a batch is taken, not when Qdrant has completed it."""
    apply = StreamSession._apply

    async def early(self: StreamSession, batch: Batch) -> None:
        if batch.end_lsn is not None:
            self.positions.applied = max(self.positions.applied, batch.end_lsn)
        await apply(self, batch)

    StreamSession._apply = early  # type: ignore[method-assign]


def schema_changes_go_unseen() -> None:
    """No table is ever marked to be read again."""

    def ignore(
        self: Relations, planned: PlannedTable, reason: str, *, unsent: bool = False
    ) -> None:
        return None

    Relations.mark = ignore  # type: ignore[method-assign]


def stale_tables_are_left() -> None:
    """Marked tables are not read again: as if that took very long."""

    async def run(self: Resync, applied: int) -> None:
        return None

    Resync.run = run  # type: ignore[method-assign]


def ledgers_say_done_too_early() -> None:
    """What is put on record of a copy says that every chunk is done; only a crash shows it."""
    save = ServerStateStore.save_ledger

    async def early(self: ServerStateStore, ledger: TableLedger) -> None:
        leaves = tuple(dataclasses.replace(leaf, done=((0, None),)) for leaf in ledger.leaves)
        await save(self, dataclasses.replace(ledger, leaves=leaves))

    ServerStateStore.save_ledger = early  # type: ignore[method-assign]


def told_before_it_is_written() -> None:
    """Postgres is told at once of what has not been written yet."""
    apply = StreamSession._apply

    async def early(self: StreamSession, batch: Batch) -> None:
        if batch.end_lsn is not None:
            self.positions.applied = max(self.positions.applied, batch.end_lsn)
            await self._confirm()
        await apply(self, batch)

    StreamSession._apply = early  # type: ignore[method-assign]
