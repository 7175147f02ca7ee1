"""The first copy joins the stream exactly: nothing is missing, nothing is there twice, whatever
happens while the slot is made and the tables are copied."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import psutil
import pytest
from psycopg import sql

from cdc_sync.config import SourceSettings
from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.postgres.catalog import TypeResolver, find_table
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.replication import CreatedSlot, ReplicationConnection
from cdc_sync.postgres.snapshot import SnapshotHolder, copy_query, copy_rows, import_snapshot
from cdc_sync.rows import PointId, Row
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.copying import Chunk
from cdc_sync.sync.first_copy import FirstCopy
from cdc_sync.sync.gather import Gatherer
from cdc_sync.sync.ledger import Ledger
from cdc_sync.sync.planning import plan_pipeline
from cdc_sync.sync.routing import PlannedTable, ResolveType, bind
from tests.support.everything import create_everything_table
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import Faults, QdrantTarget
from tests.support.source_tables import raw_plan, source_settings
from tests.support.versions import SCHEMA, CountingWriter, Replica, planned
from tests.support.workload import load

WRITERS: Final = 8
#: Transactions with a number from here on come after all others.
LAST: Final = 10**15


def chunks(planned: PlannedTable) -> list[Chunk]:
    """The whole table."""
    return Ledger.new("p", planned, 5000, sweep=False, repair=False).left(planned)


def create_docs(database: Database, rows: int = 2000, filler: int = 300) -> None:
    database.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, n int, note text, emb vector(4));"
        f"INSERT INTO docs SELECT i, i, repeat(chr(97 + i % 26), {filler}),"
        f" ARRAY[i, 1, 2, 3]::vector(4) FROM generate_series(0, {rows - 1}) i;"
        "ANALYZE docs"
    )


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def slots_and_publications(database: Database) -> tuple[object, object]:
    ((slots, publications),) = database.execute(
        "SELECT (SELECT count(*) FROM pg_replication_slots WHERE database = current_database()),"
        " (SELECT count(*) FROM pg_publication)"
    )
    return slots, publications


# -- every transaction is in the snapshot or replayed, and never both (R67)


def copy_all(source: SourceSettings, snapshot: str, table: PlannedTable) -> list[Row]:
    """Read all chunks of a table, by two workers."""

    def copy(chunk: Chunk) -> list[Row]:
        with connect(source, autocommit=False) as connection:
            import_snapshot(connection, snapshot)
            query, text = copy_query(table.plan, chunk.leaf, chunk.start_block, chunk.end_block)
            return [row for batch in copy_rows(connection, query, text) for row in batch]

    with ThreadPoolExecutor(2) as workers:
        return [row for rows in workers.map(copy, chunks(table)) for row in rows]


def replay(stream: ReplicationConnection, replica: Replica, log: int, last: int) -> None:
    """Apply the stream until the last transaction was seen in the log."""
    end = time.monotonic() + 60
    while last not in replica.rows[log] and not replica.mistakes:
        assert time.monotonic() < end, "the stream did not come to its end"
        frames = stream.read()
        for frame in frames:
            replica.feed(frame)
        if not frames:
            select.select([stream.fileno()], [], [], 0.5)


def contents(database: Database, table: str) -> dict[PointId, int]:
    rows = database.execute(f"SELECT id, version FROM {table}")
    return {int(str(key)): int(str(version)) for key, version in rows}


def join_exactly(database: Database, number: int, seconds: float) -> tuple[int, int]:
    """Make a slot and copy under eight writers, then replay. Returns how many transactions were in
    the snapshot, and how many were replayed."""
    source = source_settings(database.url)
    slot = f"versions_{number}_{database.name}"[:60]
    with connect(source) as connection:
        tables = [planned(find_table(connection, name)) for name in ("counters", "log")]
    replica = Replica(tables)
    log = tables[1].plan.oid
    writers = [CountingWriter(database, number * WRITERS + n) for n in range(1, WRITERS + 1)]
    creating = ReplicationConnection.open(source)
    try:
        time.sleep(seconds / 2)
        created = creating.create_slot(slot, lock_timeout_seconds=20)
        holder = SnapshotHolder.imported(source, created.snapshot, [t.table for t in tables])
        for table in tables:
            replica.copy(table, copy_all(source, holder.snapshot_id, table))
        holder.close()
        time.sleep(seconds / 2)
    finally:
        creating.close()
        committed = sum(writer.finish() for writer in writers)
    copied = set(replica.rows[log])
    assert len(copied) > 20
    last = LAST + number
    database.execute(f"INSERT INTO log VALUES ({last}, 1)")
    stream = ReplicationConnection.open(source)
    try:
        stream.start(slot, "versions")
        replay(stream, replica, log, last)
    finally:
        stream.close()
    database.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
    assert replica.mistakes == []
    for table in tables:
        assert replica.rows[table.plan.oid] == contents(database, table.plan.table)
    replayed = len(replica.rows[log]) - len(copied) - 1
    # A transaction of both would have been a mistake: its row of the log came a second time.
    assert len(copied) + replayed + 1 == len(contents(database, "log"))
    assert committed <= len(copied) + replayed
    return len(copied), replayed


@pytest.mark.requirement("R67")
@pytest.mark.timeout(120)
def test_every_transaction_is_in_the_snapshot_or_replayed(protocol_database: Database) -> None:
    """At least 10,000 transactions over the five versions; usually five times as many."""
    protocol_database.execute(SCHEMA)
    seen = rounds = 0
    while rounds < 2 or seen < 2_000:
        copied, replayed = join_exactly(protocol_database, rounds, seconds=0.8)
        assert replayed > 20
        seen = copied + replayed
        rounds += 1


@pytest.mark.campaign
@pytest.mark.requirement("R67")
@pytest.mark.timeout(1800)
def test_tens_of_thousands_of_transactions(protocol_database: Database) -> None:
    protocol_database.execute(SCHEMA)
    replayed = rounds = 0
    while replayed < 20_000 or rounds < 2:
        replayed += join_exactly(protocol_database, rounds, seconds=6.0)[1]
        rounds += 1


def test_the_test_sees_a_copy_under_another_snapshot(
    database18: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A break: the tables are read a moment later than the slot's snapshot."""
    imported = SnapshotHolder.imported

    def later(
        source: SourceSettings, snapshot: str, tables: list[object], **options: object
    ) -> SnapshotHolder:
        imported(source, snapshot, []).close()
        time.sleep(0.1)
        return SnapshotHolder.fresh(source, tables)  # type: ignore[arg-type]

    monkeypatch.setattr(SnapshotHolder, "imported", later)
    database18.execute(SCHEMA)
    with pytest.raises(AssertionError, match=r"version \d+ after|was not there"):
        join_exactly(database18, 1, seconds=0.4)


# -- the engine's first copy

TWO_WORKERS: Final = {"num_workers": 2, "chunk_rows": 500}
ONE_LANE: Final = {"parallel_requests": 1}


def hold_the_copy(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    """Let both workers' first writes wait; what is written before the copy does not. There are
    several chunks, and a worker has one request under way."""
    copy = Backfill.window

    async def holding(
        self: Backfill, tables: Sequence[PlannedTable], holder: SnapshotHolder
    ) -> list[PlannedTable]:
        await self._save(list(self._ledgers.values()))
        faults.hold("write", times=2)
        return await copy(self, tables, holder)

    monkeypatch.setattr(Backfill, "window", holding)


@pytest.mark.requirement("R53")
async def test_timeouts_of_the_role_do_not_end_the_copy(
    database18: Database, qdrant: QdrantTarget, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exporter and holder are idle in transaction for longer than the role may be, and so long do
    the workers' statements take."""
    create_docs(database18)
    role = database18.create_cdc_role(["docs"])
    timeouts = ["idle_in_transaction_session_timeout", "statement_timeout"]
    timeouts += ["idle_session_timeout", "transaction_timeout"]
    settings = pipeline_settings(
        database18, qdrant, "docs", pg_url=role.url, migration=TWO_WORKERS, target=ONE_LANE
    )
    with database18.connect() as connection:
        for timeout in timeouts:
            connection.execute(
                sql.SQL("ALTER ROLE {} SET {} = '1s'").format(
                    sql.Identifier(role.name), sql.Identifier(timeout)
                )
            )
        connection.execute(
            sql.SQL("CREATE PUBLICATION {} FOR TABLE docs").format(
                sql.Identifier(settings.source.publication)
            )
        )
    hold_the_copy(monkeypatch, faults)
    async with running(settings, database18, qdrant, wait=False) as life:
        await life.wait(lambda: faults.held() == 2, "both workers")
        await asyncio.sleep(1.6)
        faults.release()
        await life.wait_streaming()
        database18.execute("UPDATE docs SET n = -1 WHERE id = 1")
        await life.assert_equal()


@pytest.mark.requirement("R54")
@pytest.mark.parametrize(
    "rewrite",
    [
        "ALTER TABLE docs ALTER n TYPE bigint USING n * 2",
        "TRUNCATE docs; INSERT INTO docs (id, n) SELECT i, i FROM generate_series(5, 500) i",
        "VACUUM FULL docs",
    ],
    ids=["ALTER TYPE", "TRUNCATE", "VACUUM FULL"],
)
async def test_a_rewrite_before_the_snapshot_is_imported_is_noticed(
    database18: Database,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rewrite: str,
) -> None:
    """Under a snapshot from before the rewrite the table would be empty."""
    create_docs(database18, rows=300)
    create_slot = FirstCopy._create_slot
    rewritten: list[str] = []

    def rewriting(self: FirstCopy) -> tuple[ReplicationConnection, CreatedSlot]:
        created = create_slot(self)
        if not rewritten:
            database18.execute(rewrite)
            rewritten.append(created[1].snapshot)
        return created

    monkeypatch.setattr(FirstCopy, "_create_slot", rewriting)
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        await life.assert_equal()
        assert rewritten
        assert any("copy_abandoned" in event for event in events(caplog))
        assert slots_and_publications(database18) == (1, 1)
        assert database18.execute("SELECT count(*) > 100 FROM docs") == [(True,)]


@pytest.mark.requirement("R55")
async def test_a_killed_worker_is_replaced(
    database18: Database,
    qdrant: QdrantTarget,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs", migration=TWO_WORKERS, target=ONE_LANE)
    hold_the_copy(monkeypatch, faults)
    before = {child.pid for child in psutil.Process().children()}
    async with running(settings, database18, qdrant, wait=False) as life:
        await life.wait(lambda: faults.held() == 2, "both workers in the middle of the copy")
        workers = [
            child
            for child in psutil.Process().children()
            if child.pid not in before and "spawn_main" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        # The exporter of the snapshot is gone by now; the holder has exported it again.
        assert database18.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'walsender'"
        ) == [(0,)]
        workers[0].kill()
        # What the dead worker had sent may still be applied.
        faults.release()
        await life.wait_streaming()
        await life.assert_equal()
    assert any("copy_workers_lost" in event for event in events(caplog))
    assert not any("copy_abandoned" in event for event in events(caplog))


@pytest.mark.requirement("R56")
async def test_the_publication_exists_before_the_slot(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_docs(database18, rows=10)
    create_slot, seen = FirstCopy._create_slot, []

    def watching(self: FirstCopy) -> tuple[ReplicationConnection, CreatedSlot]:
        seen.append(slots_and_publications(database18))
        return create_slot(self)

    monkeypatch.setattr(FirstCopy, "_create_slot", watching)
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        assert seen == [(0, 1)]
        await life.stop()
    # A publication that is younger than the slot does not exist for the changes before it.
    name = sql.Identifier(settings.source.publication)
    with database18.connect() as connection:
        connection.execute(sql.SQL("DROP PUBLICATION {}").format(name))
    stops = settings.source.model_copy(update={"on_slot_lost": "stop"})
    with pytest.raises(CdcSyncError) as caught:
        async with running(settings.model_copy(update={"source": stops}), database18, qdrant):
            pass
    assert caught.value.kind is ErrorKind.PUBLICATION_UNUSABLE
    assert slots_and_publications(database18) == (1, 0)
    # So is a slot of unknown age without a record of its copy.
    with database18.connect() as connection:
        connection.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE docs").format(name))
    other = pipeline_settings(database18, qdrant, "docs")
    other = other.model_copy(update={"source": settings.source})
    with pytest.raises(CdcSyncError, match="no record of a copy") as caught:
        async with running(other, database18, qdrant):
            pass
    assert caught.value.kind is ErrorKind.SLOT_LOST


@pytest.mark.requirement("R68")
def test_the_copy_is_binary_and_keeps_up_with_a_bare_drain(database18: Database) -> None:
    database18.execute(
        "CREATE TABLE wide (id bigint PRIMARY KEY, title text, e vector(768));"
        "INSERT INTO wide SELECT i, 'title ' || i, (SELECT array_agg(n / 7.0)"
        " FROM generate_series(1, 768) n)::vector(768) FROM generate_series(1, 8000) i"
    )
    source = source_settings(database18.url)
    with connect(source) as connection:
        table = find_table(connection, "wide")
        query, text = copy_query(raw_plan(table), table.leaves[0], 0, None)
        assert text == (False, False, False)
        bare, full = [], []
        for _ in range(3):
            started = time.perf_counter()
            assert drain(connection, query) > 8000 * 768 * 4
            bare.append(time.perf_counter() - started)
            started = time.perf_counter()
            assert sum(map(len, copy_rows(connection, query, text))) == 8000
            full.append(time.perf_counter() - started)
    assert min(bare) / min(full) >= 0.2


def drain(connection: PgConnection, query: str) -> int:
    """Read a binary COPY to its end; returns the number of bytes."""
    with connection.cursor().copy(f"COPY ({query}) TO STDOUT (FORMAT binary)".encode()) as copy:
        return sum(map(len, copy))


@pytest.mark.requirement("R83")
def test_copied_and_streamed_rows_give_equal_points(
    database18: Database, qdrant: QdrantTarget
) -> None:
    source, slot = source_settings(database18.url), f"golden_{database18.name}"
    with database18.connect() as connection:
        table = create_everything_table(connection, "everything", dim=640)
        connection.execute("CREATE PUBLICATION versions FOR TABLE everything")
        stream = ReplicationConnection.open(source)
        stream.create_slot(slot, lock_timeout_seconds=10)
        load(connection, table, 100, seed=3)
    with connect(source) as reading:
        (planned_table,) = plan_pipeline(
            reading, pipeline_settings(database18, qdrant, "everything")
        ).tables
        codec, point_id = WireCodec(planned_table.plan), compile_point_id(planned_table.plan)
        copied: dict[PointId, bytes] = {}
        for chunk in chunks(planned_table):
            query, text = copy_query(
                planned_table.plan, chunk.leaf, chunk.start_block, chunk.end_block
            )
            for rows in copy_rows(reading, query, text):
                copied |= {point_id(row): codec.point(point_id(row), row) for row in rows}
        try:
            stream.start(slot, "versions")
            rows_by_id = inserts(stream, planned_table, TypeResolver(reading).resolve, 100)
        finally:
            stream.close()
    assert len(copied) == 100
    assert {key: codec.point(key, row) for key, row in rows_by_id.items()} == copied


def inserts(
    stream: ReplicationConnection, table: PlannedTable, resolve: ResolveType, count: int
) -> dict[PointId, Row]:
    """Rows by point id, as the stream brings them."""
    gatherer = Gatherer(
        lambda relation: bind(table, relation, resolve),
        batch_rows=1 << 20,
        batch_bytes=1 << 30,
    )
    end = time.monotonic() + 20
    found: dict[PointId, Row] = {}
    while len(found) < count:
        assert time.monotonic() < end
        for frame in stream.read():
            gatherer.feed(frame)
        if gatherer.ready:
            for batch in gatherer.take().tables.values():
                found |= {key: p.row for key, p in batch.pending.items() if p.row is not None}
        select.select([stream.fileno()], [], [], 0.05)
    return found


# -- tables that cannot be followed, and tables that share


@pytest.mark.requirement("R28")
@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
async def test_a_deferrable_key_is_refused_with_the_remedy(
    database18: Database, qdrant: QdrantTarget, identity: str
) -> None:
    """``UPDATE t SET id = id + 1`` would let rows share a key on the way, and a point be lost."""
    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY DEFERRABLE, emb vector(4));"
        f"ALTER TABLE docs REPLICA IDENTITY {identity}"
    )
    with pytest.raises(CdcSyncError, match="deferrable") as caught:
        async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant):
            pass
    remedy = caught.value.remedy
    assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
    assert slots_and_publications(database18) == (0, 0)
    # It is the whole remedy.
    assert remedy.startswith("ALTER TABLE")
    database18.execute(f"{remedy} INSERT INTO docs VALUES (1, '[1,2,3,4]'), (2, '[4,3,2,1]')")
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        database18.execute("UPDATE docs SET id = 3 WHERE id = 1")
        await life.assert_equal()


@pytest.mark.requirement("R29")
async def test_truncate_leaves_the_other_table_of_a_shared_collection_alone(
    database18: Database, qdrant: QdrantTarget
) -> None:
    collection = qdrant.new_collection_name()
    for name in ("red", "blue"):
        database18.execute(
            f"CREATE TABLE {name} (id bigint PRIMARY KEY, note text, emb vector(4));"
            f"INSERT INTO {name} SELECT i, '{name} ' || i, '[1,2,3,4]' FROM generate_series(1, 9) i"
        )
    tables = [{"name": n, "collection": collection, "namespace": n} for n in ("red", "blue")]
    settings = pipeline_settings(database18, qdrant, *tables)
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal()
        with database18.connect(autocommit=False) as connection:
            connection.execute("INSERT INTO red (id, note) VALUES (50, 'before')")
            connection.execute("INSERT INTO blue (id, note) VALUES (50, 'before')")
            connection.execute("TRUNCATE red")
            connection.execute("INSERT INTO red (id, note) VALUES (1, 'after'), (51, 'after')")
            connection.execute("UPDATE blue SET note = 'after' WHERE id = 1")
            connection.commit()
            connection.execute("TRUNCATE red, blue")
            connection.rollback()
        await life.assert_equal()
        assert qdrant.client().count(collection, exact=True).count == 2 + 10
        database18.execute("TRUNCATE red, blue")
        await life.assert_equal()
        assert qdrant.client().count(collection, exact=True).count == 0
