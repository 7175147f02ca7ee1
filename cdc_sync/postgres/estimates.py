"""What a copy will have to do, by estimates that cost nothing: sizes, rows, WAL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import qualified
from cdc_sync.postgres.slot import free_slots


@dataclass(frozen=True, slots=True)
class RowEstimate:
    """Rows that the planner expects a query to give. ``analysed`` is False where a part of the
    table never was: it is then no more than a guess by the size.
    """

    rows: int
    analysed: bool


@dataclass(frozen=True, slots=True)
class WalFacts:
    """What the server's settings and counters say about WAL.

    ``max_slot_wal_keep_bytes`` is None without a limit. ``bytes_per_second`` is the average of
    what was written in the last ``measured_seconds``; None if the server does not tell.
    """

    wal_level: str
    max_slot_wal_keep_bytes: int | None
    free_slots: int
    free_senders: int
    bytes_per_second: float | None
    measured_seconds: float | None


_LEAF_BYTES: Final = """
SELECT c.oid, pg_table_size(c.oid) FROM pg_class c WHERE c.oid = ANY (%s::oid[])
"""


def leaf_bytes(conn: PgConnection, table: Table) -> dict[int, int]:
    """Return bytes on disk of each leaf by OID, values out of line (TOAST) included, indexes not.

    Raises :class:`SourceError`.
    """
    oids = [leaf.oid for leaf in table.leaves]
    try:
        return {oid: int(size) for oid, size in conn.execute(_LEAF_BYTES, (oids,)).fetchall()}
    except psycopg.Error as exc:
        raise translate(exc, f"reading the size of table {table.qualified_name}") from exc


def estimate_rows(conn: PgConnection, table: Table, row_filter: str | None) -> RowEstimate:
    """Return how many rows the planner expects, of those the filter (SQL) lets through.

    Raises :class:`SourceError`, SOURCE_PERMISSION where the table may not be read.
    """
    relation = table.only + qualified(table.schema, table.name)
    where = f" WHERE {row_filter}" if row_filter is not None else ""
    query = f"EXPLAIN (FORMAT JSON) SELECT FROM {relation}{where}"
    try:
        row = conn.execute(query.encode()).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, f"estimating the rows of table {table.qualified_name}") from exc
    assert row is not None
    analysed = all(leaf.estimated_rows >= 0 or not leaf.pages for leaf in table.leaves)
    # An empty table is planned as if it had some rows, since it will.
    empty = not any(leaf.pages for leaf in table.leaves)
    return RowEstimate(0 if empty else int(row[0][0]["Plan"]["Plan Rows"]), analysed)


_SETTINGS: Final = """
SELECT (SELECT setting FROM pg_settings WHERE name = 'wal_level'),
       (SELECT setting::int8 FROM pg_settings WHERE name = 'max_slot_wal_keep_size')
"""
_WAL_RATE: Final = """
SELECT wal_bytes::float8, extract(epoch FROM now() - stats_reset)::float8 FROM pg_stat_wal
"""
_MEGABYTE: Final = 1 << 20


def wal_facts(conn: PgConnection) -> WalFacts:
    """Read what is known about WAL. Raises :class:`SourceError`."""
    try:
        settings = conn.execute(_SETTINGS).fetchone()
        rate = conn.execute(_WAL_RATE).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "reading the settings of WAL") from exc
    if settings is None or settings[0] is None:
        raise SourceError(ErrorKind.SOURCE_SETTING, "the server does not tell its wal_level")
    level, keep = settings
    slots, senders = free_slots(conn)
    written, seconds = rate if rate is not None else (None, None)
    measured = written is not None and seconds is not None and seconds >= 1
    return WalFacts(
        wal_level=level,
        max_slot_wal_keep_bytes=None if keep is None or keep < 0 else keep * _MEGABYTE,
        free_slots=slots,
        free_senders=senders,
        bytes_per_second=written / seconds if measured else None,
        measured_seconds=seconds if measured else None,
    )
