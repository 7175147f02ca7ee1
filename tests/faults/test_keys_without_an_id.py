"""Keys of which no point id can be made: what becomes of the point when a row gets such a key, and
of the row when it gets another."""

from __future__ import annotations

import pytest

from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

#: A text that the migration tool takes for a UUID, of which there is another spelling.
SHARED = "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"
#: Vectors that are TOASTed: updates of the key do not send them.
LONG = 640


def points(life: Running) -> dict[str, object]:
    """The point's payload by the key that it holds."""
    (table,) = life.pipeline.settings.tables
    assert table.collection is not None
    found, _ = life.qdrant.client().scroll(table.collection, with_vectors=True, limit=100)
    assert all(point.vector for point in found)
    return {str((point.payload or {})["id"]): (point.payload or {})["note"] for point in found}


@pytest.mark.requirement("R21")
async def test_a_row_that_gets_such_a_key_and_another(
    database18: Database, qdrant: QdrantTarget
) -> None:
    database18.execute(
        "CREATE TABLE docs (id text PRIMARY KEY, note text, emb vector);"
        f"INSERT INTO docs SELECT i::text, 'old', array_fill(i, ARRAY[{LONG}])::vector"
        " FROM generate_series(1, 3) i"
    )
    settings = pipeline_settings(
        database18,
        qdrant,
        {"name": "docs", "ids": "qdrant-migration", "dimensions": {"emb": LONG}},
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        assert points(life) == {"1": "old", "2": "old", "3": "old"}
        database18.execute(f"UPDATE docs SET id = '{SHARED}' WHERE id = '2'")
        await life.caught_up()
        assert points(life) == {"1": "old", "3": "old"}
        assert life.metric("dead_letters_pending", table="public.docs") == 1
        database18.execute(f"UPDATE docs SET id = '4', note = 'new' WHERE id = '{SHARED}'")
        await life.caught_up()
        assert points(life) == {"1": "old", "3": "old", "4": "new"}
