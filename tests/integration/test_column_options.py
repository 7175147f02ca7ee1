"""Options of columns from end to end: copied, streamed, known in part, and after DDL."""

from __future__ import annotations

from typing import Final

import pytest
from qdrant_client import models

from cdc_sync.errors import ConfigError
from cdc_sync.postgres.connect import connect
from cdc_sync.sync.planning import plan_pipeline
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

OPTIONS: Final[dict[str, object]] = {
    "exclude": ["secret", "spare"],
    "rename": {"title": "headline", "emb": "dense", "n": "rank"},
    "constants": {"source": "shop", "version": 3, "share": 0.5, "ok": True},
    "drop_nulls": ["note"],
    "numeric_as_string": ["price"],
    "skip_bytea": ["photo"],
}
#: Incompressible, so that it is TOASTed and not sent when it stays as it is.
LONG: Final = "(SELECT string_agg(md5(({0} * 100 + k)::text), '') FROM generate_series(1, 300) k)"


def create_docs(database: Database) -> None:
    database.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, title text, note text, n int, price numeric,"
        " weight numeric, meta jsonb, secret text, photo bytea, thumb bytea, emb vector(8),"
        " spare vector(4));"
        "CREATE INDEX ON docs USING hash (title); CREATE INDEX ON docs (n);"
        "CREATE INDEX ON docs (secret);"
        f"INSERT INTO docs SELECT i, {LONG.format('i')}, CASE WHEN i % 2 = 0 THEN 'note' END, i,"
        " 1.50, 2.50, '{\"a\": [1, null]}', 'canary', '\\x01', '\\x02', '[1,2,3,4,5,6,7,8]',"
        " '[1,2,3,4]' FROM generate_series(1, 12) i"
    )


@pytest.mark.requirement("R19", "R87")
@pytest.mark.parametrize("payload_key", [None, "meta data"])
@pytest.mark.parametrize("target", ["server", "edge"])
def test_copied_and_streamed(
    database: Database, sync_table: SyncTable, target: str, payload_key: str | None
) -> None:
    create_docs(database)
    options = OPTIONS if payload_key is None else {**OPTIONS, "payload_key": payload_key}
    synced = sync_table(database, "docs", target=target, compare_options=options, **options)
    # The title is not sent, nor is the vector written.
    database.execute("UPDATE docs SET n = -n, secret = 'new' WHERE id <= 4")
    database.execute("UPDATE docs SET note = NULL, price = 9.990 WHERE id IN (2, 5)")
    database.execute("UPDATE docs SET id = 100, n = 0 WHERE id = 6")
    database.execute(f"UPDATE docs SET title = {LONG.format(77)}, emb = NULL WHERE id = 7")
    database.execute("UPDATE docs SET title = NULL, n = 1 WHERE id = 8")
    database.execute("DELETE FROM docs WHERE id = 9")
    synced.assert_equal()


@pytest.mark.requirement("R19", "R23")
async def test_a_nested_payload_that_is_known_in_part(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """What an update does not send is kept in the object; where it is not there, the row is read
    again."""
    create_docs(database18)
    table = {"name": "docs", "payload_key": "doc", **OPTIONS}
    settings = pipeline_settings(database18, qdrant, table)
    collection = str(settings.tables[0].collection)
    client = qdrant.client()
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        kept = {"table": "public.docs", "resolution": "kept"}
        refetched = {"table": "public.docs", "resolution": "refetched"}
        # A field that nobody else would write shows that the object was kept, not read again.
        client.set_payload(collection, {"headline": "kept"}, [1], key="doc", wait=True)
        database18.execute("UPDATE docs SET n = 5 WHERE id = 1")
        await life.caught_up()
        (point,) = client.retrieve(collection, [1])
        assert point.payload is not None
        assert (point.payload["doc"]["headline"], point.payload["doc"]["rank"]) == ("kept", 5)
        assert life.metric("unchanged_toast_total", **kept) == 1
        # No object, an object without the field, something that is no object, no point.
        client.overwrite_payload(collection, {"x": 1}, [2], wait=True)
        client.delete_payload(collection, ["doc.headline"], [3], wait=True)
        client.overwrite_payload(collection, {"doc": "text"}, [4], wait=True)
        client.delete(collection, points_selector=[5], wait=True)
        database18.execute("UPDATE docs SET n = 6 WHERE id IN (2, 3, 4, 5)")
        await life.caught_up()
        assert life.metric("unchanged_toast_total", **refetched) == 4
        database18.execute(f"UPDATE docs SET title = {LONG.format(1)} || 'x' WHERE id = 1")
        await life.assert_equal(payload_key="doc", **OPTIONS)


async def test_payload_indexes_are_where_the_fields_are(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_docs(database18)
    settings = pipeline_settings(
        database18, qdrant, {"name": "docs", "payload_key": "doc", **OPTIONS}
    )
    collection = str(settings.tables[0].collection)
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        client = qdrant.client()
        schema = client.get_collection(collection).payload_schema
        assert set(schema) == {"doc.headline", "doc.rank"}
        condition = models.FieldCondition(key="doc.rank", match=models.MatchValue(value=7))
        found = client.count(collection, count_filter=models.Filter(must=[condition]), exact=True)
        assert found.count == 1


@pytest.mark.requirement("R30", "R31")
async def test_ddl_under_the_running_stream(database: Database, qdrant: QdrantTarget) -> None:
    """Renamed and left out columns stay so, new ones are taken; now and after a restart."""
    create_docs(database)
    table = {"name": "docs", "payload_key": "doc", **OPTIONS}
    settings = pipeline_settings(database, qdrant, table)
    async with running(settings, database, qdrant) as life:
        database.execute("ALTER TABLE docs ADD extra text DEFAULT 'x', DROP note")
        database.execute("UPDATE docs SET n = 0 WHERE id < 5")
        options = {**OPTIONS, "payload_key": "doc", "drop_nulls": False}
        await life.wait(
            lambda: (
                life.metric("schema_changes_total", table="public.docs", outcome="resynced") >= 1
            ),
            "the resync",
        )
        await life.assert_equal(**options)
        database.execute("ALTER TABLE docs DROP secret; ALTER TABLE docs ADD secret text")
        database.execute("UPDATE docs SET secret = 'y', n = 1 WHERE id < 5")
        await life.caught_up()
        await life.assert_equal(**options)
        await life.stop()
    # A column that is gone has to be taken out of the configuration, which changes nothing else.
    with connect(settings.source) as connection, pytest.raises(ConfigError, match="drop_nulls"):
        plan_pipeline(connection, settings)
    without = settings.tables[0].model_copy(update={"drop_nulls": False})
    settings = settings.model_copy(update={"tables": [without]})
    async with running(settings, database, qdrant) as life:
        database.execute("UPDATE docs SET n = 2 WHERE id = 1")
        await life.assert_equal(**options)
