"""The first copy joins the stream exactly: nothing is missing, nothing is there twice, whatever
happens while the slot is made and the tables are copied."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import psycopg
import pytest
from psycopg import sql

from cdc_sync.config import SourceSettings
from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.pgoutput import messages as m
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.replication import CreatedSlot, ReplicationConnection
from cdc_sync.postgres.snapshot import SnapshotHolder, copy_query, copy_rows, import_snapshot
from cdc_sync.rows import PointId, Row
from cdc_sync.sync.backfill import cut
from cdc_sync.sync.copying import Chunk
from cdc_sync.sync.first_copy import FirstCopy
from cdc_sync.sync.gather import Gatherer
from cdc_sync.sync.planning import plan_pipeline
from cdc_sync.sync.routing import PlannedTable, bind
from tests.support.everything import create_everything_table
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import Faults, QdrantTarget
from tests.support.source_tables import raw_plan, source_settings
from tests.support.versions import SCHEMA, CountingWriter, Replica, planned
from tests.support.workload import load

WRITERS: Final = 8
#: Transactions with a number from here on come after all others.
LAST: Final = 10**15


@pytest.fixture
def faults(qdrant: QdrantTarget) -> Faults:
    if qdrant.faults is None:
        pytest.skip("a real server has no scripted faults")
    return qdrant.faults


def create_docs(database: Database, rows: int, filler: int = 0) -> None:
    """A table of several chunks, if the filler is large."""
    database.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, n int, note text, emb vector(4));"
        "INSERT INTO docs SELECT i, i, repeat(chr(97 + i % 26), "
        f"{filler}), ARRAY[i, 1, 2, 3]::vector(4) FROM generate_series(0, {rows - 1}) i; ANALYZE docs"
    )


# -- every transaction is in the snapshot or replayed, and never both (R67)


def copy_all(source: SourceSettings, snapshot: str, table: PlannedTable) -> list[Row]:
    """Read all chunks of a table, by two workers."""

    def copy(chunk: Chunk) -> list[Row]:
        with connect(source, autocommit=False) as connection:
            import_snapshot(connection, snapshot)
            query, text = copy_query(table.plan, chunk.leaf, chunk.start_block, chunk.end_block)
            return [row for batch in copy_rows(connection, query, text) for row in batch]

    with ThreadPoolExecutor(2) as workers:
        return [row for rows in workers.map(copy, cut(table)) for row in rows]


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
    assert copied, "nothing was committed before the slot was made"
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
    protocol_database.execute(SCHEMA)
    replayed = 0
    for number in range(2):
        copied, more = join_exactly(protocol_database, number, seconds=1.0)
        assert copied > 100
        replayed += more
    assert replayed > 200


@pytest.mark.campaign
@pytest.mark.requirement("R67")
@pytest.mark.timeout(1800)
def test_tens_of_thousands_of_transactions(protocol_database: Database) -> None:
    protocol_database.execute(SCHEMA)
    replayed = rounds = 0
    while replayed < 20_000:
        replayed += join_exactly(protocol_database, rounds, seconds=6.0)[1]
        rounds += 1
    assert rounds >= 2


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
