"""Slots: their state on every version, dropping them, and the room that is left."""

from __future__ import annotations

import contextlib

import pytest

from cdc_sync.errors import ConfigError
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.slot import (
    blocking_transactions,
    current_wal_lsn,
    drop_slot,
    free_slots,
    read_slot,
    retained_wal_bytes,
    validate_slot_name,
)
from tests.support.fix_postgres import Database
from tests.support.source_tables import source_settings


@pytest.mark.requirement("R57", "R52")
def test_the_life_of_a_slot(protocol_database: Database) -> None:
    source = source_settings(protocol_database.url)
    with connect(source) as conn:
        assert read_slot(conn, "s") is None
        assert not drop_slot(conn, "s")
        assert retained_wal_bytes(conn, "s") is None
        slots, senders = free_slots(conn)
        with contextlib.closing(ReplicationConnection.open(source)) as replication:
            created = replication.create_slot("s", lock_timeout_seconds=5)
            assert free_slots(conn)[0] == slots - 1
            assert free_slots(conn)[1] == senders - 1
        slot = read_slot(conn, "s")
        assert slot is not None
        assert (slot.name, slot.plugin, slot.database) == ("s", "pgoutput", protocol_database.name)
        assert slot.confirmed_flush_lsn == created.consistent_point
        assert slot.restart_lsn is not None
        assert slot.restart_lsn <= created.consistent_point <= current_wal_lsn(conn)
        assert (slot.wal_status, slot.safe_wal_size, slot.invalidation_reason) == (
            "reserved",
            None,
            None,
        )
        assert not slot.lost
        assert not slot.active
        assert not slot.temporary
        before = retained_wal_bytes(conn, "s")
        assert before is not None
        conn.execute("SELECT pg_logical_emit_message(true, 'x', repeat('y', 100000))")
        after = retained_wal_bytes(conn, "s")
        assert after is not None
        assert after - before >= 100000
        assert drop_slot(conn, "s")
        assert read_slot(conn, "s") is None


@pytest.mark.requirement("R61")
def test_failover_slots_where_there_are_any(protocol_database: Database) -> None:
    source = source_settings(protocol_database.url)
    with contextlib.closing(ReplicationConnection.open(source)) as replication:
        assert replication.create_slot("s", failover=True, lock_timeout_seconds=5).snapshot
    with connect(source) as conn:
        slot = read_slot(conn, "s")
        assert slot is not None
        assert slot.failover == (protocol_database.major >= 17)


def test_only_writers_block(database: Database) -> None:
    reader, writer = (database.connect(autocommit=False) for _ in range(2))
    reader.execute("SELECT count(*) FROM pg_class")
    writer.execute("SET application_name = 'it is \"me\"'")
    writer.execute("SELECT pg_current_xact_id()")
    with connect(source_settings(database.url)) as conn:
        found = [text for text in blocking_transactions(conn) if database.name in text]
    assert len(found) == 1
    assert f'process {writer.info.backend_pid} (it is "me")' in found[0]
    reader.close()
    writer.close()


def test_a_least_privileged_role_sees_all_it_needs(database: Database) -> None:
    source = source_settings(database.create_cdc_role([]).url)
    with connect(source) as conn, database.connect(autocommit=False) as writer:
        writer.execute("SELECT pg_current_xact_id()")
        assert any(str(writer.info.backend_pid) in text for text in blocking_transactions(conn))
        writer.rollback()
        with contextlib.closing(ReplicationConnection.open(source)) as replication:
            replication.create_slot("s", lock_timeout_seconds=5)
        assert read_slot(conn, "s") is not None
        assert retained_wal_bytes(conn, "s") is not None
        assert free_slots(conn)[0] > 0
        assert drop_slot(conn, "s")


@pytest.mark.parametrize("name", ["", "A", "a-b", "x" * 64, "é", "a b", "a\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError):
        validate_slot_name(name)


def test_good_names() -> None:
    for name in ("a", "cdc_sync", "0", "x" * 63):
        assert validate_slot_name(name) == name
