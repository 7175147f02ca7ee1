"""A table that joins a running pipeline, while somebody has written it and not committed."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


def create(database: Database, table: str) -> None:
    database.execute(
        f"CREATE TABLE {table} (id bigint PRIMARY KEY, note text, emb vector(3));"
        f"INSERT INTO {table} SELECT i, 'note', '[1,2,3]' FROM generate_series(1, 9) i"
    )


@pytest.mark.requirement("R39")
async def test_a_writer_that_is_open_across_the_publishing(
    database: Database, qdrant: QdrantTarget
) -> None:
    """What it wrote before the table was published is not sent when it commits, nor seen by a
    snapshot taken before that."""
    create(database, "docs")
    create(database, "added")
    settings = pipeline_settings(database, qdrant, "docs", "added")
    first = settings.model_copy(update={"tables": settings.tables[:1]})
    async with running(first, database, qdrant) as life:
        await life.caught_up()
        await life.stop()
    with database.connect(autocommit=False) as writer:
        writer.execute("INSERT INTO added VALUES (10, 'open', '[4,5,6]')")
        writer.execute("UPDATE added SET note = 'open too' WHERE id = 1")
        async with running(settings, database, qdrant, wait=False) as life:
            await life.wait(
                lambda: database.execute("SELECT count(*) FROM pg_publication_tables")[0][0] == 2,
                "the publishing",
            )
            await life.wait(lambda: life.pipeline._streaming is not None, "the stream")
            # The other table is followed meanwhile.
            database.execute("UPDATE docs SET note = 'changed' WHERE id = 1")
            await asyncio.sleep(1)
            assert life.state == "snapshotting"
            writer.execute("INSERT INTO added VALUES (11, 'after', '[4,5,6]')")
            writer.commit()
            await life.wait_streaming()
            await life.assert_equal()
