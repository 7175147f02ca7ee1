"""The operator's side of the control channel: keys that a predicate selects, and messages into the
WAL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import psycopg

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.table import Column, Table
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import qualified, quote_ident

_PAGE_ROWS: Final = 2_000
#: SQLSTATE classes of a predicate that is wrong in itself: not supported, data, transaction state
#: (it would write), syntax and names.
_WRONG_SQL: Final = frozenset({"0A", "22", "25", "42"})
_NO_PRIVILEGE: Final = "42501"


def matching_keys(
    conn: PgConnection, table: Table, key: Sequence[Column], predicate: str
) -> Iterator[tuple[str, ...]]:
    """Yield the keys, in text format, of the rows for which an SQL predicate is true.

    It is evaluated with the rights of the connection's role, along that role's own search path, in
    a transaction that cannot write. The connection must be in autocommit mode and idle until the
    iterator is exhausted or closed. Raises :class:`SourceError`.
    """
    listed = ", ".join(f"{quote_ident(column.name)}::pg_catalog.text" for column in key)
    # The predicate may end in a comment.
    source = table.only + qualified(table.schema, table.name)
    query = f"SELECT {listed} FROM {source} WHERE (\n{predicate}\n)"
    try:
        with conn.transaction():
            conn.execute("SET TRANSACTION READ ONLY")
            conn.execute("SET LOCAL search_path TO DEFAULT")
            with conn.cursor("cdc_sync_keys") as cursor:
                cursor.itersize = _PAGE_ROWS
                cursor.execute(query.encode())
                for row in cursor:
                    yield tuple(str(value) for value in row)
    except psycopg.Error as exc:
        error = translate(exc, "evaluating the predicate")
        state = exc.sqlstate or ""
        wrong = state[:2] in _WRONG_SQL and state != _NO_PRIVILEGE
        raise SourceError(
            ErrorKind.CONFIG if wrong else error.kind,
            error.message,
            f"It stands in: SELECT … FROM {qualified(table.schema, table.name)} WHERE (…);"
            " try it there, with the same role.",
        ) from (None if state[:2] == "22" else exc)  # data errors quote values


def emit_messages(conn: PgConnection, prefix: str, contents: Sequence[bytes]) -> Lsn:
    """Write logical messages in one transaction; returns a position of the WAL after its commit.

    Returns once the commit is on the server's own disk, without waiting for standbys. The
    connection must be in autocommit mode and idle. Raises :class:`SourceError`.
    """
    doing = "writing a message into the WAL"
    try:
        with conn.transaction():
            conn.execute("SET LOCAL synchronous_commit = local")
            for content in contents:
                # As bytes, so that no encoding of the database changes them.
                conn.execute(
                    "SELECT pg_catalog.pg_logical_emit_message(true, %s::text, %s::bytea)",
                    (prefix, content),
                )
        row = conn.execute("SELECT pg_catalog.pg_current_wal_flush_lsn()::text").fetchone()
    except psycopg.Error as exc:
        raise translate(exc, doing) from exc
    assert row is not None
    return Lsn.parse(str(row[0]))
