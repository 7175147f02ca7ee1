"""What the daemon polls: cheap queries that tell whether something needs a closer look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import psycopg

from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection, translate

# DDL writes no message into the stream until the next change of the table (R30). One statement, so
# that what changes together is seen together; no function that waits for a lock.
_DEFINITIONS = """
    SELECT c.oid::int8,
           concat(
             (SELECT md5(string_agg(concat_ws('|', a.attnum, a.attname, a.atttypid, a.atttypmod,
                                              a.attgenerated), ',' ORDER BY a.attnum))
                FROM pg_catalog.pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
             (WITH RECURSIVE part (oid) AS (
                SELECT i.inhrelid FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid
                UNION
                SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN part ON i.inhparent = part.oid)
              SELECT md5(string_agg(part.oid::text, ',' ORDER BY part.oid)) FROM part), '.',
             (WITH RECURSIVE tree (oid) AS (
                SELECT c.oid UNION
                SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree ON i.inhparent = tree.oid)
              SELECT md5(string_agg(s.relfilenode::text, ',' ORDER BY s.oid))
                FROM tree JOIN pg_catalog.pg_class s ON s.oid = tree.oid), '.',
             (SELECT md5(string_agg(concat_ws('|', a.attnum, a.xmin), ',' ORDER BY a.attnum))
                FROM pg_catalog.pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0))
      FROM pg_catalog.pg_class c
     WHERE c.oid = ANY(%s::oid[])
"""

_POSITION = """
    SELECT pg_current_wal_flush_lsn()::text, s.restart_lsn::text, s.wal_status, s.safe_wal_size,
    s.active,
           pg_snapshot_xmin(now.snapshot)::text::int8, pg_snapshot_xmax(now.snapshot)::text::int8
      FROM (SELECT pg_current_snapshot() AS snapshot) now LEFT JOIN pg_catalog.pg_replication_slots
      s ON s.slot_name = %s
"""


WalStatus: TypeAlias = Literal["reserved", "extended", "unreserved", "lost"]


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """The server's end of WAL, and the slot's hold on it. Slot fields are None when there is no
    such slot.

    ``xmin`` and ``xmax`` (64 bit): every transaction below the first is over, none at or above the
    second had begun.
    """

    current: Lsn
    restart: Lsn | None
    wal_status: WalStatus | None
    safe_wal_bytes: int | None
    active: bool | None
    xmin: int
    xmax: int


def definitions(connection: PgConnection, oids: Sequence[int]) -> dict[int, str]:
    """What :func:`cdc_sync.mapping.table.redefined` compares, by table. Tables that are gone are
    missing in the result."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(_DEFINITIONS, (list(oids),))
            return {int(oid): str(definition) for oid, definition in cursor}
    except psycopg.Error as error:
        raise translate(error, "reading the tables' definitions") from error


def source_position(connection: PgConnection, slot: str) -> SourcePosition:
    """Read the current WAL position and the slot's state."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(_POSITION, (slot,))
            row = cursor.fetchone()
    except psycopg.Error as error:
        raise translate(error, "reading the slot's state") from error
    assert row is not None
    current, restart, status, safe, active, xmin, xmax = row
    return SourcePosition(
        Lsn.parse(current),
        Lsn.parse(restart) if restart is not None else None,
        status,
        int(safe) if safe is not None else None,
        active,
        int(xmin),
        int(xmax),
    )


def transaction_horizon(connection: PgConnection) -> int:
    """A transaction id (64 bit) above that of every transaction that is running or over.

    Takes one for itself, since no snapshot tells: a running transaction may lie at or above a
    snapshot's ``xmax``, which is the newest one that is over, plus one.
    """
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()::text::int8")
            row = cursor.fetchone()
    except psycopg.Error as error:
        raise translate(error, "reading the current snapshot") from error
    assert row is not None
    return int(row[0])
