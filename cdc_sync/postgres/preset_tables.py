"""What the presets have to ask of the database: a LangChain collection by name, and the dimension
of vectors whose column declares none."""

from __future__ import annotations

from uuid import UUID

import psycopg
from psycopg import sql

from cdc_sync.errors import ConfigError
from cdc_sync.mapping.table import Column, Table
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import qualified, quote_ident

_COLLECTIONS = "langchain_pg_collection"


def langchain_collection(conn: PgConnection, table: Table, name: str) -> bytes:
    """Return the uuid, in binary format, of the LangChain collection of that name, from the table
    of collections beside ``table``.

    Raises :class:`ConfigError` if there is none or more than one, :class:`SourceError` if the table
    of collections cannot be read.
    """
    source = qualified(table.schema, _COLLECTIONS)
    query = sql.SQL("SELECT uuid FROM {} WHERE name = %s LIMIT 2").format(
        sql.Identifier(table.schema, _COLLECTIONS)
    )
    try:
        found = conn.execute(query, (name,)).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, f"looking for a LangChain collection in {source}") from exc
    if len(found) == 1 and isinstance(found[0][0], UUID):
        return found[0][0].bytes
    what = "more than one collection" if found else "no collection"
    raise ConfigError(
        f"{table.qualified_name}: `preset_collection` is {name!r}, but {source} has {what} of that "
        "name",
        f"SELECT name FROM {source}; shows what there is.",
    )


def collection_privileges(table: Table) -> tuple[str, ...]:
    """Return what :func:`langchain_collection` needs, as it stands in GRANT."""
    return (f"SELECT (name, uuid) ON {qualified(table.schema, _COLLECTIONS)}",)


def only_condition(only: tuple[str, bytes]) -> str:
    """Return the SQL condition that a column has this uuid (in binary format)."""
    name, value = only
    return f"{quote_ident(name)} = '{UUID(bytes=value)}'::pg_catalog.uuid"


def first_dimension(conn: PgConnection, table: Table, column: Column, where: str) -> int | None:
    """Return the dimension of the vector of some row for which ``where`` (SQL) is true; None if no
    row has one. Raises :class:`SourceError`."""
    name = quote_ident(column.name)
    query = (
        f"SELECT {quote_ident(column.type.base.schema)}.vector_dims({name})"
        f" FROM {qualified(table.schema, table.name)}"
        f" WHERE {name} IS NOT NULL AND ({where}) LIMIT 1"
    )
    try:
        row = conn.execute(query.encode()).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, f"reading the dimension of {table.qualified_name}") from exc
    return None if row is None else int(row[0])
