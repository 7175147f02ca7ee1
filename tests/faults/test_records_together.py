"""Two processes of one pipeline change its record at the same time: a standby that lets a table
join, and the active one, which marks another stale. Neither undoes what the other has written."""

from __future__ import annotations

import asyncio

import pytest

from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import PipelineState, TableState
from cdc_sync.sync.fingerprints import is_recorded_stale
from cdc_sync.sync.table_records import TableRecords
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings
from tests.support.qdrant_control import QdrantTarget

_WAITS = (
    "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
    " WHERE d.datname = current_database() AND locktype = 'advisory' AND NOT granted"
)
_PATIENCE_SECONDS = 60.0


def _table(name: str) -> TableState:
    return TableState(name, name, "options:plan:definition", copied=True)


async def test_no_change_is_lost(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pipeline_settings(database18, qdrant, "docs")
    pipeline = settings.pipeline.name
    ours, theirs = await open_sink(settings.qdrant), await open_sink(settings.qdrant)
    try:
        tables = (_table("public.docs"), _table("public.others"))
        await ours.state.save(PipelineState(pipeline, "slot", "publication", "1", 1, 1, tables))
        reached, go_on = asyncio.Event(), asyncio.Event()
        save = ours.state.save

        async def slow(state: PipelineState) -> None:
            reached.set()
            await go_on.wait()
            await save(state)

        monkeypatch.setattr(ours.state, "save", slow)
        standby = asyncio.create_task(
            TableRecords(ours.state, pipeline, settings.source).all_stale()
        )
        await asyncio.wait_for(reached.wait(), _PATIENCE_SECONDS)
        active = asyncio.create_task(
            TableRecords(theirs.state, pipeline, settings.source).rebuilt(
                TableState("public.others", "another", "options:plan:definition", copied=True)
            )
        )
        for _ in range(3000):
            if active.done() or database18.execute(_WAITS) != [(0,)]:
                break
            await asyncio.sleep(0.02)
        go_on.set()
        await asyncio.gather(standby, active)
        state = await theirs.state.load(pipeline)
    finally:
        await ours.close()
        await theirs.close()
    assert state is not None
    docs, others = state.tables
    assert is_recorded_stale(docs.plan_fingerprint)
    assert others.collection == "another"
