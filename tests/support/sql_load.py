"""A small table that is changed in every way that replication knows, by several connections whose
transactions interleave; all from one thread, so that the order is the caller's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import psycopg
from psycopg import pq

from tests.support.fix_postgres import Connection, Database

TABLE: Final = "docs"
#: Enough for the vector to be stored out of line, where an update does not send it.
DIM: Final = 640
KEYS: Final = 8
CONNECTIONS: Final = 3

_SCHEMA: Final = f"""
CREATE TYPE mood AS ENUM ('glad', 'sad');
CREATE FUNCTION vec(seed bigint, dim int) RETURNS vector LANGUAGE sql IMMUTABLE AS $$
  SELECT array_agg((((seed * 37 + i * i * 11 + i) % 1700)::real / 1000 - 0.5)::float4
                   ORDER BY i)::vector
    FROM generate_series(1, dim) i $$;
CREATE TABLE {TABLE} (
  id bigint PRIMARY KEY, note text, n int, label varchar(20), feeling mood, big text,
  emb vector({DIM}), side vector(4)
);
ALTER TABLE {TABLE} ALTER COLUMN big SET STORAGE EXTERNAL;
INSERT INTO {TABLE} SELECT i, 'first', i, 'l' || i, 'glad', repeat(md5(i::text), 90),
       vec(i, {DIM}), vec(i, 4) FROM generate_series(0, {KEYS // 2}) i;
"""

#: Statements on rows: {k} and {o} are keys, {r} is a number that no other statement has.
ROWS: Final = {
    "insert": f"INSERT INTO {TABLE} (id, note, n, feeling, big, emb, side) VALUES ({{k}}, 'i{{r}}',"
    f" {{r}}, 'sad', repeat(md5('{{r}}'), 90), vec({{r}}, {DIM}), vec({{r}}, 4))"
    " ON CONFLICT DO NOTHING",
    "insert_bare": f"INSERT INTO {TABLE} (id, n) VALUES ({{k}}, {{r}}) ON CONFLICT DO NOTHING",
    "fill": f"INSERT INTO {TABLE} (id, note, n, big, emb) SELECT i, 'f{{r}}', {{r}},"
    f" repeat(md5(i::text), 90), vec({{r}} + i, {DIM}) FROM generate_series(0, {KEYS - 1}) i"
    " ON CONFLICT DO NOTHING",
    "upsert": f"INSERT INTO {TABLE} (id, n) VALUES ({{k}}, {{r}})"
    " ON CONFLICT (id) DO UPDATE SET n = excluded.n",
    "update_payload": f"UPDATE {TABLE} SET note = 'u{{r}}', n = {{r}} WHERE id = {{k}}",
    "update_big": f"UPDATE {TABLE} SET big = repeat(md5('{{r}}'), 90) WHERE id = {{k}}",
    "update_vector": f"UPDATE {TABLE} SET emb = vec({{r}}, {DIM}) WHERE id = {{k}}",
    "update_side": f"UPDATE {TABLE} SET side = vec({{r}}, 4) WHERE id = {{k}}",
    "update_both": f"UPDATE {TABLE} SET note = 'b{{r}}', emb = vec({{r}}, {DIM}) WHERE id = {{k}}",
    "update_nothing": f"UPDATE {TABLE} SET note = note WHERE id = {{k}}",
    "null_vector": f"UPDATE {TABLE} SET emb = NULL WHERE id = {{k}}",
    "null_both": f"UPDATE {TABLE} SET side = NULL, big = NULL WHERE id = {{k}}",
    "change_key": f"UPDATE {TABLE} SET id = {{o}} WHERE id = {{k}}"
    f" AND NOT EXISTS (SELECT FROM {TABLE} WHERE id = {{o}})",
    "change_key_and_row": f"UPDATE {TABLE} SET id = {{o}}, n = {{r}}, side = vec({{r}}, 4)"
    f" WHERE id = {{k}} AND NOT EXISTS (SELECT FROM {TABLE} WHERE id = {{o}})",
    "delete": f"DELETE FROM {TABLE} WHERE id = {{k}}",
    "many": f"UPDATE {TABLE} SET n = {{r}} WHERE id % 2 = {{k}} % 2",
    "shift_keys": f"UPDATE {TABLE} SET id = id + {KEYS}, note = 's{{r}}' WHERE id > {{k}}"
    f" AND id < {KEYS} AND NOT EXISTS (SELECT FROM {TABLE} WHERE id >= {KEYS})",
    "copy_rows": f"INSERT INTO {TABLE} (id, note, emb, side) SELECT id + 1, note, emb, side"
    f" FROM {TABLE} WHERE id >= {{k}} ON CONFLICT DO NOTHING",
}

#: Statements that belong together, in one transaction or savepoint.
SEQUENCES: Final = {
    "reinsert": ("delete", "insert"),
    "reinsert_bare": ("delete", "insert_bare"),
    "freed_key": ("delete_other", "change_key", "update_payload_other"),
    "swap_keys": ("to_spare", "from_other", "from_spare"),
    "touch_twice": ("update_vector", "update_payload"),
    "move_twice": ("change_key", "change_key_on"),
    "insert_and_delete": ("insert", "delete"),
}
ROWS_OF_SEQUENCES: Final = {
    "delete_other": f"DELETE FROM {TABLE} WHERE id = {{o}}",
    "update_payload_other": f"UPDATE {TABLE} SET note = 'f{{r}}' WHERE id = {{o}}",
    "to_spare": f"UPDATE {TABLE} SET id = -1 WHERE id = {{k}}",
    "from_other": f"UPDATE {TABLE} SET id = {{k}} WHERE id = {{o}} AND {{k}} <> {{o}}",
    "from_spare": f"UPDATE {TABLE} SET id = {{o}} WHERE id = -1",
    "change_key_on": f"UPDATE {TABLE} SET id = {{o}} + 1 WHERE id = {{o}}"
    f" AND NOT EXISTS (SELECT FROM {TABLE} WHERE id = {{o}} + 1)",
}

#: Statements on the table: {c} numbers a column.
DDL: Final = {
    "add": f"ALTER TABLE {TABLE} ADD COLUMN IF NOT EXISTS plain{{c}} int",
    "add_default": f"ALTER TABLE {TABLE} ADD COLUMN IF NOT EXISTS given{{c}} text DEFAULT 'd{{r}}'",
    "add_volatile": f"ALTER TABLE {TABLE} ADD COLUMN IF NOT EXISTS rolled{{c}} float8"
    " DEFAULT random()",
    "drop": f"ALTER TABLE {TABLE} DROP COLUMN IF EXISTS plain{{c}},"
    " DROP COLUMN IF EXISTS given{c}, DROP COLUMN IF EXISTS named{c}",
    "rename": f"ALTER TABLE {TABLE} RENAME COLUMN given{{c}} TO named{{c}}",
    "rename_back": f"ALTER TABLE {TABLE} RENAME COLUMN named{{c}} TO given{{c}}",
    "anew": f"ALTER TABLE {TABLE} DROP COLUMN IF EXISTS given{{c}},"
    " ADD COLUMN given{c} text DEFAULT 'a{r}'",
    "widen": f"ALTER TABLE {TABLE} ALTER COLUMN n TYPE bigint, ALTER COLUMN label TYPE text",
    "narrow": f"ALTER TABLE {TABLE} ALTER COLUMN n TYPE int, ALTER COLUMN label TYPE varchar(20)",
    "recompute": f"ALTER TABLE {TABLE} ALTER COLUMN n TYPE int USING (n % 1000) + {{r}}",
    "add_label": "ALTER TYPE mood ADD VALUE IF NOT EXISTS 'm{r}'",
    "index": f"CREATE INDEX ON {TABLE} (n)",
    "set_default": f"ALTER TABLE {TABLE} ALTER COLUMN note SET DEFAULT 'x{{r}}'",
    "identity_full": f"ALTER TABLE {TABLE} REPLICA IDENTITY FULL",
    "identity_default": f"ALTER TABLE {TABLE} REPLICA IDENTITY DEFAULT",
    "truncate": f"TRUNCATE {TABLE}",
    "rewrite": f"VACUUM FULL {TABLE}",
}
#: Not allowed inside a transaction.
_ALONE: Final = frozenset({"rewrite"})


@dataclass
class SqlLoad:
    """Runs statements by name. ``done`` counts those that worked, and those that did not.

    A statement that cannot get a lock soon, or meets a key that is taken, ends its transaction;
    that is as good as any other end.
    """

    database: Database
    done: Counter[str] = field(default_factory=Counter)
    _connections: list[Connection] = field(default_factory=list)
    _number: int = 100

    @staticmethod
    def create(database: Database) -> SqlLoad:
        database.execute(_SCHEMA)
        load = SqlLoad(database)
        for _ in range(CONNECTIONS):
            connection = database.connect()
            connection.execute("SET lock_timeout = '150ms'; SET deadlock_timeout = '50ms'")
            load._connections.append(connection)
        return load

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def rows(self, connection: int, name: str, key: int = 0, other: int = 0) -> None:
        """Run one statement on rows, or a sequence of them."""
        names = SEQUENCES.get(name, (name,))
        statements = [(ROWS | ROWS_OF_SEQUENCES)[one] for one in names]
        self._run(connection, name, statements, k=key, o=other)

    def ddl(self, connection: int, name: str, column: int = 0) -> None:
        """Run one statement on the table."""
        if name in _ALONE and self.in_transaction(connection):
            return
        self._run(connection, name, [DDL[name]], c=column)

    def begin(self, connection: int) -> None:
        if not self.in_transaction(connection):
            self._connections[connection].execute("BEGIN")

    def end(self, connection: int, command: str) -> None:
        """COMMIT or ROLLBACK."""
        if self.in_transaction(connection):
            self._connections[connection].execute(command)
            self.done[command.lower()] += 1

    def end_all(self, command: str = "COMMIT") -> None:
        for connection in range(CONNECTIONS):
            self.end(connection, command)

    def abandon(self, connection: int, name: str, key: int, other: int) -> None:
        """Run statements in a savepoint and take them back."""
        if not self.in_transaction(connection):
            return
        execute = self._connections[connection].execute
        execute("SAVEPOINT abandoned")
        self.rows(connection, name, key, other)
        if self.in_transaction(connection):
            execute("ROLLBACK TO abandoned")

    def in_transaction(self, connection: int) -> bool:
        status = self._connections[connection].info.transaction_status
        return status is not pq.TransactionStatus.IDLE

    def _run(self, connection: int, name: str, statements: list[str], **values: int) -> None:
        # One number per statement, whether it works or not: what a run does must not hang on
        # locks.
        self._number += 1
        execute = self._connections[connection].execute
        inside = self.in_transaction(connection)
        try:
            if len(statements) > 1 and not inside:
                execute("BEGIN")
            for statement in statements:
                execute(statement.format(r=self._number, **values))
            if len(statements) > 1 and not inside:
                execute("COMMIT")
        except psycopg.Error as error:
            self.done[f"{name}: {type(error).__name__}"] += 1
            execute("ROLLBACK")
        else:
            self.done[name] += 1
