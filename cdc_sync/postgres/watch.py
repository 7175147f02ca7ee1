"""What the daemon polls: cheap queries that tell whether something needs a closer look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import psycopg

from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection, translate

# DDL writes no message into the stream until the next change of the table (R30). One statement, so
# that what changes together is seen together; no function that waits for a lock. A partition that
# DETACH CONCURRENTLY is about to take away does not count: its changes are not sent any more. A row
# of pg_inherits is written anew whenever a partition is attached.
_DEFINITIONS = """
    SELECT c.oid::int8,
           concat(
             (SELECT md5(string_agg(concat_ws('|', a.attnum, a.attname, a.atttypid, a.atttypmod,
                                              a.attgenerated), ',' ORDER BY a.attnum))
                FROM pg_catalog.pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
             (WITH RECURSIVE part (oid) AS (
                SELECT i.inhrelid FROM pg_catalog.pg_inherits i
                 WHERE i.inhparent = c.oid AND NOT i.inhdetachpending
                UNION
                SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN part
                    ON i.inhparent = part.oid AND NOT i.inhdetachpending)
              SELECT md5(string_agg(part.oid::text, ',' ORDER BY part.oid)) FROM part), '.',
             (WITH RECURSIVE tree (oid) AS (
                SELECT c.oid UNION
                SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree
                    ON i.inhparent = tree.oid AND NOT i.inhdetachpending)
              SELECT md5(string_agg(s.relfilenode::text, ',' ORDER BY s.oid))
                FROM tree JOIN pg_catalog.pg_class s ON s.oid = tree.oid), '.',
             (SELECT md5(string_agg(concat_ws('|', a.attnum, a.xmin), ',' ORDER BY a.attnum))
                FROM pg_catalog.pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0), '.',
             (WITH RECURSIVE types (oid) AS (
                SELECT a.atttypid FROM pg_catalog.pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                UNION
                SELECT inner_type.oid FROM types
                  JOIN pg_catalog.pg_type t ON t.oid = types.oid
                 CROSS JOIN LATERAL (
                   SELECT unnest(ARRAY[t.typelem, t.typbasetype]) UNION ALL
                   SELECT a.atttypid FROM pg_catalog.pg_attribute a
                    WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped UNION ALL
                   SELECT r.rngsubtype FROM pg_catalog.pg_range r WHERE r.rngtypid = t.oid
                 ) inner_type (oid))
              SELECT concat_ws(',',
                (SELECT CASE WHEN count(*) > 200 THEN concat('0=', md5(string_agg(e.enumlabel, ','
                                                                     ORDER BY e.oid)))
                        ELSE string_agg(concat(e.oid, '=', left(md5(e.enumlabel), 8)), ','
                                        ORDER BY e.oid) END
                   FROM types JOIN pg_catalog.pg_enum e ON e.enumtypid = types.oid),
                (SELECT string_agg(concat(record.oid, '=', left(record.attributes, 8)), ','
                                   ORDER BY record.oid)
                   FROM (SELECT t.oid, md5(string_agg(concat_ws('|', a.attnum, a.attname,
                                                                a.atttypid, a.atttypmod),
                                                      ',' ORDER BY a.attnum)) AS attributes
                           FROM types JOIN pg_catalog.pg_type t ON t.oid = types.oid
                           JOIN pg_catalog.pg_attribute a ON a.attrelid = t.typrelid
                          WHERE a.attnum > 0 AND NOT a.attisdropped
                          GROUP BY t.oid) record))),
             CASE c.relkind WHEN 'p' THEN concat('.',
               (WITH RECURSIVE part (oid, ways) AS (
                  SELECT i.inhrelid, i.xmin::text FROM pg_catalog.pg_inherits i
                   WHERE i.inhparent = c.oid AND NOT i.inhdetachpending
                  UNION ALL
                  SELECT i.inhrelid, concat(part.ways, ' ', i.xmin)
                    FROM pg_catalog.pg_inherits i JOIN part
                      ON i.inhparent = part.oid AND NOT i.inhdetachpending)
                SELECT string_agg(concat(part.oid, '=', left(md5(part.ways), 8), '-',
                                         leaf.relfilenode), ',' ORDER BY part.oid)
                  FROM part JOIN pg_catalog.pg_class leaf ON leaf.oid = part.oid
                 WHERE leaf.relkind <> 'p')) END)
      FROM pg_catalog.pg_class c
     WHERE c.oid = ANY(%s::oid[])
"""

# ALTER TABLE and GRANT write a new row of pg_class; statistics are written in place.
_SIGNS = """
    WITH RECURSIVE published AS (
      SELECT concat(p.oid, ' ', p.xmin, ' ',
                    (SELECT string_agg(concat(r.oid, ' ', r.xmin), ',' ORDER BY r.oid)
                       FROM pg_catalog.pg_publication_rel r WHERE r.prpubid = p.oid)) AS sign
        FROM pg_catalog.pg_publication p WHERE p.pubname = %s
    ), wanted AS (
      SELECT w.name, coalesce(
               (SELECT c.oid FROM pg_catalog.pg_class c WHERE c.oid = w.oid),
               (SELECT c.oid FROM pg_catalog.pg_class c
                  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE n.nspname = w.schema AND c.relname = w.relation)) AS oid
        FROM unnest(%s::text[], %s::oid[], %s::text[], %s::text[])
             AS w (name, oid, schema, relation)
    ), tree (name, oid) AS (
      SELECT name, oid FROM wanted UNION
      SELECT t.name, i.inhrelid FROM pg_catalog.pg_inherits i JOIN tree t ON i.inhparent = t.oid
    )
    SELECT t.name, md5(concat(
             (SELECT sign FROM published),
             (SELECT concat(r.rolbypassrls, ' ', r.rolsuper)
                FROM pg_catalog.pg_roles r WHERE r.rolname = current_user),
             string_agg(concat(c.oid, ' ', c.xmin, ' ', n.xmin, ' ',
                               (SELECT string_agg(a.xmin::text, ',' ORDER BY a.attnum)
                                  FROM pg_catalog.pg_attribute a
                                 WHERE a.attrelid = c.oid AND a.attnum > 0), ' ',
                               (SELECT string_agg(concat(i.indexrelid, ' ', i.xmin), ','
                                                  ORDER BY i.indexrelid)
                                  FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid)),
                        ';' ORDER BY c.oid)))
      FROM tree t
      LEFT JOIN pg_catalog.pg_class c ON c.oid = t.oid
      LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     GROUP BY t.name
"""

_POSITION = """
    SELECT pg_current_wal_flush_lsn()::text, s.restart_lsn::text, s.wal_status, s.safe_wal_size,
    s.active, (SELECT a.wait_event FROM pg_catalog.pg_stat_activity a WHERE a.pid = s.active_pid),
           pg_snapshot_xmin(now.snapshot)::text::int8, pg_snapshot_xmax(now.snapshot)::text::int8,
           ARRAY(SELECT xid::text::int8 FROM pg_snapshot_xip(now.snapshot) xid),
           spilled.spill_bytes, spilled.spill_txns
      FROM (SELECT pg_current_snapshot() AS snapshot) now LEFT JOIN pg_catalog.pg_replication_slots
      s ON s.slot_name = %s
      LEFT JOIN pg_catalog.pg_stat_replication_slots spilled ON spilled.slot_name = s.slot_name
"""


WalStatus: TypeAlias = Literal["reserved", "extended", "unreserved", "lost"]


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """The server's end of WAL, and the slot's hold on it. Slot fields are None when there is no
    such slot. ``waiting``: what its walsender waits for, None while it works.

    ``xmin`` and ``xmax`` (64 bit): every transaction below the first is over, none at or above the
    second had begun; ``running``: those in between that were not over. ``spilled_bytes`` and
    ``spilled_transactions``: what decoding has written to the server's disk, since its statistics
    were last reset.
    """

    current: Lsn
    restart: Lsn | None
    wal_status: WalStatus | None
    safe_wal_bytes: int | None
    active: bool | None
    waiting: str | None
    xmin: int
    xmax: int
    running: frozenset[int]
    spilled_bytes: int | None = None
    spilled_transactions: int | None = None

    @property
    def retained_bytes(self) -> int | None:
        """WAL that the slot keeps, in bytes; None where there is no such slot, or it is lost."""
        return None if self.restart is None else max(0, self.current - self.restart)


# A slot loses its WAL by whole segments, so what it may keep for certain are the whole segments in
# max_slot_wal_keep_size; wal_keep_size keeps as much for everybody. With less than a segment
# nothing is certain.
_WAL_LIMITS = """
    SELECT segment, CASE WHEN slot >= 0
                         THEN greatest(slot / segment, keep / segment, 1) * segment END
      FROM (SELECT max(setting::int8) FILTER (WHERE name = 'wal_segment_size') AS segment,
                   max(setting::int8 * 1048576)
                     FILTER (WHERE name = 'max_slot_wal_keep_size') AS slot,
                   max(setting::int8 * 1048576) FILTER (WHERE name = 'wal_keep_size') AS keep
              FROM pg_catalog.pg_settings
             WHERE name IN ('wal_segment_size', 'max_slot_wal_keep_size', 'wal_keep_size')) s
"""


@dataclass(frozen=True, slots=True)
class WalLimits:
    """``slot_bytes``: what a slot may keep before the server may take it away, for certain; None
    without a limit. ``segment_bytes``: WAL is freed by so much at once."""

    segment_bytes: int
    slot_bytes: int | None


def wal_limits(connection: PgConnection) -> WalLimits:
    """Read what the server lets slots keep. Raises :class:`SourceError`."""
    try:
        row = connection.execute(_WAL_LIMITS).fetchone()
    except psycopg.Error as error:
        raise translate(error, "reading max_slot_wal_keep_size") from error
    assert row is not None
    return WalLimits(int(row[0]), None if row[1] is None else int(row[1]))


# Since Postgres 16; to begin with only a superuser may, others are granted it. A regprocedure that
# does not exist is NULL, and so is its privilege.
_MAY_LOG = """
    SELECT pg_catalog.has_function_privilege(
             pg_catalog.to_regprocedure('pg_catalog.pg_log_standby_snapshot()'), 'EXECUTE')
           AND NOT pg_catalog.pg_is_in_recovery()
"""


def log_standby_snapshot(connection: PgConnection) -> bool:
    """Have the server log which transactions run, if it can and this role may; returns whether it
    did.

    Only at such a record can a slot's ``restart_lsn`` move; by itself the server writes one every
    15 seconds, and at checkpoints. Raises :class:`SourceError`.
    """
    try:
        row = connection.execute(_MAY_LOG).fetchone()
        if row is None or not row[0]:
            return False
        connection.execute("SELECT pg_catalog.pg_log_standby_snapshot()")
    except psycopg.Error as error:
        raise translate(error, "logging which transactions run") from error
    return True


def definitions(connection: PgConnection, oids: Sequence[int]) -> dict[int, str]:
    """What :func:`cdc_sync.mapping.table.redefined` compares, by table. Tables that are gone are
    missing in the result."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(_DEFINITIONS, (list(oids),))
            return {int(oid): str(definition) for oid, definition in cursor}
    except psycopg.Error as error:
        raise translate(error, "reading the tables' definitions") from error


def table_signs(
    connection: PgConnection, tables: Mapping[str, int], publication: str
) -> dict[str, str]:
    """A digest a table of whatever the catalog has that may keep it from being followed, or mend
    that: columns, privileges, replica identity, partitions, the publication.

    ``tables``: OIDs by name (``schema.table``); one that is gone is looked for by its name.
    """
    if not tables:
        return {}
    names = list(tables)
    schemas = [name.partition(".")[0] for name in names]
    relations = [name.partition(".")[2] for name in names]
    parameters = (publication, names, [tables[name] for name in names], schemas, relations)
    try:
        with connection.cursor() as cursor:
            cursor.execute(_SIGNS, parameters)
            return {str(name): str(sign) for name, sign in cursor}
    except psycopg.Error as error:
        raise translate(error, "reading what is known of stopped tables") from error


def source_position(connection: PgConnection, slot: str) -> SourcePosition:
    """Read the current WAL position and the slot's state."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(_POSITION, (slot,))
            row = cursor.fetchone()
    except psycopg.Error as error:
        raise translate(error, "reading the slot's state") from error
    assert row is not None
    current, restart, status, safe, active, waiting, xmin, xmax, running, *spilled = row
    return SourcePosition(
        Lsn.parse(current),
        Lsn.parse(restart) if restart is not None else None,
        status,
        int(safe) if safe is not None else None,
        active,
        waiting,
        int(xmin),
        int(xmax),
        frozenset(int(xid) for xid in running),
        *(None if number is None else int(number) for number in spilled),
    )


# A rebuild's first window has a slot that nobody reads yet; its process holds the lock of
# :func:`cdc_sync.postgres.exclusive.lock_pipeline` then. Locks are looked at only if need be.
_SLOTS = """
    SELECT s.slot_name, s.active OR EXISTS (
             SELECT FROM pg_catalog.pg_locks l
              WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                AND (l.classid::int8 << 32) | l.objid::int8
                    = hashtextextended('cdc_sync copy ' || s.slot_name, 0)),
           pg_wal_lsn_diff(pg_current_wal_flush_lsn(), s.restart_lsn)::int8
      FROM pg_catalog.pg_replication_slots s
     WHERE s.slot_type = 'logical' AND starts_with(s.slot_name, %s)
     ORDER BY s.slot_name
"""


@dataclass(frozen=True, slots=True)
class KeptSlot:
    """A slot. ``in_use``: somebody reads it, or copies under it; ``retained_bytes``: WAL that it
    keeps, None if it is lost."""

    name: str
    in_use: bool
    retained_bytes: int | None


def slots_beginning(connection: PgConnection, prefix: str) -> list[KeptSlot]:
    """The logical slots whose names begin so. Raises :class:`SourceError`, on a standby too."""
    try:
        rows = connection.execute(_SLOTS, (prefix,)).fetchall()
    except psycopg.Error as error:
        raise translate(error, "reading the slots of rebuilds") from error
    return [
        KeptSlot(str(name), bool(used), None if kept is None else max(0, int(kept)))
        for name, used, kept in rows
    ]


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
