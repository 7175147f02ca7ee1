"""The demo's writer: plays an application that changes rows while the pipeline streams.

It runs in a thread with a connection of its own and knows nothing of the pipeline. The order of
what it does is fixed by a seed; only the number of transactions depends on the time it is given.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

import psycopg
from psycopg import sql

from cdc_sync.demo.dataset import Dataset, Query, Vector, vector_literal
from cdc_sync.demo.table import COLUMNS, TABLE, row_values
from cdc_sync.pgoutput.lsn import Lsn

#: Transactions a second, about.
RATE: Final = 20.0
#: Ids of moved rows are this much higher.
KEY_OFFSET: Final = 1_000_000

_SEED: Final = 384
_MARKS_KEPT: Final = 4096
# How long the end of the program waits for a statement that is under way.
_STATEMENT_TIMEOUT: Final = "-c statement_timeout=20s"

# What updates that touch no vector set. Together they reach every type of the table, to NULL and
# back, and values that need quoting.
_METADATA_UPDATES: Final = tuple(
    f"UPDATE packages SET {assignments} WHERE id = ANY(%s)"
    for assignments in (
        "version = version || '+1', released = clock_timestamp()",
        "installed_size = installed_size + 4096, ratio = ratio * 1.01",
        "tags = tags || ARRAY['demo::touched', NULL, 'quote\" and , comma']",
        "homepage = CASE WHEN homepage IS NULL THEN 'https://example.org/' || name END",
        "essential = NOT essential",
        "priority = CASE WHEN essential THEN 'optional' ELSE 'extra' END::package_priority",
        "relations = coalesce(relations, '{}') || jsonb_build_object('demo', ARRAY[id, 0, NULL])",
        "relations = relations || jsonb_build_object('also', jsonb_build_array(ratio, essential))",
        "tags = NULL, ratio = NULL, released = NULL, download_size = NULL",
        "description = description || E'\\n\\n' || repeat(summary || '. ', 40)",
    )
)


@dataclass(slots=True)
class Tally:
    """What the writer has done.

    Rows, but for ``transactions`` and ``rolled_back``: transactions, or parts of them, undone.
    """

    transactions: int = 0
    inserted: int = 0
    metadata: int = 0
    vectors: int = 0
    moved: int = 0
    deleted: int = 0
    rolled_back: int = 0

    @property
    def changes(self) -> int:
        """Committed row changes."""
        return self.inserted + self.metadata + self.vectors + self.moved + self.deleted


@dataclass(frozen=True, slots=True)
class Mark:
    """A commit of the writer: where the WAL stood after it, and when (``time.monotonic``)."""

    lsn: Lsn
    at: float


@dataclass(slots=True)
class _Rows:
    """The writer's own view: the package of every live key, and what is left to insert."""

    packages: dict[int, int]
    spare: deque[int]
    without_vector: list[int] = field(default_factory=list)
    rewritten: set[int] = field(default_factory=set)

    def copy(self) -> _Rows:
        return _Rows(
            dict(self.packages), deque(self.spare), list(self.without_vector), set(self.rewritten)
        )


class Writer:
    """Writes for ``seconds`` in a thread of its own; others may read ``tally`` and ``marks``.

    So that a search for ``query`` gives another answer afterwards, the spare rows nearest to it are
    inserted first, and the first transaction deletes the rows with the ids ``doomed``.
    """

    def __init__(
        self,
        url: str,
        dataset: Dataset,
        seconds: float,
        query: Query | None = None,
        doomed: tuple[int, ...] = (),
    ) -> None:
        self._thread = threading.Thread(target=self._run, name="demo-writer", daemon=True)
        self._url = url
        self._dataset = dataset
        self._seconds = seconds
        self._doomed = doomed
        self._random = random.Random(_SEED)
        self._ended = threading.Event()
        self._rows = _Rows(
            packages={position + 1: position for position in range(dataset.first)},
            spare=deque(_spare_positions(dataset, query)),
        )
        self._count = Tally()
        self.tally = Tally()
        self.marks: deque[Mark] = deque(maxlen=_MARKS_KEPT)
        self._error: Exception | None = None

    @property
    def last_lsn(self) -> Lsn | None:
        """Where the WAL stood after the last commit."""
        return self.marks[-1].lsn if self.marks else None

    @property
    def running(self) -> bool:
        """Whether it still writes."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end after the transaction under way."""
        self._ended.set()

    def join(self, timeout_seconds: float | None = None) -> None:
        """Wait until it has ended. Raises what has ended it, if that was an error."""
        self._thread.join(timeout_seconds)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with psycopg.connect(
                self._url, autocommit=True, options=_STATEMENT_TIMEOUT
            ) as connection:
                self._write(connection)
        except Exception as exc:  # noqa: BLE001 - join raises it again
            self._error = exc

    def _write(self, connection: psycopg.Connection) -> None:
        begin = time.monotonic()
        if self._doomed:
            self._transaction(connection, self._delete_doomed)
        # Every action once, also in the shortest run; then by weight.
        first = [action for action, _ in self._actions()]
        actions, weights = zip(*self._actions(), strict=True)
        done = 0
        while not self._ended.is_set():
            in_time = time.monotonic() - begin < self._seconds
            if done >= len(first) and not in_time:
                return
            action = first[done] if done < len(first) else self._random.choices(actions, weights)[0]
            self._transaction(connection, action)
            done += 1
            self._ended.wait(max(0.0, begin + done / RATE - time.monotonic()) if in_time else 0.0)

    def _actions(self) -> tuple[tuple[Callable[[psycopg.Connection], None], int], ...]:
        """What a transaction may do, and how often it is chosen."""
        return (
            (self._insert, 22),
            (self._update_metadata, 34),
            (self._update_vectors, 18),
            (self._insert_without_vector, 4),
            (self._add_vectors, 5),
            (self._move, 8),
            (self._move_back, 3),
            (self._delete, 9),
            (self._replace, 3),
            (self._do_everything, 6),
            (self._roll_back_part, 3),
            (self._roll_back_all, 4),
            (self._update_many, 1),
        )

    def _transaction(
        self, connection: psycopg.Connection, action: Callable[[psycopg.Connection], None]
    ) -> None:
        """Run one transaction; what was counted and remembered in it holds only if it commits."""
        rows, count = self._rows.copy(), replace(self._count)
        try:
            with connection.transaction():
                action(connection)
        except _UndoneError:
            self._rows, self._count = rows, replace(count, rolled_back=count.rolled_back + 1)
            return
        self._count.transactions += 1
        self.tally = replace(self._count)
        found = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert found is not None
        self.marks.append(Mark(Lsn.parse(found[0]), time.monotonic()))

    def _pick(self, most: int) -> list[int]:
        """Some live keys, at random."""
        keys = sorted(self._rows.packages)
        # A few rows always stay, however small the table is.
        return self._random.sample(keys, min(self._random.randint(1, most), max(0, len(keys) - 5)))

    # -- actions

    def _insert(self, connection: psycopg.Connection, with_vector: bool = True) -> None:
        for _ in range(self._random.randint(1, 2)):
            if not self._rows.spare:
                return
            key = self._rows.spare[0] + 1
            self._insert_row(connection, key, with_vector)
            if not with_vector:
                self._rows.without_vector.append(key)

    def _insert_row(self, connection: psycopg.Connection, key: int, with_vector: bool) -> None:
        """Insert the next spare package under ``key``."""
        position = self._rows.spare.popleft()
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier(TABLE),
            sql.SQL(", ").join(map(sql.Identifier, COLUMNS)),
            sql.SQL(", ").join([sql.Placeholder()] * len(COLUMNS)),
        )
        vector = self._dataset.vectors[position] if with_vector else None
        connection.execute(statement, row_values(key, self._dataset.packages[position], vector))
        self._rows.packages[key] = position
        self._count.inserted += 1

    def _insert_without_vector(self, connection: psycopg.Connection) -> None:
        self._insert(connection, with_vector=False)

    def _update_metadata(self, connection: psycopg.Connection) -> None:
        statement = self._random.choice(_METADATA_UPDATES)
        self._count.metadata += connection.execute(statement.encode(), [self._pick(6)]).rowcount

    def _update_many(self, connection: psycopg.Connection) -> None:
        """Every rule of the metadata over a tenth of the table, in one transaction."""
        for statement in _METADATA_UPDATES[:-1]:
            keys = self._pick(max(1, len(self._rows.packages) // 20))
            self._count.metadata += connection.execute(statement.encode(), [keys]).rowcount

    def _update_vectors(self, connection: psycopg.Connection) -> None:
        """Cut descriptions to their summaries, with the vector of that, or restore them."""
        for key in self._pick(4):
            position = self._rows.packages[key]
            package, short = self._dataset.packages[position], self._dataset.rewritten.get(position)
            if key in self._rows.rewritten or short is None:
                description, vector = package.description, self._dataset.vectors[position]
                self._rows.rewritten.discard(key)
            else:
                description, vector = package.summary, short
                self._rows.rewritten.add(key)
            self._set_vector(connection, key, vector, description)

    def _add_vectors(self, connection: psycopg.Connection) -> None:
        """Give rows without a vector theirs; if there are none, take it from some."""
        if not self._rows.without_vector:
            for key in self._pick(2):
                self._set_vector(connection, key, None, None)
                self._rows.without_vector.append(key)
            return
        for key in self._rows.without_vector:
            self._set_vector(connection, key, self._dataset.vectors[self._rows.packages[key]], None)
        self._rows.without_vector.clear()

    def _set_vector(
        self,
        connection: psycopg.Connection,
        key: int,
        vector: Vector | None,
        description: str | None,
    ) -> None:
        """Set a row's vector, and its description unless that is None."""
        literal = None if vector is None else vector_literal(vector)
        self._count.vectors += connection.execute(
            "UPDATE packages SET embedding = %s::vector, description = coalesce(%s, description)"
            " WHERE id = %s",
            [literal, description, key],
        ).rowcount

    def _move(self, connection: psycopg.Connection) -> None:
        """Change primary keys; the vectors, mostly out of line, are not in the stream."""
        for key in self._pick(3):
            if key < KEY_OFFSET and key + KEY_OFFSET not in self._rows.packages:
                self._move_row(connection, key, key + KEY_OFFSET)

    def _move_back(self, connection: psycopg.Connection) -> None:
        moved = sorted(key for key in self._rows.packages if key >= KEY_OFFSET)
        for key in moved[:2]:
            if key - KEY_OFFSET not in self._rows.packages:
                self._move_row(connection, key, key - KEY_OFFSET)

    def _move_row(self, connection: psycopg.Connection, key: int, new: int) -> None:
        connection.execute("UPDATE packages SET id = %s WHERE id = %s", [new, key])
        rows = self._rows
        rows.packages[new] = rows.packages.pop(key)
        rows.without_vector = [new if each == key else each for each in rows.without_vector]
        if key in rows.rewritten:
            rows.rewritten.remove(key)
            rows.rewritten.add(new)
        self._count.moved += 1

    def _delete(self, connection: psycopg.Connection) -> None:
        self._delete_rows(connection, self._pick(2))

    def _delete_doomed(self, connection: psycopg.Connection) -> None:
        self._delete_rows(connection, [key for key in self._doomed if key in self._rows.packages])

    def _delete_rows(self, connection: psycopg.Connection, keys: list[int]) -> None:
        self._count.deleted += connection.execute(
            "DELETE FROM packages WHERE id = ANY(%s)", [keys]
        ).rowcount
        rows = self._rows
        for key in keys:
            del rows.packages[key]
            rows.rewritten.discard(key)
        rows.without_vector = [key for key in rows.without_vector if key in rows.packages]

    def _replace(self, connection: psycopg.Connection) -> None:
        """Delete a row and insert another package under the same key, in one transaction."""
        keys = self._pick(1)
        if keys and self._rows.spare:
            self._delete_rows(connection, keys)
            self._insert_row(connection, keys[0], with_vector=True)

    def _do_everything(self, connection: psycopg.Connection) -> None:
        """Several kinds in one transaction, some on the same rows."""
        self._insert(connection)
        self._update_metadata(connection)
        self._move(connection)
        self._update_vectors(connection)
        keys = self._pick(2)
        connection.execute(
            "UPDATE packages SET released = %s WHERE id = ANY(%s)", [datetime.now(UTC), keys]
        )
        self._count.metadata += len(keys)
        self._delete_rows(connection, keys[:1])

    def _roll_back_part(self, connection: psycopg.Connection) -> None:
        """Undo a savepoint inside a transaction that commits."""
        self._update_metadata(connection)
        rows, count = self._rows.copy(), replace(self._count)
        with connection.transaction() as savepoint:
            self._delete(connection)
            self._update_vectors(connection)
            raise psycopg.Rollback(savepoint)
        self._rows, self._count = rows, replace(count, rolled_back=count.rolled_back + 1)

    def _roll_back_all(self, connection: psycopg.Connection) -> None:
        self._delete(connection)
        self._move(connection)
        self._insert(connection)
        raise _UndoneError


class _UndoneError(Exception):
    """Thrown by an action to roll its transaction back."""


def _spare_positions(dataset: Dataset, query: Query | None) -> list[int]:
    """The rows still to be inserted, those nearest to the query first."""
    positions = range(dataset.spare, len(dataset.packages))
    if query is None:
        return list(positions)
    nearness = dataset.vectors @ query.vector
    return sorted(positions, key=lambda position: (-float(nearness[position]), position))
