"""A table joins, and is followed for a while before its first window opens: rows that are refused
meanwhile have points of an earlier version. What an update leaves unchanged must not be taken from
those, though the copy has begun with no letters."""

from __future__ import annotations

import asyncio

import pytest

from cdc_sync.sync import ledger
from cdc_sync.sync.backfill import Backfill
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

ROWS = 40
KEY = 1000
LONG = 640


def vector(value: int, dimensions: int = LONG) -> str:
    return f"array_fill({value}, ARRAY[{dimensions}])::vector"


def create(database: Database) -> None:
    """Five rows a block; the vectors are TOASTed."""
    database.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, emb vector(3));"
        "CREATE TABLE loose (id bigint PRIMARY KEY, note text, emb vector);"
        "ALTER TABLE loose ALTER note SET STORAGE PLAIN;"
        f"INSERT INTO loose SELECT i, repeat('n', 1500), {vector(1)}"
        f" FROM generate_series(1, {ROWS}) i"
    )
    database.execute("VACUUM ANALYZE loose")


def block(database: Database) -> int:
    ((found,),) = database.execute(f"SELECT (ctid::text::point)[0]::int FROM loose WHERE id={KEY}")
    return int(str(found))


@pytest.mark.requirement("R19", "R69")
async def test_an_older_point_is_not_built_upon(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database18)
    windows = asyncio.Semaphore(0)
    finish = False

    async def has_room(backfill: Backfill, tables: object) -> bool:
        if finish:
            return True
        if windows.locked():
            return False
        return await windows.acquire()

    monkeypatch.setattr(Backfill, "has_room", has_room)
    monkeypatch.setattr(ledger, "_MIN_CHUNK_PAGES", 1)
    monkeypatch.setattr(ledger, "_MAX_CHUNK_PAGES", 1)
    settings = pipeline_settings(
        database18,
        qdrant,
        "docs",
        {"name": "loose", "dimensions": {"emb": LONG}},
        migration={"window_seconds": 0.001},
    )
    first = settings.model_copy(update={"tables": settings.tables[:1]})
    async with running(first, database18, qdrant) as life:
        await life.caught_up()
        await life.stop()
    async with running(settings, database18, qdrant, wait=False) as life:

        def letters() -> float:
            return life.metric("dead_letters_pending", table="public.loose")

        await life.wait(lambda: life.pipeline._streaming is not None, "the stream")
        database18.execute(f"INSERT INTO loose VALUES ({KEY}, repeat('a', 1500), {vector(1)})")
        await life.caught_up()
        database18.execute(f"UPDATE loose SET emb = {vector(2, LONG + 1)} WHERE id = {KEY}")
        await life.wait(lambda: letters() == 1, "the letter")
        # Its block is full, and only the first one gets room.
        for other in range(KEY + 1, KEY + 4):
            database18.execute(f"INSERT INTO loose SELECT {other}, note, emb FROM loose LIMIT 1")
        database18.execute("DELETE FROM loose WHERE id <= 5")
        database18.execute("VACUUM loose")
        assert block(database18) > 0
        windows.release()
        chunks = {"table": "public.loose", "state": "done"}
        await life.wait(lambda: life.metric("snapshot_chunks", **chunks) == 1, "the first window")
        assert letters() == 0
        # It escapes into a block that is done.
        database18.execute(f"UPDATE loose SET note = repeat('b', 4000) WHERE id = {KEY}")
        assert block(database18) == 0
        await life.caught_up()
        finish = True
        await life.wait_streaming()
        assert letters() == 1
        database18.execute(f"UPDATE loose SET emb = {vector(3)} WHERE id = {KEY}")
        await life.caught_up()
        assert letters() == 0
        await life.assert_equal()
