"""Row filters: from the configured predicate to the one that publication, copy and refetch use.

What the server thinks of a predicate is asked of the server, before anything is created: whether it
is one expression, which columns it reads, whether a publication may have it, and whether a
publication that exists has an equal one. A filter over columns outside the replica identity is
refused, since Postgres takes it and then fails the application's updates and deletes.

Source: PostgreSQL documentation, "Logical Replication", Row Filters.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from typing import Final

import psycopg
from psycopg import pq

from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.table import Index, Table
from cdc_sync.postgres.catalog import ServerInfo
from cdc_sync.postgres.connect import PgConnection, result_error, translate
from cdc_sync.postgres.identifiers import column_list, qualified, quote_ident
from cdc_sync.postgres.publication import (
    Publication,
    create_publication_sql,
    filter_mismatch,
    in_parentheses,
)
from cdc_sync.postgres.shards import shard_filter
from cdc_sync.postgres.snapshot import run_command

_SINCE: Final = 150000
_LIMITS: Final = "SET LOCAL statement_timeout = '30s'; SET LOCAL lock_timeout = '5s'"
_ALLOWED: Final = (
    "A publication's row filter takes columns, constants, and Postgres's own operators, types and"
    " immutable functions: no function, operator or type of an extension or of your own, no now()"
    " or random(), no subquery, no system column."
)


def wanted_filter(
    table: Table, key: Sequence[str], where: str | None, shard: str | None
) -> str | None:
    """Return the row filter of a table as SQL, of ``where`` and ``shard`` together; None without
    both. Raises :class:`ConfigError` for a shard that cannot be.
    """
    parts = [in_parentheses(where)] if where is not None else []
    if shard is not None:
        parts.append(f"({shard_filter(table, key, shard)})")
    return " AND ".join(parts) or None


def resolve_filter(
    conn: PgConnection,
    table: Table,
    key: Sequence[str],
    where: str | None,
    shard: str | None,
    publication: Publication | None,
    server: ServerInfo,
) -> str | None:
    """Return the filter by which rows are to be read: the publication's own, as the server prints
    it, or what it will be. None when all rows are wanted.

    Changes nothing. A publication that has a filter nobody configured is followed as it is. Raises
    :class:`ConfigError` for a predicate that is none, or that no publication takes;
    :class:`SourceError` TABLE_UNUSABLE when the replica identity lacks a column of it, with the SQL
    that adds it; PUBLICATION_UNUSABLE when the publication filters otherwise.
    """
    published = publication.tables.get(table.oid) if publication is not None else None
    wanted = wanted_filter(table, key, where, shard)
    if wanted is None:
        return published.row_filter if published is not None else None
    if server.version_num < _SINCE:
        raise ConfigError(
            f"{table.qualified_name}: publications filter rows from Postgres 15 on, this is"
            f" {server.major}",
            "Take `where` and pipeline.shard out, or upgrade the server.",
        )
    if where is not None:
        _check_expression(conn, table, where)
    _check_identity(conn, table, wanted)
    if publication is None or published is None:
        return _as_published(conn, table, wanted, server) or wanted
    found = published.row_filter
    of_children = {
        publication.tables[child.oid].row_filter
        for child in table.children
        if child.oid in publication.tables
    }
    same = found is not None and _shape(conn, table, found) == _shape(conn, table, wanted)
    if not same or not of_children <= {found}:
        columns = None if len(published.columns) == len(table.columns) else published.columns
        raise filter_mismatch(publication, table, columns, server, wanted)
    return found


# -- what the server says about a predicate


def _check_expression(conn: PgConnection, table: Table, where: str) -> None:
    """Refuse what is not one boolean expression over the table's columns.

    In parentheses alone, ``a) OR (b`` would be an expression too, of another meaning once something
    is joined to it; nothing that ends the first parenthesis fits both of these.
    """
    if "\0" in where:
        raise ConfigError(f"{table.qualified_name}: `where` holds a NUL character", _ALLOWED)
    source = table.only + qualified(table.schema, table.name)
    for condition in (f"({where}\n)", f"CAST({where}\n AS pg_catalog.bool)"):
        error = _try(conn, f"SELECT 1 FROM {source} WHERE {condition} LIMIT 0")
        if error is not None:
            raise _refused(table, "`where` is not a predicate over its columns", error)


def _refused(table: Table, what: str, error: psycopg.Error) -> ConfigError | SourceError:
    sqlstate = error.sqlstate or ""
    wrong = sqlstate[:2] in ("22", "42", "0A") or sqlstate == "08P01"
    if not wrong or sqlstate == "42501":
        return translate(error, f"checking the row filter of {table.qualified_name}")
    reason = "a value in it is refused" if sqlstate[:2] == "22" else _reason(error)
    return ConfigError(f"{table.qualified_name}: {what}: {reason}", _ALLOWED)


def _reason(error: psycopg.Error) -> str:
    parts = (error.diag.message_primary, error.diag.message_detail)
    return " ".join(" ".join(part.split()) for part in parts if part) or "no reason given"


def _try(conn: PgConnection, query: str) -> psycopg.Error | None:
    """Run one statement, read-only, by the extended protocol, which takes no second one. Returns
    its error."""
    return _run(conn, query)[1]


def _run(conn: PgConnection, query: str) -> tuple[list[str], psycopg.Error | None]:
    run_command(conn, "BEGIN READ ONLY", "checking a row filter")
    try:
        run_command(conn, _LIMITS, "checking a row filter")
        try:
            result = conn.pgconn.exec_params(query.encode(), None)
        except psycopg.Error as exc:
            raise translate(exc, "checking a row filter") from exc
        if result.status != pq.ExecStatus.TUPLES_OK:
            return [], result_error(conn, result)
        values = [result.get_value(row, 0) or b"" for row in range(result.ntuples)]
        return [value.decode() for value in values], None
    finally:
        if conn.pgconn.status == pq.ConnStatus.OK:
            run_command(conn, "ROLLBACK", "checking a row filter")


_DEFINITIONS: Final = """
SELECT a.attname::text, format_type(a.atttypid, a.atttypmod)
  FROM pg_attribute a WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
"""


def _rows_of(conn: PgConnection, table: Table, columns: Collection[str] | None = None) -> str:
    """Return a FROM item with columns like the table's, or like some of them.

    It has neither rows nor partitions, constraints or indexes, so that what the planner makes of a
    predicate over it depends on the predicate alone.
    """
    try:
        found = conn.execute(_DEFINITIONS, (table.oid,)).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, f"reading the columns of {table.qualified_name}") from exc
    listed = ", ".join(
        f"{quote_ident(name)} {type_}"
        for name, type_ in found
        if columns is None or name in columns
    )
    name = quote_ident(table.name)
    return f"pg_catalog.json_to_recordset('[]') AS {name}({listed})"


def _shape(conn: PgConnection, table: Table, predicate: str) -> list[str]:
    """Return the plan of a scan by a predicate: equal for predicates that are written differently
    and mean the same to the server."""
    condition = in_parentheses(predicate)
    plan, error = _run(
        conn, f"EXPLAIN (COSTS OFF) SELECT 1 FROM {_rows_of(conn, table)} WHERE {condition}"
    )
    if error is not None:
        raise _refused(table, "its row filter cannot be compared with the publication's", error)
    return plan


def _read_columns(conn: PgConnection, table: Table, predicate: str) -> list[str]:
    """Return the columns that a predicate reads: those without which it means nothing."""
    names = [column.name for column in table.columns]
    return [name for name in names if not _valid(conn, table, predicate, {*names} - {name})]


def _valid(conn: PgConnection, table: Table, predicate: str, columns: Collection[str]) -> bool:
    if not columns:
        return False
    condition = in_parentheses(predicate)
    query = f"EXPLAIN SELECT 1 FROM {_rows_of(conn, table, columns)} WHERE {condition}"
    error = _try(conn, query)
    if error is not None and (error.sqlstate or "")[:2] not in ("22", "42"):
        raise translate(error, f"checking the row filter of {table.qualified_name}")
    return error is None


# -- the replica identity

_IDENTITIES: Final = """
SELECT n.nspname::text, c.relname::text, c.relreplident::text,
       ARRAY(SELECT a.attname::text
               FROM pg_index i JOIN pg_attribute a
                 ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::int2[])
              WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
                AND CASE c.relreplident WHEN 'd' THEN i.indisprimary
                                        WHEN 'i' THEN i.indisreplident ELSE false END)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = ANY (%s)
 ORDER BY 1, 2
"""


def _check_identity(conn: PgConnection, table: Table, predicate: str) -> None:
    """Refuse a filter over columns that old rows do not carry: the server would take it, and fail
    every update and delete of the table from then on. Partitions have identities of their own."""
    try:
        oids = [leaf.oid for leaf in table.leaves]
        identities = conn.execute(_IDENTITIES, (oids,)).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, f"reading the identities of {table.qualified_name}") from exc
    valid: dict[frozenset[str], bool] = {}
    lacking = []
    for schema, name, identity, columns in identities:
        if identity == "f":
            continue
        carried = frozenset(columns)
        if carried not in valid:
            valid[carried] = _valid(conn, table, predicate, carried)
        if not valid[carried]:
            lacking.append((schema, name, carried))
    if not lacking:
        return
    read = _read_columns(conn, table, predicate)
    missing = [name for name in read if any(name not in carried for _, _, carried in lacking)]
    if not missing:
        # It is not the columns: the predicate itself is not valid.
        _shape(conn, table, predicate)
        return
    raise _outside_identity(table, missing, [(schema, name) for schema, name, _ in lacking])


def _outside_identity(
    table: Table, missing: Sequence[str], relations: Sequence[tuple[str, str]]
) -> SourceError:
    own = list(relations) == [(table.schema, table.name)]
    where = "it" if own else ", ".join(f"{schema}.{name}" for schema, name in relations[:5])
    full = "\n".join(
        f"ALTER TABLE {qualified(schema, name)} REPLICA IDENTITY FULL;"
        for schema, name in relations
    )
    by_index = _index_remedy(table, missing) if own else ""
    return SourceError(
        ErrorKind.TABLE_UNUSABLE,
        f"{table.qualified_name}: its row filter reads {column_list(list(missing))}, which the"
        f" replica identity of {where} does not have; once published, updates and deletes of the"
        " application would fail",
        f"{by_index}\nor, at the cost of whole old rows in the WAL:\n{full}" if by_index else full,
    )


def _index_remedy(table: Table, missing: Sequence[str]) -> str:
    """SQL for an identity by index."""
    name = qualified(table.schema, table.name)
    needed = {*table.identity_columns, *missing}
    not_null = {column.name for column in table.columns if column.not_null}
    for index in table.indexes:
        if _identifies(index, not_null) and needed <= {one.column for one in index.columns}:
            return f"ALTER TABLE {name} REPLICA IDENTITY USING INDEX {quote_ident(index.name)};"
    lines = []
    if nullable := [column for column in missing if column not in not_null]:
        changes = ", ".join(f"ALTER COLUMN {quote_ident(one)} SET NOT NULL" for one in nullable)
        lines.append(f"ALTER TABLE {name} {changes};")
    index_name = quote_ident(f"{table.name}_replica_identity"[:63])
    listed = column_list([*table.identity_columns, *missing])
    lines.append(f"CREATE UNIQUE INDEX {index_name} ON {name} ({listed});")
    lines.append(f"ALTER TABLE {name} REPLICA IDENTITY USING INDEX {index_name};")
    return "\n".join(lines)


def _identifies(index: Index, not_null: Collection[str]) -> bool:
    return (
        index.unique
        and index.valid
        and index.immediate
        and index.predicate is None
        and all(one.column in not_null for one in index.columns)
    )


# -- what a publication makes of it

_PRINTED: Final = """
SELECT pg_get_expr(r.prqual, r.prrelid)
  FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
 WHERE p.pubname = %s AND r.prrelid = %s
"""


def _as_published(
    conn: PgConnection, table: Table, predicate: str, server: ServerInfo
) -> str | None:
    """Return the predicate as a publication would have it, by making one and taking it back; None
    where the role may not, which stops the pipeline anyway."""
    if server.in_recovery:
        return None
    name = f"cdc_sync_check_{secrets.token_hex(6)}"
    statement = create_publication_sql(
        name,
        [(table, None)],
        server_version=server.version_num,
        row_filters={table.oid: predicate},
    )
    try:
        with conn.transaction(force_rollback=True):
            conn.execute(_LIMITS)
            conn.execute(statement.encode())
            row = conn.execute(_PRINTED, (name, table.oid)).fetchone()
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction):
        return None
    except psycopg.Error as exc:
        raise _refused(table, "no publication can have its row filter", exc) from exc
    return None if row is None else row[0]
