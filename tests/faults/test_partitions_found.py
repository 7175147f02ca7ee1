"""Partitions that come and go (R34) around crashes, windows, takeovers and upgrades: what is on
record, in which order, and what is not read again."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterator

import pytest

from cdc_sync.qdrant.open import open_sink
from cdc_sync.sync import resync, source_history
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.table_records import TableRecords
from tests.faults.test_partitions import ATTACH, COLUMNS, SCHEMA, read, rows, settled
from tests.faults.test_slot_gone_back import again, remember
from tests.support.fix_postgres import Database
from tests.support.ledger_log import events_of, logged
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.windows import (
    EUCLID,
    ONE_CHUNK,
    Windows,
    create_paged,
    docs_settings,
    first_window,
    vector,
)

pytestmark = pytest.mark.requirement("R34")

ATTACH_4 = "ALTER TABLE docs ATTACH PARTITION part_4 FOR VALUES FROM (4000) TO (9000);"
DETACH_4 = "ALTER TABLE docs DETACH PARTITION part_4;"


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG, "cdc_sync"):
        yield


def swept(life: Running) -> float:
    return life.metric("sweep_parts_total", table="public.docs")


async def seen(life: Running, caplog: pytest.LogCaptureFixture, event: str) -> None:
    await life.wait(lambda: logged(caplog, event) > 0, event)


async def die_in(
    life: Running, monkeypatch: pytest.MonkeyPatch, method: str, statement: str
) -> None:
    """Have the pipeline end, from one moment to the next, when it is about to put that on
    record."""
    reached = asyncio.Event()

    async def never(*_: object, **__: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(TableRecords, method, never)
        life.database.execute(statement)
        await life.wait(reached.is_set, method)
        life.task.cancel()
        await asyncio.gather(life.task, return_exceptions=True)


def create_two_parts(database: Database, *starts: int) -> None:
    """Rows of 8 a page, 300 from each start, in partitions up to and from 4,000 on."""
    create_paged(database, 0, partition="PARTITION BY RANGE (id)")
    for name, bounds in (("part_1", "(0) TO (4000)"), ("part_4", "(4000) TO (9000)")):
        database.execute(
            f"CREATE TABLE {name} PARTITION OF docs FOR VALUES FROM {bounds};"
            f"ALTER TABLE {name} SET (autovacuum_enabled = false);"
            f"ALTER TABLE {name} ALTER pad SET STORAGE PLAIN"
        )
    for first in starts:
        database.execute(
            f"INSERT INTO docs (id, note, n, emb) SELECT i, 'note ' || i, i, {vector('i')}"
            f" FROM generate_series({first}, {first + 299}) i"
        )
    database.execute("ANALYZE docs")


# -- what is on record


async def test_rows_that_were_moved_out_of_the_default_partition(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream tells that they are gone from there, and when it begins earlier again it does so
    once more, after the partition that has them was read."""
    database18.execute(SCHEMA)
    database18.execute("CREATE TABLE docs_default PARTITION OF docs DEFAULT")
    database18.execute(rows("docs", 300, 320))
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await life.stop()
    remember(database18, settings.source.slot)
    async with running(settings, database18, qdrant) as life:
        await die_in(
            life,
            monkeypatch,
            "reading",
            "BEGIN; CREATE TABLE docs_3 (LIKE docs INCLUDING ALL);"
            "WITH moved AS (DELETE FROM docs_default WHERE id >= 300 RETURNING *)"
            " INSERT INTO docs_3 SELECT * FROM moved;"
            "ALTER TABLE docs ATTACH PARTITION docs_3 FOR VALUES FROM (300) TO (400); COMMIT",
        )
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await life.assert_equal()
        await life.stop()
    await again(settings, database18, qdrant)


async def test_one_that_goes_between_its_copy_and_the_record_of_it(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is by then as it is on record; of its points only the ledger tells."""
    database18.execute(SCHEMA)
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await die_in(life, monkeypatch, "copied", ATTACH)
    database18.execute("ALTER TABLE docs DETACH PARTITION spare")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await life.assert_equal()


async def test_marks_of_the_version_before(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever had no entry in the publication left an empty one in them."""
    database18.execute(SCHEMA)
    database18.execute("CREATE TABLE others (id int8 PRIMARY KEY, emb vector(3))")
    settings = pipeline_settings(database18, qdrant, "docs", "others")
    database18.execute(
        f'CREATE PUBLICATION "{settings.source.publication}" FOR ALL TABLES'
        " WITH (publish_via_partition_root)"
    )
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        mark = await life.pipeline.sink.state.mark(settings.pipeline.name)
        await life.stop()
    assert mark is not None
    older = {"public.docs": ",;;;;", "public.others": ","}
    as_before = tuple((name, known + older[name]) for name, known in mark.publications)
    sink = await open_sink(settings.qdrant)
    try:
        await sink.state.save_mark(dataclasses.replace(mark, publications=as_before))
    finally:
        await sink.close()
    caplog.clear()
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        assert logged(caplog, "resync_wanted") == 0


# -- before the first copy is done


async def test_detached_and_attached_before_its_first_chunk(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """The stream has brought a row that is deleted meanwhile."""
    create_two_parts(database18, 0, 4000)
    async with first_window(database18, qdrant, docs_settings(database18, qdrant)) as life:
        database18.execute("INSERT INTO docs (id, note) VALUES (8000, 'gone')")
        await life.caught_up()
        database18.execute(
            f"BEGIN; {DETACH_4} DELETE FROM part_4 WHERE id = 8000; {ATTACH_4} COMMIT"
        )
        await windows.finish(life)
        await life.assert_equal()


async def test_dropped_between_joining_and_the_first_window(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    database18.execute(SCHEMA)
    database18.execute("CREATE TABLE others (id int8 PRIMARY KEY, emb vector(3))")
    settings = pipeline_settings(database18, qdrant, "others", "docs")
    first = settings.model_copy(update={"tables": settings.tables[:1]})
    async with running(first, database18, qdrant) as life:
        await life.stop()
    room = False

    async def has_room(backfill: Backfill, tables: object) -> bool:
        return room

    monkeypatch.setattr(Backfill, "has_room", has_room)
    monkeypatch.setattr(resync, "WAIT_SECONDS", 0.1)
    async with running(settings, database18, qdrant, wait=False) as life:
        await life.wait(lambda: life.pipeline._streaming is not None, "the stream")
        database18.execute("UPDATE docs SET note = 'changed' WHERE id IN (1, 101)")
        await life.caught_up()
        database18.execute("DROP TABLE docs_1")
        room = True
        await settled(life)
        await life.assert_equal()


# -- no partition at all


async def test_partitions_that_are_still_to_come(
    database18: Database, qdrant: QdrantTarget
) -> None:
    database18.execute(f"CREATE TABLE docs {COLUMNS} PARTITION BY RANGE (id)")
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        await settled(life)
        database18.execute("CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (100)")
        database18.execute(rows("docs", 1, 5))
        await life.caught_up()
        await settled(life)
        await life.assert_equal()


async def test_all_partitions_are_dropped(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    database18.execute(SCHEMA)
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        await settled(life)
        database18.execute("DROP TABLE docs_1, docs_2")
        await seen(life, caplog, "sweep_completed")
        await settled(life)
        await life.assert_equal()


# -- what is not read again


async def test_one_that_is_listed_in_the_publication_itself(
    database18: Database,
    qdrant: QdrantTarget,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That changes nothing of what is sent while the root is listed, too."""
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    database18.execute(SCHEMA)
    settings = pipeline_settings(database18, qdrant, "docs")
    database18.execute(
        f'CREATE PUBLICATION "{settings.source.publication}" FOR TABLE docs, docs_1, spare'
        " WITH (publish_via_partition_root)"
    )
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        caplog.clear()
        before = read(life)
        database18.execute(ATTACH)
        await seen(life, caplog, "partitions_copied")
        database18.execute("DROP TABLE docs_1")
        await seen(life, caplog, "sweep_completed")
        await life.assert_equal()
        await settled(life)
        assert read(life) - before == 30
        assert logged(caplog, "resync_wanted") == 0


async def test_what_another_process_has_read_before_this_one_takes_over(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """It was planned long ago."""
    database18.execute(SCHEMA)
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as active:
        await settled(active)
        async with running(settings, database18, qdrant, wait=False) as standby:
            await standby.wait(lambda: standby.state == "standby", "the standby")
            database18.execute(f"{ATTACH} DROP TABLE docs_2")
            await seen(active, caplog, "partitions_copied")
            database18.execute("ALTER TABLE docs ADD n int DEFAULT 7")
            await seen(active, caplog, "resync_completed")
            await settled(active)
            await active.stop()
            caplog.clear()
            await standby.wait_streaming()
            database18.execute("UPDATE docs SET note = note || '!'")
            await settled(standby)
            await standby.assert_equal()
            await settled(standby)
            assert (read(standby), swept(standby)) == (0, 0)
            assert logged(caplog, "resync_wanted") == 0
            # What comes from here on is seen.
            database18.execute("ALTER TABLE docs DETACH PARTITION spare")
            await seen(standby, caplog, "sweep_completed")
            await standby.assert_equal()


async def test_another_table_that_is_truncated_with_it_is_no_partition(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    database18.execute(SCHEMA)
    settings = pipeline_settings(database18, qdrant, "docs")
    database18.execute(
        f'CREATE PUBLICATION "{settings.source.publication}" FOR ALL TABLES'
        " WITH (publish_via_partition_root)"
    )
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        database18.execute("TRUNCATE docs, spare")
        await seen(life, caplog, "sweep_completed")
        await life.assert_equal()
    wanted = [e["reason"] for e in events_of(caplog.records) if e["event"] == "sweep_wanted"]
    assert wanted == ["partitions have changed"]


# -- points that stay


async def test_points_that_are_only_reported_are_not_built_upon(
    database18: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of a partition that was detached are there when it is attached again, with vectors of
    before. Its rows move from what is left into what is done."""
    create_two_parts(database18, 4000, 4300)
    migration = {**ONE_CHUNK, "extra_points": "report"}
    settings = pipeline_settings(
        database18, qdrant, {"name": "docs", **EUCLID}, migration=migration
    )
    async with first_window(database18, qdrant, settings) as life:
        await windows.finish(life)
        database18.execute(DETACH_4)
        await seen(life, caplog, "sweep_completed")
        database18.execute(f"UPDATE part_4 SET emb = {vector('id + 10000')}")
        database18.execute("VACUUM FULL part_4")
        windows.limit = windows.closed
        life.pipeline._together.backfill._settings = settings
        database18.execute(ATTACH_4)
        await seen(life, caplog, "partitions_attached")
        windows.limit += 2
        await life.wait(lambda: windows.closed == windows.limit, "two windows")
        # Space in blocks that are done, for versions of rows from the last ones.
        database18.execute("DELETE FROM docs WHERE id BETWEEN 4000 AND 4040")
        database18.execute("VACUUM (INDEX_CLEANUP ON) part_4")
        database18.execute("UPDATE docs SET n = n + 1 WHERE id BETWEEN 4500 AND 4530")
        await life.caught_up()
        await windows.finish(life)
        await life.assert_equal()
