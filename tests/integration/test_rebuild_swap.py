"""The swap of a rebuild, and what may come in between: other columns and vectors, aborts, requests
that nobody made, a pipeline that does not wait, a standby, restarts with the old configuration."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any
from unittest import mock

import pytest

from cdc_sync.errors import ConfigError, ErrorKind, SinkError
from cdc_sync.qdrant.aliases import Aliases
from cdc_sync.sync import swaps
from cdc_sync.sync.control import PREFIX, RebuildMessage, SwapRequest, rebuild_content
from cdc_sync.sync.rebuild import RebuildStand
from cdc_sync.sync.rebuild_begin import Order, begin
from cdc_sync.sync.rebuild_end import check_droppable, is_gone_over
from cdc_sync.sync.swaps import PipelineSwaps
from cdc_sync.sync.uninstall import remove_pipeline
from cdc_sync.verify import rebuild as conducting
from cdc_sync.verify.data import Verified, verify_once
from cdc_sync.verify.rebuild import Outcome
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.rebuild_scene import (
    TABLE,
    abort_rebuild,
    assert_no_trace,
    finish_rebuild,
    left_over,
    make_scene,
    notices,
    rebuilding,
    sink_of,
    swapped,
    until,
    with_table,
)


@pytest.mark.requirement("R49")
async def test_other_columns_names_metrics_ids_and_collection(
    database18: Database, qdrant: QdrantTarget
) -> None:
    mapping: dict[str, Any] = {
        "exclude": ["body"],
        "rename": {"small": "tiny", "title": "headline"},
        "metrics": {"embedding": "euclid"},
        "ids": "qdrant-migration",
        "constants": {"made": "anew"},
    }
    config = {
        "shard_number": 2,
        "on_disk_payload": True,
        "quantization_config": {"scalar": {"type": "int8", "always_ram": True}},
    }
    scene = make_scene(database18, qdrant, **mapping, collection_config=config)
    options = {key: mapping[key] for key in ("exclude", "rename", "metrics", "ids", "constants")}
    async with swapped(scene, database18) as life:
        database18.execute(
            "UPDATE items SET n = n + 1 WHERE id < 20; DELETE FROM items WHERE id > 50;"
            " INSERT INTO items VALUES (1000, 'late', 'b', 1, '[1,2,3,4]', '[1,2,3]')"
        )
        await life.assert_equal(**options)
        found = qdrant.client().get_collection(scene.new).config
        assert found.quantization_config is not None
        assert set(found.params.vectors) == {"embedding", "tiny"}  # type: ignore[arg-type]
        assert scene.alias_of(scene.new) == [scene.alias]
        assert scene.alias_of(scene.old) == []
        assert qdrant.client().count(scene.old).count == 60
        (notice,) = notices(life)
        assert TABLE in notice["title"]
        assert scene.new in notice["text"]
        # Whoever can read the token can write the message again; it counts once, at its place.
        async with sink_of(scene.settings) as sink:
            state = await sink.state.load(scene.settings.pipeline.name)
        assert state is not None
        taken = state.tables[0].rebuild
        assert taken is not None
        message = RebuildMessage(scene.settings.pipeline.name, TABLE, taken.taken)
        emit(database18, rebuild_content(message))
        database18.execute("UPDATE items SET n = 5 WHERE id = 1")
        await life.assert_equal(**options)
        assert life.metric("control_requests_total", outcome="rebuild") == 1


async def test_a_restart_with_either_configuration_goes_on(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    async with swapped(scene, database18):
        pass
    for settings, count in ((scene.settings, 1), (scene.wanted, 0), (scene.wanted, 0)):
        async with running(settings, database18, qdrant) as life:
            database18.execute("UPDATE items SET n = n + 1 WHERE id < 20")
            await life.assert_equal(exclude=["body"])
            assert len(notices(life)) == count
            assert life.pipeline.tables[0].plan.collection == scene.new
    # The file has been replaced: the old one is another configuration now.
    with pytest.raises(ConfigError, match="not the one its collection was filled by"):
        async with running(scene.settings, database18, qdrant):
            pass


@pytest.mark.campaign
async def test_copying_anew_with_the_old_file_stays_with_the_new_collection(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    async with swapped(scene, database18):
        pass
    for restart in (True, False):
        async with running(scene.settings, database18, qdrant, restart=restart) as life:
            database18.execute("UPDATE items SET n = n + 1 WHERE id < 20")
            await life.assert_equal(exclude=["body"])
            assert life.pipeline.tables[0].plan.collection == scene.new


async def test_one_rebuild_after_the_other(database18: Database, qdrant: QdrantTarget) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    async with swapped(scene, database18) as life:
        third = qdrant.new_collection_name()
        wanted = with_table(scene.settings, collection=third, exclude=["title"])
        async with rebuilding(scene.settings, wanted, scene.alias) as rebuild:
            await rebuild.ended()
        await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
        assert rebuild.rebuilt.rebuild.old == scene.new
        await life.wait(lambda: life.pipeline.settings.tables[0] == wanted.tables[0], "swap")
        database18.execute("UPDATE items SET n = n + 1 WHERE id < 20")
        await life.assert_equal(exclude=["title"])
        assert scene.alias_of(third) == [scene.alias]


@pytest.mark.campaign
async def test_an_alias_that_is_configured_as_the_collection(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant, first={"rename": {"title": "headline"}})
    first, readers = scene.old, scene.alias
    async with running(scene.settings, database18, qdrant):
        pass
    physical = qdrant.new_collection_name("physical")
    # The same configuration, with its collection behind an alias of that name.
    client = qdrant.client()
    client.delete_collection(first)
    fresh = pipeline_settings(
        database18,
        qdrant,
        {"name": "items", "collection": physical},
    )
    async with running(fresh, database18, qdrant):
        pass
    async with sink_of(fresh) as sink:
        await sink.aliases.point(readers, physical)
        state = await sink.state.load(fresh.pipeline.name)
    assert state is not None
    behind = with_table(fresh, collection=readers)
    again = behind.model_copy(
        update={"source": behind.source.model_copy(update={"slot": f"{fresh.source.slot}_a"})}
    )
    again = again.model_copy(
        update={
            "pipeline": again.pipeline.model_copy(update={"name": f"{fresh.pipeline.name}.a"}),
            "migration": again.migration.model_copy(update={"adopt": True}),
        }
    )
    wanted = with_table(again, collection=qdrant.new_collection_name(), exclude=["body"])
    async with running(again, database18, qdrant) as life:
        async with rebuilding(again, wanted, readers) as rebuild:
            assert rebuild.rebuilt.rebuild.old == physical
            await rebuild.ended()
        await finish_rebuild(again, rebuild.rebuilt.rebuild)
        await life.wait(lambda: life.pipeline.settings.tables[0] == wanted.tables[0], "swap")
        database18.execute("UPDATE items SET n = -1 WHERE id < 20")
        await life.assert_equal(exclude=["body"])
        payload = client.retrieve(physical, [1])[0].payload
        assert payload is not None
        assert payload["n"] != -1


async def test_a_table_that_has_stopped_is_rebuilt(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """Another model makes vectors of another dimension: the table stops, and readers have what it
    was until the rebuild is there."""
    scene = make_scene(database18, qdrant)
    async with running(scene.settings, database18, qdrant) as life:
        database18.execute(
            "ALTER TABLE items ALTER embedding TYPE vector(5)"
            " USING (rtrim(embedding::text, ']') || ',0.5]')::vector(5)"
        )
        database18.execute("UPDATE items SET n = 5 WHERE id = 1")
        await life.wait(lambda: bool(life.pipeline.stopped_tables), "the stop")
        async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
            await rebuild.ended()
        await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
        await life.wait(lambda: life.pipeline.settings != scene.settings, "the swap")
        database18.execute("UPDATE items SET n = 6 WHERE id = 2")
        await life.assert_equal()
        assert life.pipeline.stopped_tables == []


# -- what is not taken


def emit(database: Database, content: bytes, transactional: bool = True) -> None:
    database.execute(
        "SELECT pg_logical_emit_message(%s, %s, %s::bytea)", (transactional, PREFIX, content)
    )


@pytest.mark.requirement("R49")
async def test_forged_requests_do_nothing(database18: Database, qdrant: QdrantTarget) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    name = scene.settings.pipeline.name
    async with running(scene.settings, database18, qdrant) as life:
        async with rebuilding(scene.settings, scene.wanted, scene.alias, swap=False) as rebuild:
            assert await rebuild.ended() is Outcome.FILLED
        (record,) = await scene.records()
        token = secrets.token_hex(16)
        for message in (
            RebuildMessage(name, TABLE, token),
            RebuildMessage(name, TABLE, "0" * 32),
            RebuildMessage(name, "public.others", token),
            RebuildMessage("another", TABLE, token),
        ):
            emit(database18, rebuild_content(message))
        emit(database18, rebuild_content(RebuildMessage(name, TABLE, "")))
        emit(database18, rebuild_content(RebuildMessage(name, TABLE, token)), transactional=False)
        emit(database18, b'{"rebuild": {"pipeline": "x"}}')
        emit(database18, b'{"rebuild": [], "resync": {}}')
        database18.execute("UPDATE items SET n = 5 WHERE id = 1")
        await life.assert_equal()
        assert life.metric("control_requests_total", outcome="rebuild") == 0
        assert life.metric("control_requests_total", outcome="unknown_table") == 1
        assert life.metric("control_requests_total", outcome="invalid") == 6
        assert await scene.records() == [record]
        assert scene.alias_of(scene.old) == [scene.alias]
        assert life.pipeline.tables[0].plan.collection == scene.old
        # Many of them cost no more than a few.
        for _ in range(50):
            emit(database18, rebuild_content(RebuildMessage(name, TABLE, token)))
        await life.caught_up()
        assert life.metric("control_requests_total", outcome="limited") >= 40
        await abort_rebuild(scene.settings)
    await assert_no_trace(database18, qdrant, scene.settings, record)


async def test_a_pipeline_that_waits_in_vain_goes_on_and_is_asked_again(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    meet, late = RebuildStand.meet, [True]

    async def meet_late(
        self: RebuildStand, request: SwapRequest, lsn: int, *, settled: bool
    ) -> None:
        if late[0]:
            late[0] = False
            async with sink_of(scene.settings) as sink:
                for _ in range(600):
                    state = await sink.state.load(scene.settings.pipeline.name)
                    if state is not None and state.tables[0].rebuild is not None:
                        break
                    await asyncio.sleep(0.1)
        await meet(self, request, lsn, settled=settled)

    with (
        mock.patch.object(swaps, "WAIT_SECONDS", 0.3),
        mock.patch.object(conducting, "_RETRY_SECONDS", 0.1),
        mock.patch.object(RebuildStand, "meet", meet_late),
    ):
        async with running(scene.settings, database18, qdrant) as life:
            async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
                # From its second request on it has time.
                await life.wait(lambda: not late[0], "the first request")
                database18.execute("UPDATE items SET n = 5 WHERE id = 1")
                await asyncio.sleep(0.5)
                swaps.WAIT_SECONDS = 60.0  # type: ignore[misc]
                await rebuild.ended()
            assert any("asked again" in line for line in rebuild.said)
            await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
            await life.wait(lambda: life.pipeline.settings != scene.settings, "the swap")
            database18.execute("UPDATE items SET n = 6 WHERE id = 2")
            await life.assert_equal(exclude=["body"])
            assert life.metric("control_requests_total", outcome="rebuild") == 1
    assert left_over(database18, scene.settings) == []


async def test_a_collection_that_differs_is_not_taken(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    async with running(scene.settings, database18, qdrant) as life:
        async with rebuilding(scene.settings, scene.wanted, scene.alias, swap=False) as rebuild:
            assert await rebuild.ended() is Outcome.FILLED
        qdrant.client().delete(scene.new, [3, 4])
        async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
            assert await rebuild.ended() is Outcome.DIFFERENT
        report = rebuild.rebuilt.report
        assert report is not None
        assert report.tables[0].missing == 2
        assert scene.alias_of(scene.old) == [scene.alias]
        assert life.pipeline.tables[0].plan.collection == scene.old
        record = rebuild.rebuilt.rebuild
        await abort_rebuild(scene.settings)
    await assert_no_trace(database18, qdrant, scene.settings, record)


async def test_dead_letters_go_over(database18: Database, qdrant: QdrantTarget) -> None:
    """Rows that neither collection can have do not keep the swap from happening, and stay dead
    letters, by the ids of the new collection."""
    loose = {"dimensions": {"loose": 3}}
    scene = make_scene(database18, qdrant, first=loose, namespace="items")
    database18.execute(
        "ALTER TABLE items ADD COLUMN loose vector; UPDATE items SET loose = '[1,2,3]';"
        " UPDATE items SET loose = '[1]' WHERE id IN (7, 8)"
    )
    name = scene.settings.pipeline.name
    async with swapped(scene, database18) as life:
        async with sink_of(scene.settings) as sink:
            letters = await sink.state.dead_letters(name)
            assert sorted(one.key_values or () for one in letters) == [("7",), ("8",)]
            assert not {one.key for one in letters} & {"7", "8"}
        database18.execute("UPDATE items SET loose = '[3,2,1]' WHERE id = 7")
        await life.caught_up()
        async with sink_of(scene.settings) as sink:
            (letter,) = await sink.state.dead_letters(name)
            assert letter.key_values == ("8",)
        assert qdrant.client().count(scene.new).count == 59


# -- aborts


async def test_an_abort_before_anything_runs(database18: Database, qdrant: QdrantTarget) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    async with running(scene.settings, database18, qdrant):
        async with sink_of(scene.settings) as sink:
            order = Order(scene.settings, scene.wanted, "items", scene.alias)
            record = await begin(order, sink)
            assert scene.alias_of(scene.old) == [scene.alias]
            # It holds a slot soon, so the pipeline cannot be taken away now.
            with pytest.raises(ConfigError, match=r"rebuild of table public\.items is"):
                await remove_pipeline(scene.settings, sink)
        await abort_rebuild(scene.settings)
    await assert_no_trace(database18, qdrant, scene.settings, record)


@pytest.mark.parametrize("kept", ["alias", "collection"])
async def test_an_abort_keeps_what_was_there(
    database18: Database, qdrant: QdrantTarget, kept: str
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    client = qdrant.client()
    async with running(scene.settings, database18, qdrant):
        if kept == "alias":
            async with sink_of(scene.settings) as sink:
                await sink.aliases.point(scene.alias, scene.old)
        else:
            vectors = client.get_collection(scene.old).config.params.vectors
            client.create_collection(scene.new, vectors_config=vectors)
        async with rebuilding(scene.settings, scene.wanted, scene.alias, swap=False) as rebuild:
            assert await rebuild.ended() is Outcome.FILLED
        said = await abort_rebuild(scene.settings)
    assert client.collection_exists(scene.new) == (kept == "collection")
    assert scene.alias_of(scene.old) == ([scene.alias] if kept == "alias" else [])
    assert any(f"{scene.new}: kept" in line for line in said) == (kept == "collection")
    assert left_over(database18, scene.settings) == []
    assert await scene.records() == []


@pytest.mark.parametrize(
    "phase",
    ["copying", pytest.param("streaming", marks=pytest.mark.campaign), "verifying", "standing"],
)
async def test_an_abort_while_it_is_at_work(
    database18: Database, qdrant: QdrantTarget, phase: str
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    meet, standing, go = PipelineSwaps.meet, asyncio.Event(), asyncio.Event()

    async def meet_later(
        self: PipelineSwaps, request: SwapRequest, lsn: int, *, settled: bool
    ) -> None:
        standing.set()
        await go.wait()
        await meet(self, request, lsn, settled=settled)

    migration = {"batch_delay": 300 if phase == "copying" else 0, "batch_size": 10}
    worker = scene.settings.model_copy(
        update={"migration": scene.settings.migration.model_copy(update=migration)}
    )
    wanted = scene.wanted.model_copy(update={"migration": worker.migration})
    async with running(scene.settings, database18, qdrant) as life:
        with (
            mock.patch.object(PipelineSwaps, "meet", meet_later),
            mock.patch.object(
                conducting, "verify_once", verify_for_ever if phase == "verifying" else verify_once
            ),
        ):
            async with rebuilding(worker, wanted, scene.alias, swap=phase == "standing") as rebuild:
                if phase == "standing":
                    await asyncio.wait_for(standing.wait(), 60)
                    await until(scene.is_ready)
                elif phase == "copying":
                    await rebuild.reached("snapshotting")
                elif phase == "verifying":
                    await rebuild.has_said("verifying")
                else:
                    rebuild.conductor.swap = False
                    await rebuild.reached("streaming")
                record = rebuild.rebuilt.rebuild
                ended = asyncio.create_task(rebuild.ended())
                await abort_rebuild(scene.settings)
                await ended
            go.set()
            database18.execute("UPDATE items SET n = 5 WHERE id = 1")
            await life.assert_equal()
            assert life.pipeline.tables[0].plan.collection == scene.old
            assert life.metric("control_requests_total", outcome="rebuild") == 0
    await assert_no_trace(database18, qdrant, scene.settings, record)


async def verify_for_ever(*_: object) -> Verified:
    await asyncio.Event().wait()
    raise AssertionError


async def test_no_abort_after_the_swap(database18: Database, qdrant: QdrantTarget) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    async with running(scene.settings, database18, qdrant) as life:
        async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
            await rebuild.ended()
        with pytest.raises(ConfigError, match="nothing to abort"):
            await abort_rebuild(scene.settings)
        async with sink_of(scene.settings) as sink:
            with pytest.raises(ConfigError, match="is under way"):
                await check_droppable(scene.settings, sink, "items", scene.old)
        await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
        async with sink_of(scene.settings) as sink:
            for name in (scene.new, "others", ""):
                with pytest.raises(ConfigError, match="is not the collection"):
                    await check_droppable(scene.settings, sink, "items", name)
            await check_droppable(scene.settings, sink, "items", scene.old)
            other = qdrant.new_collection_name("alias")
            await sink.aliases.point(other, scene.old)
            with pytest.raises(ConfigError, match=other):
                await check_droppable(scene.settings, sink, "items", scene.old)
            await sink.aliases.remove(other)
        await life.assert_equal(exclude=["body"])


async def test_an_alias_that_cannot_be_moved_is_moved_later(
    database18: Database, qdrant: QdrantTarget
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    point, allowed = Aliases.point, [False]

    async def refuse(self: Aliases, alias: str, collection: str) -> None:
        if collection == scene.new and not allowed[0]:
            raise SinkError(ErrorKind.SINK_AUTH, "not allowed")
        await point(self, alias, collection)

    with mock.patch.object(Aliases, "point", refuse):
        async with running(scene.settings, database18, qdrant) as life:
            async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
                await rebuild.ended()
            await life.wait(lambda: life.pipeline.settings != scene.settings, "the swap")
            database18.execute("UPDATE items SET n = 5 WHERE id = 1")
            await life.assert_equal(exclude=["body"])
            assert scene.alias_of(scene.old) == [scene.alias]
            async with sink_of(scene.settings) as sink:
                assert not await is_gone_over(scene.settings, sink, rebuild.rebuilt.rebuild)
        allowed[0] = True
        async with running(scene.settings, database18, qdrant) as life:
            async with sink_of(scene.settings) as sink:
                assert await is_gone_over(scene.settings, sink, rebuild.rebuilt.rebuild)
            assert scene.alias_of(scene.new) == [scene.alias]
            await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
