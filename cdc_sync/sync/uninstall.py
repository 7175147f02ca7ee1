"""Removing what a pipeline has made on the source, and its records; collections stay."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ErrorKind, ExitCode, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.exclusive import lock_pipeline
from cdc_sync.postgres.publication import drop_publication, read_publication
from cdc_sync.postgres.slot import drop_slot, read_slot
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import PipelineState, Sink
from cdc_sync.sync.opening import opening

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Removed:
    """What was there and is gone. ``publication_kept``: there is one that is not ours."""

    slot: bool
    publication: bool
    publication_kept: bool


async def remove_pipeline(settings: Settings, sink: Sink) -> Removed:
    """Drop the slot, the publication if it is ours, and the records: these last, since a slot
    without records would hold WAL for ever, and nobody would know whose it is.

    Raises :class:`SourceError`, SLOT_ACTIVE while something streams, :class:`ConfigError` while a
    rebuild of one of its tables is under way, and as the state store.
    """
    rebuilds = await sink.state.rebuilds(settings.pipeline.name)
    if rebuilds:
        raise ConfigError(
            f"a rebuild of table {rebuilds[0].table} is under way, which has a slot of its own",
            f"cdc-sync rebuild --abort --table {rebuilds[0].table}",
        )
    state = await sink.state.load(settings.pipeline.name)
    removed = await asyncio.to_thread(_drop, settings, state)
    await sink.state.forget(settings.pipeline.name)
    return removed


def _drop(settings: Settings, state: PipelineState | None) -> Removed:
    source = settings.source
    ours = state is not None and state.owns_publication
    with connect(source) as connection:
        slot = read_slot(connection, source.slot) is not None and drop_slot(connection, source.slot)
        if slot:
            log.info("slot_dropped", slot=source.slot)
        publication = ours and drop_publication(connection, source.publication)
        if publication:
            log.info("publication_dropped", publication=source.publication)
        kept = read_publication(connection, source.publication) is not None
    return Removed(slot, publication, kept)


def uninstall(settings: Settings, confirmed: str, say: Callable[[str], None]) -> int:
    """Remove the pipeline; returns the exit code. ``confirmed``: the slot's name, said once more
    by whoever asks for it (R90).

    Raises :class:`CdcSyncError`: CONFIG if that is another name, SLOT_LOST if there is no record
    that the slot is this pipeline's, and as :func:`remove_pipeline`.
    """
    if confirmed != settings.source.slot:
        raise ConfigError(
            f"the pipeline's slot is {settings.source.slot}, not {confirmed}",
            "Give the slot's name as it is configured (source.slot), to confirm that it may go.",
        )
    return asyncio.run(_uninstall(settings, say))


async def _uninstall(settings: Settings, say: Callable[[str], None]) -> int:
    source, pipeline = settings.source, settings.pipeline.name
    sink = await open_sink(settings.qdrant)
    try:
        lock = await opening(lock_pipeline, source)
        try:
            state = await sink.state.load(pipeline)
            if state is None or state.slot != source.slot:
                raise SourceError(
                    ErrorKind.SLOT_LOST,
                    f"there is no record that the slot {source.slot} belongs to the pipeline "
                    f"{pipeline!r}",
                    f"If nothing else uses it run: SELECT pg_drop_replication_slot('{source.slot}')"
                    ";",
                )
            removed = await remove_pipeline(settings, sink)
        finally:
            await asyncio.to_thread(lock.close)
    finally:
        await sink.close()
    say(f"slot {source.slot}: {'dropped' if removed.slot else 'was gone'}")
    if removed.publication:
        say(f"publication {source.publication}: dropped")
    elif removed.publication_kept:
        say(f"publication {source.publication}: kept, since cdc-sync has not made it")
    say(f"records of pipeline {pipeline}: removed")
    for collection in sorted({table.collection for table in state.tables}):
        say(f"collection {collection}: kept")
    return ExitCode.OK
