"""Rows that count their versions, and a replica that notices any change that is lost, repeated or
out of order.

``counters`` holds rows (id, version); every change of a row adds one to its version, a changed key
takes the version along. ``log`` holds a row for every transaction. Subtransactions that are rolled
back write versions that must never be seen.
"""

from __future__ import annotations

import dataclasses
import random
import struct
import threading
from typing import Final

import psycopg

from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import IdScheme
from cdc_sync.mapping.table import PgType, Table
from cdc_sync.pgoutput.messages import Relation
from cdc_sync.rows import PointId, Row
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.routing import Binding, PlannedTable, bind
from tests.support.fix_postgres import Database
from tests.support.source_tables import raw_plan

SCHEMA: Final = """
    CREATE TABLE counters (id bigint PRIMARY KEY, version bigint NOT NULL);
    CREATE TABLE log (id bigint PRIMARY KEY, version bigint NOT NULL);
    CREATE PUBLICATION versions FOR TABLE counters, log
"""
_NEVER_SEEN: Final = -(10**9)
_KEYS: Final = 300
_RETRIED: Final = (psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation)


class CountingWriter:
    """A thread that changes counters until told to finish. Transactions are numbered from
    ``number * 10**9``."""

    def __init__(self, database: Database, number: int) -> None:
        self.committed = 0
        self._database = database
        self._number = number
        self._random = random.Random(number)
        self._finish = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> int:
        """Let it end, and return how many transactions it has committed."""
        self._finish.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return self.committed

    def _run(self) -> None:
        try:
            with self._database.connect() as connection:
                connection.execute("SET deadlock_timeout = '20ms'")
                while not self._finish.is_set():
                    try:
                        self._transaction(connection)
                    except _RETRIED:
                        connection.execute("ROLLBACK")
        except BaseException as error:  # noqa: BLE001 - finish() raises it in the test's thread
            self._error = error

    def _transaction(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        statements = [self._change() for _ in range(self._random.choice((1, 1, 2, 4)))]
        if self._random.random() < 0.2:
            at = self._random.randrange(len(statements) + 1)
            statements.insert(at, f"SAVEPOINT s; {self._abandoned()}; ROLLBACK TO s; RELEASE s")
        number = self._number * 10**9 + self.committed
        statements.append(f"INSERT INTO log VALUES ({number}, 1)")
        connection.execute(("BEGIN; " + "; ".join(statements)).encode())
        if self._random.random() < 0.05:
            connection.execute("ROLLBACK")
        else:
            connection.execute("COMMIT")
            self.committed += 1

    def _change(self) -> str:
        key, other = self._random.randrange(_KEYS), self._random.randrange(_KEYS)
        return self._random.choice(
            (
                f"UPDATE counters SET version = version + 1 WHERE id = {key}",
                f"UPDATE counters SET version = version + 1 WHERE id = {key}",
                f"UPDATE counters SET version = version + 1 WHERE id BETWEEN {key} AND {key + 3}",
                f"INSERT INTO counters VALUES ({key}, 1) ON CONFLICT DO NOTHING",
                f"DELETE FROM counters WHERE id = {key}",
                f"UPDATE counters SET id = {other}, version = version + 1 WHERE id = {key}",
            )
        )

    def _abandoned(self) -> str:
        key = self._random.randrange(_KEYS)
        return (
            f"UPDATE counters SET version = {_NEVER_SEEN} WHERE id = {key};"
            f" INSERT INTO counters VALUES ({key + 10**6}, {_NEVER_SEEN})"
            f" ON CONFLICT (id) DO UPDATE SET version = {_NEVER_SEEN}"
        )


def planned(table: Table) -> PlannedTable:
    """A plan that takes the table as it is, with its key as the point id."""
    plan = dataclasses.replace(raw_plan(table), id_scheme=IdScheme.INTEGER)
    return PlannedTable(table, plan, PlanOptions())


class Replica:
    """The counters and the log as they were copied and then changed by the stream, one change at a
    time. What is wrong is kept in ``mistakes``."""

    def __init__(self, tables: list[PlannedTable]) -> None:
        self._tables = {table.plan.oid: table for table in tables}
        self.rows: dict[int, dict[PointId, int]] = {oid: {} for oid in self._tables}
        self.mistakes: list[str] = []
        self.replayed = 0
        # A batch a change, so that coalescing hides nothing.
        self.gatherer = Gatherer(self._route, batch_rows=1, batch_bytes=1 << 30)

    def _route(self, relation: Relation) -> Binding:
        table = self._tables[relation.oid]
        types: dict[int, PgType] = {c.type.oid: c.type for c in table.table.columns}
        return bind(table, relation, lambda oid, _: types[oid])

    def copy(self, table: PlannedTable, rows: list[Row]) -> None:
        """Take rows read under the snapshot."""
        into = self.rows[table.plan.oid]
        for row in rows:
            key, version = values(row)
            if key in into:
                self.mistakes.append(f"{table.name} {key} was copied twice")
            into[key] = version

    def feed(self, frame: bytes) -> None:
        """Take a frame of the stream, and apply what it completes."""
        self.gatherer.feed(frame)
        while self.gatherer.ready:
            self._apply(self.gatherer.take())

    def _apply(self, batch: Batch) -> None:
        self.replayed += len(batch.commit_times)
        for oid, table in batch.tables.items():
            rows, name = self.rows[oid], self._tables[oid].name
            gone = {key: rows.pop(key, None) for key, p in table.pending.items() if p.row is None}
            written = {key: p.row for key, p in table.pending.items() if p.row is not None}
            for key, row in written.items():
                _, version = values(row)
                before = rows.get(key) if not gone else next(iter(gone.values()))
                if version != (before or 0) + 1:
                    self.mistakes.append(f"{name} {key}: version {version} after {before}")
                rows[key] = version
            if not written and None in gone.values():
                self.mistakes.append(f"{name}: {list(gone)} deleted, but was not there")


def values(row: Row) -> tuple[int, int]:
    """Key and version of a row in binary format."""
    key, version = row
    assert isinstance(key, bytes)
    assert isinstance(version, bytes)
    return struct.unpack(">q", key)[0], struct.unpack(">q", version)[0]
