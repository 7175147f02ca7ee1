"""Chooses a table's key and checks that every change of a row can be traced to its point by it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.decoding import describe
from cdc_sync.mapping.ids import is_key_type
from cdc_sync.mapping.table import Column, Index, Table

_PLAIN_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]*")


def quoted(name: str) -> str:
    """Return an identifier as SQL wants it; quoted always unless plainly harmless."""
    if _PLAIN_IDENTIFIER.fullmatch(name) and name not in ("user", "order", "table", "group"):
        return name
    return '"' + name.replace('"', '""') + '"'


def sql_name(table: Table) -> str:
    """Return the table's name as SQL wants it."""
    return f"{quoted(table.schema)}.{quoted(table.name)}"


def unusable(table: Table, message: str, remedy: str) -> SourceError:
    """Return the error for a table that cannot be kept in step as it is."""
    return SourceError(ErrorKind.TABLE_UNUSABLE, f"{table.qualified_name}: {message}", remedy)


def check_columns(table: Table, names: Iterable[str], setting: str) -> None:
    """Refuse names in the configuration that are no columns, with the nearest ones there are."""
    existing = [column.name for column in table.columns]
    for name in names:
        if name in existing:
            continue
        near = difflib.get_close_matches(name, existing, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Its columns are: {', '.join(existing)}."
        raise ConfigError(f"{table.qualified_name}: `{setting}` names no column: {name}", hint)


def choose_key(table: Table, configured: Sequence[str] | None) -> tuple[str, ...]:
    """Return the key columns: the configured ones, else the primary key.

    Raises :class:`SourceError` TABLE_UNUSABLE with the SQL that helps, or :class:`ConfigError` for
    a wrong setting.
    """
    if configured is not None:
        check_columns(table, configured, "key")
        if not configured or len(set(configured)) != len(configured):
            raise ConfigError(
                f"{table.qualified_name}: `key` must name at least one column, and none twice",
                "Correct `key`, or leave it out to take the primary key.",
            )
    key = tuple(configured) if configured is not None else table.primary_key
    if not key:
        raise _no_key(table)
    _check_identity_exists(table)
    by_name = {column.name: column for column in table.columns}
    columns = [by_name[name] for name in key]
    _check_types(table, columns)
    _check_not_null(table, columns)
    _check_unique(table, key)
    _check_identity_covers(table, key)
    return key


def _usable(index: Index) -> bool:
    plain = all(column.column is not None for column in index.columns)
    return index.unique and index.valid and index.immediate and plain and index.predicate is None


def _index_columns(index: Index) -> set[str]:
    return {column.column for column in index.columns if column.column is not None}


def _no_key(table: Table) -> SourceError:
    not_null = {column.name for column in table.columns if column.not_null}
    remedy = f"ALTER TABLE {sql_name(table)} ADD PRIMARY KEY (<columns>);"
    for index in table.indexes:
        if _usable(index) and _index_columns(index) <= not_null:
            names = ", ".join(f'"{column.column}"' for column in index.columns)
            return unusable(
                table,
                "there is no primary key",
                f"{remedy}\nor, with the unique index there is:\n"
                f"ALTER TABLE {sql_name(table)} REPLICA IDENTITY USING INDEX "
                f"{quoted(index.name)};\n"
                f"and `key = [{names}]` in the table's configuration.",
            )
    return unusable(
        table,
        "there is no primary key, nor a unique index over NOT NULL columns",
        f"{remedy}\nor create a unique index over NOT NULL columns, then\n"
        f"ALTER TABLE {sql_name(table)} REPLICA IDENTITY USING INDEX <index>;\n"
        "and name its columns as `key` in the table's configuration.",
    )


def _check_identity_exists(table: Table) -> None:
    if table.replica_identity == "n":
        raise unusable(
            table,
            "its replica identity is NOTHING, so updates and deletes cannot be published",
            f"ALTER TABLE {sql_name(table)} REPLICA IDENTITY {_identity_clause(table)};",
        )
    if table.replica_identity == "d" and not table.primary_key:
        raise unusable(
            table,
            "it has no replica identity (DEFAULT without a primary key), so the application's "
            "updates and "
            "deletes fail once the table is published",
            f"ALTER TABLE {sql_name(table)} REPLICA IDENTITY {_identity_clause(table)};",
        )


def _identity_clause(table: Table) -> str:
    if table.primary_key and not table.deferrable_key:
        return "DEFAULT"
    not_null = {column.name for column in table.columns if column.not_null}
    for index in table.indexes:
        if _usable(index) and _index_columns(index) <= not_null:
            return f"USING INDEX {quoted(index.name)}"
    return "FULL"


def _check_types(table: Table, columns: Sequence[Column]) -> None:
    for column in columns:
        if not is_key_type(column.type):
            raise unusable(
                table,
                f"key column {column.name} is of type {describe(column.type)}, which cannot be "
                "part of a "
                "point id",
                "Name other columns as `key`; a unique index must cover them.",
            )


def _check_not_null(table: Table, columns: Sequence[Column]) -> None:
    nullable = [column.name for column in columns if not column.not_null]
    if nullable:
        changes = ", ".join(f"ALTER COLUMN {quoted(name)} SET NOT NULL" for name in nullable)
        raise unusable(
            table,
            f"key columns may be NULL: {', '.join(nullable)}",
            f"ALTER TABLE {sql_name(table)} {changes};",
        )


def _check_unique(table: Table, key: Sequence[str]) -> None:
    """Refuse a key that two rows may share, be it only within a transaction (deferrable
    constraints).
    """
    wanted = set(key)
    covering = [index for index in table.indexes if _index_columns(index) <= wanted]
    if any(_usable(index) for index in covering):
        return
    primary = set(table.primary_key)
    if primary and primary <= wanted and not table.deferrable_key:
        return
    columns = ", ".join(map(quoted, key))
    if table.deferrable_key and primary <= wanted:
        names = [index.name for index in table.indexes if index.primary]
        constraint = quoted(names[0] if names else f"{table.name}_pkey")
        raise unusable(
            table,
            "its primary key is deferrable: rows may share a key within a transaction, and the "
            "order of "
            "changes then does not tell which point is which",
            f"ALTER TABLE {sql_name(table)} DROP CONSTRAINT {constraint}, "
            f"ADD PRIMARY KEY ({', '.join(map(quoted, table.primary_key))});",
        )
    raise unusable(
        table,
        f"no unique index makes sure that the key ({', '.join(key)}) is one row's only",
        f"CREATE UNIQUE INDEX ON {sql_name(table)} ({columns});",
    )


def _check_identity_covers(table: Table, key: Sequence[str]) -> None:
    if table.replica_identity == "f":
        return
    missing = [name for name in key if name not in table.identity_columns]
    if not missing:
        return
    carried = ", ".join(table.identity_columns) or "nothing"
    remedies = []
    if set(key) <= set(table.primary_key) and not table.deferrable_key:
        remedies.append(f"ALTER TABLE {sql_name(table)} REPLICA IDENTITY DEFAULT;")
    for index in table.indexes:
        if not index.primary and _usable(index) and set(key) <= _index_columns(index):
            clause = f"REPLICA IDENTITY USING INDEX {quoted(index.name)}"
            remedies.append(f"ALTER TABLE {sql_name(table)} {clause};")
    if not remedies:
        remedies.append(f"ALTER TABLE {sql_name(table)} REPLICA IDENTITY FULL;")
    raise unusable(
        table,
        f"its replica identity ({carried}) does not have the key columns {', '.join(missing)}, so "
        "deleted rows could not be told",
        "\nor ".join(remedies) + "\nor take the identity's columns as `key`.",
    )
