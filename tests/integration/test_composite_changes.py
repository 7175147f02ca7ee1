"""A composite type gets, loses or renames attributes while its table is followed: the stream says
nothing of it, and no column has another type."""

from __future__ import annotations

import pytest

from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


@pytest.mark.requirement("R13", "R30")
@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("ADD ATTRIBUTE z text", "(3,4,new)"),
        ("DROP ATTRIBUTE y", "(3)"),
        ("RENAME ATTRIBUTE y TO other", "(3,4)"),
    ],
    ids=["added", "dropped", "renamed"],
)
async def test_a_composite_type_that_is_altered(
    database18: Database, qdrant: QdrantTarget, change: str, value: str
) -> None:
    database18.execute(
        "CREATE TYPE place AS (x int, y int);"
        "CREATE TABLE docs (id bigint PRIMARY KEY, at place, emb vector(3));"
        "INSERT INTO docs SELECT i, row(i, 2)::place, '[1,2,3]' FROM generate_series(1, 20) i"
    )
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        database18.execute("INSERT INTO docs VALUES (30, '(1,2)', '[1,2,3]')")
        await life.caught_up()
        database18.execute(f"ALTER TYPE place {change}")
        database18.execute(f"INSERT INTO docs VALUES (31, '{value}', '[1,2,3]')")
        await life.caught_up()
        await life.wait(
            lambda: (
                life.metric("schema_changes_total", table="public.docs", outcome="resynced") > 0
            ),
            "the table to be read again",
        )
        assert life.metric("dead_letters_pending", table="public.docs") == 0
        # What comes from here on is read by the type as it is now.
        database18.execute(f"INSERT INTO docs VALUES (32, '{value}', '[1,2,3]')")
        await life.assert_equal()
