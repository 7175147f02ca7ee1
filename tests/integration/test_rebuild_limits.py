"""Rebuilds and others that run the pipeline, the publication, and what is refused."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from cdc_sync.errors import CdcSyncError, ConfigError
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.sync.rebuild_begin import Order, begin
from cdc_sync.verify.rebuild import Outcome
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import running
from tests.support.qdrant_control import QdrantTarget
from tests.support.rebuild_scene import (
    TABLE,
    abort_rebuild,
    assert_no_trace,
    finish_rebuild,
    left_over,
    make_scene,
    rebuilding,
    sink_of,
    with_table,
)

# -- others that run the pipeline


async def test_a_standby_that_planned_before_takes_over(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    async with (
        running(scene.settings, database18, qdrant) as first,
        running(scene.settings, database18, qdrant, wait=False) as second,
    ):
        await second.wait(lambda: second.state == "standby", "the standby")
        async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
            await rebuild.ended()
        await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
        # Either may have the slot now: the first lets go of it for a moment at the swap.
        await first.stop()
        await second.wait_streaming()
        database18.execute("UPDATE items SET n = n + 1 WHERE id < 20")
        await second.assert_equal(exclude=["body"])
        assert second.pipeline.tables[0].plan.collection == scene.new


async def test_a_rebuild_waits_for_the_index_and_for_a_pipeline(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    states = iter(["grey", "yellow"])

    async def status(self: ServerSink, collection: str) -> str:
        assert collection == scene.new
        return next(states, "green")

    async with running(scene.settings, database18, qdrant) as life:
        await life.stop()
    with mock.patch.object(ServerSink, "status", status):
        async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
            await rebuild.has_said("nothing streams from slot")
            assert any("it is grey" in line for line in rebuild.said)
            async with running(scene.settings, database18, qdrant) as life:
                await rebuild.ended()
                await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
                database18.execute("UPDATE items SET n = n + 1 WHERE id < 20")
                await life.wait(lambda: life.pipeline.settings != scene.settings, "the swap")
                await life.assert_equal(exclude=["body"])


# -- the publication


async def test_columns_that_the_publication_lacks(
    database18: Database, qdrant: QdrantTarget
) -> None:
    columns = ["id", "n", "embedding"]
    scene = make_scene(database18, qdrant, first={"columns": columns}, columns=[*columns, "title"])
    async with running(scene.settings, database18, qdrant) as life:
        async with rebuilding(scene.settings, scene.wanted, scene.alias, swap=False) as rebuild:
            assert await rebuild.ended() is Outcome.FILLED
        assert published(database18) == ["embedding", "id", "n", "title"]
        said = await abort_rebuild(scene.settings)
        assert any("as before" in line for line in said)
        assert published(database18) == ["embedding", "id", "n"]
        await assert_no_trace(database18, qdrant, scene.settings, rebuild.rebuilt.rebuild)
        async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
            await rebuild.ended()
        await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
        await life.wait(lambda: life.pipeline.settings != scene.settings, "the swap")
        database18.execute(
            "UPDATE items SET title = 'other' WHERE id < 20;"
            " INSERT INTO items VALUES (1000, 'late', 'b', 1, '[1,2,3,4]', '[1,2,3]')"
        )
        await life.assert_equal(columns=[*columns, "title"])


def published(database: Database) -> list[str]:
    ((names,),) = database.execute("SELECT attnames FROM pg_publication_tables")
    return sorted(str(name) for name in names)  # type: ignore[attr-defined]


async def test_a_publication_of_others_is_not_changed(
    database18: Database, qdrant: QdrantTarget
) -> None:
    columns = ["id", "n", "embedding"]
    scene = make_scene(database18, qdrant, first={"columns": columns}, columns=[*columns, "title"])
    name = scene.settings.source.publication
    database18.execute(f'CREATE PUBLICATION "{name}" FOR TABLE items (id, n, embedding)')
    async with running(scene.settings, database18, qdrant):
        with pytest.raises(CdcSyncError, match=r"does not publish .title.") as caught:
            async with rebuilding(scene.settings, scene.wanted, scene.alias):
                pass
        assert f'ALTER PUBLICATION "{name}" DROP TABLE' in caught.value.remedy
        assert '("id", "title", "n", "embedding")' in caught.value.remedy
        assert await scene.records() == []
        assert scene.alias_of(scene.old) == []
    assert published(database18) == ["embedding", "id", "n"]


# -- what is refused


#: Changes of the table's section, the alias to ask for, and what is said.
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"collection": None, "exclude": ["body"]}, "alias", "names no other collection"),
    ({"where": "n > 3"}, "alias", "selects other rows"),
    ({"metrics": {"nothing": "dot"}}, "alias", "nothing"),
    ({"collection_config": {"sharding": 3}}, "alias", "sharding"),
    ({}, "new", "is an alias; the new collection needs a name of its own"),
    ({}, "old", "is a collection, and no alias of Qdrant"),
    ({}, "pointing", "stands for"),
]


async def test_what_cannot_be_rebuilt_is_refused_before_anything_is_made(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant)
    other, pointing = qdrant.new_collection_name(), qdrant.new_collection_name("alias")
    names = {"alias": scene.alias, "new": scene.new, "old": scene.old, "pointing": pointing}
    async with running(scene.settings, database18, qdrant), sink_of(scene.settings) as sink:
        client = qdrant.client()
        client.create_collection(other, vectors_config={})
        await sink.aliases.point(pointing, other)
        for changes, alias, message in REFUSED:
            wanted = with_table(scene.wanted, **changes)
            order = Order(scene.settings, wanted, "items", names[alias])
            with pytest.raises(CdcSyncError, match=message):
                await begin(order, sink)
            assert await scene.records() == []
            assert scene.alias_of(scene.old) == []
        assert left_over(database18, scene.settings) == []
        client.delete_collection(other)


async def test_other_differences_are_refused(database18: Database, qdrant: QdrantTarget) -> None:
    scene = make_scene(database18, qdrant)
    database18.execute("CREATE TABLE more (id int PRIMARY KEY)")
    async with running(scene.settings, database18, qdrant):
        source = scene.wanted.source.model_copy(update={"slot": "other"})
        more = [*scene.wanted.tables, scene.wanted.tables[0].model_copy(update={"name": "more"})]
        async with sink_of(scene.settings) as sink:
            for changed, table, message in (
                ({"source": source}, "items", "differ in source.slot"),
                ({"tables": more}, "items", "differ in other tables"),
                ({}, "more", "does not belong to pipeline"),
            ):
                wanted = scene.wanted.model_copy(update=changed)
                with pytest.raises(ConfigError, match=message):
                    await begin(Order(scene.settings, wanted, table, scene.alias), sink)
            record = await begin(Order(scene.settings, scene.wanted, TABLE, scene.alias), sink)
            other = with_table(scene.wanted, exclude=["n"])
            for order in (
                Order(scene.settings, other, "items", scene.alias),
                Order(scene.settings, scene.wanted, "items", "another"),
            ):
                with pytest.raises(ConfigError, match="under way with other settings"):
                    await begin(order, sink)
            again = await begin(Order(scene.settings, scene.wanted, "items", scene.alias), sink)
            assert again == record
        await abort_rebuild(scene.settings)
    await assert_no_trace(database18, qdrant, scene.settings, record)
