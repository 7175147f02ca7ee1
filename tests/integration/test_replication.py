"""The replication transport against real servers."""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.errors import CdcSyncError, ConfigError, ErrorKind, ProtocolError, SourceError
from cdc_sync.pgoutput.envelope import KEEPALIVE, XLOG_DATA, XLOG_HEADER_BYTES, decode_keepalive
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.catalog import server_info
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.identifiers import quote_ident
from cdc_sync.postgres.replication import (
    ReplicationConnection,
    StreamOptions,
    start_command,
)
from cdc_sync.postgres.slot import blocking_transactions, drop_slot, read_slot
from tests.support.fix_postgres import Database, DatabaseFactory, PrivatePostgres
from tests.support.source_tables import source_settings

SLOT = "transport"


@contextlib.contextmanager
def replication(database: Database) -> Iterator[ReplicationConnection]:
    connection = ReplicationConnection.open(source_settings(database.url))
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def streaming(
    database: Database, publication: str = "pub", options: StreamOptions | None = None
) -> Iterator[ReplicationConnection]:
    with replication(database) as connection:
        if read_slot_info(database) is None:
            connection.create_slot(SLOT, lock_timeout_seconds=5)
        connection.start(SLOT, publication, options)
        yield connection


def read_slot_info(database: Database, slot: str = SLOT) -> object:
    with connect(source_settings(database.url)) as conn:
        return read_slot(conn, slot)


def messages(
    connection: ReplicationConnection,
    enough: Callable[[list[bytes]], bool],
    timeout_seconds: float = 20.0,
) -> list[bytes]:
    """Read until the pgoutput messages are enough."""
    found: list[bytes] = []
    deadline = time.monotonic() + timeout_seconds
    while not enough(found):
        assert time.monotonic() < deadline, f"only {[m[:1] for m in found]}"
        frames = connection.read()
        found += [f[XLOG_HEADER_BYTES:] for f in frames if f[0] == XLOG_DATA]
        if not frames:
            select.select([connection.fileno()], [], [], 0.2)
    return found


def commits(count: int) -> Callable[[list[bytes]], bool]:
    return lambda found: sum(m[:1] == b"C" for m in found) >= count


def changes(found: list[bytes]) -> list[bytes]:
    return [m for m in found if m[:1] in (b"I", b"U", b"D", b"T", b"M")]


def error_of(connection: ReplicationConnection, timeout_seconds: float = 20.0) -> CdcSyncError:
    """Read until the stream fails."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        try:
            if not connection.read():
                select.select([connection.fileno()], [], [], 0.2)
        except CdcSyncError as error:
            return error
    raise AssertionError("the stream did not fail")


def setup_table(database: Database, publication: str = "pub") -> None:
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text);"
        f"CREATE PUBLICATION {quote_ident(publication)} FOR TABLE t"
    )


@pytest.mark.requirement("R11", "R52", "R5")
def test_streams_on_every_version(protocol_database: Database) -> None:
    name = """Pub, '"X; DROP TABLE t -- 🐘"""
    setup_table(protocol_database, name)
    for number, options in enumerate(
        (
            StreamOptions(),
            StreamOptions(binary=False, messages=False),
            StreamOptions(protocol_version=4, streaming="parallel"),
            StreamOptions(protocol_version=2, streaming="on"),
        )
    ):
        with streaming(protocol_database, name, options) as connection:
            protocol_database.execute(f"INSERT INTO t VALUES ({number}, 'x')")
            found = changes(messages(connection, commits(1)))
            kind = b"b" if options.binary else b"t"
            assert any(m[:1] == b"I" and m[8:9] == kind for m in found)
            assert connection.stop()


@pytest.mark.requirement("R11")
def test_never_sends_an_option_that_the_server_lacks() -> None:
    wanted = StreamOptions(protocol_version=4, streaming="parallel")
    assert "proto_version '2'" in start_command("s", "p", wanted, 140010)
    assert "streaming 'on'" in start_command("s", "p", wanted, 150010)
    assert "streaming 'parallel'" in start_command("s", "p", wanted, 160010)
    plain = start_command("s", "p", StreamOptions(), 140010)
    for option in ("streaming", "two_phase", "origin"):
        assert option not in plain
    assert "LOGICAL 0/0 (proto_version '1'" in plain


@pytest.mark.requirement("R46")
def test_starts_where_the_slot_stands(database18: Database) -> None:
    setup_table(database18)
    with streaming(database18) as connection:
        database18.execute("INSERT INTO t VALUES (1, 'one')")
        found = messages(connection, commits(1))
        end = int.from_bytes(next(m for m in found if m[:1] == b"C")[10:18])
        connection.send_status(connection.received_lsn, end)
        assert connection.stop()
    database18.execute("INSERT INTO t VALUES (2, 'two')")
    with streaming(database18) as connection:
        (change,) = changes(messages(connection, commits(1)))
        assert change.endswith(b"two")


@pytest.mark.requirement("R51", "R52")
def test_slot_creation_does_not_wait_for_ever(protocol_database: Database) -> None:
    setup_table(protocol_database)
    writer = protocol_database.connect(autocommit=False)
    writer.execute("SET application_name = 'the writer'")
    writer.execute("INSERT INTO t VALUES (1, 'x')")
    try:
        started = time.monotonic()
        with replication(protocol_database) as connection:
            with pytest.raises(SourceError) as caught:
                connection.create_slot(SLOT, lock_timeout_seconds=0.3)
            assert time.monotonic() - started < 5
            assert caught.value.kind is ErrorKind.SLOT_BUSY
            assert f"process {writer.info.backend_pid} (the writer)" in caught.value.message
            assert read_slot_info(protocol_database) is None
            with connect(source_settings(protocol_database.url)) as conn:
                assert "the writer" in "".join(blocking_transactions(conn))
            writer.commit()
            # The connection is still good, and so is the next try.
            created = connection.create_slot(SLOT, lock_timeout_seconds=5)
            assert created.name == SLOT
            assert created.snapshot
    finally:
        writer.close()


@pytest.mark.requirement("R51", "R81")
def test_slot_creation_names_prepared_transactions(private_postgres: PrivatePostgres) -> None:
    server = private_postgres({"max_prepared_transactions": "4"})
    source = source_settings(server.url())
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute("CREATE TABLE t (id int)")
        conn.execute("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'it''s \"mine\"'")
        connection = ReplicationConnection.open(source)
        with pytest.raises(SourceError, match=r"prepared transaction 'it''s \"mine\"'") as caught:
            connection.create_slot(SLOT, lock_timeout_seconds=0.3)
        assert caught.value.kind is ErrorKind.SLOT_BUSY
        conn.execute("ROLLBACK PREPARED 'it''s \"mine\"'")
        connection.create_slot(SLOT, lock_timeout_seconds=5)
        connection.close()


def test_slot_that_exists(database18: Database) -> None:
    with replication(database18) as first, replication(database18) as second:
        first.create_slot(SLOT, lock_timeout_seconds=5)
        with pytest.raises(SourceError) as caught:
            second.create_slot(SLOT, lock_timeout_seconds=5)
        assert caught.value.kind is ErrorKind.SLOT_ACTIVE


def test_slot_names_are_validated(database18: Database) -> None:
    with replication(database18) as connection:
        for name in ("", "A", "a-b", 'a"; DROP', "x" * 64, "ä"):
            with pytest.raises(ConfigError):
                connection.create_slot(name, lock_timeout_seconds=1)


def test_no_room_for_a_slot(private_postgres: PrivatePostgres) -> None:
    server = private_postgres({"max_replication_slots": "1"})
    connection = ReplicationConnection.open(source_settings(server.url()))
    connection.create_slot("one", lock_timeout_seconds=5)
    with pytest.raises(SourceError, match="replication slots are in use") as caught:
        connection.create_slot("two", lock_timeout_seconds=5)
    assert caught.value.kind is ErrorKind.SOURCE_SETTING
    assert "max_replication_slots" in caught.value.remedy
    connection.close()


def test_wal_level_too_low(private_postgres: PrivatePostgres) -> None:
    server = private_postgres({"wal_level": "replica"})
    connection = ReplicationConnection.open(source_settings(server.url()))
    with pytest.raises(SourceError) as caught:
        connection.create_slot("one", lock_timeout_seconds=5)
    assert caught.value.kind is ErrorKind.SOURCE_SETTING
    assert "wal_level = logical" in caught.value.remedy
    connection.close()


def test_identify(database: Database) -> None:
    with replication(database) as connection, connect(source_settings(database.url)) as conn:
        identity = connection.identify()
        server = server_info(conn)
        assert identity.system_identifier == server.system_identifier
        assert identity.timeline == server.timeline == 1
        assert identity.database == database.name == server.database
        assert identity.xlog_position > Lsn(0)
        assert connection.wal_sender_timeout_seconds == 60.0


@pytest.mark.requirement("R58")
def test_slot_in_use(protocol_database: Database) -> None:
    setup_table(protocol_database)
    with streaming(protocol_database) as first, replication(protocol_database) as second:
        with pytest.raises(SourceError) as caught:
            second.start(SLOT, "pub")
        assert caught.value.kind is ErrorKind.SLOT_ACTIVE
        assert f"process {first.backend_pid} (cdc_sync)" in caught.value.message
        with connect(source_settings(protocol_database.url)) as conn:
            with pytest.raises(SourceError) as caught:
                drop_slot(conn, SLOT)
            assert caught.value.kind is ErrorKind.SLOT_ACTIVE
            first.stop()
            # Nothing was broken by the refusal.
            second.start(SLOT, "pub")


def test_slot_missing(protocol_database: Database) -> None:
    setup_table(protocol_database)
    with replication(protocol_database) as connection:
        with pytest.raises(SourceError) as caught:
            connection.start("nowhere", "pub")
        assert caught.value.kind is ErrorKind.SLOT_LOST


def test_slot_of_another_database(
    database18: Database, database18_factory: DatabaseFactory
) -> None:
    setup_table(database18)
    other = database18_factory()
    with replication(database18) as connection:
        connection.create_slot(SLOT, lock_timeout_seconds=5)
    with replication(other) as connection, pytest.raises(SourceError) as caught:
        connection.start(SLOT, "pub")
    assert caught.value.kind is ErrorKind.SOURCE_SETTING


@pytest.mark.requirement("R57", "R8")
def test_slot_lost(private_postgres: PrivatePostgres) -> None:
    settings = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB"}
    server = private_postgres(settings)
    source = source_settings(server.url())
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION pub FOR TABLE t")
        connection = ReplicationConnection.open(source)
        connection.create_slot(SLOT, lock_timeout_seconds=5)
        connection.close()
        for _ in range(4):
            conn.execute("SELECT pg_logical_emit_message(false, 'x', repeat('y', 1000))")
            conn.execute("SELECT pg_switch_wal()")
        conn.execute("CHECKPOINT")
        with connect(source) as reading:
            slot = read_slot(reading, SLOT)
        assert slot is not None
        assert slot.lost
        assert slot.wal_status == "lost"
        assert slot.invalidation_reason == "wal_removed"
        connection = ReplicationConnection.open(source)
        with pytest.raises(SourceError) as caught:
            connection.start(SLOT, "pub")
        assert caught.value.kind is ErrorKind.SLOT_LOST
        connection.close()


@pytest.mark.requirement("R9", "R63", "R8")
def test_publication_that_vanishes_is_fatal(protocol_database: Database) -> None:
    setup_table(protocol_database)
    # A role that hides warnings must not hide that changes are skipped.
    with protocol_database.connect() as conn:
        conn.execute(f"ALTER DATABASE {protocol_database.name} SET client_min_messages = 'error'")
    with streaming(protocol_database) as connection:
        protocol_database.execute("INSERT INTO t VALUES (1, 'seen')")
        messages(connection, commits(1))
        protocol_database.execute("DROP PUBLICATION pub; INSERT INTO t VALUES (2, 'lost')")
        error = error_of(connection)
        assert error.kind is ErrorKind.PUBLICATION_UNUSABLE
        assert "pub" in error.message
        # It stays so: nothing of what was skipped is ever handed out.
        with pytest.raises(SourceError):
            connection.read()


@pytest.mark.requirement("R8")
def test_terminated_by_an_administrator(database: Database) -> None:
    setup_table(database)
    with streaming(database) as connection:
        database.execute("SELECT pg_terminate_backend(%s)", (connection.backend_pid,))
        error = error_of(connection)
        assert error.kind is ErrorKind.SOURCE_UNAVAILABLE
        assert "57P01" in error.message
        assert "slot" in error.remedy


def started_at(server: PostgresServer) -> ReplicationConnection:
    """A stream of an empty table of a server of its own."""
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION pub FOR TABLE t")
    connection = ReplicationConnection.open(source_settings(server.url()))
    connection.create_slot(SLOT, lock_timeout_seconds=5)
    connection.start(SLOT, "pub")
    return connection


@pytest.mark.requirement("R8", "R7")
def test_server_shuts_down(private_postgres: PrivatePostgres) -> None:
    server = private_postgres()
    connection = started_at(server)
    stopping = server_stop_in_background(server.stop)
    deadline = time.monotonic() + 30
    error: SourceError | None = None
    while error is None and time.monotonic() < deadline:
        select.select([connection.fileno()], [], [], 0.1)
        try:
            # A fast shutdown waits until the consumer has confirmed everything.
            for frame in connection.read():
                if frame[0] == KEEPALIVE:
                    end = decode_keepalive(frame).wal_end
                    connection.send_status(end, end)
        except SourceError as exc:
            error = exc
    stopping.join(30)
    connection.close()
    assert error is not None
    assert error.kind is ErrorKind.SOURCE_UNAVAILABLE
    # In which words depends on what the server was doing.
    assert "shutting down" in error.message or "57P01" in error.message


@pytest.mark.requirement("R8")
def test_server_killed(private_postgres: PrivatePostgres) -> None:
    server = private_postgres()
    connection = started_at(server)
    server.stop("immediate")
    assert error_of(connection).kind is ErrorKind.SOURCE_UNAVAILABLE
    with pytest.raises(SourceError):
        connection.send_status(0, 0)
    with pytest.raises(SourceError):
        connection.fileno()
    connection.close()
    connection.close()
    with pytest.raises(SourceError) as caught:
        ReplicationConnection.open(source_settings(server.url()))
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE


@pytest.mark.requirement("R8", "R12", "R63")
def test_decoding_error_and_the_text_way_out(database: Database) -> None:
    database.execute(
        "CREATE TABLE a (id int PRIMARY KEY, acl aclitem[]); CREATE PUBLICATION pub FOR TABLE a"
    )
    with streaming(database) as connection:
        database.execute("INSERT INTO a VALUES (1, '{=r/postgres}')")
        error = error_of(connection)
        assert error.kind is ErrorKind.PROTOCOL
        assert "binary output function" in error.message
        assert error_of(connection) is error
    with streaming(database, options=StreamOptions(binary=False)) as connection:
        (change,) = changes(messages(connection, commits(1)))
        assert b"{=r/postgres}" in change


@pytest.mark.requirement("R45", "R3")
def test_positions_never_exceed_what_was_received(database18: Database) -> None:
    setup_table(database18)
    with streaming(database18) as connection:
        database18.execute("INSERT INTO t VALUES (1, 'x')")
        messages(connection, commits(1))
        received = int(connection.received_lsn)
        assert received > 0
        far = received + (10 << 20)
        connection.send_status(far, far, reply=True)
        deadline = time.monotonic() + 10
        confirmed = 0
        while confirmed < received and time.monotonic() < deadline:
            time.sleep(0.02)
            connection.read()
            ((text,),) = database18.execute(
                "SELECT confirmed_flush_lsn::text FROM pg_replication_slots"
                " WHERE database = current_database()"
            )
            confirmed = Lsn.parse(str(text))
        assert confirmed == received
        with pytest.raises(ProtocolError):
            connection.send_status(received, received - 1)
        with pytest.raises(ProtocolError):
            connection.send_status(received - 1, received - 1)
        with pytest.raises(ProtocolError):
            connection.send_status(received, received + 1)
        # What was beyond still comes: the server was told nothing of it.
        database18.execute("INSERT INTO t VALUES (2, 'y')")
        assert changes(messages(connection, commits(1)))


def test_nothing_is_confirmed_before_anything_is_received(database18: Database) -> None:
    setup_table(database18)
    with streaming(database18) as connection:
        before = read_slot_info(database18)
        connection.send_status(1 << 60, 1 << 60)
        database18.execute("INSERT INTO t VALUES (1, 'x')")
        assert changes(messages(connection, commits(1)))
        assert before is not None


def test_read_respects_its_limits_and_loses_nothing(database18: Database) -> None:
    setup_table(database18)
    with streaming(database18) as connection:
        database18.execute(
            "INSERT INTO t SELECT i, repeat('x', 2000) FROM generate_series(1, 500) i"
        )
        seen = 0
        deadline = time.monotonic() + 20
        while seen < 500:
            assert time.monotonic() < deadline
            frames = connection.read(max_frames=3, max_bytes=5000)
            assert len(frames) <= 3
            assert sum(map(len, frames)) < 5000 + 2100
            assert all(isinstance(frame, bytes) for frame in frames)
            seen += sum(f[0] == XLOG_DATA and f[25:26] == b"I" for f in frames)
            if not frames:
                select.select([connection.fileno()], [], [], 0.2)
        assert seen == 500


def test_stop_in_the_middle_of_a_flood(database18: Database) -> None:
    setup_table(database18)
    with streaming(database18) as connection:
        database18.execute(
            "INSERT INTO t SELECT i, repeat('x', 2000) FROM generate_series(1, 20000) i"
        )
        assert connection.read(max_frames=10) is not None
        assert connection.stop(20)
    # Nothing was confirmed, so all of it comes again.
    with streaming(database18) as connection:
        assert changes(messages(connection, lambda found: len(found) > 20))


@pytest.mark.requirement("R6")
def test_hostile_role_settings_do_not_reach_the_stream(database18: Database) -> None:
    database18.execute(
        "CREATE TABLE h (id int PRIMARY KEY, ts timestamptz, i interval, f float8, b bytea,"
        " t text);"
        "CREATE PUBLICATION pub FOR TABLE h"
    )
    with database18.connect() as conn:
        for setting in (
            "datestyle = 'SQL, DMY'",
            "timezone = 'Asia/Tokyo'",
            "intervalstyle = 'postgres_verbose'",
            "extra_float_digits = -15",
            "bytea_output = 'escape'",
            "client_encoding = 'LATIN1'",
            "statement_timeout = '1ms'",
            "lock_timeout = '1ms'",
            "idle_in_transaction_session_timeout = '1ms'",
            "standard_conforming_strings = off",
        ):
            conn.execute(f"ALTER DATABASE {database18.name} SET {setting}")
    with streaming(database18, options=StreamOptions(binary=False)) as connection:
        with database18.connect() as conn:
            conn.execute(
                "SET statement_timeout = 0; SET client_encoding = 'UTF8';"
                "SET standard_conforming_strings = on"
            )
            conn.execute(
                "INSERT INTO h VALUES (1, '2024-03-04 05:06:07+00', '1 day 02:03:04',"
                " 0.1::float8 + 0.2::float8, '\\x00ff'::bytea, %s)",
                ("€ 🐘",),
            )
        (change,) = changes(messages(connection, commits(1)))
        for text in (
            b"2024-03-04 05:06:07+00",
            b"P1DT2H3M4S",
            b"0.30000000000000004",
            rb"\x00ff",
            "€ 🐘".encode(),
        ):
            assert text in change


def server_stop_in_background(stop: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=stop)
    thread.start()
    return thread
