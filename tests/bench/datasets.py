"""The tables and the changes that are measured: 768-d and 1536-d vectors with eight typed payload
columns, and rows without vectors.

Everything is made by Postgres itself, from the row's number, so every run has the same data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_sync.config import SourceSettings
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.postgres.catalog import TypeResolver, find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.sync.planning import plan_table
from cdc_sync.sync.routing import PlannedTable, ResolveType

#: A benchmark must not be disturbed by work that comes at moments of its own.
POSTGRES_SETTINGS: Final = {
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "32GB",
    "shared_buffers": "256MB",
    "wal_sender_timeout": "5min",
}

_COLUMNS: Final = (
    "id bigint PRIMARY KEY, title text NOT NULL, lang varchar(8), views int, score float8, "
    "active bool, created timestamptz, tags text[], meta jsonb"
)
_VALUES: Final = (
    "i, 'title of document ' || i, 'en', i % 1000, i * 0.5, i % 2 = 0, "
    "'2026-01-01'::timestamptz + i * interval '1 second', ARRAY['a', 'tag' || i % 10], "
    "jsonb_build_object('source', 'web', 'page', i)"
)
# Not a formula a row: a thousand rows share a vector but for its first component, so that the
# source of the data is not what takes the time.
_VECTOR: Final = "(SELECT v FROM vectors WHERE n = i % 100)"


@dataclass(frozen=True)
class Dataset:
    """A table and what is done to it. ``dim`` 0: no vector. ``before`` is done before the slot is
    made, ``changes`` after it; both are statements with ``{rows}``. ``each``: the changes are
    transactions of one row (``{i}`` is the row's number)."""

    name: str
    title: str
    dim: int
    before: str | None
    changes: tuple[str, ...]
    rows: int
    each: bool = False

    @property
    def table(self) -> str:
        """The name of its table."""
        return self.name.replace("-", "_")

    @property
    def slot(self) -> str:
        """The name of its slot and of its publication."""
        return f"bench_{self.table}"


def insert(table: str, dim: int, first: str, last: str) -> str:
    """The statement that makes the rows of these numbers (SQL expressions, both inclusive)."""
    vector = f", {_VECTOR}" if dim else ""
    return f"INSERT INTO {table} SELECT {_VALUES}{vector} FROM generate_series({first}, {last}) i"


def create(table: str, dim: int) -> str:
    """The statement that makes the table."""
    vector = f", embedding vector({dim})" if dim else ""
    return f"CREATE TABLE {table} ({_COLUMNS}{vector})"


def inserts(dim: int, rows: int, *, each: bool = False) -> Dataset:
    """Inserts in one transaction, or in one a row."""
    kind = f"{dim}-d inserts" if dim else "small rows, no vectors"
    name = f"inserts-{dim}" if dim else "small-rows"
    if each:
        table = f"{name}-each".replace("-", "_")
        title = f"{kind}, one-row transactions"
        return Dataset(
            f"{name}-each", title, dim, None, (insert(table, dim, "{i}", "{i}"),), rows, each=True
        )
    table = name.replace("-", "_")
    return Dataset(name, kind, dim, None, (insert(table, dim, "1", "{rows}"),), rows)


def updates(rows: int) -> Dataset:
    """Updates of one payload column; the 768-d vectors do not come with them."""
    table = "updates"
    return Dataset(
        table,
        "metadata-only updates",
        768,
        insert(table, 768, "1", "{rows}"),
        (f"UPDATE {table} SET views = views + 1",),
        rows,
    )


def deletes(rows: int) -> Dataset:
    """Deletes of rows with 768-d vectors."""
    table = "deletes"
    return Dataset(
        table,
        "deletes",
        768,
        insert(table, 768, "1", "{rows}"),
        (f"DELETE FROM {table}",),
        rows,
    )


def mixed(rows: int) -> Dataset:
    """Half inserts, three tenths metadata-only updates, a tenth updates of the vector, a tenth
    deletes."""
    table = "mixed"
    return Dataset(
        table,
        "mixed: 50 % inserts, 30 % metadata, 10 % vectors, 10 % deletes",
        768,
        insert(table, 768, "1", "{rows}"),
        (
            insert(table, 768, "{rows} + 1", "{rows} + {rows} * 5 / 10"),
            f"UPDATE {table} SET views = views + 1 WHERE id <= {{rows}} * 3 / 10",
            (
                f"UPDATE {table} SET embedding = (SELECT v FROM vectors WHERE n = id % 50) "
                "WHERE id > {rows} * 3 / 10 AND id <= {rows} * 4 / 10"
            ),
            f"DELETE FROM {table} WHERE id > {{rows}} * 4 / 10 AND id <= {{rows}} * 5 / 10",
        ),
        rows,
    )


class Source:
    """A database on a server of this machine, with tables, publications and slots for the
    benchmark. ``pid`` is the postmaster's."""

    def __init__(self, url: str, pid: int | None) -> None:
        self.url = url
        self.pid = pid
        self._dim = 0
        self.execute("CREATE EXTENSION IF NOT EXISTS vector")

    def settings(self, name: str) -> SourceSettings:
        """Settings with slot and publication of that name."""
        return SourceSettings.model_validate({"url": self.url, "slot": name, "publication": name})

    def execute(self, *statements: str) -> None:
        """Run statements, each in a transaction of its own."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def scalar(self, query: str) -> str:
        """The only value of a query, as text."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            row = connection.execute(query).fetchone()
        assert row is not None
        return str(row[0])

    def position(self) -> int:
        """Where the next record of the WAL goes."""
        return int(self.scalar("SELECT pg_current_wal_insert_lsn() - '0/0'"))

    def make_vectors(self, dim: int) -> None:
        """Make the vectors that rows of that many dimensions are given; none for 0."""
        if dim in (0, self._dim):
            return
        self._dim = dim
        self.execute(
            "DROP TABLE IF EXISTS vectors",
            f"CREATE TABLE vectors (n int PRIMARY KEY, v vector({dim}))",
            "INSERT INTO vectors SELECT n, (SELECT array_agg(sin(n * 0.37 + j)) FROM "
            f"generate_series(1, {dim}) j)::vector({dim}) FROM generate_series(0, 99) n",
        )

    def load(self, table: str, dim: int, rows: int) -> None:
        """Make a table of that many rows, with statistics."""
        self.make_vectors(dim)
        self.execute(create(table, dim))
        if rows:
            self.execute(insert(table, dim, "1", str(rows)))
        self.execute(f"VACUUM (ANALYZE, FREEZE) {table}")

    def plan(self, table: str) -> PlannedTable:
        """The plan of a table, as the pipeline makes it."""
        with connect(self.settings("bench")) as connection:
            return plan_table(find_table(connection, table), PlanOptions(), None)

    @contextmanager
    def changes(self, dataset: Dataset) -> Iterator[str]:
        """Make the dataset's table, a slot and a publication of its name, and its changes; all of
        it is removed at the end. Yields the name."""
        name, table = dataset.slot, dataset.table
        self.make_vectors(dataset.dim)
        self.execute(create(table, dataset.dim), f"CREATE PUBLICATION {name} FOR TABLE {table}")
        try:
            if dataset.before is not None:
                self.execute(dataset.before.format(rows=dataset.rows))
            self.execute(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
            self._change(dataset)
            yield name
        finally:
            self.drop_slot(name)
            self.execute(f"DROP PUBLICATION {name}", f"DROP TABLE {table}")

    def _change(self, dataset: Dataset) -> None:
        if dataset.each:
            (statement,) = dataset.changes
            body = statement.replace("{i}", "k")
            self.execute(
                f"DO $$ BEGIN FOR k IN 1..{dataset.rows} LOOP {body}; COMMIT; END LOOP; END $$"
            )
            return
        with psycopg.connect(self.url) as connection:
            for statement in dataset.changes:
                connection.execute(statement.format(rows=dataset.rows))

    def drop_slot(self, name: str) -> None:
        """Remove a slot once its walsender has noticed that it is over; harmless without one."""
        self.wait_free(name)
        self.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots "
            f"WHERE slot_name = '{name}'"
        )

    def wait_free(self, name: str) -> None:
        """Wait until nobody uses a slot; whoever still does after a minute is ended."""
        self.execute(
            "DO $$ BEGIN FOR tries IN 1..6000 LOOP "
            f"IF NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{name}' "
            "AND active) THEN RETURN; END IF; PERFORM pg_sleep(0.01); "
            "PERFORM pg_stat_clear_snapshot(); END LOOP; "
            "PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots "
            f"WHERE slot_name = '{name}' AND active; END $$"
        )

    @contextmanager
    def types(self) -> Iterator[ResolveType]:
        """A resolver of types, with a connection of its own."""
        with connect(self.settings("bench")) as connection:
            yield TypeResolver(connection).resolve
