"""``check``: everything that has to be right before the pipeline can run. Changes nothing on either
side."""

from __future__ import annotations

import asyncio

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.preflight import preflight_source
from cdc_sync.postgres.preset_tables import collection_privileges
from cdc_sync.postgres.role_script import Read, role_script
from cdc_sync.postgres.slot import read_slot
from cdc_sync.qdrant.collections import absent
from cdc_sync.qdrant.open import open_sink
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.planning import PipelinePlan, plan_pipeline
from cdc_sync.sync.transport import transport_warnings


def run_checks(settings: Settings) -> list[Finding]:
    """Look at both sides; returns findings in the order in which they were looked at. Raises
    nothing of CdcSyncError."""
    findings = [
        Finding("warning", side, sentence, "", None)
        for side, sentence in transport_warnings(settings)
    ]
    plan = _check_source(settings, findings)
    asyncio.run(_check_sink(settings, plan, findings))
    return findings


def role_sql(settings: Settings, role: str | None = None) -> str:
    """Return the SQL that makes a role with the least rights this pipeline needs, ``role`` by name;
    see :func:`~cdc_sync.postgres.role_script.role_script`.

    Raises :class:`CdcSyncError` when the tables cannot be planned.
    """
    with connect(settings.source) as connection:
        plan = plan_pipeline(connection, settings)
        columns = plan.columns_read
        return role_script(
            connection,
            settings.source,
            [Read(planned.table, columns[planned.table.oid]) for planned in plan.tables],
            plan.published_columns,
            role=role,
            row_filters=plan.row_filters,
            published=plan.publication is not None,
            also_read=[
                privileges
                for table, planned in zip(settings.tables, plan.tables, strict=True)
                if table.preset_collection is not None
                for privileges in collection_privileges(planned.table)
            ],
        )


def _check_source(settings: Settings, findings: list[Finding]) -> PipelinePlan | None:
    try:
        with connect(settings.source) as connection:
            findings.append(_ok("postgres", "connected"))
            return _check_plan(settings, connection, findings)
    except CdcSyncError as error:
        findings.append(_failed("postgres", error))
        return None


def _check_plan(
    settings: Settings, connection: PgConnection, findings: list[Finding]
) -> PipelinePlan | None:
    try:
        plan = plan_pipeline(connection, settings)
    except CdcSyncError as error:
        findings.append(_failed("tables", error))
        return None
    for planned in plan.tables:
        vectors = ", ".join(v.name or "(unnamed)" for v in planned.plan.vectors) or "none"
        findings.append(
            _ok(planned.name, f"becomes collection {planned.plan.collection}, vectors: {vectors}")
        )
        findings += [
            Finding("warning", planned.name, warning, "", None) for warning in planned.warnings
        ]
    try:
        slot = read_slot(connection, settings.source.slot)
        preflight_source(
            connection,
            settings.source,
            tables=[planned.table for planned in plan.tables],
            slot_exists=slot is not None,
            publication=plan.publication,
            wanted=plan.published_columns,
            row_filters=plan.row_filters,
            columns_read=plan.columns_read,
        )
    except CdcSyncError as error:
        findings.append(_failed("postgres", error))
        return plan
    findings.append(
        _ok("publication", f"{settings.source.publication} {_stands(plan.publication is not None)}")
    )
    findings.append(_ok("slot", f"{settings.source.slot} {_stands(slot is not None)}"))
    return plan


def _stands(exists: bool) -> str:
    return "exists" if exists else "will be created by run"


async def _check_sink(
    settings: Settings, plan: PipelinePlan | None, findings: list[Finding]
) -> None:
    try:
        sink = await open_sink(settings.qdrant)
    except CdcSyncError as error:
        findings.append(_failed("qdrant", error))
        return
    try:
        await sink.ping()
        findings.append(_ok("qdrant", f"connected, version {sink.version}"))
        state = await sink.state.load(settings.pipeline.name)
        ours = {table.collection for table in state.tables} if state is not None else set()
        for planned in plan.tables if plan is not None else ():
            found = await sink.inspect(planned.plan)
            subject = f"collection {planned.plan.collection}"
            findings += [Finding("warning", subject, text, "", None) for text in found.warnings]
            if not found.exists and not settings.migration.create_collection:
                findings.append(_failed(subject, absent(planned.plan)))
            elif not found.exists:
                findings.append(_ok(subject, "will be created by run"))
            elif found.points and planned.plan.collection not in ours:
                findings.append(
                    Finding(
                        "error",
                        subject,
                        f"holds {found.points} points that this pipeline has not written",
                        "Choose another collection, or drop this one first.",
                        ErrorKind.COLLECTION_MISMATCH,
                    )
                )
            else:
                findings.append(_ok(subject, f"fits, {found.points} points"))
    except CdcSyncError as error:
        findings.append(_failed("qdrant", error))
    finally:
        await sink.close()


def _ok(subject: str, message: str) -> Finding:
    return Finding("ok", subject, message, "", None)


def _failed(subject: str, error: CdcSyncError) -> Finding:
    return Finding("error", subject, error.message, error.remedy, error.kind)
