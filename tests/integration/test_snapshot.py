"""Snapshots, locks and COPY BINARY against real servers; the parser against any chunking."""

from __future__ import annotations

import contextlib
import itertools
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ErrorKind, ProtocolError, SourceError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.catalog import find_table, read_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.copy_binary import CopyParser
from cdc_sync.postgres.publication import read_publication
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.snapshot import (
    SnapshotHolder,
    TableRewrittenError,
    TransactionSnapshot,
    copy_query,
    copy_rows,
    import_snapshot,
)
from cdc_sync.rows import RawValue, Row, TextValue
from cdc_sync.sync.planning import with_published_children
from tests.support.fault_cases import until
from tests.support.fix_postgres import Database
from tests.support.source_tables import raw_plan, source_settings

HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
TRAILER = struct.pack(">h", -1)


def settings(database: Database) -> SourceSettings:
    return source_settings(database.url)


def table_of(database: Database, name: str) -> Table:
    with connect(settings(database)) as conn:
        return find_table(conn, name)


def read_all(
    database: Database,
    plan: TablePlan,
    table: Table,
    snapshot_id: str | None = None,
    row_filter: str | None = None,
) -> list[Row]:
    rows: list[Row] = []
    with connect(settings(database), autocommit=False) as conn:
        if snapshot_id is not None:
            import_snapshot(conn, snapshot_id)
        for leaf in table.leaves:
            query, text = copy_query(plan, leaf, 0, None, row_filter)
            for batch in copy_rows(conn, query, text, batch_rows=100):
                assert batch
                rows += batch
    return rows


def ids(rows: Sequence[Row]) -> list[int]:
    return sorted(int.from_bytes(row[0]) for row in rows if isinstance(row[0], bytes))


@contextlib.contextmanager
def held(holder: SnapshotHolder) -> Iterator[SnapshotHolder]:
    try:
        yield holder
    finally:
        holder.close()


@pytest.mark.requirement("R67", "R55", "R52")
def test_slot_snapshot_is_shared_and_outlives_its_exporter(protocol_database: Database) -> None:
    protocol_database.execute(
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1);"
        "CREATE PUBLICATION pub FOR TABLE t"
    )
    table = table_of(protocol_database, "t")
    replication = ReplicationConnection.open(settings(protocol_database))
    created = replication.create_slot("s", lock_timeout_seconds=5)
    protocol_database.execute("INSERT INTO t VALUES (2)")
    with held(
        SnapshotHolder.imported(settings(protocol_database), created.snapshot, [table])
    ) as holder:
        replication.close()
        protocol_database.execute("INSERT INTO t VALUES (3)")
        plan = raw_plan(table)
        # One worker after the other, each from the holder's own export.
        for _ in range(2):
            assert ids(read_all(protocol_database, plan, table, holder.snapshot_id)) == [1]
        holder.check()

    def gone() -> bool:
        try:
            read_all(protocol_database, plan, table, holder.snapshot_id)
        except SourceError as error:
            return error.kind is ErrorKind.SOURCE_UNAVAILABLE
        return False

    # Its backend ends in its own time.
    until(gone, "the end of the snapshot")
    holder.close()
    with pytest.raises(SourceError):
        holder.check()


@pytest.mark.requirement("R54")
@pytest.mark.parametrize(
    "ddl",
    [
        "TRUNCATE t",
        "ALTER TABLE t ALTER v TYPE int USING length(v)",
        "DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v text)",
        "ALTER TABLE t RENAME TO old; CREATE TABLE t (id int PRIMARY KEY, v text)",
        "VACUUM FULL t",
    ],
)
def test_ddl_between_reading_and_locking_is_found(database18: Database, ddl: str) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'x')")
    table = table_of(database18, "t")
    replication = ReplicationConnection.open(settings(database18))
    created = replication.create_slot("s", lock_timeout_seconds=5)
    for statement in ddl.split("; "):
        database18.execute(statement)
    with pytest.raises(TableRewrittenError, match=r"public\.t changed"):
        SnapshotHolder.imported(settings(database18), created.snapshot, [table])
    replication.close()


@pytest.mark.requirement("R54", "R34")
@pytest.mark.parametrize(
    "ddl",
    [
        "TRUNCATE p1",
        "ALTER TABLE p DETACH PARTITION p1",
        "CREATE TABLE p9 PARTITION OF p FOR VALUES FROM (90) TO (100)",
    ],
)
def test_partitions_that_changed_are_found(database18: Database, ddl: str) -> None:
    database18.execute(
        "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20);"
        "INSERT INTO p SELECT generate_series(0, 19)"
    )
    table = table_of(database18, "p")
    with held(SnapshotHolder.fresh(settings(database18), [table])) as holder:
        assert ids(read_all(database18, raw_plan(table), table, holder.snapshot_id)) == list(
            range(20)
        )
    database18.execute(ddl)
    with pytest.raises(TableRewrittenError):
        SnapshotHolder.fresh(settings(database18), [table])


@pytest.mark.requirement("R54")
def test_harmless_ddl_is_not_mistaken(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'x')")
    table = table_of(database18, "t")
    database18.execute(
        "ALTER TABLE t ADD n int DEFAULT 7; ALTER TABLE t DROP n; CREATE INDEX ON t (v)"
    )
    with held(SnapshotHolder.fresh(settings(database18), [table])) as holder:
        assert len(read_all(database18, raw_plan(table), table, holder.snapshot_id)) == 1


@pytest.mark.requirement("R54")
def test_the_holder_keeps_ddl_out(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    table = table_of(database18, "t")
    with held(SnapshotHolder.fresh(settings(database18), [table])) as holder:
        with pytest.raises(psycopg.errors.LockNotAvailable):
            database18.execute("SET lock_timeout = '100ms'; TRUNCATE t")
        assert ids(read_all(database18, raw_plan(table), table, holder.snapshot_id)) == [1]
    database18.execute("TRUNCATE t")


def test_a_table_that_stays_locked(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY)")
    table = table_of(database18, "t")
    with database18.connect(autocommit=False) as conn:
        conn.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(SourceError, match="locking the tables") as caught:
            SnapshotHolder.fresh(settings(database18), [table], lock_timeout_seconds=0.2)
        assert caught.value.kind is ErrorKind.TABLE_LOCKED
        conn.rollback()


@pytest.mark.requirement("R53", "R79", "R6")
def test_timeouts_of_the_role_do_not_end_the_copy(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    table = table_of(database, "t")
    timeouts = ["statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"]
    if database.major >= 17:
        timeouts.append("transaction_timeout")
    with database.connect() as conn:
        for timeout in timeouts:
            conn.execute(f"ALTER DATABASE {database.name} SET {timeout} = '300ms'")
        conn.execute(f"ALTER DATABASE {database.name} SET row_security = on")
    replication = ReplicationConnection.open(settings(database))
    created = replication.create_slot("s", lock_timeout_seconds=5)
    time.sleep(0.5)
    with held(SnapshotHolder.imported(settings(database), created.snapshot, [table])) as holder:
        with connect(settings(database), autocommit=False) as conn:
            import_snapshot(conn, holder.snapshot_id)
            time.sleep(0.5)
            query, text = copy_query(raw_plan(table), table.leaves[0], 0, None)
            slow = query.replace(" WHERE ", " WHERE pg_sleep(0.5) IS NOT NULL AND ")
            assert len(list(copy_rows(conn, slow, text))) == 1
            shown = {name: conn.execute(f"SHOW {name}".encode()).fetchone() for name in timeouts}
            assert shown == dict.fromkeys(timeouts, ("0",))
            for name, value in (
                ("row_security", "off"),
                ("transaction_isolation", "repeatable read"),
                ("transaction_read_only", "on"),
                ("client_encoding", "UTF8"),
            ):
                assert conn.execute(f"SHOW {name}".encode()).fetchone() == (value,)
        holder.check()
    replication.close()


def test_fresh_snapshot_says_what_it_sees(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY)")
    table = table_of(database18, "t")
    with database18.connect(autocommit=False) as conn:
        conn.execute("INSERT INTO t VALUES (1)")
        row = conn.execute("SELECT pg_current_xact_id()::text::int8").fetchone()
        assert row is not None
        xid = int(str(row[0]))
        with held(SnapshotHolder.fresh(settings(database18), [table])) as holder:
            assert not holder.snapshot.sees(xid)
            assert holder.snapshot.sees(xid - 100)
            assert not holder.snapshot.sees(holder.snapshot.xmax)
        conn.commit()
    with held(SnapshotHolder.fresh(settings(database18), [table])) as holder:
        assert holder.snapshot.sees(xid)


def test_transaction_snapshot() -> None:
    snapshot = TransactionSnapshot.parse("10:20:10,14")
    assert [xid for xid in range(5, 25) if not snapshot.sees(xid)] == [10, 14, 20, 21, 22, 23, 24]
    assert TransactionSnapshot.parse("10:10:").xip == frozenset()
    with pytest.raises(ValueError, match="unpack"):
        TransactionSnapshot.parse("10")


@pytest.mark.requirement("R69", "R76")
def test_ranges_of_blocks_cover_every_row_once(database: Database) -> None:
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text);"
        "INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 3000) i;"
        "DELETE FROM t WHERE id % 7 = 0"
    )
    table = table_of(database, "t")
    leaf = table.leaves[0]
    assert leaf.pages > 100
    plan = raw_plan(table, ["id"])
    with held(SnapshotHolder.fresh(settings(database), [table])) as holder:
        # Rows move to other blocks meanwhile; under one snapshot nothing is missed or seen twice.
        database.execute("UPDATE t SET v = v || 'y' WHERE id < 1000")
        found: list[int] = []
        with connect(settings(database)) as conn:
            import_snapshot(conn, holder.snapshot_id)
            bounds = [*range(0, leaf.pages, 17), None]
            for start, end in itertools.pairwise(bounds):
                assert start is not None
                query, text = copy_query(plan, leaf, start, end)
                found += ids([row for batch in copy_rows(conn, query, text) for row in batch])
            ((plan_text,),) = conn.execute(f"EXPLAIN (FORMAT json) {query}".encode()).fetchall()
            assert "Tid Range Scan" in str(plan_text)
    assert sorted(found) == [i for i in range(1, 3001) if i % 7]
    assert len(found) == len(set(found))


@pytest.mark.requirement("R76", "R38")
def test_reads_what_the_publication_sends(database: Database) -> None:
    database.execute(
        "CREATE TABLE t (id int, tenant text, v text, gone int, PRIMARY KEY (id, tenant));"
        "ALTER TABLE t DROP gone; CREATE TABLE child () INHERITS (t);"
        "INSERT INTO t SELECT i, CASE i % 2 WHEN 0 THEN 'a' ELSE 'b' END, 'v'"
        " FROM generate_series(1, 10) i;"
        "INSERT INTO child VALUES (99, 'a', 'v');"
        "CREATE PUBLICATION pub FOR TABLE ONLY t (id, tenant) WHERE (tenant = 'a' OR id = 1)"
    )
    with connect(settings(database)) as conn:
        publication = read_publication(conn, "pub")
    assert publication is not None
    table, warnings = with_published_children(table_of(database, "t"), publication)
    assert "child" in warnings[0]
    published = publication.tables[table.oid]
    plan = raw_plan(table, published.columns)
    rows = read_all(database, plan, table, row_filter=published.row_filter)
    assert ids(rows) == [1, 2, 4, 6, 8, 10]
    assert {len(row) for row in rows} == {2}


@pytest.mark.requirement("R12", "R68")
def test_types_without_binary_output_come_as_text(database: Database) -> None:
    database.execute(
        "CREATE TYPE pair AS (n int, acl aclitem);"
        "CREATE TABLE t (id int PRIMARY KEY, acl aclitem, acls aclitem[], pair pair, d text);"
        "INSERT INTO t VALUES (1, '=r/postgres', '{=r/postgres}', ROW(1, '=r/postgres'), 'd'),"
        " (2, NULL, NULL, NULL, NULL)"
    )
    table = table_of(database, "t")
    plan = raw_plan(table)
    _, text = copy_query(plan, table.leaves[0], 0, None)
    assert text == (False, True, True, True, False)
    first, second = read_all(database, plan, table)
    assert first[1:] == [b"=r/postgres", b"{=r/postgres}", b"(1,=r/postgres)", b"d"]
    assert [type(value) for value in first] == [bytes, TextValue, TextValue, TextValue, bytes]
    assert second[1:] == [None, None, None, None]


def test_hostile_names(database18: Database) -> None:
    schema, name, column = 'a"b', "t ; DROP TABLE x --", "🐘 \"'é%s"
    quoted = [f'"{part.replace(chr(34), chr(34) * 2)}"' for part in (schema, name, column)]
    with database18.connect() as conn:
        conn.execute(f"CREATE SCHEMA {quoted[0]}".encode())
        conn.execute(
            f"CREATE TABLE {quoted[0]}.{quoted[1]} (id int PRIMARY KEY, {quoted[2]} text)".encode()
        )
        conn.execute(f"INSERT INTO {quoted[0]}.{quoted[1]} VALUES (1, 'x')".encode())
    table = table_of(database18, f"{quoted[0]}.{quoted[1]}")
    assert (table.schema, table.name) == (schema, name)
    with held(SnapshotHolder.fresh(settings(database18), [table])) as holder:
        rows = read_all(database18, raw_plan(table), table, holder.snapshot_id)
    assert [row[1] for row in rows] == [b"x"]


def test_a_failing_copy_says_so_and_frees_the_connection(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY)")
    database18.execute("INSERT INTO t SELECT generate_series(0, 5000)")
    table = table_of(database18, "t")
    query, text = copy_query(raw_plan(table), table.leaves[0], 0, None, "1 / (4000 - id) < 2")
    with connect(settings(database18)) as conn:
        with pytest.raises(SourceError, match="22012"):
            list(copy_rows(conn, query, text))
        good, text = copy_query(raw_plan(table), table.leaves[0], 0, None)
        assert sum(map(len, copy_rows(conn, good, text))) == 5001
        with pytest.raises(SourceError) as caught:
            list(copy_rows(conn, good.replace('"id"', '"nope"'), text))
        assert caught.value.kind is ErrorKind.TABLE_UNUSABLE


def test_a_killed_server_process_is_an_error_and_no_short_table(database18: Database) -> None:
    database18.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text);"
        "INSERT INTO t SELECT i, repeat('x', 1000) FROM generate_series(1, 20000) i"
    )
    table = table_of(database18, "t")
    conn = connect(settings(database18))
    query, text = copy_query(raw_plan(table), table.leaves[0], 0, None)
    batches = copy_rows(conn, query, text, batch_rows=10)
    next(batches)
    pid = conn.info.backend_pid
    database18.execute("SELECT pg_terminate_backend(%s)", (pid,))
    with pytest.raises(SourceError) as caught:
        for _ in batches:
            pass
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
    conn.close()


def test_an_abandoned_copy_closes_its_connection(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY)")
    database18.execute("INSERT INTO t SELECT generate_series(1, 100000)")
    table = table_of(database18, "t")
    conn = connect(settings(database18))
    query, text = copy_query(raw_plan(table), table.leaves[0], 0, None)
    batches = copy_rows(conn, query, text, batch_rows=10)
    assert len(next(batches)) <= 10
    batches.close()  # type: ignore[attr-defined]
    assert conn.closed


def test_waiting_for_rows_leaves_other_threads_alone(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    table = table_of(database18, "t")
    query, text = copy_query(raw_plan(table), table.leaves[0], 0, None)
    slow = query.replace(" WHERE ", " WHERE pg_sleep(0.5) IS NOT NULL AND ")
    done: list[int] = []

    def copy() -> None:
        with connect(settings(database18)) as conn:
            done.append(sum(map(len, copy_rows(conn, slow, text))))

    thread = threading.Thread(target=copy)
    thread.start()
    longest, last = 0.0, time.monotonic()
    while thread.is_alive():
        time.sleep(0.005)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    assert done == [1]
    assert longest < 0.3


def test_snapshot_names_are_validated(database18: Database) -> None:
    with connect(settings(database18)) as conn, pytest.raises(ValueError, match="snapshot"):
        import_snapshot(conn, "x'; DROP TABLE t; --")


def test_wide_table_with_every_kind_of_dropped_column(database: Database) -> None:
    columns = ", ".join(f"c{i} int DEFAULT {i}" for i in range(300))
    database.execute(f"CREATE TABLE t (id int PRIMARY KEY, {columns}); INSERT INTO t VALUES (1)")
    database.execute("ALTER TABLE t DROP c0, DROP c150, DROP c299")
    table = table_of(database, "t")
    (row,) = read_all(database, raw_plan(table), table)
    assert len(row) == len(table.columns) == 298
    assert row[-1] == struct.pack(">i", 298)


# -- the parser

VALUES = st.lists(st.lists(st.none() | st.binary(max_size=40), min_size=3, max_size=3), max_size=8)


def encode(rows: Sequence[Sequence[RawValue]], trailer: bytes = TRAILER) -> bytes:
    data = HEADER
    for row in rows:
        data += struct.pack(">h", len(row))
        for value in row:
            if isinstance(value, bytes):
                data += struct.pack(">i", len(value)) + value
            else:
                data += struct.pack(">i", -1)
    return data + trailer


def parse(chunks: Sequence[bytes], text: Sequence[bool] = (False, False, False)) -> list[Row]:
    parser = CopyParser(text)
    rows = [row for chunk in chunks for row in parser.feed(chunk)]
    parser.end()
    return rows


@given(rows=VALUES, data=st.data())
def test_any_chunking_gives_the_same_rows(
    rows: list[list[bytes | None]], data: st.DataObject
) -> None:
    stream = encode(rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    bounds = [0, *cuts, len(stream)]
    chunks = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    assert parse(chunks) == rows
    assert parse([bytes([byte]) for byte in stream]) == rows


@given(rows=VALUES.filter(bool))
def test_any_truncation_is_an_error(rows: list[list[bytes | None]]) -> None:
    stream = encode(rows)
    for end in range(len(stream)):
        with pytest.raises(ProtocolError):
            parse([stream[:end]])


@given(garbage=st.binary(max_size=80))
def test_garbage_raises_only_protocol_errors(garbage: bytes) -> None:
    for stream in (garbage, HEADER + garbage, encode([[b"1", None, b"3"]], b"") + garbage):
        with contextlib.suppress(ProtocolError):
            parse([stream])


@pytest.mark.parametrize(
    "stream",
    [
        encode([[b"1", b"2"]]),
        encode([[b"1", b"2", b"3", b"4"]]),
        encode([]) + b"x",
        encode([[b"1", b"2", b"3"]]) + encode([]),
        HEADER + struct.pack(">hi", 3, -2),
        HEADER + struct.pack(">hi", 3, (1 << 30) + 1),
        HEADER + struct.pack(">h", -2),
        b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 1 << 16, 0),
        b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, -1),
        b"1\t2\t3\n4\t5\t6\n7\t8\t9\n",
    ],
)
def test_malformed_copy_is_refused(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse([stream])


def test_header_extensions_are_skipped_and_text_is_marked() -> None:
    stream = HEADER[:-4] + struct.pack(">i", 3) + b"abc" + encode([[b"1", b"2", None]])[19:]
    (row,) = parse([stream[:20], stream[20:]], (False, True, True))
    assert row == [b"1", TextValue(b"2"), None]
    assert [type(value) for value in row] == [bytes, TextValue, type(None)]


def test_read_table_of_a_table_that_is_gone(database18: Database) -> None:
    with connect(settings(database18)) as conn, pytest.raises(SourceError) as caught:
        read_table(conn, 4_000_000_000)
    assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
