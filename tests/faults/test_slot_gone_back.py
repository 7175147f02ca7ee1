"""The slot's position goes back, as it does when Postgres crashes before it has saved the slot: the
stream brings again what was applied. What it does not tell of (R34, R39) was read from the tables
after that, and has to be read again.
"""

from __future__ import annotations

import asyncio

import pytest

from cdc_sync.config import Settings
from cdc_sync.rows import PointId
from cdc_sync.sync import backfill, source_history
from tests.faults.test_slot_lost import drop_slot, settled
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running, wal_position
from tests.support.qdrant_control import QdrantTarget
from tests.support.windows import (
    CHUNK_PAGES,
    DONE,
    Windows,
    block_of,
    create_paged,
    docs_settings,
    first_window,
    make_space,
)


@pytest.fixture(autouse=True)
def _marks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)


def fill(database: Database) -> None:
    database.execute(
        "CREATE TABLE docs (id int8 PRIMARY KEY, note text, emb vector(3)) PARTITION BY HASH (id);"
        "CREATE TABLE docs_0 PARTITION OF docs FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE docs_1 PARTITION OF docs FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
        "INSERT INTO docs SELECT i, 'old', '[1,2,3]' FROM generate_series(1, 100) i"
    )


def remember(database: Database, slot: str) -> None:
    """Keep the slot as it is now beside it."""
    database.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", (slot, f"{slot}_old"))


def go_back(database: Database, slot: str) -> None:
    """Put the slot where it was when it was remembered."""
    drop_slot(database, slot)
    database.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", (f"{slot}_old", slot))


@pytest.fixture
async def life_before(database18: Database, qdrant: QdrantTarget) -> Settings:
    """A life in which every row was changed once by the stream; the slot as of before is kept."""
    fill(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await life.stop()
    remember(database18, settings.source.slot)
    return settings


async def change(life: Running) -> None:
    life.database.execute("UPDATE docs SET note = 'changed'")
    await settled(life)
    await life.assert_equal()


async def truncate_partition(life: Running) -> None:
    """Truncate a partition, of which the stream tells nothing, until its points are gone and that
    is on record."""
    life.database.execute("TRUNCATE docs_0")
    await life.wait(lambda: life.metric("orphans_total", table="public.docs") > 0, "a sweep")
    relations = life.pipeline._relations
    assert relations is not None
    await life.wait(lambda: not relations.wanted, "the end of the sweep")
    await settled(life)


async def again(settings: Settings, database: Database, qdrant: QdrantTarget) -> None:
    await asyncio.to_thread(go_back, database, settings.source.slot)
    async with running(settings, database, qdrant) as life:
        await settled(life)
        await life.assert_equal()


@pytest.mark.requirement("R34")
async def test_a_truncated_partition(
    life_before: Settings, database18: Database, qdrant: QdrantTarget
) -> None:
    async with running(life_before, database18, qdrant) as life:
        await change(life)
        await truncate_partition(life)
        await life.assert_equal()
        await life.stop()
    await again(life_before, database18, qdrant)


@pytest.mark.requirement("R34")
async def test_a_partition_that_was_swapped(
    life_before: Settings, database18: Database, qdrant: QdrantTarget
) -> None:
    """Its rows were read; the stream brings again what was done to others with their keys."""
    async with running(life_before, database18, qdrant) as life:
        await change(life)
        database18.execute(
            "BEGIN; CREATE TABLE other (LIKE docs INCLUDING ALL);"
            "INSERT INTO other SELECT id, 'swapped', emb FROM docs_0;"
            "ALTER TABLE docs DETACH PARTITION docs_0; ALTER TABLE docs ATTACH PARTITION other"
            " FOR VALUES WITH (MODULUS 2, REMAINDER 0); COMMIT"
        )
        relations = life.pipeline._relations
        assert relations is not None
        await life.wait(lambda: bool(relations.unread), "the look")
        await life.wait(lambda: not relations.wanted, "the end of the copy")
        await life.assert_equal()
        await life.stop()
    await again(life_before, database18, qdrant)


@pytest.mark.requirement("R39")
async def test_changes_that_were_not_published(
    life_before: Settings, database18: Database, qdrant: QdrantTarget
) -> None:
    publication = life_before.source.publication
    async with running(life_before, database18, qdrant) as life:
        await change(life)
        await life.stop()
    database18.execute(f"ALTER PUBLICATION \"{publication}\" SET (publish = 'insert')")
    database18.execute("UPDATE docs SET note = 'unsent' WHERE id % 3 = 0")
    database18.execute("DELETE FROM docs WHERE id % 3 = 1")
    database18.execute(
        f"ALTER PUBLICATION \"{publication}\" SET (publish = 'insert, update, delete, truncate')"
    )
    async with running(life_before, database18, qdrant) as life:
        await settled(life)
        await life.assert_equal()
        here = wal_position(database18)

        def on_record() -> bool:
            database18.execute("SELECT pg_logical_emit_message(true, 'tests', '')")
            saved = life.pipeline._together.history._saved
            return saved is not None and saved.lsn > here

        await life.wait(on_record, "a mark of the publication as it is")
        await life.stop()
    await again(life_before, database18, qdrant)


@pytest.mark.requirement("R34", "R72")
async def test_a_crash_while_points_are_looked_through_again(
    life_before: Settings,
    database18: Database,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(life_before, database18, qdrant) as life:
        await change(life)
        await truncate_partition(life)
        await life.stop()
    await asyncio.to_thread(go_back, database18, life_before.source.slot)
    begun = asyncio.Event()

    async def never(*_: object) -> list[PointId]:
        begun.set()
        await asyncio.Event().wait()
        return []

    with monkeypatch.context() as patched:
        patched.setattr(backfill, "sweep", never)
        async with running(life_before, database18, qdrant) as life:
            await life.wait(begun.is_set, "a sweep")
            state = await life.pipeline.sink.state.load(life_before.pipeline.name)
            assert state is not None
            wanted = state.tables[0].swept_lsn
            await life.wait(lambda: life.confirmed() >= wanted, "where the sweep began")
    async with running(life_before, database18, qdrant) as life:
        await settled(life)
        await life.assert_equal()


@pytest.mark.requirement("R31")
async def test_rows_computed_anew_in_the_middle_of_the_first_copy(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_paged(database18, 300)
    settings = docs_settings(database18, qdrant)
    windows = Windows(monkeypatch)
    async with first_window(database18, qdrant, settings) as life:
        remember(database18, life.slot)
        database18.execute("UPDATE docs SET n = 7 WHERE id = %s", (DONE,))
        await life.caught_up()
        database18.execute("ALTER TABLE docs ALTER n TYPE bigint USING n * 2")
        await windows.finish(life)
        await life.assert_equal()
        await life.stop()
    await again(settings, database18, qdrant)


@pytest.mark.requirement("R31", "R46")
async def test_a_copy_under_way_begins_again(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """A chunk that was copied has rows computed anew by a rewrite; the stream brings what they were
    before, and of the rewrite nothing."""
    create_paged(database18, 300, dim=3)
    settings = docs_settings(database18, qdrant)
    windows.limit = 1_000_000
    async with running(settings, database18, qdrant) as life:
        await windows.wait_settled(life)
        make_space(database18)
        await life.caught_up()
        remember(database18, settings.source.slot)
        database18.execute("UPDATE docs SET note = 'changed' WHERE id = %s", (DONE,))
        assert block_of(database18, DONE) < CHUNK_PAGES
        await life.caught_up()
        windows.limit = windows.closed + 1
        database18.execute("ALTER TABLE docs ALTER note TYPE text USING note || '!'")
        await life.wait(lambda: windows.closed >= windows.limit, "the first chunk")
        await life.stop()
    await asyncio.to_thread(go_back, database18, settings.source.slot)
    windows.limit = 1_000_000
    async with running(settings, database18, qdrant) as life:
        await windows.wait_settled(life)
        await life.assert_equal()
