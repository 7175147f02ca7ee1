"""A partitioned table of any size, and writers that change it in every way while it is copied."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy
import psycopg

from tests.support.fix_postgres import Database

_LOAD_BATCH: Final = 5_000
_COPY_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_TRAILER: Final = b"\xff\xff"
_RETRIED: Final = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.UniqueViolation,
)


def create_partitioned(
    database: Database, rows: int, *, dim: int, partitions: int, pad: int = 0, table: str = "items"
) -> None:
    """Create a table in hash partitions with the ids 1 to ``rows``. ``pad``: bytes that each row
    has besides, so that fewer fit into a block."""
    with database.connect() as connection:
        connection.execute(
            f"CREATE TABLE {table} (id bigint PRIMARY KEY, note text DEFAULT 'loaded', n bigint,"
            f" pad text DEFAULT repeat('x', {pad}), emb vector({dim})) PARTITION BY HASH (id)"
        )
        for part in range(partitions):
            connection.execute(
                f"CREATE TABLE {table}_{part} PARTITION OF {table}"
                f" FOR VALUES WITH (MODULUS {partitions}, REMAINDER {part})"
            )
            connection.execute(f"ALTER TABLE {table}_{part} ALTER pad SET STORAGE PLAIN")
        for start in range(1, rows + 1, _LOAD_BATCH):
            ids = range(start, min(start + _LOAD_BATCH, rows + 1))
            with connection.cursor().copy(
                f"COPY {table} (id, n, emb) FROM STDIN (FORMAT binary)"
            ) as copy:
                copy.write(_COPY_SIGNATURE + _copy_rows(ids, dim) + _COPY_TRAILER)
        connection.execute(f"VACUUM ANALYZE {table}")


def _copy_rows(ids: range, dim: int) -> bytes:
    """Tuples of COPY BINARY. A vector is its dimension, an unused int16, and float4s."""
    layout = [("fields", ">i2")]
    layout += [
        (f"{name}_bytes", ">i4") if i % 2 == 0 else (name, ">i8")
        for name in ("id", "n")
        for i in (0, 1)
    ]
    layout += [("emb_bytes", ">i4"), ("dim", ">i2"), ("unused", ">i2")]
    rows = numpy.zeros(len(ids), dtype=[*layout, ("emb", ">f4", (dim,))])
    rows["fields"] = 3
    rows["id_bytes"] = rows["n_bytes"] = 8
    rows["id"] = rows["n"] = numpy.arange(ids.start, ids.stop)
    rows["emb_bytes"] = 4 + 4 * dim
    rows["dim"] = dim
    rows["emb"] = numpy.random.default_rng(ids.start).standard_normal((len(ids), dim))
    return rows.tobytes()


class MigrationWriter:
    """A thread that changes random rows until told to finish; it lives through restarts of the
    server.

    Ids are taken from 1 to ``key_space``. It inserts, updates with and without the vector, changes
    keys, which moves rows to other partitions, deletes, and now and then makes space for rows to
    move into.
    """

    def __init__(
        self,
        database: Database,
        *,
        dim: int,
        key_space: int,
        seed: int,
        table: str = "items",
        pause_seconds: float = 0.005,
    ) -> None:
        self.done: Counter[str] = Counter()
        self._database = database
        self._dim = dim
        self._key_space = key_space
        self._table = table
        self._pause_seconds = pause_seconds
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._statements = {
            "insert": (
                20,
                (
                    "INSERT INTO {t} (id, note, n, emb) VALUES ({k}, 'new', {n}, {v})"
                    " ON CONFLICT DO NOTHING"
                ),
            ),
            "update": (35, "UPDATE {t} SET note = 'changed', n = {n} WHERE id = {k}"),
            "update many": (5, "UPDATE {t} SET n = {n} WHERE id BETWEEN {k} AND {k} + 30"),
            "vector": (12, "UPDATE {t} SET emb = {v}, n = {n} WHERE id = {k}"),
            "no vector": (3, "UPDATE {t} SET emb = NULL WHERE id = {k}"),
            "key": (
                10,
                (
                    "UPDATE {t} SET id = {o} WHERE id = {k}"
                    " AND NOT EXISTS (SELECT FROM {t} WHERE id = {o})"
                ),
            ),
            "delete": (12, "DELETE FROM {t} WHERE id = {k}"),
            "delete many": (2, "DELETE FROM {t} WHERE id BETWEEN {k} AND {k} + 20"),
            "vacuum": (1, "VACUUM (INDEX_CLEANUP ON) {t}"),
        }
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self, timeout_seconds: float = 60.0) -> Counter[str]:
        """Stop, and return what was committed, by kind. Raises what ended the thread."""
        self._stopping.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise TimeoutError("a writer did not end")
        if self._error is not None:
            raise self._error
        return self.done

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    with self._database.connect() as connection:
                        connection.execute("SET lock_timeout = '1s'; SET deadlock_timeout = '50ms'")
                        while not self._stopping.is_set():
                            self._transaction(connection)
                            self._stopping.wait(self._pause_seconds)
                except (psycopg.OperationalError, psycopg.Rollback):
                    # Of a connection that is lost while it rolls back, psycopg raises the latter.
                    self._stopping.wait(0.1)
        except BaseException as error:  # noqa: BLE001 - finish() raises it in the test's thread
            self._error = error

    def _transaction(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        names = list(self._statements)
        weights = [weight for weight, _ in self._statements.values()]
        chosen = self._random.choices(names, weights, k=self._random.choice((1, 1, 1, 3, 8)))
        try:
            if "vacuum" in chosen:
                connection.execute(self._statement("vacuum"))
                return
            with connection.transaction():
                for name in chosen:
                    connection.execute(self._statement(name))
                if self._random.random() < 0.05:
                    raise psycopg.Rollback
        except _RETRIED:
            return
        self.done.update(chosen)

    def _statement(self, name: str) -> bytes:
        first = self._random.randrange(-4000, 4000) / 1024
        text = self._statements[name][1].format(
            t=self._table,
            k=self._random.randint(1, self._key_space),
            o=self._random.randint(1, self._key_space),
            n=self._random.getrandbits(40),
            v=f"('[' || {first} || repeat(',1', {self._dim - 1}) || ']')::vector",
        )
        return text.encode()


@contextmanager
def writing(*writers: MigrationWriter) -> Iterator[None]:
    """Run writers meanwhile; each must have done something."""
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        done = [sum(writer.finish().values()) for writer in writers]
    assert all(done), done
