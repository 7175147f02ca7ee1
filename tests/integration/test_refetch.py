"""Reading rows again by key: visibility, kinds of keys, and what is left out."""

from __future__ import annotations

import struct
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.pgoutput.envelope import XLOG_DATA, XLOG_HEADER_BYTES
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.refetch import fetch_rows, widen_xid
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.snapshot import copy_query, copy_rows
from cdc_sync.rows import UNCHANGED, RawValue, Row, TextValue
from tests.support.fix_postgres import Database, PrivatePostgres
from tests.support.source_tables import raw_plan, source_settings


def connection(database: Database) -> PgConnection:
    return connect(source_settings(database.url))


def plan_of(database: Database, name: str) -> TablePlan:
    with connection(database) as conn:
        return raw_plan(find_table(conn, name))


def int4(value: int) -> bytes:
    return struct.pack(">i", value)


def first_ints(rows: list[Row]) -> list[int]:
    return sorted(int.from_bytes(row[0]) for row in rows if isinstance(row[0], bytes))


def test_reads_what_is_there(database: Database) -> None:
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, e vector(3));"
        "INSERT INTO t SELECT i, 'v' || i, '[1,2,3]' FROM generate_series(1, 3000) i;"
        "UPDATE t SET v = NULL WHERE id = 2"
    )
    plan = plan_of(database, "t")
    with connection(database) as conn:
        keys = [[int4(i)] for i in (*range(1, 1500), 2, 2, -1, 99999)]
        rows = fetch_rows(conn, plan, keys, [])
        assert first_ints(rows) == list(range(1, 1500))
        by_id = {row[0]: row for row in rows}
        assert by_id[int4(1)] == [int4(1), b"v1", struct.pack(">hhfff", 3, 0, 1, 2, 3)]
        assert by_id[int4(2)][1] is None
        assert fetch_rows(conn, plan, [], [1]) == []
        # The connection is idle again, with its settings as before.
        assert conn.info.transaction_status.name == "IDLE"
        assert conn.execute("SHOW statement_timeout").fetchone() == ("0",)


def test_key_lookups_use_the_index(database18: Database) -> None:
    database18.execute(
        "CREATE TABLE t (a int, b text, v text, PRIMARY KEY (a, b));"
        "INSERT INTO t SELECT i, 'b' || i, repeat('x', 200) FROM generate_series(1, 60000) i;"
        "ANALYZE t"
    )
    plan = plan_of(database18, "t")
    keys = [[int4(i), b"b%d" % i] for i in range(1, 60000, 3000)]
    with connection(database18) as conn:
        before = _blocks(database18)
        assert len(fetch_rows(conn, plan, keys, [])) == len(keys)
        conn.execute("SELECT pg_stat_force_next_flush()")
    after = _blocks(database18)
    assert after[0] == before[0], "the table was scanned as a whole"
    assert after[1] - before[1] == len(keys)


def _blocks(database: Database) -> tuple[int, int]:
    ((scans, fetched),) = database.execute(
        "SELECT coalesce(sum(seq_tup_read), 0)::int8, coalesce(sum(idx_tup_fetch), 0)::int8"
        " FROM pg_stat_user_tables WHERE relname = 't'"
    )
    return int(str(scans)), int(str(fetched))


@pytest.mark.requirement("R13")
def test_kinds_of_keys(database18: Database) -> None:
    database18.execute(
        """
        CREATE SCHEMA "Ext ""x";
        ALTER EXTENSION citext SET SCHEMA "Ext ""x";
        ALTER EXTENSION ltree SET SCHEMA "Ext ""x";
        CREATE DOMAIN "my id" AS numeric(10, 2);
        CREATE TYPE mood AS ENUM ('sad', 'it''s "ok"');
        CREATE TABLE k (c "Ext ""x".citext, l "Ext ""x".ltree, d "my id", m mood, u uuid, b bytea,
          ch char(5), q "char", n name, ts timestamptz, v varchar(9), bi bit(3), f float8, o oid,
          PRIMARY KEY (c, l, d, m, u, b, ch, q, n, ts, v, bi, f, o));
        INSERT INTO k VALUES ('MiXed', 'a.b', 1.50, 'it''s "ok"', gen_random_uuid(), '\\x00ff',
          'ab', 'q', 'nam', now(), 'vv', '101', 0.1, 7)
        """
    )
    plan = plan_of(database18, "k")
    table, text_plan = plan, plan_of(database18, "k")
    with connection(database18) as conn:
        leaf = find_table(conn, "k").leaves[0]
        query, text = copy_query(plan, leaf, 0, None)
        (copied,) = [row for batch in copy_rows(conn, query, text) for row in batch]
        assert fetch_rows(conn, table, [copied], []) == [copied]
        # The same in text, as a stream in text mode has it.
        listed = ", ".join(f'"{column.name}"::text' for column in plan.columns)
        (shown,) = conn.execute(f"SELECT {listed} FROM public.k".encode()).fetchall()
        as_text = [TextValue(str(value).encode()) for value in shown]
        assert fetch_rows(conn, text_plan, [as_text, as_text], []) == [copied]
        mixed = [t if i % 2 else b for i, (t, b) in enumerate(zip(as_text, copied, strict=True))]
        assert fetch_rows(conn, plan, [mixed, copied], []) == [copied]
        # citext compares without regard to case, as the table's own index does.
        upper = [TextValue(b"MIXED"), *as_text[1:]]
        assert fetch_rows(conn, plan, [upper], []) == [copied]


def test_row_filter_partitions_and_children(database: Database) -> None:
    database.execute(
        "CREATE TABLE p (id int, cdc_sync_key_0 int, PRIMARY KEY (id)) PARTITION BY RANGE (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE p2 (cdc_sync_key_0 int, id int NOT NULL);"
        "ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20);"
        "INSERT INTO p SELECT i, i % 2 FROM generate_series(0, 19) i;"
        "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child () INHERITS (parent);"
        "INSERT INTO parent VALUES (1); INSERT INTO child VALUES (1), (2)"
    )
    with connection(database) as conn:
        keys = [[int4(i)] for i in range(20)]
        partitioned = raw_plan(find_table(conn, "p"))
        # The filter means the table's column, not the list of keys, which has one of that name.
        rows = fetch_rows(conn, partitioned, keys, [], "(cdc_sync_key_0 = 1)")
        assert first_ints(rows) == list(range(1, 20, 2))
        parent = raw_plan(find_table(conn, "parent"))
        assert first_ints(fetch_rows(conn, parent, keys, [])) == [1]


def test_table_that_was_renamed_changed_or_dropped(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'x')")
    plan = plan_of(database18, "t")
    with connection(database18) as conn:
        database18.execute("ALTER TABLE t RENAME TO t2; CREATE TABLE t (id int, v text)")
        assert fetch_rows(conn, plan, [[int4(1)]], []) == [[int4(1), b"x"]]
        database18.execute("ALTER TABLE t2 RENAME v TO w")
        with pytest.raises(SourceError) as caught:
            fetch_rows(conn, plan, [[int4(1)]], [])
        assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
        database18.execute("DROP TABLE t2")
        with pytest.raises(SourceError, match="gone") as caught:
            fetch_rows(conn, plan, [[int4(1)]], [])
        assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
        assert conn.info.transaction_status.name == "IDLE"


@pytest.mark.parametrize("key", [[None], [UNCHANGED], [], [b"1", b"2"]])
def test_a_key_that_is_none_is_a_programming_error(
    database18: Database, key: list[RawValue]
) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY)")
    plan = plan_of(database18, "t")
    with connection(database18) as conn, pytest.raises(ValueError, match=r"key of public\.t"):
        fetch_rows(conn, plan, [key], [])


def test_malformed_key_values_do_not_reach_the_message(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY)")
    plan = plan_of(database18, "t")
    with connection(database18) as conn:
        for key in (TextValue(b"s3cret"), b"s3cret"):
            with pytest.raises(SourceError) as caught:
                fetch_rows(conn, plan, [[key]], [])
            assert "s3cret" not in str(caught.value)
        assert fetch_rows(conn, plan, [[int4(1)]], []) == []


@pytest.mark.requirement("R84")
def test_waits_until_the_transaction_is_visible(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'old')")
    plan = plan_of(database, "t")
    with connection(database) as conn, database.connect(autocommit=False) as writer:
        writer.execute("UPDATE t SET v = 'new'")
        row = writer.execute("SELECT (pg_current_xact_id()::text::int8 % (2^32)::int8)").fetchone()
        assert row is not None
        xid = int(str(row[0]))
        timer = threading.Timer(0.4, writer.commit)
        timer.start()
        started = time.monotonic()
        rows = fetch_rows(conn, plan, [[int4(1)]], [xid, xid], timeout_seconds=10)
        timer.join()
        assert time.monotonic() - started >= 0.35
        assert rows == [[int4(1), b"new"]]


@pytest.mark.requirement("R84")
def test_gives_up_in_time(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY)")
    plan = plan_of(database18, "t")
    with connection(database18) as conn, database18.connect(autocommit=False) as writer:
        row = writer.execute("SELECT pg_current_xact_id()::text::int8").fetchone()
        assert row is not None
        started = time.monotonic()
        with pytest.raises(SourceError, match="not visible") as caught:
            fetch_rows(conn, plan, [[int4(1)]], [int(str(row[0]))], timeout_seconds=0.5)
        assert time.monotonic() - started < 3
        assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
        assert conn.info.transaction_status.name == "IDLE"


@pytest.mark.requirement("R84")
def test_commits_held_back_by_a_synchronous_standby(private_postgres: PrivatePostgres) -> None:
    """The stream delivers a commit that no snapshot sees yet: the standby has not answered."""
    server = private_postgres()
    source = source_settings(server.url())
    with connect(source) as admin, connect(source) as conn:
        admin.execute("CREATE TABLE public.t (id int PRIMARY KEY, v text)")
        admin.execute("INSERT INTO public.t VALUES (1, 'old')")
        admin.execute("CREATE PUBLICATION pub FOR TABLE public.t")
        plan = raw_plan(find_table(admin, "t"))
        stream = ReplicationConnection.open(source)
        stream.create_slot("s", lock_timeout_seconds=5)
        stream.start("s", "pub")
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        admin.execute("SELECT pg_reload_conf()")
        time.sleep(0.3)
        writer = connect(source)
        thread = threading.Thread(
            target=writer.execute, args=("UPDATE public.t SET v = 'new' WHERE id = 1",)
        )
        thread.start()
        xid = _streamed_xid(stream)
        with pytest.raises(SourceError, match="not visible"):
            fetch_rows(conn, plan, [[int4(1)]], [xid], timeout_seconds=0.5)
        admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        admin.execute("SELECT pg_reload_conf()")
        assert fetch_rows(conn, plan, [[int4(1)]], [xid]) == [[int4(1), b"new"]]
        thread.join(10)
        writer.close()
        stream.close()


def _streamed_xid(stream: ReplicationConnection) -> int:
    deadline = time.monotonic() + 10
    xid = None
    while time.monotonic() < deadline:
        for frame in stream.read():
            message = frame[XLOG_HEADER_BYTES:] if frame[0] == XLOG_DATA else b""
            if message[:1] == b"B":
                xid = int.from_bytes(message[17:21])
            elif message[:1] == b"C" and xid is not None:
                return xid
        time.sleep(0.01)
    raise AssertionError("the commit was not streamed")


@pytest.mark.requirement("R75")
@pytest.mark.parametrize("epoch", [0, 1, 2, 1 << 20])
def test_widening_at_the_edges_of_epochs(epoch: int) -> None:
    edge = epoch << 32
    for offset in (-5, -1, 0, 1, 5, 1 << 31, (1 << 31) - 1):
        xmax = edge + offset
        if xmax < 3:
            continue
        for distance in (0, 1, 4, 1000, (1 << 31) - 1):
            wide = xmax - distance
            if wide >= 0:
                assert widen_xid(wide & 0xFFFFFFFF, xmax) == wide


@pytest.mark.requirement("R75")
@given(xmax=st.integers(1 << 32, 1 << 60), distance=st.integers(-(1 << 31) + 1, (1 << 31) - 1))
def test_widening_finds_the_nearest(xmax: int, distance: int) -> None:
    assert widen_xid((xmax + distance) & 0xFFFFFFFF, xmax) == xmax + distance
