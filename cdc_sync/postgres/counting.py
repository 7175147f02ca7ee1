"""Counting rows of the source: exactly, or as the planner expects them; and what waits in a slot.

Never ``n_live_tup``, which is an estimate of its own that a crash resets to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_sync.mapping.table import Leaf
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import qualified, quote_ident
from cdc_sync.postgres.publication import in_parentheses

#: Changes looked at behind a slot, at most.
_PEEKED: Final = 1_000
_PEEK_TIMEOUT: Final = "SET LOCAL statement_timeout = '10s'"

# A message is its kind's letter (I, U, D: bytes 73, 85, 68), then the relation; a truncation
# (T: 84) names several, and counts for every table.
_PEEK: Final = f"""
SELECT count(*), coalesce(bool_or(kind = 84 OR relation = %s::int8), false)
  FROM (SELECT get_byte(data, 0) AS kind,
               CASE WHEN get_byte(data, 0) IN (73, 85, 68) THEN
                 (get_byte(data, 1)::int8 << 24) | (get_byte(data, 2) << 16)
                 | (get_byte(data, 3) << 8) | get_byte(data, 4) END AS relation
          FROM pg_logical_slot_peek_binary_changes(%s, NULL, {_PEEKED}, 'proto_version', '1',
                                                   'publication_names', %s)) changes
"""

_WAL_LIMIT: Final = """
SELECT CASE WHEN setting::int8 >= 0 THEN setting::int8 * 1024 * 1024 END
  FROM pg_settings WHERE name = 'max_slot_wal_keep_size'
"""


@dataclass(frozen=True, slots=True)
class LeafCount:
    """Rows of one leaf partition, or of a table that has none; ``name`` is ``schema.table``."""

    name: str
    rows: int


def count_rows(
    conn: PgConnection, leaves: Sequence[Leaf], row_filter: str | None
) -> tuple[LeafCount, ...]:
    """Count the rows of every leaf for which the filter is true.

    One statement and so one snapshot: the sum is exact at one moment. It reads the leaves whole, or
    an index of theirs. Raises :class:`SourceError`.
    """
    if not leaves:
        return ()
    try:
        rows = conn.execute(_over(leaves, row_filter, "count(*)").encode()).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, "counting rows") from exc
    counts = {int(position): int(count) for position, count in rows}
    return tuple(
        LeafCount(f"{leaf.schema}.{leaf.name}", counts[position])
        for position, leaf in enumerate(leaves)
    )


def expect_rows(conn: PgConnection, leaves: Sequence[Leaf], row_filter: str | None) -> int:
    """Return how many rows the planner expects, the filter considered; reads no row.

    Raises :class:`SourceError`.
    """
    if not leaves:
        return 0
    query = f"EXPLAIN (FORMAT JSON) {_over(leaves, row_filter, '1')}"
    try:
        row = conn.execute(query.encode()).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "estimating rows") from exc
    assert row is not None
    return math.ceil(float(row[0][0]["Plan"]["Plan Rows"]))


def _over(leaves: Sequence[Leaf], row_filter: str | None, value: str) -> str:
    where = f" WHERE {in_parentheses(row_filter)}" if row_filter is not None else ""
    return " UNION ALL ".join(
        f"SELECT {position}, {value} FROM ONLY {qualified(leaf.schema, leaf.name)}{where}"
        for position, leaf in enumerate(leaves)
    )


def changes_waiting(conn: PgConnection, slot: str, publication: str, table: int) -> bool | None:
    """Whether the slot holds changes of the table (by OID) that nobody has confirmed; None: not
    known.

    Looks at the beginning only, and for some seconds at the most. Nobody may be using the slot.
    Raises :class:`SourceError` when the connection is lost.
    """
    try:
        with conn.transaction():
            conn.execute(_PEEK_TIMEOUT)
            row = conn.execute(_PEEK, (table, slot, quote_ident(publication))).fetchone()
    except psycopg.Error as exc:
        if conn.broken:
            raise translate(exc, f"looking into slot {slot}") from exc
        return None
    assert row is not None
    seen, rows_among_them = row
    return True if rows_among_them else False if seen < _PEEKED else None


def slot_wal_limit_bytes(conn: PgConnection) -> int | None:
    """Return ``max_slot_wal_keep_size`` in bytes; None when it is unlimited.

    Raises :class:`SourceError`.
    """
    try:
        row = conn.execute(_WAL_LIMIT).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "reading max_slot_wal_keep_size") from exc
    return None if row is None else row[0]
