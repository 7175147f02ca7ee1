"""The demo's table: its definition, how it is filled, and how Postgres itself is searched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from psycopg import Connection, sql
from psycopg.types.json import Jsonb

from cdc_sync.demo.dataset import (
    DIMENSIONS,
    VALUE_COLUMNS,
    Dataset,
    Package,
    Query,
    Vector,
    vector_literal,
)

#: Name of the table, of its collection, and of its vector column.
TABLE: Final = "packages"
VECTOR: Final = "embedding"

COLUMNS: Final = ("id", *VALUE_COLUMNS, VECTOR)

# A vector of 384 dimensions takes 1.5 kB, so together with a longer text or list a row is over the
# limit of 2 kB from which Postgres stores the vector out of line (TOAST); others keep it inline.
_SCHEMA: Final = f"""
    CREATE EXTENSION IF NOT EXISTS vector;
    CREATE TYPE package_priority AS ENUM
        ('required', 'important', 'standard', 'optional', 'extra');
    CREATE TABLE packages (
        id              bigint PRIMARY KEY,
        name            text NOT NULL,
        section         text NOT NULL,
        priority        package_priority NOT NULL,
        version         text NOT NULL,
        installed_size  bigint NOT NULL,
        download_size   integer,
        ratio           numeric(12, 3),
        released        timestamptz,
        homepage        text,
        tags            text[],
        relations       jsonb,
        essential       boolean NOT NULL,
        summary         text NOT NULL,
        description     text,
        embedding       vector({DIMENSIONS})
    );
    """

_INDEXES: Final = {
    "embedding": "CREATE INDEX ON packages USING hnsw (embedding vector_cosine_ops)",
    "section": "CREATE INDEX ON packages (section)",
    "priority": "CREATE INDEX ON packages (priority)",
    "installed_size": "CREATE INDEX ON packages (installed_size)",
    "released": "CREATE INDEX ON packages (released)",
    "tags": "CREATE INDEX ON packages USING gin (tags)",
}

# With so long a list of candidates the index search is as good as an exact one on so small a table.
_SEARCH_SETTING: Final = "SET LOCAL hnsw.ef_search = 400"
_SEARCH: Final = (
    "SELECT id, name, 1 - (embedding <=> %(vector)s::vector) FROM packages"
    " WHERE embedding IS NOT NULL ORDER BY embedding <=> %(vector)s::vector LIMIT %(limit)s"
)


@dataclass(frozen=True, slots=True)
class Hit:
    """A result of a search; ``score`` is the cosine similarity, -1 to 1."""

    id: int
    name: str
    score: float


def create_table(connection: Connection) -> str:
    """Create the extension, the type and the table; return the version of pgvector."""
    with connection.transaction():
        connection.execute(_SCHEMA.encode())
        found = connection.execute(
            "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
        ).fetchone()
    return str(found[0]) if found is not None else "unknown"


def load_rows(connection: Connection, dataset: Dataset) -> Iterator[int]:
    """Copy the first rows into the table in one transaction; yield now and then how many are."""
    names = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(TABLE), names)
    with (
        connection.transaction(),
        connection.cursor() as cursor,
        cursor.copy(statement) as copy,
    ):
        for position in range(dataset.first):
            package, vector = dataset.packages[position], dataset.vectors[position]
            copy.write_row(row_values(position + 1, package, vector))
            if position % 100 == 0:
                yield position
    yield dataset.first


def create_indexes(connection: Connection) -> tuple[str, ...]:
    """Create the indexes and gather statistics; return the columns indexed."""
    with connection.transaction():
        for statement in _INDEXES.values():
            connection.execute(statement.encode())
        connection.execute("ANALYZE packages")
    return tuple(_INDEXES)


def row_values(key: int, package: Package, vector: Vector | None) -> list[object]:
    """The row's values as parameters, in the order of :data:`COLUMNS`.

    ``vector`` is float32, (384,), or None for NULL.
    """
    values: list[object] = [getattr(package, name) for name in VALUE_COLUMNS]
    relations = VALUE_COLUMNS.index("relations")
    if values[relations] is not None:
        values[relations] = Jsonb(values[relations])
    return [key, *values, None if vector is None else vector_literal(vector)]


def search_postgres(connection: Connection, query: Query, limit: int) -> list[Hit]:
    """The rows nearest to the query by pgvector."""
    parameters = {"vector": vector_literal(query.vector), "limit": limit}
    with connection.transaction():
        connection.execute(_SEARCH_SETTING)
        rows = connection.execute(_SEARCH, parameters).fetchall()
    return [Hit(int(key), str(name), float(score)) for key, name, score in rows]


def count_rows(connection: Connection) -> int:
    """The exact number of rows."""
    found = connection.execute("SELECT count(*) FROM packages").fetchone()
    return int(found[0]) if found is not None else 0
