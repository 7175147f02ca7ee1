"""Keys in Postgres's text format, read by Postgres itself.

One key has many texts (``007``, ``{A0EE…}``, ``1e2``): the server casts them to the columns' types
and returns the value in the form in which rows carry it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Final

import psycopg
from psycopg import pq

from cdc_sync.errors import ErrorKind
from cdc_sync.mapping.plan import ColumnPlan
from cdc_sync.mapping.table import PgType
from cdc_sync.postgres.connect import PgConnection, result_error, translate
from cdc_sync.postgres.identifiers import quote_ident
from cdc_sync.postgres.pg_types import sends_binary
from cdc_sync.postgres.refetch import TableRedefinedError
from cdc_sync.rows import TextValue

_JSON_OID: Final = 114
_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 0.25
#: What format_type says of a type that is not there (any more).
_NO_TYPE: Final = "???"


class KeyTextError(ValueError):
    """A text is no value of its key column's type. Which one is not said: it is a row value."""


def parse_keys(
    conn: PgConnection,
    columns: Sequence[ColumnPlan],
    keys: Sequence[Sequence[str]],
    condition: str | None = None,
) -> list[tuple[bytes, ...]]:
    """Return the keys as raw values, equal ones once.

    ``keys`` hold a text for each of the key ``columns``. ``condition`` is SQL over these columns:
    keys for which it is not true are left out. The connection must be in autocommit mode
    and idle. Raises :class:`KeyTextError` when one of the texts is no value of its type,
    :class:`TableRedefinedError` when a type is gone, :class:`SourceError` for everything else.
    """
    types = _type_names(conn, columns)
    as_text = [not sends_binary(column.type.base) for column in columns]
    names = [quote_ident(column.name) for column in columns]
    values = ", ".join(
        f"(element ->> {position})::{type_} AS {name}"
        for position, (type_, name) in enumerate(zip(types, names, strict=True))
    )
    listed = ", ".join(
        name + ("::text" if text else "") for name, text in zip(names, as_text, strict=True)
    )
    where = "" if condition is None else f" WHERE ({condition})"
    result = _read(
        conn,
        f"SELECT {listed} FROM (SELECT {values} FROM pg_catalog.json_array_elements($1)"
        f" AS elements (element)) AS keys{where}",
        json.dumps([list(key) for key in keys]).encode(),
    )
    found: dict[tuple[bytes, ...], None] = {}
    for number in range(result.ntuples):
        key = []
        for position, text in enumerate(as_text):
            value = result.get_value(number, position)
            if value is None:
                raise KeyTextError("a key's value is NULL")
            key.append(TextValue(value) if text else value)
        found[tuple(key)] = None
    return list(found)


def _type_names(conn: PgConnection, columns: Sequence[ColumnPlan]) -> list[str]:
    """Return the columns' types, without domains, as SQL wants them: with their modifiers, since a
    ``char(5)`` is padded to five."""
    types: list[PgType] = [column.type.base for column in columns]
    try:
        rows = conn.execute(
            "SELECT pg_catalog.format_type(oid, modifier) FROM ROWS FROM"
            " (pg_catalog.unnest(%s::oid[]), pg_catalog.unnest(%s::int4[]))"
            " WITH ORDINALITY AS t (oid, modifier, position) ORDER BY position",
            ([type_.oid for type_ in types], [type_.typmod for type_ in types]),
        ).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, "reading the types of a key") from exc
    names = [str(row[0]) for row in rows]
    if _NO_TYPE in names:
        raise _redefined()
    return names


def _read(conn: PgConnection, query: str, parameter: bytes) -> pq.abc.PGresult:
    doing = "reading the texts of keys"
    try:
        result = conn.pgconn.exec_params(
            query.encode(), [parameter], [_JSON_OID], [pq.Format.TEXT], pq.Format.BINARY
        )
    except psycopg.Error as exc:
        raise translate(exc, doing) from exc
    if result.status == pq.ExecStatus.TUPLES_OK:
        return result
    error = result_error(conn, result)
    sqlstate = error.sqlstate or ""
    # Data exceptions, and program limits: a numeric with too many digits, a tsvector too long.
    if sqlstate[:2] in ("22", "54"):
        # Not chained: the error quotes the text.
        raise KeyTextError("a text is no value of its key column's type")
    if sqlstate in ("42704", "3F000"):
        raise _redefined()
    raise translate(error, doing)


def _redefined() -> TableRedefinedError:
    return TableRedefinedError(
        ErrorKind.TABLE_UNUSABLE, "the type of a key column is gone from the database"
    )


def horizon_passed(conn: PgConnection, horizon: int, timeout_seconds: float) -> bool:
    """Wait until every transaction with a 64-bit id below ``horizon`` is over; False if that takes
    longer than the timeout. Snapshots taken from then on see those that were committed. Raises
    :class:`SourceError`.
    """
    deadline = time.monotonic() + timeout_seconds
    pause = _FIRST_PAUSE_SECONDS
    while _oldest_running(conn) < horizon:
        if time.monotonic() + pause > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
    return True


def _oldest_running(conn: PgConnection) -> int:
    try:
        row = conn.execute(
            "SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::int8"
        ).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "looking for open transactions") from exc
    assert row is not None
    return int(row[0])
