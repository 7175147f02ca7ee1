"""The end of a rebuild: what is removed after a swap, by an abort, and of the collection that was
replaced; and what can be said of one that is under way."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.exclusive import lock_pipeline, lock_rebuild
from cdc_sync.postgres.slot import SlotInfo, read_slot, retained_wal_bytes
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import RebuildState
from cdc_sync.sync.opening import opening
from cdc_sync.sync.planning import in_force, is_named
from cdc_sync.sync.rebuild import answer_on_record, worker_settings
from cdc_sync.sync.rebuild_begin import publish_as_before, table_on_record
from cdc_sync.sync.uninstall import remove_pipeline

log = get_logger(__name__)

#: How long a process that is told to end may take.
_END_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.25

Say = Callable[[str], None]


async def find_rebuild(settings: Settings, sink: ServerSink, table: str) -> RebuildState | None:
    """The rebuild under way of a table, by its name as in SQL."""
    known = await sink.state.rebuilds(settings.pipeline.name)
    exact = [one for one in known if one.table == table]
    return next(iter(exact or [one for one in known if is_named(table, one.table)]), None)


async def is_taken(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> bool:
    """Whether the pipeline keeps the table in the rebuilt collection."""
    state = await sink.state.load(settings.pipeline.name)
    return bool(rebuild.token) and answer_on_record(state, rebuild.table).taken == rebuild.token


async def is_kept(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> bool:
    """Whether the pipeline keeps the table in the rebuilt collection, be there a record of the
    rebuild or not."""
    state = await sink.state.load(settings.pipeline.name)
    record = table_on_record(rebuild.table, state.tables) if state is not None else None
    return record is not None and record.collection == rebuild.collection


async def is_gone_over(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> bool:
    """Whether the pipeline has moved the readers' alias, too."""
    state = await sink.state.load(settings.pipeline.name)
    answer = answer_on_record(state, rebuild.table)
    return answer.taken == rebuild.token and not answer.alias


async def finish(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> None:
    """Remove what a rebuild needed, once its collection was taken; harmless when repeated. Raises
    as :func:`~cdc_sync.sync.uninstall.remove_pipeline`."""
    await _remove_worker(settings, sink, rebuild)
    await sink.state.drop_rebuild(rebuild.pipeline, rebuild.table)
    log.info("rebuild_finished", table=rebuild.table, collection=rebuild.collection)


async def abort(settings: Settings, sink: ServerSink, rebuild: RebuildState, say: Say) -> None:
    """Remove a rebuild without trace, whatever it has come to; harmless when repeated. A process
    that is at work on it is told to end, and waited for.

    Raises :class:`ConfigError` if its collection has been taken, SLOT_ACTIVE if its process does
    not end.
    """
    lock = await opening(lock_rebuild, settings.source)
    try:
        # It may have asked since.
        rebuild = await sink.state.rebuild(rebuild.pipeline, rebuild.table) or rebuild
        if await is_taken(settings, sink, rebuild):
            raise ConfigError(
                f"the pipeline keeps table {rebuild.table} in collection {rebuild.collection} by "
                "now: there is nothing to abort",
                "Run the same cdc-sync rebuild again without --abort: it removes what it does not "
                "need any more.",
            )
        # From here on it is taken by nobody.
        await sink.state.save_rebuild(dataclasses.replace(rebuild, phase="aborting"))
    finally:
        lock.close()
    for line in await remove_made(settings, sink, rebuild):
        say(line)
    if rebuild.widened:
        await _narrow(settings, sink, rebuild)
        say(f"publication {settings.source.publication}: as before")
    await sink.state.drop_rebuild(rebuild.pipeline, rebuild.table)
    log.info("rebuild_aborted", table=rebuild.table, collection=rebuild.collection)


async def remove_made(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> list[str]:
    """Remove slot, records, alias and collection of a rebuild that nobody has taken, as far as it
    has made them; returns what was done, in sentences. Harmless when repeated."""
    await _remove_worker(settings, sink, rebuild)
    done = [f"slot {rebuild.slot}, and the records of {rebuild.worker}: removed"]
    if rebuild.made_alias and (await sink.aliases.all()).get(rebuild.alias) == rebuild.old:
        await sink.aliases.remove(rebuild.alias)
        done.append(f"alias {rebuild.alias}: removed")
    if rebuild.made_collection:
        await sink.drop(rebuild.collection)
        done.append(f"collection {rebuild.collection}: removed")
    else:
        done.append(f"collection {rebuild.collection}: kept, since the rebuild has not made it")
    return done


async def _narrow(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> None:
    state = await sink.state.load(rebuild.pipeline)
    record = table_on_record(rebuild.table, state.tables) if state is not None else None
    if state is not None and record is not None:
        await asyncio.to_thread(publish_as_before, settings, state, record)


async def _remove_worker(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> None:
    """Remove slot and records of the pipeline that rebuilds, once no process is at work."""
    worker = worker_settings(settings, rebuild)
    deadline = time.monotonic() + _END_SECONDS
    while True:
        try:
            lock = await opening(lock_pipeline, worker.source)
            try:
                await remove_pipeline(worker, sink)
            finally:
                lock.close()
        except SourceError as error:
            if error.kind is not ErrorKind.SLOT_ACTIVE or time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL_SECONDS)
        else:
            return


# -- the collection that was replaced


async def check_droppable(
    settings: Settings, sink: ServerSink, table: str, collection: str
) -> None:
    """Raise :class:`ConfigError` unless a collection is the one that a rebuild of the table has
    replaced, and nothing refers to it any more."""
    state = await sink.state.load(settings.pipeline.name)
    record = table_on_record(table, state.tables) if state is not None else None
    if state is None or record is None:
        raise ConfigError(f"table {table} does not belong to pipeline {settings.pipeline.name!r}")
    replaced = record.rebuild.replaced if record.rebuild is not None else ""
    if not collection or collection != replaced:
        last = f"the last rebuild has replaced {replaced}" if replaced else "it was never rebuilt"
        raise ConfigError(
            f"{collection} is not the collection that {record.table} was kept in before: {last}",
            "Other collections are dropped in Qdrant itself.",
        )
    configured = {entry.collection for entry in in_force(settings, state).tables}
    if collection in {one.collection for one in state.tables} | configured:
        raise ConfigError(f"collection {collection} is in use by the pipeline")
    under_way = await sink.state.rebuilds(settings.pipeline.name)
    if any(collection in (one.old, one.collection) for one in under_way):
        raise ConfigError(
            f"a rebuild of {record.table} is under way",
            "Wait for its end, or remove it with --abort.",
        )
    aliases = await sink.aliases.all()
    pointing = sorted(alias for alias, target in aliases.items() if target == collection)
    if collection in aliases or pointing:
        raise ConfigError(
            f"readers may still use collection {collection}: the alias "
            f"{', '.join(pointing) or collection} stands for it",
            f"Point the alias to {record.collection}, or remove it.",
        )


# -- what can be said


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rebuild is. ``retained_bytes``: WAL that its slot keeps; ``rows`` copied so far,
    None once all are."""

    rebuild: RebuildState
    active: bool
    retained_bytes: int | None
    copied: bool
    rows: int | None
    daemon: bool

    def to_json(self) -> dict[str, object]:
        """As ``--json`` shows it."""
        rebuild = self.rebuild
        return {
            "table": rebuild.table,
            "phase": rebuild.phase,
            "collection": rebuild.collection,
            "replaces": rebuild.old,
            "alias": rebuild.alias,
            "slot": rebuild.slot,
            "running": self.active,
            "retained_bytes": self.retained_bytes,
            "copied": self.copied,
            "rows": self.rows,
            "lsn": str(Lsn(rebuild.lsn)) if rebuild.lsn else None,
            "daemon_running": self.daemon,
        }


async def progress(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> Progress:
    """Look at a rebuild. Errors of either side."""

    def look() -> tuple[SlotInfo | None, int | None, SlotInfo | None]:
        with connect(settings.source, application_name="cdc_sync rebuild") as connection:
            return (
                read_slot(connection, rebuild.slot),
                retained_wal_bytes(connection, rebuild.slot),
                read_slot(connection, settings.source.slot),
            )

    slot, retained, daemon = await asyncio.to_thread(look)
    state = await sink.state.load(rebuild.worker)
    record = table_on_record(rebuild.table, state.tables) if state is not None else None
    ledgers = await sink.state.ledgers(rebuild.worker)
    copied = record is not None and record.copied
    return Progress(
        rebuild,
        slot is not None and slot.active,
        retained,
        copied,
        None if copied else sum(ledger.rows for ledger in ledgers),
        daemon is not None and daemon.active,
    )
