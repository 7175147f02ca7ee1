"""The publication is altered and put back while nobody looks: changes of that time are never sent,
so the tables have to be read again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cdc_sync.sync import source_history
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.source_history import SourceHistory
from cdc_sync.verify import rebuild as conducting
from cdc_sync.verify.rebuild import Conductor
from tests.faults.test_slot_gone_back import go_back, remember
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.rebuild_scene import (
    TABLE,
    Rebuilding,
    Scene,
    create_items,
    finish_rebuild,
    make_scene,
    rebuilding,
    with_table,
)
from tests.support.windows import DONE, EUCLID, ONE_CHUNK, ROWS, Windows, create_paged


def unseen(database: Database, publication: str, *statements: str) -> None:
    """Have statements run that are not sent."""
    name = f'"{publication}"'
    database.execute(f"ALTER PUBLICATION {name} SET (publish = 'insert')")
    for statement in statements:
        database.execute(statement)
    database.execute(f"ALTER PUBLICATION {name} SET (publish = 'insert,update,delete,truncate')")


async def read_again(life: Running, table: str) -> None:
    await life.wait(
        lambda: life.metric("schema_changes_total", table=table, outcome="resynced") > 0,
        "the table to be read again",
    )


@pytest.mark.requirement("R39")
@pytest.mark.parametrize("dies", [False, True], ids=["goes_on", "dies"])
async def test_in_the_first_window(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(3));"
        "INSERT INTO docs SELECT i, 'old', '[1,2,3]' FROM generate_series(1, 100) i"
    )
    settings = pipeline_settings(database18, qdrant, "docs")
    window = Backfill.window
    over = False

    async def altered(backfill: Backfill, *arguments: object) -> object:
        nonlocal over
        if not over:
            unseen(
                database18,
                settings.source.publication,
                "UPDATE docs SET note = 'new' WHERE id <= 10",
                "DELETE FROM docs WHERE id > 90",
            )
            over = True
        found: Awaitable[object] = window(backfill, *arguments)  # type: ignore[arg-type]
        return await found

    monkeypatch.setattr(Backfill, "window", altered)
    if dies:
        async with running(settings, database18, qdrant, wait=False) as life:
            await life.wait(lambda: over, "the first window")
    async with running(settings, database18, qdrant) as life:
        await read_again(life, "public.docs")
        await life.assert_equal()


@pytest.mark.requirement("R39")
async def test_of_a_table_that_is_being_copied_while_nobody_runs(
    database18: Database, qdrant: QdrantTarget, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has joined the pipeline, and part of it is copied when the process ends."""
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    database18.execute("CREATE TABLE others (id bigint PRIMARY KEY, emb vector(3))")
    create_paged(database18, ROWS, dim=3)
    settings = pipeline_settings(
        database18, qdrant, "others", {"name": "docs", **EUCLID}, migration=ONE_CHUNK
    )
    first = settings.model_copy(update={"tables": settings.tables[:1]})
    async with running(first, database18, qdrant) as life:
        await life.caught_up()
        await life.stop()
    windows.limit = windows.closed + 1
    async with running(settings, database18, qdrant, wait=False) as life:
        await life.wait(lambda: windows.closed >= windows.limit, "the first window")
        await life.caught_up()
        await life.stop()
    unsent(database18, settings.source.publication, "docs", f"DELETE FROM docs WHERE id = {DONE}")
    windows.limit = 1_000_000
    at_once = settings.migration.model_copy(update={"window_seconds": 60.0})
    settings = settings.model_copy(update={"migration": at_once})
    async with running(settings, database18, qdrant) as life:
        await read_again(life, "public.docs")
        await life.assert_equal()


class Asking:
    """A rebuild that asks for the swap when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits, self.may = asyncio.Event(), asyncio.Event()
        ask: Callable[..., Awaitable[None]] = Conductor._ask

        async def held(conductor: Conductor, *arguments: object) -> None:
            self.waits.set()
            await self.may.wait()
            await ask(conductor, *arguments)

        monkeypatch.setattr(Conductor, "_ask", held)


def unsent(database: Database, publication: str, table: str, statement: str) -> None:
    """Have the table changed without it being sent, and the publication as before after that."""
    name = f'"{publication}"'
    database.execute(
        f"BEGIN; ALTER PUBLICATION {name} DROP TABLE {table}; {statement};"
        f" ALTER PUBLICATION {name} ADD TABLE {table}; COMMIT"
    )


def unsent_update(database: Database, publication: str, table: str) -> None:
    unsent(database, publication, table, f"UPDATE {table} SET n = -1")


async def swap(scene: Scene, life: Running, rebuild: Rebuilding) -> None:
    await rebuild.ended()
    await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
    await life.wait(lambda: life.pipeline.settings.tables[0] == scene.wanted.tables[0], "swap")


@pytest.mark.requirement("R39")
async def test_of_another_table_right_before_tables_are_planned_anew(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    asking, windows = Asking(monkeypatch), Windows(monkeypatch)
    create_items(database18, 60)
    database18.execute(
        "CREATE TABLE others (id bigint PRIMARY KEY, n int, emb vector(3));"
        "INSERT INTO others SELECT i, i, '[1,2,3]' FROM generate_series(1, 20) i"
    )
    settings = pipeline_settings(database18, qdrant, "items", "others")
    wanted = with_table(settings, collection=qdrant.new_collection_name(), exclude=["body"])
    scene = Scene(settings, wanted, qdrant.new_collection_name("alias"), qdrant)
    async with (
        running(settings, database18, qdrant) as life,
        rebuilding(settings, wanted, scene.alias) as rebuild,
    ):
        await life.wait(asking.waits.is_set, "the rebuild")
        unsent_update(database18, settings.source.publication, "others")
        relations = life.pipeline._relations
        assert relations is not None
        await life.wait(lambda: bool(relations.stale), "what shows in the catalog")
        asking.may.set()
        await swap(scene, life, rebuild)
        await life.wait(lambda: life.pipeline._relations is not relations, "another plan")
        windows.limit = 1_000_000
        await read_again(life, "public.others")
        await life.assert_equal(exclude=["body"])


@pytest.mark.requirement("R39")
async def test_of_the_table_that_is_rebuilt(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline has seen it and read the table again, the rebuild has not."""
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    monkeypatch.setattr(conducting, "_RETRY_SECONDS", 0.1)
    asking = Asking(monkeypatch)
    scene = make_scene(database18, qdrant, exclude=["body"])
    keep: Callable[..., Awaitable[None]] = SourceHistory.keep

    async def pipelines_only(history: SourceHistory, *arguments: object) -> None:
        if ".rebuild." not in history._settings.pipeline.name:
            await keep(history, *arguments)

    monkeypatch.setattr(SourceHistory, "keep", pipelines_only)
    async with (
        running(scene.settings, database18, qdrant) as life,
        rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild,
    ):
        await life.wait(asking.waits.is_set, "the rebuild")
        unsent_update(database18, scene.settings.source.publication, "items")
        await read_again(life, TABLE)
        asking.may.set()
        await life.wait(
            lambda: rebuild.task.done() or any("asked again" in line for line in rebuild.said),
            "a decision",
        )
        monkeypatch.setattr(SourceHistory, "keep", keep)
        await swap(scene, life, rebuild)
        await life.assert_equal(exclude=["body"])


@pytest.mark.requirement("R39")
async def test_before_a_rebuild_whose_pipeline_goes_back_to_before_that(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream brings older values than the rebuild has read, and not what came after them."""
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    scene = make_scene(database18, qdrant, exclude=["body"])
    slot = scene.settings.source.slot
    async with running(scene.settings, database18, qdrant) as life:
        remember(database18, slot)
        database18.execute("UPDATE items SET n = 7 WHERE id < 20")
        await life.caught_up()
        unsent_update(database18, scene.settings.source.publication, "items")
        await read_again(life, TABLE)
        async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
            await swap(scene, life, rebuild)
        await life.assert_equal(exclude=["body"])
        await life.stop()
    await asyncio.to_thread(go_back, database18, slot)
    async with running(scene.wanted, database18, qdrant) as life:
        await read_again(life, TABLE)
        await life.assert_equal(exclude=["body"])
