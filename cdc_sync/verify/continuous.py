"""Verification without end, beside a running pipeline, a few rows a second.

A pass goes through the rows of every table, block by block, and then through the points of its
collection. How far it is among the rows is on record, so a restart goes on from there; the points
are then gone through from the beginning.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError
from cdc_sync.mapping.table import Leaf
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.control import emit_messages
from cdc_sync.qdrant.sink import DeadLetter, Mismatches, Sink, TableVerification
from cdc_sync.sync.control import PREFIX, Request, request_content
from cdc_sync.sync.pipeline import Pipeline
from cdc_sync.sync.resync_request import key_batches
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.data import Asked, plan_tables, reasons
from cdc_sync.verify.source import SourceReader
from cdc_sync.verify.stream import StreamWatch
from cdc_sync.verify.table import How, Sides, TableFindings, TableVerifier

log = get_logger(__name__)

#: Blocks that are read by one statement.
_CHUNK_PAGES: Final = 256
#: Ids that are looked up at once.
_PAGE: Final = 256
#: How often it is put on record how far a pass is, at most.
_SAVE_SECONDS: Final = 10.0
#: Before it is tried again, after an error.
_RETRY_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.5
_PATIENCE_SECONDS: Final = 60.0


async def verify_continuously(pipeline: Pipeline) -> None:
    """Verify the pipeline's tables again and again, until cancelled."""
    await ContinuousVerification(pipeline).run()


class ContinuousVerification:
    """Verifies a pipeline's tables again and again. Run :meth:`run` as a task; cancel it at the
    end, before the pipeline's sink is closed."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._settings: Settings = pipeline.settings
        self._metrics = pipeline.metrics
        self._saved = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._streaming()
            try:
                await self._pass(self._pipeline.sink)
                seconds = self._settings.verify.pause_seconds
            except Exception as error:  # noqa: BLE001 - the pipeline goes on, and so does this
                # At its end the pipeline takes the sink away.
                if self._state() == "streaming":
                    _log_failure(error)
                seconds = _RETRY_SECONDS
            await asyncio.sleep(seconds)

    def _state(self) -> str:
        return str(self._pipeline.board.snapshot()["state"])

    async def _streaming(self) -> None:
        """Wait until the pipeline streams."""
        while True:
            if self._state() == "streaming":
                return
            await asyncio.sleep(_POLL_SECONDS)

    async def _pass(self, sink: Sink) -> None:
        settings = self._settings
        name = settings.pipeline.name
        state = await sink.state.load(name)
        known = {one.table: one for one in await sink.state.verifications(name)}
        for one in known.values():
            self._show(one)
        letters = await sink.state.dead_letters(name)
        asked = Asked(How(rate=settings.verify.rows_per_second, examples=0))
        tables, _ = await asyncio.to_thread(plan_tables, settings, asked, state)
        async with SourceReader(settings.source) as copying, SourceReader(settings.source) as ask:
            sides = Sides(sink, copying, ask, StreamWatch(settings, ask, _PATIENCE_SECONDS))
            # The one that was begun first, then those that were verified longest ago.
            order = sorted(tables, key=lambda one: _urgency(known.get(one.name)))
            for planned in order:
                record = known.get(planned.name) or TableVerification(name, planned.name)
                await self._verify(planned, sides, asked.how, record, letters)

    async def _verify(
        self,
        planned: PlannedTable,
        sides: Sides,
        how: How,
        record: TableVerification,
        letters: list[DeadLetter],
    ) -> None:
        before = record.found
        verifier = TableVerifier(planned, sides, how, reasons(letters, planned), _quiet)
        if not await verifier.begin():
            return
        findings: TableFindings | None = None
        for leaf, start, end in _chunks(planned, record):
            findings = await verifier.verify_blocks(leaf, start, end)
            if self._is_rebuilt(planned):
                return
            record = dataclasses.replace(
                record,
                leaf=leaf.oid,
                relfilenode=leaf.relfilenode,
                block=end if end is not None else max(leaf.pages, start),
                rows=record.rows + _take_rows(findings),
                found=_added(before, findings),
            )
            await self._found(sides, record, findings)
        findings = await verifier.verify_points(_PAGE)
        if self._is_rebuilt(planned):
            return
        record = dataclasses.replace(record, found=_added(before, findings))
        await self._found(sides, record, findings)
        await self._complete(sides.sink, record)

    def _is_rebuilt(self, planned: PlannedTable) -> bool:
        """Whether the table is kept in another collection by now, so that what was found is of one
        that is not followed any more."""
        kept = {one.name: one.plan.collection for one in self._pipeline.tables}
        return kept.get(planned.name, planned.plan.collection) != planned.plan.collection

    async def _found(
        self, sides: Sides, record: TableVerification, findings: TableFindings
    ) -> None:
        """Put on record and on show what was found so far, and have it repaired."""
        self._show(record)
        if self._settings.verify.repair and findings.keys:
            await self._repair(sides.asking, findings)
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._saved = time.monotonic()
            await sides.sink.state.save_verification(record)

    async def _complete(self, sink: Sink, record: TableVerification) -> None:
        found = record.found
        record = TableVerification(
            record.pipeline, record.table, last=found, rows=record.rows, completed=int(time.time())
        )
        log.info(
            "verification_completed",
            table=record.table,
            rows=record.rows,
            missing=found.missing,
            extra=found.extra,
            different=found.different,
        )
        if found != Mismatches():
            log.warning(
                "verification_found",
                table=record.table,
                missing=found.missing,
                extra=found.extra,
                different=found.different,
            )
        record = dataclasses.replace(record, rows=0)
        await sink.state.save_verification(record)
        self._show(record)

    def _show(self, record: TableVerification) -> None:
        table = record.table
        found, last = dataclasses.asdict(record.found), dataclasses.asdict(record.last)
        worst = {kind: max(count, last[kind]) for kind, count in found.items()}
        for kind, count in worst.items():
            self._metrics.verify_mismatches.labels(table, kind).set(count)
        finished = float(record.completed) if record.completed else None
        self._pipeline.board.set_verification(table, **worst, finished=finished)
        if record.completed:
            gauge = self._metrics.verify_last_success_timestamp_seconds
            gauge.labels(table).set(record.completed)

    async def _repair(self, reader: SourceReader, findings: TableFindings) -> None:
        """Ask the pipeline to read rows again. Points whose keys nobody knows are left to
        somebody who looks at them."""
        name = findings.planned.name
        keys = list(dict.fromkeys(findings.keys.values()))
        findings.keys.clear()
        requests = [
            Request(self._settings.pipeline.name, name, batch) for batch in key_batches(keys)
        ]

        def emit(connection: PgConnection) -> None:
            emit_messages(connection, PREFIX, [request_content(request) for request in requests])

        await reader.run(emit)
        log.info("verification_repairs", table=name, keys=len(keys))


def _log_failure(error: Exception) -> None:
    if isinstance(error, CdcSyncError):
        log.warning("verification_failed", kind=error.kind.value, reason=error.message)
    else:
        log.exception("verification_failed", kind="bug", reason=type(error).__name__)


def _urgency(record: TableVerification | None) -> tuple[bool, int]:
    if record is None:
        return True, 0
    return record.leaf == 0, record.completed


def _chunks(planned: PlannedTable, record: TableVerification) -> list[tuple[Leaf, int, int | None]]:
    """What is left of a pass: ranges of blocks, the last of each leaf without an end."""
    chunks: list[tuple[Leaf, int, int | None]] = []
    for leaf in sorted(planned.table.leaves, key=lambda one: one.oid):
        if leaf.oid < record.leaf:
            continue
        first = 0
        if leaf.oid == record.leaf and leaf.relfilenode == record.relfilenode:
            first = record.block
            if first >= leaf.pages:
                continue
        starts = range(first, max(first + 1, leaf.pages), _CHUNK_PAGES)
        chunks += [
            (leaf, start, start + _CHUNK_PAGES if start != starts[-1] else None) for start in starts
        ]
    return chunks


def _take_rows(findings: TableFindings) -> int:
    """The rows that were compared since this was asked last."""
    rows, findings.report.compared = findings.report.compared, 0
    return rows


def _added(before: Mismatches, findings: TableFindings) -> Mismatches:
    report = findings.report
    without_id = sum(findings.without_id.values())
    return Mismatches(
        before.missing + report.missing,
        before.extra + report.extra,
        before.different + report.different - report.missing - report.extra + without_id,
    )


def _quiet(done: int, expected: int, doing: str, different: int) -> None:
    """No progress is shown."""
