"""Loads the everything table, and changes it from several threads in every way that matters to
replication.

All randomness comes from seeds: a load gives the same rows each time; a single writer makes the
same changes each time, several interleave as they happen to.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy
import numpy.typing
import psycopg

from tests.support.everything import (
    VECTOR_COLUMNS,
    Connection,
    EverythingTable,
    KeyKind,
    create_everything_table,
)

__all__ = [
    "EverythingTable",
    "KeyKind",
    "WorkloadStats",
    "Writer",
    "create_everything_table",
    "load",
    "run_writers",
]

_LOAD_BATCH: Final = 2000
_COPY_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_TRAILER: Final = b"\xff\xff"
_RETRIED: Final = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.LockNotAvailable,
    # Two writers move or insert rows to one key.
    psycopg.errors.UniqueViolation,
)


def load(connection: Connection, table: EverythingTable, rows: int, seed: int = 0) -> None:
    """Fill the table with the keys ``k`` = 0 to ``rows - 1``, in one transaction; the table must be
    empty of them.

    Vectors go by COPY BINARY into a temporary table; everything else is computed where it is
    stored.
    """
    columns = table.insert_columns()
    statement = (
        f"INSERT INTO {table.name} ({', '.join(columns)})"
        f" SELECT {', '.join(columns.values())} FROM pg_temp.staged s"
    )
    with connection.transaction():
        connection.execute(
            "CREATE TEMP TABLE staged"
            f" (k int8, n int8, embedding vector({table.dim})) ON COMMIT DROP"
        )
        for start in range(0, rows, _LOAD_BATCH):
            count = min(_LOAD_BATCH, rows - start)
            generator = numpy.random.default_rng([seed, start])
            with connection.cursor().copy("COPY pg_temp.staged FROM STDIN (FORMAT binary)") as copy:
                copy.write(_COPY_SIGNATURE)
                copy.write(_copy_rows(start, seed, generator.standard_normal((count, table.dim))))
                copy.write(_COPY_TRAILER)
            connection.execute(statement)
            connection.execute("TRUNCATE pg_temp.staged")


def _copy_rows(start: int, seed: int, vectors: numpy.typing.NDArray[numpy.float64]) -> bytes:
    """Return tuples of COPY BINARY: field count, then length and value of k, n and the vector.

    A vector is its dimension, an unused int16, and its components as float4.
    """
    count, dim = vectors.shape
    rows = numpy.zeros(
        count,
        dtype=[
            ("fields", ">i2"),
            ("k_bytes", ">i4"),
            ("k", ">i8"),
            ("n_bytes", ">i4"),
            ("n", ">i8"),
            ("vector_bytes", ">i4"),
            ("dim", ">i2"),
            ("unused", ">i2"),
            ("vector", ">f4", (dim,)),
        ],
    )
    rows["fields"] = 3
    rows["k_bytes"] = rows["n_bytes"] = 8
    rows["k"] = numpy.arange(start, start + count)
    rows["n"] = rows["k"] + seed * 1_000_003
    rows["vector_bytes"] = 4 + 4 * dim
    rows["dim"] = dim
    rows["vector"] = vectors
    return rows.tobytes()


@dataclass
class WorkloadStats:
    """What writers did: transactions by outcome, and operations (inside committed transactions) by
    kind.
    """

    committed: int = 0
    rolled_back: int = 0
    retried: int = 0
    reconnected: int = 0
    operations: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: WorkloadStats) -> WorkloadStats:
        return WorkloadStats(
            self.committed + other.committed,
            self.rolled_back + other.rolled_back,
            self.retried + other.retried,
            self.reconnected + other.reconnected,
            self.operations + other.operations,
        )


class _AbandonedError(Exception):
    """Raised inside a transaction to roll it back on purpose."""


class Writer:
    """A thread that runs random transactions until it has made its number of them, or is told to
    finish.

    Keys are taken from 0 to ``key_space - 1``, so choose about twice the rows loaded: half of the
    inserts then meet no row. With ``reconnect`` it lives through restarts of the server.
    """

    def __init__(
        self,
        url: str,
        table: EverythingTable,
        *,
        seed: int = 0,
        transactions: int | None = None,
        key_space: int = 1000,
        reconnect: bool = False,
        pause_seconds: float = 0.0,
    ) -> None:
        self.name = f"writer-{seed}"
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.stats = WorkloadStats()
        self._url = url
        self._table = table
        self._random = random.Random(seed)
        # Revisions are unique over writers, so that a row tells who wrote it last.
        self._revisions = iter(range(seed % 1000 * 10**12 + 10**9, 2**62))
        self._transactions = transactions
        self._key_space = key_space
        self._reconnect = reconnect
        self._pause_seconds = pause_seconds
        self._stop_requested = threading.Event()
        self._error: BaseException | None = None
        self._key_match = "({}) = (SELECT {} FROM (VALUES (%(k)s::int8)) s(k))".format(
            ", ".join(table.key_columns), ", ".join(table.key_expressions)
        )
        self._operations = {
            "insert": (20, self._insert),
            "update_payload": (25, self._update_payload),
            "update_vector": (12, self._update_vector),
            "update_both": (10, self._update_both),
            "update_nothing": (3, self._update_nothing),
            "clear_vectors": (3, self._clear_vectors),
            "update_many": (4, self._update_many),
            "change_key": (8, self._change_key),
            "delete": (10, self._delete),
            "reinsert": (5, self._reinsert),
        }

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it still makes transactions."""
        return self._thread.is_alive()

    def finish(self, timeout_seconds: float = 60.0) -> WorkloadStats:
        """Ask it to stop, wait for it, and return what it did.

        :raises TimeoutError: it did not end in time. Whatever error ended the thread is raised as
        well.
        """
        self._stop_requested.set()
        return self.wait(timeout_seconds)

    def wait(self, timeout_seconds: float = 60.0) -> WorkloadStats:
        """Wait until it has made its transactions; otherwise as :meth:`finish`."""
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.name} did not end within {timeout_seconds:g} s")
        if self._error is not None:
            raise self._error
        return self.stats

    def _run(self) -> None:
        try:
            while not self._done():
                try:
                    with self._connect() as connection:
                        while not self._done():
                            self._transaction(connection)
                            if self._pause_seconds:
                                self._stop_requested.wait(self._pause_seconds)
                except psycopg.OperationalError:
                    if not self._reconnect:
                        raise
                    self.stats.reconnected += 1
                    self._stop_requested.wait(0.1)
        except BaseException as exc:  # noqa: BLE001 - wait() raises it in the test's thread
            self._error = exc

    def _done(self) -> bool:
        made = self.stats.committed + self.stats.rolled_back
        return self._stop_requested.is_set() or (
            self._transactions is not None and made >= self._transactions
        )

    def _connect(self) -> Connection:
        connection = psycopg.connect(self._url, autocommit=True)
        connection.execute("SET deadlock_timeout = '50ms'; SET lock_timeout = '2s'")
        return connection

    def _transaction(self, connection: Connection) -> None:
        size = self._random.choice((1, 1, 1, 2, 3, 5, 12))
        abandon = self._random.random() < 0.08
        done: Counter[str] = Counter()
        try:
            with connection.transaction():
                for _ in range(size):
                    if self._random.random() < 0.1:
                        self._abandoned_savepoint(connection)
                        done["savepoint_rolled_back"] += 1
                    else:
                        done[self._one(connection)] += 1
                if abandon:
                    raise _AbandonedError
        except _AbandonedError:
            self.stats.rolled_back += 1
        except _RETRIED:
            # Not the same again: the next transaction is as random as this one.
            self.stats.retried += 1
            time.sleep(self._random.random() * 0.02)
        else:
            self.stats.committed += 1
            self.stats.operations += done

    def _abandoned_savepoint(self, connection: Connection) -> None:
        try:
            with connection.transaction():
                for _ in range(self._random.randint(1, 3)):
                    self._one(connection)
                raise _AbandonedError
        except _AbandonedError:
            pass

    def _one(self, connection: Connection) -> str:
        names = list(self._operations)
        weights = [weight for weight, _ in self._operations.values()]
        (name,) = self._random.choices(names, weights)
        self._operations[name][1](connection)
        return name

    # -- operations

    def _key(self) -> int:
        return self._random.randrange(self._key_space)

    def _vector(self) -> str:
        # Binary fractions of few digits: exact as float4 and quick to write.
        values = self._random.choices(range(-4000, 4000), k=self._table.dim)
        return "[" + ",".join(f"{value / 1024}" for value in values) + "]"

    def _insert(self, connection: Connection, key: int | None = None) -> None:
        columns = self._table.insert_columns()
        connection.execute(
            f"INSERT INTO {self._table.name} ({', '.join(columns)})"
            f" SELECT {', '.join(columns.values())}"
            " FROM (SELECT %(k)s::int8 AS k, %(n)s::int8 AS n,"
            f" %(v)s::vector({self._table.dim}) AS embedding) s"
            " ON CONFLICT DO NOTHING",
            {
                "k": self._key() if key is None else key,
                "n": next(self._revisions),
                "v": self._vector(),
            },
        )

    def _update(self, connection: Connection, columns: dict[str, str], vector: bool) -> None:
        source = "SELECT %(n)s::int8 AS n"
        parameters: dict[str, object] = {"k": self._key(), "n": next(self._revisions)}
        if vector:
            source += f", %(v)s::vector({self._table.dim}) AS embedding"
            parameters["v"] = self._vector()
        connection.execute(
            f"UPDATE {self._table.name} SET ({', '.join(columns)})"
            f" = ROW({', '.join(columns.values())})"
            f" FROM ({source}) s WHERE {self._key_match}",
            parameters,
        )

    def _some_payload(self) -> dict[str, str]:
        payload = dict(self._table.payload)
        if self._random.random() < 0.3:
            return payload
        chosen = self._random.sample(sorted(payload), self._random.randint(1, 6))
        return {name: payload[name] for name in {"revision", *chosen}}

    def _some_vectors(self) -> dict[str, str]:
        vectors = self._table.vector_expressions
        chosen = self._random.sample(VECTOR_COLUMNS, self._random.randint(1, len(VECTOR_COLUMNS)))
        return {name: vectors[name] for name in chosen}

    def _update_payload(self, connection: Connection) -> None:
        self._update(connection, self._some_payload(), vector=False)

    def _update_vector(self, connection: Connection) -> None:
        self._update(connection, self._some_vectors(), vector=True)

    def _update_both(self, connection: Connection) -> None:
        self._update(connection, self._some_payload() | self._some_vectors(), vector=True)

    def _update_nothing(self, connection: Connection) -> None:
        self._update(connection, {"title": f"{self._table.name}.title"}, vector=False)

    def _clear_vectors(self, connection: Connection) -> None:
        self._update(connection, {"second": "NULL", "half": "NULL", "multi": "NULL"}, vector=False)

    def _update_many(self, connection: Connection) -> None:
        """Several rows in one statement, all that hash into one class."""
        keys = ", ".join(self._table.key_columns)
        connection.execute(
            f"UPDATE {self._table.name} SET revision = %(n)s, flag = NOT flag"
            f" WHERE ({keys}) IN (SELECT {keys} FROM {self._table.name}"
            f" WHERE revision IS NOT NULL ORDER BY {keys} LIMIT 20 OFFSET %(skip)s)",
            {
                "n": next(self._revisions),
                "skip": self._random.randrange(max(1, self._key_space // 2)),
            },
        )

    def _change_key(self, connection: Connection) -> None:
        columns = dict(zip(self._table.key_columns, self._table.key_expressions, strict=True))
        others = self._some_payload() if self._random.random() < 0.5 else {}
        columns |= others
        taken = self._key_match.replace("%(k)s", "%(new)s")
        connection.execute(
            f"UPDATE {self._table.name} SET ({', '.join(columns)})"
            f" = ROW({', '.join(columns.values())})"
            " FROM (SELECT %(new)s::int8 AS k, %(n)s::int8 AS n) s"
            f" WHERE {self._key_match}"
            f" AND NOT EXISTS (SELECT FROM {self._table.name} WHERE {taken})",
            {"k": self._key(), "new": self._key(), "n": next(self._revisions)},
        )

    def _delete(self, connection: Connection, key: int | None = None) -> None:
        connection.execute(
            f"DELETE FROM {self._table.name} WHERE {self._key_match}",
            {"k": self._key() if key is None else key},
        )

    def _reinsert(self, connection: Connection) -> None:
        key = self._key()
        self._delete(connection, key)
        self._insert(connection, key)


def run_writers(
    url: str,
    table: EverythingTable,
    n: int,
    *,
    seconds: float | None = None,
    transactions: int | None = None,
    seed: int = 0,
    key_space: int = 1000,
    timeout_seconds: float = 120.0,
) -> WorkloadStats:
    """Run ``n`` writers for so many ``seconds``, or until each has made so many ``transactions``;
    one of both is given.

    :raises TimeoutError: they did not end in time.
    """
    if (seconds is None) == (transactions is None):
        raise ValueError("give either seconds or transactions")
    writers = [
        Writer(url, table, seed=seed * 100 + number, transactions=transactions, key_space=key_space)
        for number in range(n)
    ]
    for writer in writers:
        writer.start()
    if seconds is not None:
        time.sleep(seconds)
    total = WorkloadStats()
    for writer in writers:
        total += (
            writer.finish(timeout_seconds) if seconds is not None else writer.wait(timeout_seconds)
        )
    return total
