"""What ``check`` wants to know of a server beyond the preconditions: settings, the role's own, room
for connections, open transactions, standbys, the clock, and whether something stands in between.

Everything here is read from catalog views that cost nothing, whatever the size of the database.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from cdc_sync.errors import SourceError
from cdc_sync.postgres.connect import PgConnection, translate

#: No question of a check may take longer, or wait longer for a lock.
QUESTION_SECONDS: Final = 3.0
LOCK_SECONDS: Final = 1.0
_MEGABYTE: Final = 1 << 20
_CLOCK_ROUNDS: Final = 5

#: Settings that each connection asks for when it starts (see ``connect.py``), as ``pg_settings``
#: shows them. Where one is missing something in between has thrown it away.
_PINNED: Final[Mapping[str, str]] = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "TimeZone": "UTC",
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "row_security": "off",
    "client_min_messages": "warning",
}
#: Timeouts that end a long copy, or the transaction that holds its snapshot.
_TIMEOUTS: Final = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "transaction_timeout",
)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of the server; None for what this version does not have, or does not show.

    ``wal_sender_timeout_seconds`` and ``idle_slot_timeout_seconds`` are 0 for none,
    ``max_slot_wal_keep_bytes`` is None without a limit. ``port`` is where Postgres itself listens.
    """

    wal_level: str | None
    wal_sender_timeout_seconds: float | None
    idle_slot_timeout_seconds: float | None
    max_slot_wal_keep_bytes: int | None
    max_wal_bytes: int | None
    synchronized_standby_slots: str | None
    port: str | None


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """The connected role: its name; timeouts that it or the database sets for its sessions (0 ones
    left out), as written there; how many more connections it and the server have room for (None:
    not limited for the role); whether the server writes standby snapshots for it (None: the server
    has no such function).
    """

    name: str
    timeouts: Mapping[str, str]
    free_of_role: int | None
    free_of_server: int
    may_log_standby_snapshot: bool | None


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """A transaction that has written something, or is prepared: who has it, for people, and for how
    long (None: this role may not see it). ``key`` tells it from others.
    """

    key: str
    holder: str
    seconds: float | None
    prepared: bool


@dataclass(frozen=True, slots=True)
class Between:
    """Signs of a pooler between this program and Postgres.

    ``strange_pid``: the process id given at the start is not that of the process that answers, or
    another one answers each time (``changing_pid``). ``lost``: settings that were asked for at the
    start and do not hold. ``host`` and ``port`` are those connected to.
    """

    host: str
    port: int
    strange_pid: bool
    changing_pid: bool
    lost: tuple[str, ...]


@contextlib.contextmanager
def bounded(
    conn: PgConnection, seconds: float = QUESTION_SECONDS, lock_seconds: float = LOCK_SECONDS
) -> Iterator[None]:
    """Let no statement on the connection (autocommit) take longer, or wait longer for a lock."""
    _set_timeouts(conn, seconds, lock_seconds)
    try:
        yield
    finally:
        if not conn.broken:
            _set_timeouts(conn, 0, 0)


def _set_timeouts(conn: PgConnection, seconds: float, lock_seconds: float) -> None:
    try:
        conn.execute(f"SET statement_timeout = {round(seconds * 1000):d}")
        conn.execute(f"SET lock_timeout = {round(lock_seconds * 1000):d}")
    except psycopg.Error as exc:
        raise translate(exc, "setting timeouts") from exc


def _all(conn: PgConnection, query: str, doing: str, *parameters: object) -> list[tuple[Any, ...]]:
    try:
        return conn.execute(query.encode(), parameters or None).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, doing) from exc


def _shown(conn: PgConnection) -> dict[str, str]:
    # The view leaves out what the role may not see; current_setting() would fail.
    return dict(_all(conn, "SELECT name, setting FROM pg_settings", "reading the settings"))


def server_settings(conn: PgConnection) -> ServerSettings:
    """Read the settings. Raises :class:`SourceError`."""
    shown = _shown(conn)

    def number(name: str, unit: float = 1) -> float | None:
        return float(shown[name]) * unit if name in shown else None

    keep = number("max_slot_wal_keep_size", _MEGABYTE)
    largest = number("max_wal_size", _MEGABYTE)
    return ServerSettings(
        wal_level=shown.get("effective_wal_level") or shown.get("wal_level"),
        wal_sender_timeout_seconds=number("wal_sender_timeout", 0.001),
        idle_slot_timeout_seconds=number("idle_replication_slot_timeout"),
        max_slot_wal_keep_bytes=None if keep is None or keep < 0 else int(keep),
        max_wal_bytes=None if largest is None else int(largest),
        synchronized_standby_slots=shown.get("synchronized_standby_slots"),
        port=shown.get("port"),
    )


_ROLE: Final = """
SELECT r.rolname::text, r.rolsuper, r.rolconnlimit,
       (SELECT count(*) FROM pg_stat_activity a
         WHERE a.usesysid = r.oid AND a.backend_type = 'client backend'),
       -- Which sessions are clients' is not shown to everybody; how many there are is.
       (SELECT sum(numbackends)::int4 FROM pg_stat_database),
       (SELECT sum(setting::int4) FROM pg_settings WHERE name = 'max_connections'),
       (SELECT coalesce(sum(setting::int4), 0) FROM pg_settings
         WHERE name IN ('superuser_reserved_connections', 'reserved_connections')),
       has_function_privilege(
         to_regprocedure('pg_catalog.pg_log_standby_snapshot()'), 'EXECUTE')
  FROM pg_roles r WHERE r.rolname = current_user
"""
#: Least specific first: what comes later wins.
_ROLE_SETTINGS: Final = """
SELECT s.setconfig FROM pg_db_role_setting s
 WHERE s.setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = current_user))
   AND s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
 ORDER BY s.setrole <> 0, s.setdatabase <> 0
"""


def role_facts(conn: PgConnection) -> RoleFacts:
    """Read what is known of the role. Raises :class:`SourceError`."""
    doing = "reading the role's settings"
    name, superuser, limit, own, all_, most, reserved, standby = _all(conn, _ROLE, doing)[0]
    timeouts: dict[str, str] = {}
    for (settings,) in _all(conn, _ROLE_SETTINGS, doing):
        for setting in settings:
            key, _, value = setting.partition("=")
            if key in _TIMEOUTS:
                timeouts[key] = value
    return RoleFacts(
        name=name,
        timeouts={key: value for key, value in timeouts.items() if not _is_zero(value)},
        free_of_role=None if limit < 0 or superuser else limit - own,
        free_of_server=most - all_ - (0 if superuser else reserved),
        may_log_standby_snapshot=standby,
    )


def _is_zero(value: str) -> bool:
    return value.strip().rstrip("hdminsu").strip() in ("", "0")


_OPEN: Final = """
SELECT a.pid || '/' || a.backend_xid::text,
       'process ' || a.pid || coalesce(' (' || nullif(a.application_name, '') || ')', '')
       || coalesce(', user ' || a.usename, '') || coalesce(', database ' || a.datname, ''),
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8, false
  FROM pg_stat_activity a
 WHERE a.backend_xid IS NOT NULL AND a.pid <> pg_backend_pid()
 UNION ALL
SELECT p.transaction::text,
       'prepared transaction ' || quote_literal(p.gid) || ', database ' || p.database,
       extract(epoch FROM clock_timestamp() - p.prepared)::float8, true
  FROM pg_prepared_xacts p
 ORDER BY 3 DESC NULLS LAST
"""


def open_transactions(conn: PgConnection) -> list[OpenTransaction]:
    """Transactions that the creation of a slot would wait for, the oldest first. Raises
    :class:`SourceError`."""
    rows = _all(conn, _OPEN, "looking for open transactions")
    return [OpenTransaction(*row) for row in rows]


_STANDBYS: Final = """
SELECT (SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary)
     + (SELECT count(*) FROM pg_stat_replication s
         WHERE s.state IN ('streaming', 'catchup')
           AND NOT EXISTS (SELECT FROM pg_replication_slots r WHERE r.active_pid = s.pid)),
       ARRAY(SELECT slot_name::text FROM pg_replication_slots
              WHERE slot_type = 'physical' AND NOT temporary ORDER BY 1),
       ARRAY(SELECT slot_name::text FROM pg_replication_slots
              WHERE slot_type = 'physical' AND active AND xmin IS NULL ORDER BY 1)
"""


@dataclass(frozen=True, slots=True)
class Standbys:
    """Standbys as the primary knows them: how many, their slots, and which of these are in use
    without ``hot_standby_feedback``."""

    count: int
    slots: tuple[str, ...]
    without_feedback: tuple[str, ...]


def standbys(conn: PgConnection) -> Standbys:
    """Count the standbys. Raises :class:`SourceError`."""
    count, slots, silent = _all(conn, _STANDBYS, "looking for standbys")[0]
    return Standbys(int(count), tuple(slots), tuple(silent))


def clock_offset(conn: PgConnection) -> tuple[float, float]:
    """Seconds by which the server's clock is ahead of this host's, and half the time the question
    took, which bounds the error. Raises :class:`SourceError`."""
    best = (0.0, float("inf"))
    for _ in range(_CLOCK_ROUNDS):
        before, started = time.time(), time.monotonic()
        rows = _all(
            conn, "SELECT extract(epoch FROM clock_timestamp())::float8", "reading the clock"
        )
        half = (time.monotonic() - started) / 2
        if half < best[1]:
            best = (rows[0][0] - before - half, half)
    return best


def between(conn: PgConnection) -> Between:
    """Look for signs of a pooler. Raises :class:`SourceError`."""
    doing = "looking for a pooler"
    # One after the other: a pooler may give each another session.
    answers = [
        _all(conn, "SELECT pg_backend_pid(), current_setting('search_path')", doing)[0]
        for _ in range(3)
    ]
    pids = {pid for pid, _ in answers}
    shown = _shown(conn)
    lost = [name for name, wanted in _PINNED.items() if shown.get(name) != wanted]
    if not shown.get("DateStyle", "").startswith("ISO"):
        lost.append("DateStyle")
    if any(path not in ("", '""') for _, path in answers):
        lost.append("search_path")
    return Between(
        host=conn.info.host,
        port=conn.info.port,
        strange_pid=pids != {conn.info.backend_pid},
        changing_pid=len(pids) > 1,
        lost=tuple(sorted(lost)),
    )


def is_timeout(error: SourceError) -> bool:
    """Whether a question was given up since it took too long."""
    cause = error.__cause__
    return isinstance(cause, psycopg.errors.QueryCanceled | psycopg.errors.LockNotAvailable)
