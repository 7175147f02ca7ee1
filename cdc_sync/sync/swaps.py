"""Swaps: the position in the stream at which a table goes over to a rebuilt collection.

A rebuild (:mod:`cdc_sync.sync.rebuild`) fills a second collection beside the one that the pipeline
keeps, as a pipeline of its own. To take its place it writes a message into the WAL, which both
streams bring at one position X. The rebuild applies everything before X, stands there, and says so
on its record. The pipeline comes to X with nothing in flight, waits for that, and decides by a
single write of its own record: the table is kept in the other collection from X on. Then readers'
alias is pointed to it. What comes after X was written by neither, so the two collections are equal
at that moment, and nothing is missing or applied twice.

Whoever dies on the way comes to X again, since X is not confirmed before; the decision is read from
the record then. The alias is pointed again at each start until that is on record, too. An abort and
a decision exclude each other by an advisory lock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Protocol

from cdc_sync.config import Settings
from cdc_sync.errors import SinkError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.exclusive import lock_rebuild
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import (
    PipelineState,
    RebuildState,
    Sink,
    TableRebuild,
    TableState,
    TableVerification,
)
from cdc_sync.sync.control import SwapRequest
from cdc_sync.sync.fingerprints import is_recorded_stale
from cdc_sync.sync.opening import opening
from cdc_sync.sync.planning import recorded_as, settings_in_force
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.source_history import read_identities
from cdc_sync.sync.table_records import TableRecords

log = get_logger(__name__)

#: How long the stream stands for a rebuild that does not come.
WAIT_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.05
#: Where the configuration does not name the collection of a rebuilt table.
OUTDATED_REMEDY: Final = (
    "Replace the configuration file by the one that was given to cdc-sync rebuild --to."
)


class TablesChangedError(Exception):
    """Tables are to be kept otherwise from here on: the pipeline plans them anew."""


class Swaps(Protocol):
    """What becomes of messages of rebuilds."""

    @property
    def follows(self) -> str | None:
        """The pipeline whose requests are met; None: one's own."""
        ...

    async def meet(self, request: SwapRequest, lsn: int, *, settled: bool) -> None:
        """The stream stands at a request, which was committed at ``lsn``; everything before it is
        written, and nothing after it. ``settled``: no table is being read, or is to be read.

        Raises :class:`TablesChangedError` when the stream is to begin anew there.
        """
        ...

    async def compare(self) -> None:
        """The slot was taken. Raises :class:`TablesChangedError` if another process has changed
        how tables are kept since they were planned."""
        ...


class PipelineSwaps:
    """Decides about requests to this pipeline. ``configured`` are its settings as they were given;
    ``collections``: those of its tables, by name, as planned."""

    def __init__(
        self,
        configured: Settings,
        sink: Sink,
        records: TableRecords,
        metrics: Metrics,
        collections: Mapping[str, str],
    ) -> None:
        self._settings = configured
        self._sink = sink
        self._records = records
        self._metrics = metrics
        self._collections = collections

    @property
    def follows(self) -> None:
        """None: its own requests."""
        return

    async def compare(self) -> None:
        """Finish what was begun when tables were taken. Raises :class:`TablesChangedError` if a
        table is on record with another collection than it was planned with."""
        state = await self._records.load()
        await self._check_planned(state)
        for table in state.tables if state is not None else ():
            rebuild = table.rebuild
            if rebuild is None:
                continue
            if rebuild.alias and isinstance(self._sink, ServerSink):
                await self._go_over(self._sink, table, rebuild)
            if rebuild.settings and table.table not in rebuilt_tables(self._settings, state):
                # The configuration says the same by now.
                await self._records.rebuild(table.table, lambda k: replace(k, settings=""))

    async def _check_planned(self, state: PipelineState | None) -> None:
        for table in state.tables if state is not None else ():
            planned = self._collections.get(table.table, table.collection)
            if table.rebuild is not None and planned != table.collection:
                raise TablesChangedError

    async def meet(self, request: SwapRequest, lsn: int, *, settled: bool) -> None:
        """Grant the request if the rebuild on record is ready at this position; wait for that."""
        table = request.planned.name
        sink = self._sink
        if not isinstance(sink, ServerSink):
            self._refuse(table, "an embedded database has no aliases")
            return
        deadline = time.monotonic() + WAIT_SECONDS
        waiting = False
        while True:
            state = await self._records.load()
            # It may have been decided by a try whose answer was lost.
            await self._check_planned(state)
            record = _table(state, table)
            if record is None or _is_answered(record, request.token):
                return
            rebuild = await sink.state.rebuild(self._settings.pipeline.name, table)
            if rebuild is None or rebuild.token != request.token:
                self._refuse(table, "no rebuild with its token is on record")
                return
            if rebuild.phase == "ready":
                if await self._decide(sink, rebuild, lsn):
                    raise TablesChangedError
                return
            if not waiting:
                waiting = True
                log.info("rebuild_awaited", table=table, lsn=str(Lsn(lsn)))
            if rebuild.phase != "requested":
                await self._let_go(rebuild, "it is being removed")
                return
            if time.monotonic() > deadline:
                await self._let_go(rebuild, f"it was not ready within {WAIT_SECONDS:g} s")
                return
            await asyncio.sleep(POLL_SECONDS)

    def _refuse(self, table: str, reason: str) -> None:
        self._metrics.control_requests["invalid"].inc()
        log.warning("request_refused", table=table, reason=reason)

    async def _let_go(self, rebuild: RebuildState, reason: str) -> None:
        """Go on with the old collection, and say so on record."""
        await self._records.rebuild(
            rebuild.table, lambda known: replace(known, answered=rebuild.token)
        )
        log.warning(
            "rebuild_not_taken",
            table=rebuild.table,
            collection=rebuild.collection,
            reason=reason,
        )

    async def _decide(self, sink: ServerSink, rebuild: RebuildState, lsn: int) -> bool:
        """Take the collection, unless the rebuild is being aborted. Returns whether it was."""
        source, pipeline = self._settings.source, self._settings.pipeline.name
        lock = await opening(lock_rebuild, source)
        try:
            # Under the lock, under which alone it is taken away.
            now = await sink.state.rebuild(pipeline, rebuild.table)
            worker = await sink.state.load(rebuild.worker)
            filled = _table(worker, rebuild.table)
            if now is None or now.token != rebuild.token:
                self._refuse(rebuild.table, "no rebuild with its token is on record")
                return False
            if now.phase != "ready" or now.lsn != lsn:
                await self._let_go(rebuild, "it does not stand at this position")
                return False
            if filled is None or not filled.copied or is_recorded_stale(filled.plan_fingerprint):
                await self._let_go(rebuild, "the table is to be read again")
                return False
            if not await self._knows_publication(sink, rebuild.worker, filled):
                await self._let_go(rebuild, "the publication was altered")
                return False
            # Of what was changed before its slot was made, that one's stream brings nothing.
            read_lsn = max(filled.read_lsn, worker.slot_lsn if worker is not None else 0)
            await self._take(sink, rebuild, replace(filled, read_lsn=read_lsn))
        finally:
            lock.close()
        return True

    async def _knows_publication(self, sink: ServerSink, worker: str, filled: TableState) -> bool:
        """Whether the rebuild has read the table since the publication was last altered: what was
        not sent then is in the old collection, once this pipeline has noticed."""
        mark = await sink.state.mark(worker)
        known = dict(mark.publications) if mark is not None else {}
        now = await read_identities(self._settings, [filled.oid])
        return known.get(filled.table) == now.get(filled.oid)

    async def _take(self, sink: ServerSink, rebuild: RebuildState, filled: TableState) -> None:
        pipeline, table = self._settings.pipeline.name, rebuild.table
        # Rows without a point are known before, and those of the old collection forgotten after.
        letters = await sink.state.dead_letters(rebuild.worker)
        await sink.state.park([replace(one, pipeline=pipeline) for one in letters])
        if any(one.table == table for one in await sink.state.verifications(pipeline)):
            # What was verified was the other collection.
            await sink.state.save_verification(TableVerification(pipeline, table))
        await sink.state.drop_ledger(pipeline, table)
        taken = TableRebuild(
            answered=rebuild.token,
            taken=rebuild.token,
            settings=rebuild.settings,
            replaced=rebuild.old,
            alias=rebuild.alias,
        )
        new = replace(filled, rebuild=taken)
        await self._records.rebuilt(new)
        self._metrics.control_requests["rebuild"].inc()
        log.info(
            "collection_taken",
            table=table,
            collection=rebuild.collection,
            replaced=rebuild.old,
            lsn=str(Lsn(rebuild.lsn)),
        )
        await self._go_over(sink, new, taken)

    async def _go_over(self, sink: ServerSink, table: TableState, rebuild: TableRebuild) -> None:
        """Have readers use the collection that was taken. Raises what passes by itself; an alias
        that cannot be changed is logged."""
        await self._forget_letters(sink, table.table, rebuild.taken)
        try:
            await sink.aliases.point(rebuild.alias, table.collection)
        except SinkError as error:
            if is_transient(error):
                raise
            log.error(  # noqa: TRY400 - said in words
                "alias_not_changed",
                table=table.table,
                alias=rebuild.alias,
                collection=table.collection,
                kind=error.kind.value,
                error=error.message,
            )
            return
        await self._records.rebuild(table.table, lambda known: replace(known, alias=""))
        log.info(
            "alias_changed", table=table.table, alias=rebuild.alias, collection=table.collection
        )

    async def _forget_letters(self, sink: ServerSink, table: str, token: str) -> None:
        """Forget dead letters that the rebuild does not have: their ids may be other ones now."""
        pipeline = self._settings.pipeline.name
        rebuild = await sink.state.rebuild(pipeline, table)
        if rebuild is None or rebuild.token != token:
            return
        kept = {one.key for one in await sink.state.dead_letters(rebuild.worker)}
        known = await sink.state.dead_letters(pipeline)
        gone = [(table, one.key) for one in known if one.table == table and one.key not in kept]
        await sink.state.release(pipeline, gone)


def rebuilt_tables(configured: Settings, state: PipelineState | None) -> dict[str, str]:
    """The collections, by table, of tables that are kept by other settings than are configured."""
    known = state.tables if state is not None else ()
    records = ((entry, recorded_as(entry.name, known)) for entry in configured.tables)
    return {
        record.table: record.collection
        for entry, record in records
        if record is not None and settings_in_force(entry, record) is not entry
    }


def _table(state: PipelineState | None, name: str) -> TableState | None:
    if state is None:
        return None
    return next((table for table in state.tables if table.table == name), None)


def _is_answered(record: TableState, token: str) -> bool:
    return record.rebuild is not None and token in (record.rebuild.answered, record.rebuild.taken)
