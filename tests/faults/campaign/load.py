"""The tables of a campaign and what changes them: writers in threads, and statements now and then
that concern a table as a whole."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import psycopg

from tests.support.fix_postgres import Connection, Database
from tests.support.migration_load import MigrationWriter, create_partitioned
from tests.support.workload import EverythingTable, Writer, create_everything_table, load

#: Wide enough that the vector is TOASTed, so that updates come without it.
_DIM: Final = 640
#: 1,200 bytes beside the padding: TOASTed too.
_ITEM_DIM: Final = 300
_ITEM_PAD: Final = 1000
_ROWS: Final = 250
_ITEMS: Final = 1200
_PARTITIONS: Final = 4
_LOCK: Final = "SET lock_timeout = '1500ms'; SET deadlock_timeout = '50ms'"

ORDINARY: Final = "everything"
PARTITIONED: Final = "items"
TABLES: Final = (ORDINARY, PARTITIONED)


class NotPossibleError(Exception):
    """Something cannot be done at the moment; the text says why."""


@dataclass
class Load:
    """Changes the tables of one database. Made by :meth:`create`."""

    database: Database
    table: EverythingTable
    _writers: list[Writer] = field(default_factory=list)
    _movers: list[MigrationWriter] = field(default_factory=list)
    _numbers: int = 0
    #: When a table was last redefined or stored anew, by the monotonic clock.
    redefined: float = 0.0

    @classmethod
    def create(cls, database: Database, seed: int) -> Load:
        """Make the tables with their first rows: one of every type, and one in partitions."""
        with database.connect() as connection:
            table = create_everything_table(connection, ORDINARY, dim=_DIM)
            # Without an estimate of its rows it is cut small enough for several workers.
            connection.execute(f"ALTER TABLE {ORDINARY} SET (autovacuum_enabled = false)")
            load(connection, table, _ROWS, seed=seed)
        create_partitioned(database, _ITEMS, dim=_ITEM_DIM, partitions=_PARTITIONS, pad=_ITEM_PAD)
        return cls(database, table)

    # -- writers

    def start(self, seed: int) -> None:
        """Let writers change rows."""
        self._writers = [
            Writer(
                self.database.url,
                self.table,
                seed=(seed + n) % 1000,
                key_space=2 * _ROWS,
                reconnect=True,
                pause_seconds=0.01,
            )
            for n in range(2)
        ]
        self._movers = [
            MigrationWriter(
                self.database,
                dim=_ITEM_DIM,
                key_space=3 * _ITEMS // 2,
                seed=seed + 7,
                pause_seconds=0.02,
            )
        ]
        for writer in self._writers:
            writer.start()
        for mover in self._movers:
            mover.start()

    def finish(self) -> Counter[str]:
        """Stop the writers; returns what they did. Raises what ended one of them."""
        done: Counter[str] = Counter()
        for writer in self._writers:
            done["transactions"] += writer.finish().committed
        for mover in self._movers:
            done["statements"] += sum(mover.finish().values())
        self._writers, self._movers = [], []
        return done

    # -- statements on a table as a whole

    def execute(self, statement: str) -> None:
        """Run one statement; raises :class:`NotPossibleError` where others are in its way."""
        try:
            with self.database.connect() as connection:
                connection.execute(_LOCK)
                connection.execute(statement.encode())
        except (psycopg.OperationalError, psycopg.errors.UniqueViolation) as error:
            raise NotPossibleError(type(error).__name__) from error

    def truncate(self, choose: random.Random) -> str:
        """Empty a table, or a partition."""
        name = choose.choice((ORDINARY, PARTITIONED, f"{PARTITIONED}_{choose.randrange(4)}"))
        self.execute(f"TRUNCATE {name}")
        self.redefined = time.monotonic()
        return name

    def fill(self, choose: random.Random) -> str:
        """Insert many rows in one transaction where there are none."""
        self._numbers += 1
        name = choose.choice(TABLES)
        vector = "(SELECT array_agg(((g * 37 + i * i) % 1700)::real / 1000 - 0.5 ORDER BY i)"
        if name == PARTITIONED:
            self.execute(
                f"INSERT INTO {name} (id, note, n, emb) SELECT g, 'filled', {self._numbers},"
                f" {vector}::vector FROM generate_series(1, {_ITEM_DIM}) i)"
                f" FROM generate_series(1, {_ITEMS}) g ON CONFLICT DO NOTHING"
            )
            return name
        columns = self.table.insert_columns()
        self.execute(
            f"INSERT INTO {name} ({', '.join(columns)}) SELECT {', '.join(columns.values())}"
            f" FROM (SELECT g::int8 AS k, g::int8 + {self._numbers * 10_000} AS n,"
            f" {vector}::vector({_DIM}) FROM generate_series(1, {_DIM}) i) AS embedding"
            f" FROM generate_series(0, {_ROWS}) g) s ON CONFLICT DO NOTHING"
        )
        return name

    def change_all(self, choose: random.Random) -> str:
        """Update or delete many rows in one transaction."""
        self._numbers += 1
        statement = choose.choice(
            (
                f"UPDATE {ORDINARY} SET revision = {self._numbers}",
                f"UPDATE {PARTITIONED} SET n = {self._numbers}, note = 'all'",
                f"UPDATE {PARTITIONED} SET emb = NULL WHERE id % 5 = 0",
                f"UPDATE {PARTITIONED} SET id = id + 100000 WHERE id % 7 = 3 AND id < 100000",
                f"DELETE FROM {PARTITIONED} WHERE id % 3 = 0",
                f"DELETE FROM {ORDINARY} WHERE id % 4 = 1",
            )
        )
        self.execute(statement)
        return statement

    def redefine(self, choose: random.Random) -> str:
        """Change a table's columns, or store it anew."""
        self._numbers += 1
        table, column, number = choose.choice(TABLES), choose.randrange(2), self._numbers
        alter, drop = f"ALTER TABLE {table}", "DROP COLUMN IF EXISTS"
        statement = choose.choice(
            (
                f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS plain{column} int",
                f"{alter} ADD COLUMN IF NOT EXISTS plain{column} int",
                f"{alter} ADD COLUMN IF NOT EXISTS given{column} text DEFAULT 'd{number}'",
                f"{alter} ADD COLUMN IF NOT EXISTS rolled{column} float8 DEFAULT random()",
                f"{alter} {drop} given{column}, ADD COLUMN given{column} text DEFAULT 'a{number}'",
                f"{alter} {drop} plain{column}, {drop} given{column}",
                f"ALTER TABLE {PARTITIONED} ALTER COLUMN n TYPE int8 USING (n % 1000) + {number}",
                f"ALTER TABLE {ORDINARY} ALTER COLUMN revision TYPE int8 USING revision + 1",
                f"VACUUM FULL {table}",
            )
        )
        self.execute(statement)
        self.redefined = time.monotonic()
        return statement

    def hold_open(self, seconds: float) -> str:
        """Have a transaction write, and commit only after so many seconds; others go on."""
        self._numbers += 1
        threading.Thread(target=self._hold_open, args=(self._numbers, seconds), daemon=True).start()
        return f"for {seconds:.1f} s"

    def _hold_open(self, number: int, seconds: float) -> None:
        try:
            with self.database.connect(autocommit=False) as connection:
                connection.execute(_LOCK)
                self._change_slowly(connection, number, seconds)
        except psycopg.Error:
            return  # A server that was restarted has rolled it back.

    @staticmethod
    def _change_slowly(connection: Connection, number: int, seconds: float) -> None:
        for part in range(4):
            connection.execute(
                f"UPDATE {PARTITIONED} SET note = 'held', n = {number} WHERE id ="
                f" (SELECT min(id) FROM {PARTITIONED} WHERE id > {part * 100})".encode()
            )
            time.sleep(seconds / 4)

    # -- requests

    def request_resync(self, pipeline: str, table: str) -> None:
        """Ask for a table to be read again."""
        self._request(f'{{"pipeline": "{pipeline}", "table": "public.{table}"}}')

    def request_rows(self, pipeline: str, choose: random.Random) -> str:
        """Ask for rows to be read again, some of which are not there."""
        keys = ", ".join(f'["{choose.randrange(2 * _ITEMS)}"]' for _ in range(40))
        self._request(
            f'{{"pipeline": "{pipeline}", "table": "public.{PARTITIONED}", "keys": [{keys}]}}'
        )
        return PARTITIONED

    def _request(self, body: str) -> None:
        try:
            self.database.execute(
                "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (f'{{"resync": {body}}}',)
            )
        except psycopg.OperationalError as error:
            raise NotPossibleError(type(error).__name__) from error


#: How the tables are configured.
TABLE_SETTINGS: Final[tuple[Mapping[str, object], ...]] = (
    {"name": ORDINARY, "collection": ORDINARY},
    {"name": PARTITIONED, "collection": PARTITIONED, "metrics": {"emb": "euclid"}},
)
