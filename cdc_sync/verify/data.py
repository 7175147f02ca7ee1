"""``verify``: compares tables with their collections, beside a pipeline that may be running."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import DeadLetter, PipelineState
from cdc_sync.sync.fingerprints import is_recorded_stale
from cdc_sync.sync.planning import PipelinePlan, plan_pipeline
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.report import Report, TableReport
from cdc_sync.verify.source import SourceReader, patiently
from cdc_sync.verify.stream import StreamWatch
from cdc_sync.verify.table import How, Sides, TableFindings, TableVerifier

#: Told of each table what :data:`cdc_sync.verify.table.Progress` is told, after its name.
TableProgress = Callable[[str, int, int, str, int], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the operator asked for. ``tables``: names as in SQL; none: all of them.
    ``patience_seconds``: how long a pipeline may stand still before its changes are not waited for
    any more."""

    how: How
    tables: tuple[str, ...] = ()
    patience_seconds: float = 60.0


@dataclass(slots=True)
class Verified:
    """A report, and what a repair needs."""

    report: Report
    findings: list[TableFindings]


def verify(
    settings: Settings, asked: Asked, progress: TableProgress, before: Verified | None = None
) -> Verified:
    """Compare; ``before``: only what differed then. Changes nothing.

    Raises :class:`ConfigError` for tables that are not the pipeline's, :class:`SourceError` and
    :class:`SinkError` when either side is away.
    """
    return asyncio.run(verify_once(settings, asked, progress, before))


async def verify_once(
    settings: Settings, asked: Asked, progress: TableProgress, before: Verified | None = None
) -> Verified:
    """As :func:`verify`, within an event loop."""
    began = time.monotonic()
    sink = await open_sink(settings.qdrant)
    try:
        name = settings.pipeline.name
        state = await patiently(lambda: sink.state.load(name))
        letters = await patiently(lambda: sink.state.dead_letters(name))
        tables, unplanned = await asyncio.to_thread(plan_tables, settings, asked, state)
        async with SourceReader(settings.source) as copying, SourceReader(settings.source) as ask:
            stream = StreamWatch(settings, ask, asked.patience_seconds)
            report = Report(asked.how.mode, await stream.describe(), unplanned)
            verified = Verified(report, [])
            sides = Sides(sink, copying, ask, stream)
            for planned in tables:
                earlier = _found_before(before, planned)
                if earlier is not None and not earlier.repairable:
                    # Nothing of it was repaired.
                    verified.findings.append(earlier)
                    report.tables.append(earlier.report)
                    continue
                verifier = TableVerifier(
                    planned,
                    sides,
                    asked.how,
                    reasons(letters, planned),
                    _of_table(progress, planned.name),
                )
                found = await (verifier.run() if earlier is None else verifier.again(earlier))
                _note_copy(state, found)
                _note_rebuilt(await patiently(lambda: sink.state.load(name)), found)
                verified.findings.append(found)
                report.tables.append(found.report)
    finally:
        await sink.close()
    report.seconds = time.monotonic() - began
    return verified


def _found_before(before: Verified | None, planned: PlannedTable) -> TableFindings | None:
    if before is None:
        return None
    return next((one for one in before.findings if one.planned.name == planned.name), None)


def _of_table(progress: TableProgress, table: str) -> Callable[[int, int, str, int], None]:
    return lambda done, expected, doing, different: progress(
        table, done, expected, doing, different
    )


def reasons(letters: Sequence[DeadLetter], planned: PlannedTable) -> Mapping[str, str]:
    """Why rows of the table could not be written, by point id."""
    return {letter.key: letter.reason for letter in letters if letter.table == planned.name}


def _note_copy(state: PipelineState | None, found: TableFindings) -> None:
    name, notes = found.planned.name, found.report.notes
    if state is None:
        return
    record = next((one for one in state.tables if one.table == name), None)
    if record is None:
        notes.append("the pipeline has not taken up this table yet")
    elif not record.copied:
        notes.append("its first copy is not complete yet")
    elif is_recorded_stale(record.plan_fingerprint):
        notes.append("it is to be read again as a whole, by the pipeline itself")


def _note_rebuilt(state: PipelineState | None, found: TableFindings) -> None:
    """What was found of a collection that was replaced meanwhile says nothing."""
    name, collection = found.planned.name, found.planned.plan.collection
    for record in state.tables if state is not None else ():
        if record.table != name or record.rebuild is None or record.collection == collection:
            continue
        report = found.report
        report.findings.clear()
        found.keys.clear()
        found.ids.clear()
        report.undecided = max(1, report.undecided)
        report.notes.append(f"it was rebuilt meanwhile, into {record.collection}: verify again")


def plan_tables(
    settings: Settings, asked: Asked, state: PipelineState | None
) -> tuple[list[PlannedTable], list[TableReport]]:
    """The tables to verify, and reports of those that cannot be. Raises as :func:`verify`."""
    # A publication of ours may still lack tables.
    owned = state is None or state.owns_publication
    with connect(settings.source, application_name="cdc_sync verify") as connection:
        plan = plan_pipeline(connection, settings, owned=owned, state=state)
        if asked.tables:
            return _chosen(connection, settings, asked, plan), []
    if asked.how.where is not None and len(plan.tables) + len(plan.stopped) != 1:
        raise ConfigError("a predicate is of one table", "Name it with --table.")
    unplanned = []
    for stopped in plan.stopped:
        report = TableReport(stopped.name, "", asked.how.examples)
        report.undecided = 1
        report.notes.append(f"it could not be compared: {stopped.error.message}")
        unplanned.append(report)
    return list(plan.tables), unplanned


def _chosen(
    connection: PgConnection, settings: Settings, asked: Asked, plan: PipelinePlan
) -> list[PlannedTable]:
    planned = {table.plan.oid: table for table in plan.tables}
    for stopped in plan.stopped:
        if any(find_table(connection, name).oid == stopped.oid for name in asked.tables):
            raise stopped.error
    oids = []
    for name in asked.tables:
        oid = find_table(connection, name).oid
        if oid not in planned:
            listed = ", ".join(sorted(table.name for table in planned.values()))
            raise ConfigError(
                f"table {name} does not belong to pipeline {settings.pipeline.name!r}",
                f"Its tables are: {listed}.",
            )
        oids.append(oid)
    if asked.how.where is not None and len(set(oids)) != 1:
        raise ConfigError("a predicate is of one table", "Name one with --table.")
    return [planned[oid] for oid in dict.fromkeys(oids)]
