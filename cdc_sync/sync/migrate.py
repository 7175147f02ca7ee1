"""A migration: a pipeline that ends once it has copied and caught up, and what remains of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cdc_sync.config import Settings
from cdc_sync.errors import ExitCode
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.counting import slot_wal_limit_bytes
from cdc_sync.postgres.slot import retained_wal_bytes
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.daemon import run_pipeline
from cdc_sync.sync.pipeline import Pipeline
from cdc_sync.sync.summary import CopySummary, Summarizer
from cdc_sync.sync.uninstall import remove_pipeline

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SlotAfter:
    """The replication slot after a migration.

    ``kept``: it stays, and holds ``retained_bytes`` of WAL already (None: not known);
    ``wal_limit_bytes`` is ``max_slot_wal_keep_size`` (None: unlimited). ``publication_kept`` is
    false if the publication was ours and is removed.
    """

    name: str
    publication: str
    kept: bool
    publication_kept: bool
    retained_bytes: int | None
    wal_limit_bytes: int | None

    def to_json(self) -> dict[str, object]:
        """As ``--json`` shows it."""
        return {
            "name": self.name,
            "kept": self.kept,
            "retained_bytes": self.retained_bytes,
            "wal_limit_bytes": self.wal_limit_bytes,
            "publication": self.publication,
            "publication_kept": self.publication_kept,
        }


@dataclass(frozen=True, slots=True)
class Migration:
    """How a migration ended. ``summary`` and ``slot`` are None if it was stopped before its end."""

    exit_code: int
    summary: CopySummary | None = None
    slot: SlotAfter | None = None


def migrate(settings: Settings, *, restart: bool = False, remove: bool = False) -> Migration:
    """Copy every table, catch up, and end.

    Go on where an earlier migration, or ``run``, stopped; ``restart`` begins anew. ``remove`` takes
    slot, publication (if it is ours) and records away at the end; else they stay, so that ``run``
    goes on without a gap. The exit code is 0 when rows and points agree or the source has been
    written since, DIFFERENCES when they do not agree, and 128 and its number after a signal. Raises
    :class:`CdcSyncError`.
    """
    ended: list[tuple[CopySummary, SlotAfter]] = []

    async def after(pipeline: Pipeline) -> None:
        # The pipeline has closed its own.
        sink = await open_sink(settings.qdrant)
        try:
            summary = await Summarizer(
                settings, sink, pipeline.tables, pipeline.board, pipeline.metrics, live=False
            ).run()
            slot = await (_remove(settings, sink) if remove else _keep(settings))
        finally:
            await sink.close()
        ended.append((summary, slot))

    code = run_pipeline(settings, restart=restart, once=True, after=after)
    if not ended:
        return Migration(code)
    summary, slot = ended[0]
    return Migration(ExitCode.DIFFERENCES if summary.agree is False else ExitCode.OK, summary, slot)


async def _keep(settings: Settings) -> SlotAfter:
    source = settings.source

    def look() -> SlotAfter:
        with connect(source) as connection:
            retained = retained_wal_bytes(connection, source.slot)
            limit = slot_wal_limit_bytes(connection)
        return SlotAfter(source.slot, source.publication, True, True, retained, limit)

    return await asyncio.to_thread(look)


async def _remove(settings: Settings, sink: Sink) -> SlotAfter:
    source = settings.source
    removed = await remove_pipeline(settings, sink)
    return SlotAfter(source.slot, source.publication, False, removed.publication_kept, None, None)
