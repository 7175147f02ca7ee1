"""Tables whose searches are compared: filled on both sides without a pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from cdc_sync.config import Settings
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.refetch import fetch_rows
from cdc_sync.qdrant.edge import EdgeSink
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Changes
from cdc_sync.rows import RawValue, TextValue
from cdc_sync.sync.planning import plan_pipeline
from cdc_sync.sync.routing import PlannedTable
from tests.support.fix_postgres import Database
from tests.support.fix_qdrant import QdrantTarget


def scene_settings(
    database: Database,
    target: QdrantTarget | str,
    *tables: Mapping[str, object],
) -> Settings:
    """Settings for tables and a target: a server, or the path of an embedded database."""
    sections = []
    for number, table in enumerate(tables):
        name = f"docs{number}" if isinstance(target, str) else target.new_collection_name()
        sections.append({"collection": name, **table})
    qdrant = (
        {"url": f"edge:{target}"}
        if isinstance(target, str)
        else {"url": target.url, "api_key": target.api_key}
    )
    return Settings.model_validate(
        {
            "source": {"url": database.url, "slot": "none", "publication": "none"},
            "qdrant": qdrant,
            "tables": sections,
        }
    )


def planned_tables(settings: Settings) -> tuple[PlannedTable, ...]:
    """The tables as they are planned now."""
    with connect(settings.source) as connection:
        return plan_pipeline(connection, settings).tables


def fill(settings: Settings, target: Settings | None = None) -> list[TablePlan]:
    """Write all rows as points, as ``target`` (by default the same) says; returns the plans."""

    async def write() -> list[TablePlan]:
        sink = await open_sink((target or settings).qdrant)
        try:
            plans = []
            for planned in planned_tables(target or settings):
                await sink.ensure_collection(planned.plan)
                changes = Changes(upserts=_points(settings, planned))
                applied = await sink.writer(planned.plan).apply(changes)
                assert not applied.refused, applied.refused
                plans.append(planned.plan)
            return plans
        finally:
            await sink.close()

    return asyncio.run(write())


def _points(settings: Settings, planned: PlannedTable) -> list[tuple[int | str, list[RawValue]]]:
    plan = planned.plan
    with connect(settings.source) as connection:
        names = ", ".join(f'"{plan.columns[position].name}"::text' for position in plan.key)
        query = f'SELECT {names} FROM "{planned.table.schema}"."{planned.table.name}"'
        keys: list[Sequence[RawValue]] = [
            [TextValue(str(value).encode()) for value in row]
            for row in connection.execute(query.encode()).fetchall()
        ]
        rows = fetch_rows(connection, plan, keys, (), planned.selection)
    point_id = compile_point_id(plan)
    return [(point_id(row), row) for row in rows]


def change(settings: Settings, *, delete: Sequence[int | str] = ()) -> None:
    """Delete points of the first table behind everybody's back."""

    async def write() -> None:
        sink = await open_sink(settings.qdrant)
        try:
            plan = planned_tables(settings)[0].plan
            await sink.writer(plan).apply(Changes(deletes=list(delete)))
        finally:
            await sink.close()

    asyncio.run(write())


def optimize(settings: Settings) -> None:
    """Have an embedded database build its indexes."""

    async def run() -> None:
        sink = await open_sink(settings.qdrant)
        try:
            assert isinstance(sink, EdgeSink)
            for planned in planned_tables(settings):
                # It optimizes what it has opened.
                await sink.inspect(planned.plan)
            await sink.optimize()
        finally:
            await sink.close()

    asyncio.run(run())
