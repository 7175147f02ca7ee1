"""Reading rows again by key, at the present, once the transactions being applied are visible."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import psycopg
from psycopg import pq

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.plan import ColumnPlan, TablePlan
from cdc_sync.postgres.connect import PgConnection, result_error, translate, unchecked_text
from cdc_sync.postgres.identifiers import qualified, quote_ident
from cdc_sync.postgres.snapshot import TransactionSnapshot, begin_snapshot, run_command, select_list
from cdc_sync.postgres.written import write_out
from cdc_sync.rows import RawValue, Row, TextValue, Unchanged

_CHUNK_KEYS: Final = 500
_FIRST_PAUSE_SECONDS: Final = 0.005
_LONGEST_PAUSE_SECONDS: Final = 0.25
_TEXT_OID: Final = 25
#: undefined_column, undefined_function (no such operator), undefined_table
_REDEFINED: Final = frozenset({"42703", "42883", "42P01"})
_BINARY: Final = pq.Format.BINARY
_TEXT: Final = pq.Format.TEXT


class TableRedefinedError(SourceError):
    """A table has not the columns any more by which its rows were to be read."""


def widen_xid(xid: int, xmax: int) -> int:
    """Return the 64-bit id of a 32-bit transaction id, given the 64-bit ``xmax`` of a snapshot
    (R75).

    The one within 2**31 of ``xmax``: older ones cannot be told apart from newer ones, and are not
    in use.
    """
    wide = (xmax & ~0xFFFFFFFF) | xid
    if wide > xmax + (1 << 31):
        return wide - (1 << 32)
    if wide < xmax - (1 << 31):
        return wide + (1 << 32)
    return wide


def fetch_rows(
    conn: PgConnection,
    plan: TablePlan,
    keys: Sequence[Sequence[RawValue]],
    xids: Collection[int],
    row_filter: str | None = None,
    *,
    timeout_seconds: float = 30.0,
) -> list[Row]:
    """Read the rows with these keys as they are now, in plan order; absent ones are left out (R84).

    ``keys`` hold raw values in the order of ``plan.key``. ``xids`` are the 32-bit ids of the
    transactions being applied: a commit can be streamed before it is visible, so the read waits
    until a snapshot sees them all. Then a row that is absent was deleted or given another key
    later, and that change is still to come.

    The connection must be in autocommit mode and idle. Raises :class:`SourceError`:
    SOURCE_UNAVAILABLE when the transactions do not become visible in time (a synchronous standby is
    away), :class:`TableRedefinedError` when the table no longer has the plan's columns, and
    ``ValueError`` for a key that is no key.
    """
    wanted = list(dict.fromkeys(_checked(plan, key) for key in keys))
    if not wanted:
        return []
    deadline = time.monotonic() + timeout_seconds
    _begin_when_visible(conn, xids, deadline, plan.qualified_name)
    try:
        remaining = max(1, round((deadline - time.monotonic()) * 1000))
        run_command(conn, f"SET LOCAL statement_timeout = {remaining}", "reading rows again")
        source = _source(conn, plan)
        if unchecked := unchecked_text(conn, local=True):
            run_command(conn, unchecked, "reading rows again")
        rows = [
            row
            for start in range(0, len(wanted), _CHUNK_KEYS)
            for row in _select(conn, plan, source, wanted[start : start + _CHUNK_KEYS], row_filter)
        ]
    finally:
        _end(conn)
    # Nothing is given away that a crash of the server could still undo.
    write_out(conn)
    return rows


def _checked(plan: TablePlan, key: Sequence[RawValue]) -> tuple[bytes, ...]:
    values = tuple(value for value in key if value is not None and not isinstance(value, Unchanged))
    if len(values) != len(key) or len(key) != len(plan.key):
        raise ValueError(f"a key of {plan.qualified_name} with NULL or missing values")
    return values


def _begin_when_visible(
    conn: PgConnection, xids: Collection[int], deadline: float, table: str
) -> None:
    """Begin a transaction whose snapshot sees every one of the transactions."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        snapshot = begin_snapshot(conn)
        hidden = _hidden(snapshot, xids)
        if not hidden:
            return
        _end(conn)
        if time.monotonic() + pause > deadline:
            raise SourceError(
                ErrorKind.SOURCE_UNAVAILABLE,
                f"rows of {table} cannot be read again yet: {len(hidden)} transactions that were"
                f" streamed are not visible (first: {hidden[0]})",
                "A synchronous standby that does not answer holds them back: pg_stat_replication.",
            )
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


def _hidden(snapshot: TransactionSnapshot, xids: Collection[int]) -> list[int]:
    return [xid for xid in xids if not snapshot.sees(widen_xid(xid, snapshot.xmax))]


def _end(conn: PgConnection) -> None:
    # A broken connection has no transaction to end, and its own error is on its way.
    if conn.pgconn.status == pq.ConnStatus.OK:
        run_command(conn, "ROLLBACK", "ending a read")


def _source(conn: PgConnection, plan: TablePlan) -> str:
    """Return the table under its present name, with what it consists of."""
    row = None
    try:
        row = conn.execute(
            "SELECT n.nspname, c.relname, c.relkind::text FROM pg_class c"
            " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s",
            (plan.oid,),
        ).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, f"looking for {plan.qualified_name}") from exc
    if row is None:
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"table {plan.qualified_name} is gone",
            "Remove it from the configuration, or start cdc-sync again to take the new table.",
        )
    return ("" if row[2] == "p" or plan.inherited else "ONLY ") + qualified(row[0], row[1])


def _select(
    conn: PgConnection,
    plan: TablePlan,
    source: str,
    keys: Sequence[tuple[bytes, ...]],
    row_filter: str | None,
) -> Iterator[Row]:
    key_columns = [plan.columns[position] for position in plan.key]
    listed, text = select_list(plan)
    query = _query(key_columns, keys, source, listed, row_filter)
    values = [value for key in keys for value in key]
    text_values = [isinstance(value, TextValue) for value in values]
    oids = [column.type.base.oid for column in key_columns] * len(keys)
    doing = f"reading rows of {plan.qualified_name} again"
    try:
        result = conn.pgconn.exec_params(
            query.encode(),
            values,
            [_TEXT_OID if as_text else oid for oid, as_text in zip(oids, text_values, strict=True)],
            [_TEXT if as_text else _BINARY for as_text in text_values],
            _BINARY,
        )
    except psycopg.Error as exc:
        raise translate(exc, doing) from exc
    if result.status != pq.ExecStatus.TUPLES_OK:
        error = result_error(conn, result)
        if error.sqlstate in _REDEFINED:
            raise _redefined(plan) from error
        raise translate(error, doing)
    _check_types(plan, text, result)
    columns = range(len(plan.columns))
    for number in range(result.ntuples):
        row: Row = [result.get_value(number, column) for column in columns]
        for column, as_text in enumerate(text):
            value = row[column]
            if as_text and isinstance(value, bytes):
                row[column] = TextValue(value)
        yield row


def _check_types(plan: TablePlan, text: Sequence[bool], result: pq.abc.PGresult) -> None:
    """Values of another type than the plan's would be read wrongly."""
    for position, (column, as_text) in enumerate(zip(plan.columns, text, strict=True)):
        if not as_text and result.ftype(position) != column.type.base.oid:
            raise _redefined(plan)


def _redefined(plan: TablePlan) -> TableRedefinedError:
    return TableRedefinedError(
        ErrorKind.TABLE_UNUSABLE,
        f"table {plan.qualified_name} no longer has the columns by which its rows were written",
        "Start cdc-sync again; it reads the table anew.",
    )


def _query(
    key_columns: Sequence[ColumnPlan],
    keys: Sequence[tuple[bytes, ...]],
    source: str,
    listed: str,
    row_filter: str | None,
) -> str:
    """Return a semi-join with the keys, which the planner turns into index look-ups.

    The row filter stands outside of it, where the keys' names cannot be mistaken for columns.
    """
    number = 0
    rows = []
    for key in keys:
        row = []
        for column, value in zip(key_columns, key, strict=True):
            number += 1
            type_ = column.type.base
            cast = f"::{qualified(type_.schema, type_.name)}"
            row.append(f"${number}{cast if isinstance(value, TextValue) else ''}")
        rows.append(f"({', '.join(row)})")
    names = [f'"cdc_sync_key_{position}"' for position in range(len(key_columns))]
    conditions = " AND ".join(
        f"source_row.{quote_ident(column.name)} {_equals(column)} wanted.{name}"
        for column, name in zip(key_columns, names, strict=True)
    )
    query = (
        f"SELECT {listed} FROM {source} AS source_row WHERE EXISTS (SELECT FROM"
        f" (VALUES {', '.join(rows)}) AS wanted ({', '.join(names)}) WHERE {conditions})"
    )
    return query if row_filter is None else f"{query} AND ({row_filter})"


def _equals(column: ColumnPlan) -> str:
    """Return the type's equality operator: an extension's lives in the extension's schema."""
    type_ = column.type.base
    schema = type_.schema if type_.extension is not None else "pg_catalog"
    return f"OPERATOR({quote_ident(schema)}.=)"
