"""Repairing what a verification has found: rows are read again, and points without a row removed.

Who writes to the collection is always the pipeline, so that what is written to a point keeps its
order: a running one is asked through the control channel (:mod:`cdc_sync.sync.control`); where none
runs, it is asked too, and then started here until it has caught up. Only where nothing follows the
tables at all, since there is no slot, points are written directly.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ErrorKind, ExitCode, SinkError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.control import emit_messages
from cdc_sync.postgres.exclusive import lock_pipeline
from cdc_sync.postgres.refetch import fetch_rows
from cdc_sync.postgres.slot import SlotInfo, read_slot
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Changes, Sink
from cdc_sync.rows import PointId, Row
from cdc_sync.sync.control import PREFIX, Request, request_content
from cdc_sync.sync.opening import opening
from cdc_sync.sync.resync_request import Waiting, key_batches
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.data import Verified
from cdc_sync.verify.keys import KeyFinder, RawKey
from cdc_sync.verify.source import SourceReader
from cdc_sync.verify.table import TableFindings

Say = Callable[[str], None]

_WRITTEN_POINTS = 500


def repair(settings: Settings, verified: Verified, wait_seconds: float, say: Say) -> bool:
    """Repair what can be, and return whether all of it is done; a running pipeline is waited for
    so long at the most.

    Raises :class:`CdcSyncError` as the pipeline does, where it has to be started here.
    """
    todo = [one for one in verified.findings if one.repairable]
    if not todo:
        say("nothing to repair")
        return True
    slot = _slot(settings)
    if slot is None or slot.lost:
        asyncio.run(_write(settings, todo, say))
        return True
    requests = [request for one in todo for request in _requests(settings, one, say)]
    with connect(settings.source, application_name="cdc_sync verify") as connection:
        lsn = emit_messages(connection, PREFIX, [request_content(r) for r in requests])
    whole = {request.table for request in requests if request.keys is None}
    if slot.active:
        say(f"asked the running pipeline to repair, at {lsn}")
        return asyncio.run(_wait(settings, lsn, whole, wait_seconds, say))
    say(f"no pipeline runs: it is started until it has done the repair, at {lsn}")
    _run(settings)
    return True


def _slot(settings: Settings) -> SlotInfo | None:
    with connect(settings.source, application_name="cdc_sync verify") as connection:
        return read_slot(connection, settings.source.slot)


def _requests(settings: Settings, found: TableFindings, say: Say) -> list[Request]:
    """Keys to read again; the table as a whole where there are points whose keys nobody knows, or
    too many keys."""
    name, pipeline = found.planned.name, settings.pipeline.name
    if found.overflow or found.ids:
        why = "too many rows differ" if found.overflow else "points have no key that is known"
        say(f"{name} is read again as a whole: {why}")
        return [Request(pipeline, name)]
    say(f"{name}: {len(found.keys)} rows are read again")
    keys = list(dict.fromkeys(found.keys.values()))
    return [Request(pipeline, name, batch) for batch in key_batches(keys)]


async def _wait(
    settings: Settings, lsn: Lsn, whole: set[str], wait_seconds: float, say: Say
) -> bool:
    sink: Sink | None = await open_sink(settings.qdrant) if whole else None
    try:
        with connect(settings.source, application_name="cdc_sync verify") as connection:
            waiting = Waiting(settings, connection, sink, wait_seconds, say)
            return await waiting.run(lsn, whole) == ExitCode.OK
    finally:
        if sink is not None:
            await sink.close()


def _run(settings: Settings) -> None:
    """Run the pipeline until it has caught up."""
    # Imported here: the daemon brings much along.
    from cdc_sync.sync.daemon import run_pipeline

    code = run_pipeline(settings, once=True)
    if code != ExitCode.OK:
        raise ConfigError(
            "the repair was stopped before its end",
            "Run the same command again, or cdc-sync run: the requests wait in the WAL.",
        )


# -- without a slot


async def _write(settings: Settings, todo: Sequence[TableFindings], say: Say) -> None:
    """Write points and remove them directly. Nobody can start a pipeline meanwhile."""
    lock = await opening(lock_pipeline, settings.source)
    try:
        sink = await open_sink(settings.qdrant)
        try:
            async with SourceReader(settings.source) as reader:
                for found in todo:
                    await _write_table(sink, reader, found, say)
        finally:
            await sink.close()
    finally:
        lock.close()


def _fetch(connection: PgConnection, *, planned: PlannedTable, keys: Sequence[RawKey]) -> list[Row]:
    return fetch_rows(connection, planned.plan, keys, (), planned.selection)


async def _write_table(sink: Sink, reader: SourceReader, found: TableFindings, say: Say) -> None:
    planned, plan = found.planned, found.planned.plan
    if found.overflow:
        say(f"{found.planned.name}: too many differences to repair at once; repair again after")
    finder, point_id = KeyFinder(planned, reader), compile_point_id(plan)
    ids: list[PointId] = [*found.keys, *found.ids]
    keys = await finder.parse(found.keys)
    writer = sink.writer(plan)
    refused = 0
    for start in range(0, len(ids), _WRITTEN_POINTS):
        some = ids[start : start + _WRITTEN_POINTS]
        unkeyed = [id_ for id_ in some if id_ not in keys]
        keys |= await finder.find(await writer.retrieve(unkeyed))
        wanted = [keys[id_] for id_ in some if id_ in keys]
        rows = await reader.run(functools.partial(_fetch, planned=planned, keys=wanted))
        upserts = {point_id(row): row for row in rows}
        gone = [id_ for id_ in some if id_ not in upserts]
        applied = await writer.apply(Changes(upserts=list(upserts.items()), deletes=gone))
        refused += len(applied.refused)
    await sink.make_durable()
    say(f"{found.planned.name}: {len(ids) - refused} points written or removed")
    if refused:
        raise SinkError(
            ErrorKind.SINK_REFUSED, f"{refused} points of {found.planned.name} were refused"
        )
