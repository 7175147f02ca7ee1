"""Somebody holds a followed table for long: VACUUM FULL, or an ALTER TABLE that was not
committed."""

from __future__ import annotations

import json

import pytest

from cdc_sync.sync import monitor, planning
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

_WAITING = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'cdc_sync watch'
   AND wait_event_type = 'Lock'
"""


def waiting(life: Running) -> object:
    tables = life.pipeline.board.snapshot()["tables"]
    assert isinstance(tables, list)
    return tables[0]["waiting"]


def retained(life: Running) -> object:
    slot = life.pipeline.board.snapshot()["slot"]
    return slot["retained_bytes"] if isinstance(slot, dict) else None


async def test_the_slot_is_watched_while_a_table_is_locked(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog's views lock what they show: nobody may be blind for that, and no backends may
    pile up on the server."""
    monkeypatch.setattr(monitor, "_LOCK_SECONDS", 0.2)
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, emb vector(3))")
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        with database18.connect(autocommit=False) as other:
            other.execute("LOCK TABLE docs IN ACCESS EXCLUSIVE MODE")
            for _ in range(3):
                before = retained(life)
                # Postgres keeps it for longer than it is confirmed.
                database18.execute(
                    "SELECT pg_logical_emit_message(true, 'load', repeat('x', 20000))"
                )
                await life.wait(lambda old=before: retained(life) != old, "a look at the slot")  # type: ignore[misc]
                waiting = database18.execute(_WAITING)[0][0]
                assert isinstance(waiting, int)
                assert waiting <= 1
        database18.execute(
            "ALTER TABLE docs ADD note text; INSERT INTO docs VALUES (1, '[1,2,3]', 'x')"
        )
        await life.assert_equal()


async def test_the_status_says_that_a_resync_waits_for_a_lock(
    database18: Database, qdrant: QdrantTarget
) -> None:
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, emb vector(3))")
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        body = {"resync": {"pipeline": settings.pipeline.name, "table": "public.docs"}}
        with database18.connect(autocommit=False) as other:
            other.execute("LOCK TABLE docs IN ACCESS EXCLUSIVE MODE")
            database18.execute(
                "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (json.dumps(body),)
            )
            await life.wait(lambda: waiting(life) == "a table is locked", "the reason")
            assert life.metric("tables_waiting") == 1
        await life.wait(lambda: waiting(life) is None, "the end of the wait")
        assert life.metric("tables_waiting") == 0
        await life.assert_equal()


async def test_a_start_waits_for_a_locked_table_and_says_so(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_LOCK_SECONDS", 0.2)
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, emb vector(3))")
    settings = pipeline_settings(
        database18, qdrant, "docs", pipeline={"startup_timeout_seconds": 600}
    )
    with database18.connect(autocommit=False) as other:
        other.execute("LOCK TABLE docs IN ACCESS EXCLUSIVE MODE")
        async with running(settings, database18, qdrant, wait=False) as life:
            await life.wait(
                lambda: life.metric("source_reconnects_total", reason="table_locked") >= 3, "tries"
            )
            assert "lock" in str(life.pipeline.board.snapshot()["source"])
            assert database18.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()"
            ) in ([(0,)], [(1,)])
            other.rollback()
            await life.wait_streaming()
            await life.assert_equal()
