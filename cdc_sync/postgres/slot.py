"""Replication slots: their state, and what stands in the way of making one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection, translate

_NAME: Final = re.compile(r"[a-z0-9_]{1,63}")


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A slot as ``pg_replication_slots`` shows it.

    ``restart_lsn`` is None once its WAL is gone. ``wal_status`` is reserved, extended, unreserved
    or lost. ``safe_wal_size`` is bytes until the slot may be lost (None: unlimited). What a server
    version does not know is None or False. ``active_application`` names the process that holds it,
    if this role may see that.
    """

    name: str
    plugin: str
    database: str
    temporary: bool
    active: bool
    active_pid: int | None
    active_application: str | None
    restart_lsn: Lsn | None
    confirmed_flush_lsn: Lsn | None
    wal_status: str | None
    safe_wal_size: int | None
    invalidation_reason: str | None
    two_phase: bool
    failover: bool
    synced: bool

    @property
    def lost(self) -> bool:
        """Whether changes behind it can no longer be read: it must be dropped and made anew."""
        return self.wal_status == "lost" or self.invalidation_reason is not None


# As JSON, since the columns differ between versions.
_SLOT: Final = """
SELECT to_jsonb(s), a.application_name
  FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
 WHERE s.slot_name = %s AND s.slot_type = 'logical'
"""


def validate_slot_name(name: str) -> str:
    """Return the name; raises :class:`ConfigError` unless it is a valid slot name."""
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"source.slot {name!r} is not a slot name",
            "Use 1 to 63 lower-case letters, digits and underscores.",
        )
    return name


def read_slot(conn: PgConnection, name: str) -> SlotInfo | None:
    """Read a logical slot of the cluster; None when there is none. Raises :class:`SourceError`."""
    try:
        row = conn.execute(_SLOT, (name,)).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, f"reading slot {name}") from exc
    return None if row is None else _slot(row[0], row[1])


def _slot(facts: dict[str, Any], application: str | None) -> SlotInfo:
    reason = facts.get("invalidation_reason")
    # 16 knows only that the slot conflicts with recovery, which on a primary means its WAL is gone.
    if reason is None and facts.get("conflicting") and "invalidation_reason" not in facts:
        reason = "conflicting"
    return SlotInfo(
        name=facts["slot_name"],
        plugin=facts["plugin"],
        database=facts["database"],
        temporary=facts["temporary"],
        active=facts["active"],
        active_pid=facts["active_pid"],
        active_application=application or None,
        restart_lsn=_lsn(facts["restart_lsn"]),
        confirmed_flush_lsn=_lsn(facts["confirmed_flush_lsn"]),
        wal_status=facts["wal_status"],
        safe_wal_size=facts["safe_wal_size"],
        invalidation_reason=reason,
        two_phase=bool(facts.get("two_phase")),
        failover=bool(facts.get("failover")),
        synced=bool(facts.get("synced")),
    )


def _lsn(text: str | None) -> Lsn | None:
    return None if text is None else Lsn.parse(text)


def drop_slot(conn: PgConnection, name: str) -> bool:
    """Drop the slot; False when there was none.

    Raises :class:`SourceError` SLOT_ACTIVE while a process uses it, naming that process.
    """
    try:
        conn.execute("SELECT pg_drop_replication_slot(%s)", (name,))
    except psycopg.errors.UndefinedObject:
        return False
    except psycopg.errors.ObjectInUse as exc:
        slot = read_slot(conn, name)
        pid, application = (slot.active_pid, slot.active_application) if slot else (None, None)
        raise slot_active(name, pid, application) from exc
    except psycopg.Error as exc:
        raise translate(exc, f"dropping slot {name}") from exc
    return True


def slot_active(name: str, pid: int | None, application: str | None = None) -> SourceError:
    """Make the error for a slot that another process uses."""
    holder = "another process"
    if pid is not None:
        holder = f"process {pid}" + (f" ({application})" if application else "")
    return SourceError(
        ErrorKind.SLOT_ACTIVE,
        f"slot {name} is used by {holder}",
        "Wait until it lets go (a dead one does after wal_sender_timeout), or stop that process.",
    )


def free_slots(conn: PgConnection) -> tuple[int, int]:
    """Return how many more replication slots and WAL senders the server has room for."""
    query = """
        SELECT current_setting('max_replication_slots')::int4
               - (SELECT count(*) FROM pg_replication_slots)::int4,
               current_setting('max_wal_senders')::int4
               - (SELECT count(*) FROM pg_stat_replication)::int4
    """
    row = _one(conn, query, "counting slots")
    return int(row[0]), int(row[1])


#: Transactions that have written something, prepared ones too; slot creation waits for them all.
BLOCKERS: Final = """
SELECT 'process ' || a.pid || coalesce(' (' || nullif(a.application_name, '') || ')', '')
       || coalesce(', user ' || a.usename, '') || coalesce(', database ' || a.datname, '')
       || coalesce(', open for '
            || extract(epoch FROM clock_timestamp() - a.xact_start)::int4 || ' s', '')
  FROM pg_stat_activity a
 WHERE a.backend_xid IS NOT NULL AND a.pid <> pg_backend_pid()
 UNION ALL
SELECT 'prepared transaction ' || quote_literal(p.gid) || ', database ' || p.database
  FROM pg_prepared_xacts p
"""


def blocking_transactions(conn: PgConnection) -> list[str]:
    """Name the open write transactions and prepared transactions that slot creation waits for
    (R51).

    Works on a replication connection too. Of other roles' sessions only the process id may show.
    """
    try:
        return [str(text) for (text,) in conn.execute(BLOCKERS).fetchall()]
    except psycopg.Error as exc:
        raise translate(exc, "looking for open transactions") from exc


def current_wal_lsn(conn: PgConnection) -> Lsn:
    """Return the server's write position. Raises :class:`SourceError`, on a standby too."""
    row = _one(conn, "SELECT pg_current_wal_lsn()::text", "reading the WAL position")
    return Lsn.parse(row[0])


def retained_wal_bytes(conn: PgConnection, name: str) -> int | None:
    """Return how much WAL the slot holds back; None when it is lost or there is none."""
    query = """
        SELECT (SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8
                  FROM pg_replication_slots WHERE slot_name = %s)
    """
    row = _one(conn, query, f"measuring the WAL behind slot {name}", (name,))
    return None if row[0] is None else int(row[0])


def _one(
    conn: PgConnection, query: str, doing: str, parameters: tuple[str, ...] | None = None
) -> tuple[Any, ...]:
    try:
        row = conn.execute(query.encode(), parameters).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, doing) from exc
    assert row is not None
    return row
