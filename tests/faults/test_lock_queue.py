"""Somebody who waits for a lock that a window keeps does not stop everything: workers would wait
behind him, he for the window, and the window for them."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

LEAVES = 4
ROWS_A_LEAF = 100


def create(database: Database) -> None:
    database.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, note text, emb vector(3)) PARTITION BY RANGE (id)"
    )
    for leaf in range(LEAVES):
        first = leaf * ROWS_A_LEAF
        database.execute(
            f"CREATE TABLE docs_{leaf} PARTITION OF docs"
            f" FOR VALUES FROM ({first}) TO ({first + ROWS_A_LEAF})"
        )
    database.execute(
        "INSERT INTO docs SELECT i, 'note', '[1,2,3]'"
        f" FROM generate_series(0, {LEAVES * ROWS_A_LEAF - 1}) i"
    )


LAST = f"docs_{LEAVES - 1}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "statement"),
    [
        ("first copy", f"TRUNCATE {LAST}"),
        pytest.param(
            "resync", "ALTER TABLE docs ADD COLUMN n int DEFAULT 5", marks=pytest.mark.campaign
        ),
        pytest.param("resync", "TRUNCATE docs", marks=pytest.mark.campaign),
        pytest.param("resync", f"VACUUM FULL {LAST}", marks=pytest.mark.campaign),
    ],
)
async def test_a_lock_that_is_waited_for_while_a_window_is_open(
    database18: Database, qdrant: QdrantTarget, phase: str, statement: str
) -> None:
    create(database18)
    settings = pipeline_settings(
        database18,
        qdrant,
        "docs",
        # A batch a second and a half: the statement comes while the first leaf is copied.
        migration={"batch_size": 50, "batch_delay": 700, "num_workers": 1, "window_seconds": 60},
    )
    async with running(settings, database18, qdrant, wait=phase == "resync") as life:
        if phase == "resync":
            await life.caught_up()
            body = {"pipeline": settings.pipeline.name, "table": "public.docs"}
            database18.execute(
                "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)",
                (json.dumps({"resync": body}),),
            )
        await life.wait(lambda: copiers(database18) > 0, "a worker")
        started = time.monotonic()
        await asyncio.to_thread(database18.execute, statement)
        # Not the seconds that the whole window would have taken.
        assert time.monotonic() - started < 15
        database18.execute("INSERT INTO docs (id, note) VALUES (7, 'x') ON CONFLICT DO NOTHING")
        await settled(life)
        await life.assert_equal()


def copiers(database: Database) -> int:
    return len(
        database.execute(
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'cdc_sync copy'"
            " AND datname = current_database() AND query LIKE 'COPY%%'",
            (),
        )
    )


async def settled(life: Running) -> None:
    """Until it streams, and has nothing left to read again."""
    relations = life.pipeline._relations
    assert relations is not None
    await life.wait_streaming()
    await life.caught_up()

    def at_rest() -> bool:
        now = life.pipeline._relations
        return now is not None and not now.wanted

    await life.wait(at_rest, "the end of the copies")
