"""Opening sinks in tests, and reading back what they wrote."""

from __future__ import annotations

from pydantic import SecretStr

from cdc_sync.config import QdrantSettings
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.sink import Changes, PipelineState, Sink, StoredPoint, TableState, TableWriter
from cdc_sync.rows import PointId, Row
from tests.support.fix_qdrant import QdrantTarget


def settings_of(target: QdrantTarget, **more: object) -> QdrantSettings:
    key = None if target.api_key is None else SecretStr(target.api_key)
    return QdrantSettings.model_validate({"url": target.url, "api_key": key, **more})


async def ready(sink: Sink, plan: TablePlan) -> TableWriter:
    await sink.ensure_collection(plan)
    return sink.writer(plan)


async def content(writer: TableWriter) -> dict[PointId, StoredPoint]:
    """Everything the writer's table has in Qdrant."""
    return {point.id: point async for page in writer.scroll_points(7) for point in page}


def upserts(*items: tuple[PointId, Row]) -> Changes:
    return Changes(upserts=list(items))


def partials(*items: tuple[PointId, Row]) -> Changes:
    return Changes(partials=list(items))


STATE = PipelineState(
    pipeline="p.1",
    slot="slot",
    publication="pub",
    system_identifier="7123456789012345678",
    timeline=3,
    slot_lsn=2**64 - 2,
    tables=(TableState("public.items", "items", "abc", True), TableState("public.b", "b", "d")),
)
