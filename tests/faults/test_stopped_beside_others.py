"""A table that cannot be followed when the pipeline starts says nothing of how the values of the
others are sent."""

from __future__ import annotations

import pytest

from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


@pytest.mark.requirement("R12")
@pytest.mark.parametrize("type_", ["int", "aclitem[]"])
async def test_values_that_come_in_binary_format_only(
    database18: Database, qdrant: QdrantTarget, type_: str
) -> None:
    """As text the values of ``kind`` are names, which no point takes; the table that has stopped
    may have a column that can only be sent as text, and then it cannot be helped."""
    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, kind regtype, emb vector(3));"
        "INSERT INTO docs SELECT i, 'int', '[1,2,3]' FROM generate_series(1, 20) i;"
        "CREATE TABLE others (id int PRIMARY KEY, emb vector(2))"
    )
    settings = pipeline_settings(database18, qdrant, "docs", "others")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        await life.stop()
    database18.execute(
        f"ALTER TABLE others ADD COLUMN more {type_};"
        f"ALTER PUBLICATION {settings.source.publication} DROP TABLE others"
    )
    async with running(settings, database18, qdrant) as life:
        await life.wait(lambda: len(life.pipeline.stopped_tables) == 1, "the table that stops")
        database18.execute(
            "UPDATE docs SET kind = 'text' WHERE id < 10; DELETE FROM docs WHERE id = 20"
        )
        await life.caught_up()
        assert life.metric("dead_letters_pending", table="public.docs") == 0
        database18.execute(
            f"ALTER PUBLICATION {settings.source.publication} ADD TABLE others;"
            "ALTER TABLE others DROP COLUMN more; INSERT INTO others VALUES (1, '[1,2]')"
        )
        await life.wait(lambda: not life.pipeline.stopped_tables, "the table to start again")
        await life.assert_equal()
