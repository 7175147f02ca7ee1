"""What happens in mid copy, between two windows: tables change, partitions come and go, tables
join, points have no row, and input is bad."""

from __future__ import annotations

import logging
import re
from typing import Final

import pytest
from qdrant_client import models as q

from cdc_sync.config import TableSettings
from cdc_sync.errors import CdcSyncError, SinkError
from cdc_sync.sync.recent_transactions import RecentTransactions
from tests.support.fix_postgres import Database
from tests.support.ledger_log import check_ledger, count, events_of
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.windows import (
    DIM,
    LEFT,
    ROWS,
    Windows,
    create_paged,
    docs_settings,
    first_window,
    vector,
    write_some,
)

# -- tables that change under the copy

CHANGES: Final = {
    "VACUUM FULL": "VACUUM FULL docs",
    "CLUSTER": "CLUSTER docs USING docs_pkey",
    "TRUNCATE": "TRUNCATE docs; INSERT INTO docs (id, note) SELECT i, 'new' FROM"
    " generate_series(500, 520) i",
    "DELETE and VACUUM": "DELETE FROM docs WHERE id % 3 > 0;VACUUM (INDEX_CLEANUP ON) docs",
    "ALTER TYPE": "ALTER TABLE docs ALTER n TYPE text",
    "ALTER TYPE of the vector": f"ALTER TABLE docs ALTER emb TYPE vector({DIM}) USING emb + emb",
    "ADD COLUMN": "ALTER TABLE docs ADD extra text DEFAULT 'given'",
    "DROP COLUMN": "ALTER TABLE docs DROP n",
    "DROP and ADD COLUMN": "ALTER TABLE docs DROP n, ADD n bigint DEFAULT 7",
    "RENAME COLUMN": "ALTER TABLE docs RENAME n TO number",
}
PART_CHANGES: Final = {
    "attached": "CREATE TABLE part_4 (LIKE part_1 INCLUDING ALL);"
    f"INSERT INTO part_4 (id, note, emb) SELECT i, 'attached', {vector('i')}"
    " FROM generate_series(4000, 4100) i;"
    "ALTER TABLE docs ATTACH PARTITION part_4 FOR VALUES FROM (4000) TO (5000)",
    "created": "CREATE TABLE part_4 PARTITION OF docs FOR VALUES FROM (4000) TO (5000);"
    "INSERT INTO docs (id, note) VALUES (4001, 'created')",
    "detached, done": "ALTER TABLE docs DETACH PARTITION part_1",
    "detached, left": "ALTER TABLE docs DETACH PARTITION part_2",
    "dropped, done": "DROP TABLE part_1",
    "dropped, left": "DROP TABLE part_2",
    "truncated, done": "TRUNCATE part_1",
    "truncated, left": "TRUNCATE part_2",
    "all truncated": "TRUNCATE docs",
}
WHEN: Final = (
    "between windows",
    pytest.param("at a window's beginning", marks=pytest.mark.slow),
    pytest.param("while it is down", marks=pytest.mark.slow),
)


def do(database: Database, statements: str) -> None:
    """Each by itself: VACUUM and CLUSTER want that."""
    for statement in statements.split(";"):
        database.execute(statement)


async def change_under_the_copy(
    database: Database, qdrant: QdrantTarget, windows: Windows, change: str, when: str
) -> None:
    """After the first window, and with changes in the stream before and after it."""
    settings = docs_settings(database, qdrant)

    async def go_on(life: Running) -> None:
        write_some(database, LEFT + 10)
        await windows.open(life, 1)
        await windows.finish(life)
        await life.assert_equal()

    async with first_window(database, qdrant, settings) as life:
        write_some(database)
        await life.caught_up()
        if when == "between windows":
            do(database, change)
        elif when == "at a window's beginning":
            windows.before_snapshot.append(lambda: do(database, change))
            await windows.open(life, 1)
        else:
            await life.stop()
        if when != "while it is down":
            await go_on(life)
            return
    do(database, change)
    async with first_window(database, qdrant, settings) as life:
        await go_on(life)


@pytest.mark.requirement("R54", "R82")
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("change", CHANGES)
async def test_a_table_that_changes_in_mid_copy(
    database18: Database, qdrant: QdrantTarget, windows: Windows, change: str, when: str
) -> None:
    create_paged(database18, ROWS)
    await change_under_the_copy(database18, qdrant, windows, CHANGES[change], when)


def create_parts(database: Database) -> None:
    create_paged(database, 0, partition="PARTITION BY RANGE (id)")
    for number, (first, end) in enumerate([(0, 400), (400, 1500), (1500, 4000)], 1):
        database.execute(
            f"CREATE TABLE part_{number} PARTITION OF docs FOR VALUES FROM ({first}) TO ({end});"
            f"ALTER TABLE part_{number} SET (autovacuum_enabled = false);"
            f"ALTER TABLE part_{number} ALTER pad SET STORAGE PLAIN"
        )
    database.execute(
        f"INSERT INTO docs (id, note, n, emb) SELECT i, 'note ' || i, i, {vector('i')}"
        f" FROM generate_series(1, {ROWS}) i; ANALYZE docs"
    )


@pytest.mark.requirement("R34", "R54")
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, marks=pytest.mark.slow if change.endswith(", left") else ())
        for change in PART_CHANGES
    ],
)
async def test_a_partition_that_comes_or_goes_in_mid_copy(
    database18: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    change: str,
    when: str,
) -> None:
    caplog.set_level(logging.DEBUG, "cdc_sync")
    create_parts(database18)
    await change_under_the_copy(database18, qdrant, windows, PART_CHANGES[change], when)
    if change in ("attached", "created"):
        # What is done of the others stays done.
        assert check_ledger(events_of(caplog.records)).faults == []


async def test_a_table_that_is_dropped_in_mid_copy(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    create_paged(database18, ROWS)
    settings = docs_settings(database18, qdrant)
    async with first_window(database18, qdrant, settings) as life:
        database18.execute("DROP TABLE docs")
        windows.limit = 1_000
        board = life.pipeline.board.table("public.docs")
        await life.wait(lambda: board.state == "stopped", "the stop")
        shown = board.to_json()
        assert re.search(r"public\.docs (was dropped|cannot be read)", str(shown["error"]))
        assert "configuration" in str(shown["remedy"])
    with pytest.raises(CdcSyncError, match="docs"):
        async with running(settings, database18, qdrant):
            pass


async def test_what_was_copied_of_a_table_that_stops_in_mid_copy_does_not_count(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """Rows of a chunk that was done are deleted while the table is stopped."""
    create_paged(database18, ROWS)
    settings = docs_settings(database18, qdrant)
    name = settings.source.publication
    async with first_window(database18, qdrant, settings) as life:
        # Of a stopped table that is tried again.
        life.patience_seconds = 100.0
        board = life.pipeline.board.table("public.docs")
        collection = settings.tables[0].collection
        assert collection is not None
        copied = [point.id for point in qdrant.client().scroll(collection, limit=20)[0]]
        resync = life.pipeline._resync
        assert resync is not None
        database18.execute(f"ALTER PUBLICATION {name} DROP TABLE docs")
        await life.wait(lambda: bool(resync._found), "the look")
        windows.limit = 1_000
        await life.wait(lambda: board.state == "stopped", "the stop")
        database18.execute("DELETE FROM docs WHERE id = ANY (%s)", (copied,))
        database18.execute("UPDATE docs SET note = 'unseen' WHERE id % 3 = 0")
        database18.execute(f"ALTER PUBLICATION {name} ADD TABLE docs")
        await life.wait_streaming()
        await life.wait(lambda: board.state == "streaming", "the table")
        await life.assert_equal()


# -- tables that join


@pytest.mark.requirement("R70", "R71")
@pytest.mark.parametrize("owner", ["ours", "the user's"])
async def test_a_table_joins_a_running_pipeline(
    database18: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    owner: str,
) -> None:
    """A transaction writes to it before it is published and ends when it is: what it wrote is not
    in the stream, so no snapshot without it will do."""
    await join(database18, qdrant, windows, caplog, owner)


async def test_the_test_sees_a_table_that_is_copied_too_early(
    database18: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RecentTransactions, "all_visible", lambda *_: True)
    with pytest.raises(AssertionError):
        await join(database18, qdrant, windows, caplog, "ours")


async def join(
    database: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    owner: str,
) -> None:
    caplog.set_level(logging.DEBUG, "cdc_sync")
    create_paged(database, 50)
    create_paged(database, 300, "more")
    settings = docs_settings(database, qdrant)
    if owner != "ours":
        database.execute(f'CREATE PUBLICATION "{settings.source.publication}" FOR TABLE docs')
    async with first_window(database, qdrant, settings) as life:
        await windows.finish(life)
        await life.assert_equal()
        await life.stop()
    more = TableSettings(
        name="more", collection=qdrant.new_collection_name(), metrics={"emb": "euclid"}
    )
    settings = settings.model_copy(update={"tables": [*settings.tables, more]})
    with database.connect(autocommit=False) as writer:
        writer.execute("INSERT INTO more (id, note) VALUES (5000, 'before it was published')")
        writer.execute("UPDATE more SET note = 'before' WHERE id IN (1, 290)")
        writer.execute("DELETE FROM more WHERE id = 291")
        if owner != "ours":
            database.execute(f'ALTER PUBLICATION "{settings.source.publication}" ADD TABLE more')
        async with running(settings, database, qdrant, wait=False) as life:
            await life.wait(
                lambda: count(events_of(caplog.records), "tables_added") == 1, "the table"
            )
            windows.limit = 1_000
            # The other table goes on.
            write_some(database, 30)
            await life.wait(
                lambda: (
                    windows.closed > 3 or count(events_of(caplog.records), "window_postponed") > 2
                ),
                "a window",
            )
            assert not is_copied_to(life, str(more.collection), 300)
            writer.commit()
            database.execute("UPDATE more SET note = 'published' WHERE id IN (2, 289)")
            await windows.finish(life)
            await life.assert_equal()


def is_copied_to(life: Running, collection: str, id_: int) -> bool:
    return bool(life.qdrant.client().retrieve(collection, [id_]))


# -- points without a row


def put(life: Running, *ids: int) -> None:
    """Add points by hand."""
    collection = str(life.pipeline.settings.tables[0].collection)
    life.qdrant.client().upsert(
        collection,
        [q.PointStruct(id=id_, vector={"emb": [0.5] * DIM}, payload={"note": "?"}) for id_ in ids],
        wait=True,
    )


@pytest.mark.requirement("R72", "R82")
@pytest.mark.parametrize("cause", ["ADD COLUMN", "a request"])
async def test_a_resync_sweeps_points_without_a_row(
    database18: Database, qdrant: QdrantTarget, windows: Windows, cause: str
) -> None:
    """Rows that come and go while it is under way are not mistaken for such points."""
    create_paged(database18, ROWS)
    async with first_window(database18, qdrant) as life:
        await windows.finish(life)
        put(life, 7_001, 7_002, 99_999)
        if cause == "ADD COLUMN":
            windows.limit = windows.closed
            database18.execute("ALTER TABLE docs ADD extra text DEFAULT 'given'")
        else:
            await windows.begin_resync(life)
        write_some(database18)
        windows.before_snapshot.append(
            lambda: do(
                database18, "INSERT INTO docs (id) VALUES (7001);DELETE FROM docs WHERE id = 30"
            )
        )
        await life.caught_up()
        await windows.finish(life)
        await life.assert_equal()
        assert life.metric("orphans_total", table="public.docs") >= 2


@pytest.mark.requirement("R57", "R72")
async def test_rows_deleted_while_the_table_was_not_published_are_swept(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    create_paged(database18, ROWS)
    settings = docs_settings(database18, qdrant)
    publication = settings.source.publication
    async with first_window(database18, qdrant, settings) as life:
        await windows.finish(life)
        database18.execute(f'ALTER PUBLICATION "{publication}" DROP TABLE docs')
        await life.wait(lambda: table_state(life) == "stopped", "the table to stop")
    database18.execute(
        "DELETE FROM docs WHERE id < 50; UPDATE docs SET note = 'unseen' WHERE id = 60"
    )
    database18.execute(f"UPDATE docs SET emb = {vector('0')} WHERE id = 61")
    database18.execute(f'ALTER PUBLICATION "{publication}" ADD TABLE docs')
    async with running(settings, database18, qdrant) as life:
        await windows.finish(life)
        await life.assert_equal()


def table_state(life: Running) -> str:
    (table,) = life.pipeline.board.snapshot()["tables"]  # type: ignore[misc]
    return str(table["state"])  # type: ignore[has-type]


# -- bad input


async def test_a_plan_that_changes_between_two_lives(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """In mid copy as after it: half of the points would be of the one plan."""
    create_paged(database18, ROWS)
    settings = docs_settings(database18, qdrant)
    async with first_window(database18, qdrant, settings) as life:
        await life.stop()
    (table,) = settings.tables
    for change in ({"exclude": ["pad"]}, {"rename": {"note": "text"}}, {"where": "id > 5"}):
        changed = settings.model_copy(update={"tables": [table.model_copy(update=change)]})
        with pytest.raises(CdcSyncError, match=r"public\.docs|publication") as caught:
            async with running(changed, database18, qdrant):
                pass
        assert caught.value.remedy, change
    async with first_window(database18, qdrant, settings) as life:
        await windows.finish(life)
        await life.assert_equal()


async def test_a_key_column_with_nulls(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        "CREATE TABLE docs (k bigint UNIQUE, emb vector(3));"
        "ALTER TABLE docs REPLICA IDENTITY FULL;"
        "INSERT INTO docs VALUES (1, '[1,2,3]'), (NULL, '[1,2,3]')"
    )
    settings = pipeline_settings(database18, qdrant, {"name": "docs", "key": ["k"]})
    with pytest.raises(CdcSyncError, match=r"(?s)docs.*\bk\b|\bk\b.*docs") as caught:
        async with running(settings, database18, qdrant):
            pass
    assert "NOT NULL" in str(caught.value) + caught.value.remedy
    assert not qdrant.client().collection_exists(str(settings.tables[0].collection))
    assert database18.execute("SELECT count(*) FROM pg_publication") == [(0,)]


@pytest.mark.requirement("R9", "R72")
async def test_a_slot_lost_in_mid_copy(
    database18: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The copy begins anew, and rows deleted meanwhile leave nothing behind."""
    caplog.set_level(logging.DEBUG, "cdc_sync")
    create_paged(database18, ROWS)
    settings = docs_settings(database18, qdrant)
    async with first_window(database18, qdrant, settings) as life:
        write_some(database18)
        await life.caught_up()
        await life.stop()
    database18.execute("SELECT pg_drop_replication_slot(%s)", (settings.source.slot,))
    database18.execute("DELETE FROM docs WHERE id < 10 OR id = 3700")
    windows.closed = 0
    async with first_window(database18, qdrant, settings) as life:
        await windows.finish(life)
        await life.assert_equal()
    events = events_of(caplog.records)
    assert count(events, "copy_begins_anew") == 1
    assert check_ledger(events).faults == []


async def test_a_collection_that_holds_foreign_points(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_paged(database18, 10)
    settings = docs_settings(database18, qdrant)
    collection = str(settings.tables[0].collection)
    client = qdrant.client()
    client.create_collection(
        collection, {"emb": q.VectorParams(size=DIM, distance=q.Distance.EUCLID)}
    )
    client.upsert(
        collection, [q.PointStruct(id=77, vector={"emb": [1.0] * DIM}, payload={})], wait=True
    )
    with pytest.raises(SinkError, match=f"{collection}.*already holds 1 point") as caught:
        async with running(settings, database18, qdrant):
            pass
    assert "--adopt" in caught.value.remedy
    assert client.count(collection).count == 1
    assert database18.execute(
        "SELECT (SELECT count(*) FROM pg_publication), (SELECT count(*) FROM pg_replication_slots"
        " WHERE database = current_database())"
    ) == [(0, 0)]
