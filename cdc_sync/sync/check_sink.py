"""The part of ``check`` that looks at Qdrant: the server or directory, and each collection."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Final

from cdc_sync.config import QdrantSettings, Settings
from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.collections import absent
from cdc_sync.qdrant.open import edge_directory, open_sink
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import CollectionState, Sink
from cdc_sync.sync import doctor_qdrant as doctor
from cdc_sync.sync.check_source import SourceFacts
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.known_findings import failed, finding

#: A check does not wait longer for an answer; nor for a count that strict mode makes long.
_ANSWER_SECONDS: Final = 10.0
#: An embedded database takes about so many times what the tables do: vectors, WAL, indexes.
_EDGE_FACTOR: Final = 2


async def check_sink(
    settings: Settings, source: SourceFacts | None, findings: list[Finding]
) -> None:
    """Add what there is to say of Qdrant, and of the collections of ``source``'s tables."""
    try:
        sink = await open_sink(bounded_target(settings))
    except CdcSyncError as error:
        findings.append(failed("qdrant-connection", "qdrant", error))
        return
    try:
        await sink.ping()
        text = f"connected, version {sink.version}"
        findings.append(finding("qdrant-connection", "ok", "qdrant", text))
        await _check_open(settings, sink, source, findings)
    except CdcSyncError as error:
        findings.append(failed("qdrant-connection", "qdrant", error))
    finally:
        await sink.close()


def bounded_target(settings: Settings) -> QdrantSettings:
    """Qdrant's settings, for somebody who does not wait long."""
    patience = min(settings.qdrant.timeout_seconds, _ANSWER_SECONDS)
    return settings.qdrant.model_copy(update={"timeout_seconds": patience})


async def _check_open(
    settings: Settings, sink: Sink, source: SourceFacts | None, findings: list[Finding]
) -> None:
    plans = [planned.plan for planned in source.plan.tables] if source is not None else []
    if isinstance(sink, ServerSink):
        marked = any(plan.marks for plan in plans)
        findings += doctor.server_findings(settings, sink.version, marked)
    state = await sink.state.load(settings.pipeline.name)
    ours = {table.collection for table in state.tables} if state is not None else set()
    empty = []
    for plan in plans:
        found = await _check_collection(settings, sink, plan, ours, findings)
        if found is not None and not found.points:
            empty.append(plan)
        if found is not None and found.exists and isinstance(sink, ServerSink):
            rows = source.rows.get(plan.oid) if source is not None else None
            facts = await sink.examine(plan)
            if facts is not None:
                findings += doctor.collection_findings(settings, plan, facts, rows)
    directory = edge_directory(settings.qdrant)
    if directory is not None:
        _check_disk(directory, empty, source, findings)


async def _check_collection(
    settings: Settings, sink: Sink, plan: TablePlan, ours: set[str], findings: list[Finding]
) -> CollectionState | None:
    """Whether the collection fits. None where it does not, or that took too long."""
    subject = f"collection {plan.collection}"
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            found = await sink.inspect(plan)
    except TimeoutError:
        text = "its points could not be counted in a short time"
        findings.append(finding("collection-facts", "advice", subject, text))
        return None
    except CdcSyncError as error:
        if error.kind not in (ErrorKind.COLLECTION_MISMATCH, ErrorKind.CONFIG):
            raise
        findings.append(failed("collection", subject, error))
        return None
    findings += [
        finding("collection-settings", "warning", subject, text, _as_configured(plan))
        for text in found.warnings
    ]
    if not found.exists and not settings.migration.create_collection:
        findings.append(failed("collection", subject, absent(plan)))
    elif not found.exists:
        findings.append(finding("collection", "ok", subject, "will be created by run"))
    elif found.points and plan.collection not in ours and not settings.migration.adopt:
        findings.append(
            finding(
                "collection",
                "error",
                subject,
                f"holds {found.points} points that this pipeline has not written",
                "Choose another collection, drop this one first, or take it over "
                "(--migration.adopt).",
                ErrorKind.COLLECTION_MISMATCH,
            )
        )
    else:
        findings.append(finding("collection", "ok", subject, f"fits, {found.points} points"))
    return found


def _as_configured(plan: TablePlan) -> str:
    return (
        f"Change it in Qdrant (PATCH /collections/{plan.collection}), or drop the collection and "
        "copy anew; or say in collection_config what it has."
    )


def _check_disk(
    directory: Path, empty: list[TablePlan], source: SourceFacts | None, findings: list[Finding]
) -> None:
    """Room for the collections that are still to be filled."""
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    needed = None
    if source is not None:
        needed = sum(source.bytes.get(plan.oid, 0) for plan in empty) * _EDGE_FACTOR
    findings.append(doctor.disk_finding(str(directory), free, needed))
