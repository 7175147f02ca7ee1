"""A value that the server cannot send in binary format comes under a binary stream: the stream goes
on as text, by itself."""

from __future__ import annotations

import pytest

from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

DOCS = (
    "CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(3));"
    "INSERT INTO docs SELECT i, 'old', '[1,2,3]' FROM generate_series(1, 20) i;"
    "CREATE TABLE others (id int PRIMARY KEY, emb vector(2))"
)
ACL = "'{=r/postgres}'"


@pytest.mark.requirement("R8", "R12")
async def test_a_column_that_is_added(database18: Database, qdrant: QdrantTarget) -> None:
    """Its table stops, since it has no counterpart; the other goes on, and so does the one once the
    column is gone."""
    database18.execute(DOCS)
    settings = pipeline_settings(database18, qdrant, "docs", "others")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        database18.execute("ALTER TABLE others ADD COLUMN acl aclitem[]")
        database18.execute(
            f"INSERT INTO others VALUES (1, '[1,2]', {ACL});"
            "UPDATE docs SET note = 'new', emb = '[3,2,1]' WHERE id <= 10;"
            "DELETE FROM docs WHERE id = 20"
        )
        await life.caught_up()
        await life.wait(lambda: len(life.pipeline.stopped_tables) == 1, "the table that stops")
        database18.execute("ALTER TABLE others DROP COLUMN acl")
        database18.execute(
            "INSERT INTO others VALUES (2, '[2,2]');"
            "UPDATE docs SET note = 'newer', id = 100 + id WHERE id < 5"
        )
        await life.wait(lambda: not life.pipeline.stopped_tables, "the table to start again")
        await life.assert_equal()


@pytest.mark.requirement("R12")
async def test_a_table_of_the_publication_that_is_not_ours(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """What is known of the pipeline's own tables does not tell, so every life meets it anew."""
    database18.execute(f"{DOCS}; ALTER TABLE others ADD COLUMN acl aclitem[]")
    settings = pipeline_settings(database18, qdrant, "docs")
    publication = settings.source.publication
    database18.execute(f"CREATE PUBLICATION {publication} FOR TABLE docs, others")
    for number in range(2):
        async with running(settings, database18, qdrant) as life:
            database18.execute(
                f"INSERT INTO others VALUES ({number}, '[1,2]', {ACL});"
                f"UPDATE docs SET note = 'life {number}' WHERE id = 1"
            )
            await life.assert_equal()
