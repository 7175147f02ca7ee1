"""Partitions come and go without a message for their rows (R34): those of one that is attached are
read, and no others; points of one that is gone are removed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psycopg
import pytest

from tests.support.fix_postgres import Database
from tests.support.ledger_log import check_ledger, events_of, logged
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.windows import (
    ROWS,
    Windows,
    create_paged,
    docs_settings,
    first_window,
    vector,
)

pytestmark = pytest.mark.requirement("R34")

#: Of so many dimensions that an update does not send it.
DIM = 600
COLUMNS = f"(id int8 PRIMARY KEY, note text, emb vector({DIM}))"


def rows(table: str, first: int, last: int, note: str = "old", more: int = 1) -> str:
    vector = f"array_fill((mod(i, 7) + {more})::float4, ARRAY[{DIM}])::vector"
    return (
        f"INSERT INTO {table} SELECT i, '{note}', {vector} FROM generate_series({first}, {last}) i;"
    )


#: Two partitions of 100 rows, one of which has two of its own; and a table with 30 rows.
SCHEMA = f"""
CREATE TABLE docs {COLUMNS} PARTITION BY RANGE (id);
CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (100);
CREATE TABLE docs_2 PARTITION OF docs FOR VALUES FROM (100) TO (200) PARTITION BY RANGE (id);
CREATE TABLE docs_2a PARTITION OF docs_2 FOR VALUES FROM (100) TO (150);
CREATE TABLE docs_2b PARTITION OF docs_2 FOR VALUES FROM (150) TO (200);
CREATE TABLE spare (LIKE docs INCLUDING ALL);
{rows("docs", 0, 199)}
{rows("spare", 200, 229, "attached")}
"""
ATTACH = "ALTER TABLE docs ATTACH PARTITION spare FOR VALUES FROM (200) TO (300);"
DETACH_1 = "ALTER TABLE docs DETACH PARTITION docs_1;"
ATTACH_1 = "ALTER TABLE docs ATTACH PARTITION docs_1 FOR VALUES FROM (0) TO (100);"


@dataclass(frozen=True)
class Act:
    """What is done in one transaction, and how many rows are read after it."""

    statements: str
    read: int


ACTS = {
    "attached": Act(ATTACH + "UPDATE docs SET note = 'new' WHERE id IN (7, 207);", 30),
    "created": Act(
        "CREATE TABLE docs_3 PARTITION OF docs FOR VALUES FROM (300) TO (400);"
        + rows("docs", 300, 304),
        5,
    ),
    "attached and emptied": Act(ATTACH + "TRUNCATE spare;", 0),
    "attached, and a default": Act(ATTACH + "ALTER TABLE docs ALTER note SET DEFAULT 'none';", 30),
    "detached": Act("DELETE FROM docs WHERE id = 3;" + DETACH_1, 0),
    "two dropped, with what is between": Act("DROP TABLE docs_2;", 0),
    "swapped": Act(
        DETACH_1
        + "CREATE TABLE other (LIKE docs INCLUDING ALL);"
        + rows("other", 90, 99, "swapped", 2)
        + "ALTER TABLE docs ATTACH PARTITION other FOR VALUES FROM (0) TO (100);"
        "UPDATE docs SET note = 'metadata only' WHERE id = 95;",
        10,
    ),
    "changed while it was detached": Act(
        DETACH_1
        + "UPDATE docs_1 SET note = 'unsent' WHERE id < 50; DELETE FROM docs_1 WHERE id >= 60;"
        + ATTACH_1,
        60,
    ),
    "changed while its parent was detached": Act(
        "ALTER TABLE docs DETACH PARTITION docs_2;"
        "UPDATE docs_2a SET note = 'unsent' WHERE id < 120;"
        "ALTER TABLE docs ATTACH PARTITION docs_2 FOR VALUES FROM (100) TO (200);",
        100,
    ),
    "attached, written and detached": Act(
        ATTACH + rows("docs", 230, 234) + "ALTER TABLE docs DETACH PARTITION spare;", 0
    ),
    "moved out of what is dropped": Act(
        ATTACH + "UPDATE docs SET id = id + 230 WHERE id < 5;" + "DROP TABLE docs_1;", 35
    ),
}


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG, "cdc_sync"):
        yield


@asynccontextmanager
async def life_of(
    database: Database, qdrant: QdrantTarget, **migration: object
) -> AsyncIterator[Running]:
    """A pipeline whose table has been copied."""
    database.execute(SCHEMA)
    settings = pipeline_settings(database, qdrant, "docs", migration=migration)
    async with running(settings, database, qdrant) as life:
        await settled(life)
        yield life


async def settled(life: Running) -> None:
    """Until the stream has caught up and nothing is left to read or to look through."""
    await life.caught_up()

    def at_rest() -> bool:
        now = life.pipeline._relations
        return life.state == "streaming" and now is not None and not now.wanted

    await life.wait(at_rest, "the end of the copies")


def read(life: Running) -> float:
    return life.metric("snapshot_rows_total", table="public.docs")


def seen(caplog: pytest.LogCaptureFixture) -> int:
    """How often partitions were seen to have changed."""
    return logged(caplog, "sweep_wanted") + logged(caplog, "partitions_attached")


async def settled_again(life: Running, caplog: pytest.LogCaptureFixture, before: int = 0) -> None:
    """Until partitions that have changed since so much was seen have been met."""
    await life.wait(lambda: seen(caplog) > before, "the change")
    await settled(life)
    await life.assert_equal()


@pytest.mark.parametrize("name", ACTS)
async def test_a_partition_that_comes_or_goes(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    act = ACTS[name]
    async with life_of(database18, qdrant) as life:
        before = read(life)
        database18.execute(f"BEGIN; {act.statements} COMMIT")
        database18.execute("UPDATE docs SET note = note || '!' WHERE mod(id, 3) = 0")
        await settled_again(life, caplog)
        assert read(life) - before == act.read
        assert logged(caplog, "resync_started") == 0
        # Nothing is left to do for another life.
        settings = life.pipeline.settings
        await life.stop()
    caplog.clear()
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        assert seen(caplog) + logged(caplog, "resync_wanted") == 0


@pytest.mark.parametrize("name", ACTS)
async def test_so_does_one_while_the_pipeline_is_down(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    act = ACTS[name]
    async with life_of(database18, qdrant) as life:
        settings = life.pipeline.settings
        await life.stop()
    database18.execute(f"BEGIN; {act.statements} COMMIT")
    database18.execute("UPDATE docs SET note = note || '!' WHERE mod(id, 3) = 0")
    async with running(settings, database18, qdrant) as life:
        await settled_again(life, caplog)
        assert read(life) == act.read
        assert logged(caplog, "resync_started") == 0


async def test_points_are_looked_through_only_where_rows_may_be_gone(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """Not where a partition is made ahead, as is usual."""

    def swept() -> float:
        return life.metric("sweep_parts_total", table="public.docs")

    async with life_of(database18, qdrant) as life:
        database18.execute(ATTACH)
        database18.execute("CREATE TABLE docs_3 PARTITION OF docs FOR VALUES FROM (300) TO (400)")
        await settled_again(life, caplog)
        await settled_again(life, caplog)
        database18.execute(rows("docs", 300, 304))
        await settled(life)
        await life.assert_equal()
        assert (read(life), swept()) == (230, 0)
        caplog.clear()
        database18.execute(f"BEGIN; {DETACH_1} ALTER TABLE docs ALTER note SET DEFAULT ''; COMMIT")
        await settled_again(life, caplog)
        assert (read(life), swept()) == (230, 1)
        assert logged(caplog, "relation_ignored") == 0


# -- around windows


PAGED = "ALTER TABLE docs ATTACH PARTITION part_4 FOR VALUES FROM (4000) TO (9000)"


def create_paged_parts(database: Database) -> None:
    """A partition of 300 rows, and a table of 600 to be attached."""
    create_paged(database, 0, partition="PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE part_1 PARTITION OF docs FOR VALUES FROM (0) TO (4000)")
    create_paged(database, 0, "part_4")
    for table, first, rows_ in (("docs", 0, 300), ("part_4", 4000, 600)):
        database.execute(
            f"INSERT INTO {table} (id, note, n, emb) SELECT i, 'note ' || i, i, {vector('i')}"
            f" FROM generate_series({first}, {first + rows_ - 1}) i; ANALYZE {table}"
        )


async def test_a_partition_is_read_in_windows_while_its_rows_change_and_through_a_crash(
    database18: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of it move from what is left into what is done, without their vectors."""
    create_paged_parts(database18)
    settings = docs_settings(database18, qdrant)
    async with first_window(database18, qdrant, settings) as life:
        await windows.finish(life)
        caplog.clear()
        before, windows.limit = read(life), windows.closed
        # One chunk a window again.
        life.pipeline._together.backfill._settings = settings
        database18.execute(PAGED)
        await life.wait(lambda: logged(caplog, "partitions_attached") == 1, "the look")
        windows.limit += 2
        await life.wait(lambda: windows.closed == windows.limit, "two windows")
        assert 0 < read(life) - before < 600
        # Space in blocks that are done, for versions of rows from the last ones.
        database18.execute("DELETE FROM docs WHERE id BETWEEN 4000 AND 4040")
        database18.execute("VACUUM (INDEX_CLEANUP ON) part_4")
        database18.execute("UPDATE docs SET n = n + 1 WHERE id BETWEEN 4500 AND 4530")
        await life.caught_up()
    # It is gone from one moment to the next.
    database18.execute("UPDATE docs SET n = n + 1 WHERE id BETWEEN 4520 AND 4560 OR id < 5")
    async with running(settings, database18, qdrant) as life:
        await windows.finish(life)
        await settled(life)
        await life.assert_equal()
        assert read(life) < 600
    assert logged(caplog, "resync_started") == 0
    assert check_ledger(events_of(caplog.records)).faults == []


async def test_columns_that_change_before_a_sweep_has_begun(
    database18: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sweep's window is the first to see them, and the only one, were it not to look."""
    create_paged_parts(database18)
    async with first_window(database18, qdrant, docs_settings(database18, qdrant)) as life:
        await windows.finish(life)
        windows.limit = windows.closed
        database18.execute("TRUNCATE part_1; INSERT INTO docs (id, note) VALUES (1, 'one')")
        await life.wait(lambda: logged(caplog, "sweep_wanted") == 1, "the look")
        resync = life.pipeline._resync
        assert resync is not None
        monkeypatch.setattr(resync, "observe", windows.look_away)
        database18.execute("ALTER TABLE docs ADD extra text DEFAULT 'given'")
        await windows.finish(life)
        await settled(life)
        await life.assert_equal()


async def test_a_partition_that_comes_and_goes_between_two_windows_of_the_first_copy(
    database18: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    create_paged_parts(database18)
    async with first_window(database18, qdrant, docs_settings(database18, qdrant)) as life:
        database18.execute(
            f"BEGIN; {PAGED}; INSERT INTO docs (id, note) VALUES (8000, 'gone');"
            "ALTER TABLE docs DETACH PARTITION part_4; COMMIT"
        )
        await life.caught_up()
        await windows.finish(life)
        await settled(life)
        await life.assert_equal()


async def test_a_label_renamed_between_two_windows(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """Rows of chunks that are done have the old one."""
    create_paged(database18, ROWS)
    database18.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'glad'); ALTER TABLE docs ADD m mood DEFAULT 'sad'"
    )
    async with first_window(database18, qdrant, docs_settings(database18, qdrant)) as life:
        database18.execute("ALTER TYPE mood RENAME VALUE 'sad' TO 'sorry'")
        await windows.finish(life)
        await settled(life)
        await life.assert_equal()


# -- DETACH CONCURRENTLY


async def test_a_partition_that_is_about_to_be_detached(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """DETACH CONCURRENTLY waits for transactions that use the table; meanwhile queries do not see
    the partition any more, and its changes are not sent."""
    async with life_of(database18, qdrant) as life:
        with (
            psycopg.connect(database18.url) as reader,
            psycopg.connect(database18.url, autocommit=True) as detaching,
        ):
            reader.execute("SELECT count(*) FROM docs")
            detach = asyncio.create_task(
                asyncio.to_thread(detaching.execute, f"{DETACH_1[:-1]} CONCURRENTLY")
            )
            await life.wait(lambda: logged(caplog, "sweep_wanted") == 1, "the look")
            database18.execute("UPDATE docs_1 SET note = 'unsent'")
            await settled(life)
            await life.assert_equal()
            reader.rollback()
            await detach
        await settled(life)
        await life.assert_equal()
        assert logged(caplog, "resync_started") == 0
