"""Schema events of columns and tables, a test each: what the user sees, that the other table goes
on, and that no row is lost; in the middle of transactions with data, under a writer's load."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings
from tests.support.qdrant_control import QdrantTarget
from tests.support.schema_scene import (
    AFTER,
    BEFORE,
    COLUMNS,
    DIM,
    Load,
    scene,
    settings_for,
)

pytestmark = pytest.mark.usefixtures("tried_seldom", "schema_tables")


async def copied_again(database: Database, qdrant: QdrantTarget, *event: str) -> None:
    """The event has the table read again, without a stop; nothing else is seen of it."""
    async with scene(settings_for(database, qdrant), database, qdrant) as play:
        with Load(database), Load(database, "others"):
            play.execute(*BEFORE, *event, *AFTER)
            await play.wait_copied(1)
        await play.assert_settled()
        assert play.dropped() == 0
        assert play.copies("others") == 0


# -- columns


@pytest.mark.requirement("R31")
async def test_column_added_with_a_default(database18: Database, qdrant: QdrantTarget) -> None:
    """Rows that exist get the value without a message."""
    await copied_again(database18, qdrant, "ALTER TABLE docs ADD COLUMN added text DEFAULT 'given'")


async def test_column_dropped(database18: Database, qdrant: QdrantTarget) -> None:
    await copied_again(database18, qdrant, "ALTER TABLE docs DROP COLUMN label")


async def test_column_renamed(database18: Database, qdrant: QdrantTarget) -> None:
    await copied_again(database18, qdrant, "ALTER TABLE docs RENAME COLUMN label TO title")


async def test_type_changed_to_a_compatible_one(database18: Database, qdrant: QdrantTarget) -> None:
    await copied_again(database18, qdrant, "ALTER TABLE docs ALTER COLUMN n TYPE text")


async def test_key_type_changed_to_one_with_the_same_ids(
    database18: Database, qdrant: QdrantTarget
) -> None:
    await copied_again(database18, qdrant, "ALTER TABLE docs ALTER COLUMN id TYPE int")


@pytest.mark.parametrize(
    ("event", "back", "says"),
    [
        pytest.param(
            "ALTER COLUMN emb TYPE text",
            f"ALTER COLUMN emb TYPE vector({DIM}) USING emb::vector",
            "column emb changed its type from public.vector to text",
            id="vector",
        ),
        pytest.param(
            "ALTER COLUMN id TYPE text",
            "ALTER COLUMN id TYPE bigint USING id::bigint",
            "column id is part of the key and changed its type",
            id="key",
        ),
        pytest.param(
            "ADD COLUMN odd tsquery", "DROP COLUMN odd", "column odd: type tsquery", id="added"
        ),
    ],
)
async def test_type_changed_to_an_incompatible_one(
    database18: Database, qdrant: QdrantTarget, event: str, back: str, says: str
) -> None:
    """The table stops; changed back, it is copied and goes on."""
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            change = f"ALTER TABLE docs {event}"
            late = [s for s in AFTER if "id" not in event or "IN (4" not in s]
            play.execute(*BEFORE, change, "UPDATE docs SET note = 'after'")
            await play.wait_stopped("public.docs", says)
            play.execute("UPDATE docs SET note = 'late'", f"ALTER TABLE docs {back}", *late)
            await play.wait_copied(1)
        await play.assert_settled()


# -- vectors


@pytest.mark.requirement("R32")
async def test_dimension_changed(database18: Database, qdrant: QdrantTarget) -> None:
    """The table stops with the remedy, and says so once; no row is written that was made after."""
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18, "others"):
            play.execute(
                *BEFORE,
                f"ALTER TABLE docs ALTER COLUMN emb TYPE vector({DIM + 1}) USING NULL",
                *AFTER,
            )
            await play.wait_stopped(
                "column emb now has 601 dimensions", remedy='on_dimension_change = "rebuild"'
            )
        await play.others_go_on()
        before = play.dropped()
        assert before > 0
        database18.execute("UPDATE docs SET note = 'dropped' WHERE id = 7")
        await play.life.caught_up()
        assert play.dropped() == before + 1
        with Load(database18):
            play.execute(
                "DELETE FROM docs WHERE id = 8",
                f"ALTER TABLE docs ALTER COLUMN emb TYPE vector({DIM}) USING NULL",
                "DELETE FROM docs WHERE id = 9",
            )
            await play.wait_copied(1)
        await play.assert_settled()


async def test_dimension_changed_with_rebuild(database18: Database, qdrant: QdrantTarget) -> None:
    """With ``on_dimension_change = "rebuild"`` the collection is made anew, and filled."""
    settings = settings_for(database18, qdrant, on_dimension_change="rebuild")
    async with scene(settings, database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            play.execute(
                *BEFORE,
                f"ALTER TABLE docs ALTER COLUMN emb TYPE vector({DIM // 2})"
                f" USING subvector(emb, 1, {DIM // 2})",
                *AFTER,
            )
            await play.wait_copied(1)
        await play.assert_settled()


async def test_dimension_changed_with_rebuild_of_a_shared_collection(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """Points of another table would go with it, so the table stops."""
    database18.execute(f"CREATE TABLE more {COLUMNS}; INSERT INTO more (id) VALUES (1)")
    name = qdrant.new_collection_name()
    settings = pipeline_settings(
        database18,
        qdrant,
        {
            "name": "docs",
            "collection": name,
            "namespace": "docs",
            "on_dimension_change": "rebuild",
        },
        {"name": "more", "collection": name, "namespace": "more"},
        "others",
    )
    async with scene(settings, database18, qdrant) as play:
        play.execute("ALTER TABLE docs ALTER COLUMN emb TYPE vector(8) USING NULL", *AFTER)
        await play.life.wait(lambda: "not made anew" in str(play.table()["error"]), "the refusal")
        await play.wait_stopped("others may have points in it")
        await play.others_go_on()
        database18.execute("INSERT INTO more (id) VALUES (2)")
        play.options["more"] = {"namespace": "more"}
        await play.life.caught_up()
        assert qdrant.client().count(name).count > 2


async def test_vector_column_dropped_and_added_again(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """A collection keeps its vectors, so the table stops until it has the column again."""
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            play.execute(*BEFORE, "ALTER TABLE docs DROP COLUMN emb", *AFTER)
            await play.wait_stopped("vector 'emb'", "not in the plan")
            play.execute(
                "DELETE FROM docs WHERE id = 10",
                f"ALTER TABLE docs ADD COLUMN emb vector({DIM})",
                "DELETE FROM docs WHERE id = 11",
            )
            await play.wait_copied(1)
        database18.execute(f"UPDATE docs SET emb = array_fill(3, ARRAY[{DIM}])::vector")
        await play.assert_settled()


# -- enums


async def test_enum_value_added(database18: Database, qdrant: QdrantTarget) -> None:
    """No row has it yet, so nothing is copied."""
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18):
            database18.execute("ALTER TYPE mood ADD VALUE 'calm' BEFORE 'sad'")
            database18.execute("UPDATE docs SET feeling = 'calm' WHERE id = 1")
        await play.assert_settled()
        assert play.copies() == 0


async def test_enum_value_renamed(database18: Database, qdrant: QdrantTarget) -> None:
    """Every row that has it reads otherwise, without a message."""
    await copied_again(database18, qdrant, "ALTER TYPE mood RENAME VALUE 'sad' TO 'low'")


# -- tables


async def test_table_renamed(database18: Database, qdrant: QdrantTarget) -> None:
    """It goes on into its collection, after a restart too, whichever name is configured."""
    settings = settings_for(database18, qdrant)
    renamed = [s.replace("docs", "papers") for s in AFTER]
    async with scene(settings, database18, qdrant) as play:
        with Load(database18, "others"):
            play.execute(*BEFORE, "ALTER TABLE docs RENAME TO papers", *renamed)
        play.names["docs"] = "papers"
        await play.assert_settled()
        assert play.copies() == 0
    papers = settings.tables[0].model_copy(update={"name": "papers"})
    again = settings.model_copy(update={"tables": [papers, settings.tables[1]]})
    for number, one in enumerate((settings, again)):
        database18.execute(f"DELETE FROM papers WHERE id = {20 + number}")
        async with scene(one, database18, qdrant) as play:
            database18.execute(f"DELETE FROM papers WHERE id = {30 + number}")
            play.names["docs"] = "papers"
            await play.assert_equal()
            assert play.copies() == 0
            assert play.ready()


async def test_table_dropped(database18: Database, qdrant: QdrantTarget) -> None:
    """The table stops, the others go on, after a restart too; its points stay as they were."""
    settings = settings_for(database18, qdrant)
    async with scene(settings, database18, qdrant) as play:
        with Load(database18, "others"):
            play.execute(*BEFORE, "DROP TABLE docs")
            await play.wait_stopped("public.docs was dropped", remedy="configuration")
        await play.others_go_on()
    async with scene(settings, database18, qdrant) as play:
        await play.wait_stopped("docs")
        await play.others_go_on()
        collection = settings.tables[0].collection
        assert collection is not None
        # The moved row was to be read again from the table.
        assert qdrant.client().count(collection).count in (39, 40)


FILL = (
    "INSERT INTO docs SELECT i, 'new ' || i, '', i, 'glad',"
    f" array_fill(i::float4, ARRAY[{DIM}])::vector FROM generate_series(30, 60) i"
)
RECREATE = ("DROP TABLE docs", f"CREATE TABLE docs {COLUMNS}", FILL)


@pytest.mark.requirement("R33")
async def test_table_dropped_and_recreated(database18: Database, qdrant: QdrantTarget) -> None:
    """Our publication takes the new table in, and it is copied; points of the old one leave."""
    async with scene(settings_for(database18, qdrant), database18, qdrant) as play:
        with Load(database18, "others"):
            play.execute(*BEFORE, *RECREATE)
            await play.wait_copied(1)
        with Load(database18):
            await asyncio.sleep(0.3)
        await play.assert_settled()


@pytest.mark.requirement("R33")
async def test_table_dropped_and_recreated_while_the_pipeline_is_down(
    database18: Database, qdrant: QdrantTarget
) -> None:
    settings = settings_for(database18, qdrant)
    async with scene(settings, database18, qdrant) as play:
        await play.assert_settled()
    database18.execute("; ".join(("BEGIN", *BEFORE, *RECREATE, "COMMIT")))
    async with scene(settings, database18, qdrant) as play:
        with Load(database18), Load(database18, "others"):
            await play.wait_copied(1)
        await play.assert_settled()


@pytest.mark.requirement("R33")
async def test_table_dropped_and_recreated_under_a_publication_of_the_user(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """The publication is not ours, so the table stops with the SQL; run it, and the table is
    copied."""
    settings = settings_for(database18, qdrant)
    publication = settings.source.publication
    database18.execute(
        f"CREATE PUBLICATION {publication} FOR TABLE docs, others"
        " WITH (publish_via_partition_root = true)"
    )
    async with scene(settings, database18, qdrant) as play:
        with Load(database18, "others"):
            play.execute(*BEFORE, *RECREATE)
            await play.life.wait(
                lambda: "does not have table" in str(play.table()["error"]), "the reason"
            )
            await play.wait_stopped(publication, remedy=f'ALTER PUBLICATION "{publication}" ADD')
            with Load(database18):
                database18.execute(str(play.table()["remedy"]).partition(";")[0])
                await play.wait_copied(1)
        await play.assert_settled()


async def test_table_replaced_by_another_of_its_name(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """While the pipeline runs it follows the one it knows; at the next start it asks which."""
    settings = settings_for(database18, qdrant)
    async with scene(settings, database18, qdrant) as play:
        play.execute(*BEFORE, "ALTER TABLE docs RENAME TO old", f"CREATE TABLE docs {COLUMNS}")
        database18.execute("DELETE FROM old WHERE id = 30")
        play.names["docs"] = "old"
        await play.assert_equal()
    async with scene(settings, database18, qdrant) as play:
        await play.wait_stopped("not the one that was copied", remedy="Else drop it")
        await play.others_go_on()
        play.execute("DROP TABLE old", "INSERT INTO docs (id, note) VALUES (1, 'x')")
        # The publication is the pipeline's own, which adds the table to it.
        await play.wait_copied(1)
        await play.assert_settled()
