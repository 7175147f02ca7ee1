"""``check``: everything that has to be right before the pipeline can run, and what will cost
something later. Changes nothing on either side.

What is read costs nothing on a large database: catalogs, a few blocks of each table, no counts.
"""

from __future__ import annotations

import asyncio

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.preset_tables import collection_privileges
from cdc_sync.postgres.role_script import Read, role_script
from cdc_sync.qdrant.open import open_sink
from cdc_sync.sync.check_sink import bounded_target, check_sink
from cdc_sync.sync.check_source import check_source
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.known_findings import finding
from cdc_sync.sync.planning import in_force, plan_pipeline
from cdc_sync.sync.swaps import OUTDATED_REMEDY, rebuilt_tables
from cdc_sync.sync.transport import transport_warnings


def run_checks(settings: Settings) -> list[Finding]:
    """Look at both sides; returns findings in the order in which they were looked at. Raises
    nothing of CdcSyncError."""
    findings = [
        finding(f"{side}-transport", "warning", side, sentence)
        for side, sentence in transport_warnings(settings)
    ]
    settings = asyncio.run(_in_force(settings, findings))
    source = check_source(settings, findings)
    asyncio.run(check_sink(settings, source, findings))
    return findings


async def _in_force(settings: Settings, findings: list[Finding]) -> Settings:
    """The settings with those of tables that were rebuilt since; as they are where Qdrant does not
    answer, which is said elsewhere."""
    if settings.qdrant.url.startswith("edge:"):
        return settings
    try:
        sink = await open_sink(bounded_target(settings))
    except CdcSyncError:
        return settings
    try:
        state = await sink.state.load(settings.pipeline.name)
        effective = in_force(settings, state)
    except CdcSyncError:
        return settings
    finally:
        await sink.close()
    for table, collection in rebuilt_tables(settings, state).items():
        text = f"{table} was rebuilt and is kept in {collection}, which is not configured"
        findings.append(finding("rebuilt-table", "warning", table, text, OUTDATED_REMEDY))
    return effective


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
