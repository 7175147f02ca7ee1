"""Schema events around a table: partitions, replica identities, publications, privileges and
collections; and what becomes of a stopped table at restarts, requests and crashes."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest
from qdrant_client import models as q

from cdc_sync.errors import CdcSyncError
from cdc_sync.sync import stopped_tables
from cdc_sync.sync.pipeline import Pipeline
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings
from tests.support.qdrant_control import QdrantTarget
from tests.support.schema_scene import (
    AFTER,
    BEFORE,
    COLUMNS,
    DIM,
    Load,
    Scene,
    scene,
    settings_for,
)

pytestmark = pytest.mark.usefixtures("tried_seldom", "schema_tables")

# -- partitions

PARTITIONED = f"""
DROP TABLE docs;
CREATE TABLE docs {COLUMNS} PARTITION BY RANGE (id);
CREATE TABLE docs_low PARTITION OF docs FOR VALUES FROM (0) TO (100);
CREATE TABLE docs_rest PARTITION OF docs DEFAULT;
CREATE TABLE docs_more (LIKE docs INCLUDING ALL);
INSERT INTO docs SELECT i, 'note ' || i, 'label', i, 'sad',
  array_fill(i::float4 / 8 + 1, ARRAY[{DIM}])::vector FROM generate_series(1, 40) i;
INSERT INTO docs_more SELECT i, 'more ' || i, 'label', i, 'sad',
  array_fill(i::float4 / 8 + 1, ARRAY[{DIM}])::vector FROM generate_series(10001, 10040) i;
"""


@pytest.mark.requirement("R34")
async def test_partition_attached(database18: Database, qdrant: QdrantTarget) -> None:
    """Its rows come without a message."""
    database18.execute(PARTITIONED)
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            play.execute(
                *BEFORE,
                "ALTER TABLE docs ATTACH PARTITION docs_more FOR VALUES FROM (10000) TO (20000)",
                *AFTER,
                "UPDATE docs SET note = 'moved' WHERE id = 10001",
            )
            await play.wait_swept()
        await play.assert_settled()


@pytest.mark.requirement("R34")
async def test_partition_detached(database18: Database, qdrant: QdrantTarget) -> None:
    """Its rows leave without a message."""
    database18.execute(PARTITIONED)
    database18.execute(
        "ALTER TABLE docs ATTACH PARTITION docs_more FOR VALUES FROM (10000) TO (20000)"
    )
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            play.execute(
                *BEFORE,
                "DELETE FROM docs WHERE id = 10001",
                "ALTER TABLE docs DETACH PARTITION docs_more",
                *AFTER,
            )
            await play.wait_swept()
        await play.assert_settled()
        assert play.life.metric("orphans_total", table="public.docs") >= 39


# -- replica identity


@pytest.mark.requirement("R15")
async def test_replica_identity_full_and_back(database18: Database, qdrant: QdrantTarget) -> None:
    """Nothing is to be seen of it."""
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18):
            play.execute(*BEFORE, "ALTER TABLE docs REPLICA IDENTITY FULL", *AFTER)
            await asyncio.sleep(0.2)
            play.execute(
                "DELETE FROM docs WHERE id = 30",
                "ALTER TABLE docs REPLICA IDENTITY DEFAULT",
                "DELETE FROM docs WHERE id = 31",
            )
        await play.assert_settled()
        assert play.dropped() == 0


async def test_replica_identity_nothing_and_back(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """Postgres refuses updates and deletes; inserts are dropped until it is put back, and then
    copied."""
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            play.execute(
                *BEFORE,
                "ALTER TABLE docs REPLICA IDENTITY NOTHING",
                "INSERT INTO docs (id, note) VALUES (600, 'unseen')",
            )
            await play.wait_stopped(
                "REPLICA IDENTITY", "NOTHING", remedy="REPLICA IDENTITY DEFAULT"
            )
            play.execute(
                "INSERT INTO docs (id, note) VALUES (601, 'unseen')",
                "ALTER TABLE docs REPLICA IDENTITY DEFAULT",
                *AFTER,
            )
            await play.wait_copied(1)
        await play.others_go_on()
        await play.assert_settled()


async def test_replica_identity_using_index(database18: Database, qdrant: QdrantTarget) -> None:
    """One that covers the key is as good as the primary key; one that does not stops the table."""
    database18.execute(
        "ALTER TABLE docs ALTER COLUMN n SET NOT NULL;"
        "UPDATE docs SET n = id;"
        "CREATE UNIQUE INDEX with_key ON docs (n, id); CREATE UNIQUE INDEX other ON docs (n)"
    )
    new = "INSERT INTO docs (id, note, n) VALUES (600, 'new', 600)"
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        play.execute(*BEFORE, "ALTER TABLE docs REPLICA IDENTITY USING INDEX with_key", new)
        database18.execute("DELETE FROM docs WHERE id = 10")
        await play.assert_settled()
        assert play.dropped() == 0
        play.execute(
            "ALTER TABLE docs REPLICA IDENTITY USING INDEX other", "DELETE FROM docs WHERE id = 11"
        )
        await play.wait_stopped("no longer covers its key column id")
        await play.others_go_on()
        play.execute(
            "DELETE FROM docs WHERE id = 12",
            "ALTER TABLE docs REPLICA IDENTITY USING INDEX with_key",
            "DELETE FROM docs WHERE id = 13",
        )
        await play.wait_copied(1)
        await play.assert_settled()


# -- the publication


@pytest.mark.requirement("R39", "R57")
async def test_table_taken_out_of_the_publication_and_put_back(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """What happens in between is not sent; a transaction that was open all the time is not lost
    either."""
    settings = settings_for(database18, qdrant)
    name = settings.source.publication
    async with scene(settings, database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            with database18.connect(autocommit=False) as slow:
                slow.execute("UPDATE docs SET note = 'slow' WHERE id = 35")
                database18.execute(f"ALTER PUBLICATION {name} DROP TABLE docs")
                await play.wait_stopped("does not have table public.docs", remedy="ADD TABLE")
                database18.execute("DELETE FROM docs WHERE id IN (36, 37)")
                slow.execute("UPDATE docs SET note = 'slower' WHERE id = 34")
                database18.execute(f"ALTER PUBLICATION {name} ADD TABLE docs")
                await asyncio.sleep(1.5)
                # What it wrote meanwhile may not be sent, and no snapshot shows it yet (R39).
                assert play.copies() == 0
                slow.commit()
            await play.wait_copied(1)
        await play.others_go_on()
        await play.assert_settled()


async def test_column_list_narrowed_and_widened(database18: Database, qdrant: QdrantTarget) -> None:
    """A column that is not published leaves the points, and comes back with the list."""
    settings = settings_for(database18, qdrant)
    name = settings.source.publication
    database18.execute(
        f"CREATE PUBLICATION {name} FOR TABLE docs, others WITH (publish_via_partition_root = true)"
    )
    async with scene(settings, database18, qdrant) as play:
        with Load(database18):
            play.execute(
                *BEFORE,
                f"ALTER PUBLICATION {name} SET TABLE docs (id, note, n, feeling, emb), others",
                *AFTER,
            )
            await play.wait_copied(1)
        play.options["docs"] = {"exclude": ["label"]}
        await play.assert_settled()
        copies = play.copies()
        with Load(database18):
            play.execute(
                "DELETE FROM docs WHERE id = 30",
                f"ALTER PUBLICATION {name} SET TABLE docs, others",
                "UPDATE docs SET label = 'new' WHERE id = 31",
            )
            await play.wait_copied(copies + 1)
        play.options.clear()
        await play.assert_settled()


async def test_column_list_without_the_key(database18: Database, qdrant: QdrantTarget) -> None:
    settings = settings_for(database18, qdrant)
    name = settings.source.publication
    async with scene(settings, database18, qdrant) as play:
        database18.execute(f"ALTER PUBLICATION {name} SET TABLE docs (note, n), others")
        await play.wait_stopped('does not publish "id"')
        database18.execute("INSERT INTO docs (id, note) VALUES (700, 'unseen')")
        await play.others_go_on()
        database18.execute(f"ALTER PUBLICATION {name} SET TABLE docs, others")
        await play.wait_copied(1)
        await play.assert_settled()


async def test_publish_list_changed_and_put_back(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """It concerns all tables: all of them stop, and are copied when it is put back."""
    settings = settings_for(database18, qdrant)
    name = settings.source.publication
    async with scene(settings, database18, qdrant) as play:
        database18.execute(f"ALTER PUBLICATION {name} SET (publish = 'insert, update')")
        await play.life.wait(lambda: play.life.metric("tables", state="stopped") == 2, "the stop")
        assert "does not publish delete and truncate" in play.table()["error"]
        assert "SET (publish" in play.table("others")["remedy"]
        database18.execute("DELETE FROM docs WHERE id = 1; DELETE FROM others WHERE id = 1")
        database18.execute(
            f"ALTER PUBLICATION {name} SET (publish = 'insert,update,delete,truncate')"
        )
        await play.wait_copied(1)
        await play.wait_copied(1, "others")
        await play.assert_settled()


# -- privileges


async def test_privilege_revoked_and_granted(database18: Database, qdrant: QdrantTarget) -> None:
    """The stream goes on without SELECT; what has to be read stops the table, with the GRANT."""
    role = database18.create_cdc_role(["docs", "others"])
    settings = pipeline_settings(
        database18, qdrant, "docs", "others", pg_url=role.url, pipeline={"batch_rows": 64}
    )
    name = settings.source.publication
    database18.execute(
        f"CREATE PUBLICATION {name} FOR TABLE docs, others WITH (publish_via_partition_root = true)"
    )
    async with scene(settings, database18, qdrant) as play:
        with Load(database18, "others"):
            database18.execute(f"REVOKE SELECT ON docs FROM {role.name}")
            play.execute(*BEFORE, *AFTER)
            await play.wait_stopped("docs", remedy="GRANT SELECT ON")
            database18.execute("DELETE FROM docs WHERE id = 20")
            database18.execute(f"GRANT SELECT ON docs TO {role.name}")
            await play.wait_copied(1)
        await play.assert_settled()


# -- collections


def replace(qdrant: QdrantTarget, collection: str) -> None:
    """Somebody makes the collection anew, for another model."""
    client = qdrant.client()
    client.delete_collection(collection)
    other = q.VectorParams(size=8, distance=q.Distance.COSINE)
    client.create_collection(collection, vectors_config={"emb": other})


async def test_collection_removed(database18: Database, qdrant: QdrantTarget) -> None:
    """It is made again and filled."""
    settings = settings_for(database18, qdrant)
    collection = settings.tables[0].collection
    assert collection is not None
    async with scene(settings, database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            qdrant.client().delete_collection(collection)
            await play.wait_copied(1)
        await play.assert_settled()


async def test_collection_replaced_by_one_of_another_dimension(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """It is not the rows that are wrong: no dead letters, the table stops."""
    settings = settings_for(database18, qdrant)
    collection = settings.tables[0].collection
    assert collection is not None
    async with scene(settings, database18, qdrant) as play:
        await play.assert_settled()
        with mock.patch.multiple(stopped_tables, RETRY_SECONDS=1.0, FIRST_PAUSE_SECONDS=1.0):
            client = qdrant.client()
            replace(qdrant, collection)
            play.execute(*AFTER, f"UPDATE docs SET emb = array_fill(2, ARRAY[{DIM}])::vector")
            await play.wait_stopped(collection, remedy="drop collection")
            assert play.life.metric("dead_letters_pending", table="public.docs") == 0
            await play.others_go_on()
            client.delete_collection(collection)
            await play.wait_copied(1)
        await play.assert_settled()


# -- what becomes of a stopped table

STOP = "ALTER TABLE docs ALTER COLUMN emb TYPE vector(8) USING NULL"
GO = f"ALTER TABLE docs ALTER COLUMN emb TYPE vector({DIM}) USING NULL"


async def test_stopped_table_at_a_restart(database18: Database, qdrant: QdrantTarget) -> None:
    """It starts stopped and the others go on; cured while the pipeline is down or runs, it is
    copied."""
    settings = settings_for(database18, qdrant)
    async with scene(settings, database18, qdrant) as play:
        play.execute(*BEFORE, STOP, *AFTER)
        await play.wait_stopped("8 dimensions")
        await play.life.caught_up()
    database18.execute("DELETE FROM docs WHERE id = 30; DELETE FROM others WHERE id = 30")
    async with scene(settings, database18, qdrant) as play:
        await play.wait_stopped("docs", remedy="collection")
        await play.others_go_on()
        play.execute("DELETE FROM docs WHERE id = 31", GO, "DELETE FROM docs WHERE id = 32")
        await play.wait_copied(1)
        await play.assert_settled()
        play.execute(STOP, "DELETE FROM docs WHERE id = 33")
        await play.wait_stopped("8 dimensions")
        await play.life.caught_up()
    play.execute("DELETE FROM docs WHERE id = 34", GO, "DELETE FROM docs WHERE id = 35")
    async with scene(settings, database18, qdrant) as play:
        with Load(database18):
            await play.wait_copied(1)
        await play.assert_settled()


async def test_killed_while_a_table_is_stopped(database18: Database, qdrant: QdrantTarget) -> None:
    """When its cause is gone by the next start, only the record tells that changes were
    dropped."""
    settings = settings_for(database18, qdrant)
    async with scene(settings, database18, qdrant) as play:
        play.execute(
            *BEFORE,
            "ALTER TABLE docs REPLICA IDENTITY NOTHING",
            "INSERT INTO docs (id, note) VALUES (600, 'unseen')",
        )
        await play.wait_stopped("NOTHING")
        await play.life.caught_up()
        assert play.dropped() > 0
    database18.execute("ALTER TABLE docs REPLICA IDENTITY DEFAULT")
    async with scene(settings, database18, qdrant) as play:
        await play.assert_settled()
        assert play.copies() == 1


async def test_key_changed_while_the_pipeline_is_down(
    database18: Database, qdrant: QdrantTarget
) -> None:
    settings = settings_for(database18, qdrant)
    async with scene(settings, database18, qdrant) as play:
        await play.assert_settled()
    database18.execute("ALTER TABLE docs ALTER COLUMN id TYPE text")
    async with scene(settings, database18, qdrant) as play:
        await play.wait_stopped("the key of table public.docs, or its type")
        await play.others_go_on()
        database18.execute("ALTER TABLE docs ALTER COLUMN id TYPE bigint USING id::bigint")
        await play.wait_copied(1)
        await play.assert_settled()
        assert play.table()["collection"] == settings.tables[0].collection


async def test_a_migration_ends_with_the_error(database18: Database, qdrant: QdrantTarget) -> None:
    """It ends when everything is copied, so there a table does not stop."""
    settings = settings_for(database18, qdrant)
    async with scene(settings, database18, qdrant) as play:
        await play.assert_settled()
    database18.execute(STOP)
    with pytest.raises(CdcSyncError, match="docs"):
        await asyncio.wait_for(Pipeline(settings).run(asyncio.Event(), once=True), 30)


async def test_refused_at_the_first_start(database18: Database, qdrant: QdrantTarget) -> None:
    """Nothing has been copied, so it is the configuration that is wrong."""
    database18.execute("ALTER TABLE docs ADD COLUMN odd tsquery")
    settings = settings_for(database18, qdrant)
    with pytest.raises(CdcSyncError, match="column odd: type tsquery"):
        async with scene(settings, database18, qdrant):
            pass


async def test_stopped_in_the_middle_of_its_copy(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """Nothing that was copied before counts, whoever goes on."""
    settings = settings_for(database18, qdrant)
    async with scene(settings, database18, qdrant) as play:
        for number in range(3):
            play.execute(
                f"ALTER TABLE docs ADD COLUMN c{number} int DEFAULT 1",
                f"DELETE FROM docs WHERE id = {10 + number}",
            )
            await asyncio.sleep(0.05)
            play.execute(STOP, f"DELETE FROM docs WHERE id = {20 + number}")
            await play.wait_stopped("8 dimensions")
            play.execute(f"DELETE FROM docs WHERE id = {30 + number}", GO)
            await asyncio.sleep(0.05)
        await play.life.caught_up()
    async with scene(settings, database18, qdrant) as play:
        await play.assert_settled()


async def test_other_tables_are_copied_while_one_is_stopped(
    database18: Database, qdrant: QdrantTarget
) -> None:
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        play.execute(STOP, "DELETE FROM docs WHERE id = 1")
        await play.wait_stopped("8 dimensions")
        with Load(database18, "others"):
            database18.execute("ALTER TABLE others ADD COLUMN added text DEFAULT 'given'")
            await play.wait_copied(1, "others")
        await play.assert_equal("others")


async def ask_for(play: Scene, table: str) -> None:
    body = f'{{"resync": {{"pipeline": "{play.life.pipeline.settings.pipeline.name}"'
    body += f', "table": "public.{table}"}}}}'
    play.database.execute("SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (body,))


async def test_resync_asked_for_while_a_table_is_stopped(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """It is tried again at once: here its collection was mended, of which Postgres knows
    nothing."""
    settings = settings_for(database18, qdrant)
    collection = settings.tables[0].collection
    assert collection is not None
    async with scene(settings, database18, qdrant) as play:
        await play.assert_settled()
        client = qdrant.client()
        replace(qdrant, collection)
        play.execute(f"UPDATE docs SET emb = array_fill(2, ARRAY[{DIM}])::vector")
        await play.wait_stopped(collection)
        client.delete_collection(collection)
        database18.execute("DELETE FROM docs WHERE id = 9")
        await ask_for(play, "docs")
        await play.wait_copied(1)
        await play.assert_settled()
