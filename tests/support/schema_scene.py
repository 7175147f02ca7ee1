"""Two tables, the pipeline that follows them, and writers: what tests of schema events play on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg

from cdc_sync.config import Settings
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

#: The stream does not send unchanged vectors of this size, so updates of the text keep them.
DIM = 600
ROWS = 40
COLUMNS = f"(id bigint PRIMARY KEY, note text, label text, n int, feeling mood, emb vector({DIM}))"
CREATE = f"""
CREATE TYPE mood AS ENUM ('glad', 'sad');
CREATE TABLE docs {COLUMNS};
CREATE TABLE others (id bigint PRIMARY KEY, note text, emb vector(4));
INSERT INTO docs SELECT i, 'note ' || i, 'label', i, 'sad',
  array_fill(i::float4 / 8 + 1, ARRAY[{DIM}])::vector FROM generate_series(1, {ROWS}) i;
INSERT INTO others SELECT i, 'other ' || i, '[1,2,3,4]' FROM generate_series(1, {ROWS}) i;
"""
#: What a transaction does around the event.
BEFORE = (
    "UPDATE docs SET note = 'before' WHERE id = 1",
    "DELETE FROM docs WHERE id = 2",
    "UPDATE docs SET id = 500 WHERE id = 3",
)
AFTER = (
    "UPDATE docs SET note = 'after' WHERE id IN (4, 500)",
    "DELETE FROM docs WHERE id = 5",
    "UPDATE docs SET id = 501 WHERE id = 6",
    "INSERT INTO docs (id, note) VALUES (502, 'new')",
)


def settings_for(database: Database, qdrant: QdrantTarget, **docs: object) -> Settings:
    """Settings for both tables; keywords are for ``docs``."""
    return pipeline_settings(
        database, qdrant, {"name": "docs", **docs}, "others", pipeline={"batch_rows": 64}
    )


class Load:
    """A writer with a connection of its own, which takes it as it comes when it is refused."""

    def __init__(self, database: Database, table: str = "docs") -> None:
        self._database = database
        self._table = table
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.commits = 0
        self.refused = 0

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        number = 1000
        with self._database.connect() as connection:
            while not self._stop.is_set():
                number += 1
                try:
                    with connection.transaction():
                        self._write(connection, number)
                except psycopg.Error:
                    self.refused += 1
                else:
                    self.commits += 1
                time.sleep(0.005)

    def _write(self, connection: psycopg.Connection[tuple[object, ...]], number: int) -> None:
        table, row = self._table, number % ROWS + 1
        connection.execute(f"INSERT INTO {table} (id, note) VALUES ({number}, 'new')")
        connection.execute(f"UPDATE {table} SET note = 'n{number}' WHERE id = {row}")
        connection.execute(f"DELETE FROM {table} WHERE id = {number - 20}")


@dataclass
class Scene:
    """One life of the pipeline on both tables. ``names``: what a table is called now, if otherwise;
    ``options``: the oracle's, by table."""

    life: Running
    names: dict[str, str] = field(default_factory=dict)
    options: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def database(self) -> Database:
        return self.life.database

    def execute(self, *statements: str) -> None:
        """In one transaction; one that meets a writer in a deadlock is begun again."""
        while True:
            try:
                self.database.execute("BEGIN; " + "; ".join(statements) + "; COMMIT")
            except psycopg.errors.DeadlockDetected:
                continue
            return

    def table(self, name: str = "docs") -> dict[str, Any]:
        tables = self.life.pipeline.board.snapshot()["tables"]
        assert isinstance(tables, list)
        (found,) = [one for one in tables if one["name"] == f"public.{name}"]
        return dict(found)

    def copies(self, table: str = "docs") -> float:
        """How often the table was read again as a whole."""
        labels = {"table": f"public.{table}", "outcome": "resynced"}
        return self.life.metric("schema_changes_total", **labels)

    def dropped(self, table: str = "docs") -> float:
        """How many changes were dropped."""
        return self.life.metric("changes_dropped_total", table=f"public.{table}")

    def ready(self) -> bool:
        return all(check.ok for check in self.life.pipeline.board.readiness())

    async def wait_stopped(self, *says: str, remedy: str = "", table: str = "docs") -> None:
        """Until the table is stopped, with an error that says so, and a remedy."""

        def stopped() -> bool:
            found = self.table(table)
            if found["state"] != "stopped" or remedy not in found["remedy"]:
                return False
            return all(text in found["error"] for text in says)

        try:
            await self.life.wait(stopped, "the stop")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.table(table)}") from error
        assert self.table(table)["remedy"]
        assert self.life.metric("table_stopped", table=f"public.{table}") == 1
        assert self.life.metric("tables", state="stopped") == 1
        assert not self.ready()

    async def wait_copied(self, copies: float, table: str = "docs") -> None:
        """Until the table was read again so often, and is followed."""
        try:
            await self.life.wait(lambda: self.copies(table) >= copies, "the copy")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.table(table)}") from error
        await self.wait_streaming(table)

    async def wait_swept(self) -> None:
        """Until points of ``docs`` were looked through, and it is followed."""
        life = self.life
        await life.wait(
            lambda: life.metric("sweep_parts_total", table="public.docs") > 0, "a sweep"
        )
        await self.wait_streaming()

    async def wait_streaming(self, table: str = "docs") -> None:
        """Until the table is followed, and nothing is left to copy."""
        relations = self.life.pipeline._relations
        assert relations is not None

        def done() -> bool:
            oid = relations.oids.get(f"public.{table}")
            marked = oid in relations.wanted
            return self.table(table)["state"] == "streaming" and not marked

        await self.life.wait(done, f"{table} in step")
        assert self.table(table)["error"] is None
        assert self.life.metric("table_stopped", table=f"public.{table}") == 0

    async def assert_equal(self, *tables: str) -> None:
        """Once everything committed by now is confirmed, collections are as the tables."""
        await self.life.caught_up()
        qdrant = self.life.qdrant
        for entry in self.life.pipeline.settings.tables:
            if tables and entry.name not in tables:
                continue
            assert entry.collection is not None
            await asyncio.to_thread(
                assert_equal,
                self.database.url,
                self.names.get(entry.name, entry.name),
                qdrant_url=qdrant.url,
                collection=entry.collection,
                api_key=qdrant.api_key,
                **self.options.get(entry.name, {}),
            )

    async def assert_settled(self) -> None:
        """After the catalog was looked at and everything copied again, nothing differs."""
        await self.life.caught_up()
        await asyncio.sleep(0.4)
        for entry in self.life.pipeline.settings.tables:
            await self.wait_streaming(entry.name)
        await self.assert_equal()
        assert self.ready()
        assert self.life.qdrant.violations() == []

    async def others_go_on(self) -> None:
        """Changes of the other table arrive, while the first one is stopped."""
        self.database.execute("UPDATE others SET note = note || '!' WHERE id <= 5")
        self.database.execute("DELETE FROM others WHERE id = (SELECT max(id) FROM others)")
        await self.assert_equal("others")
        assert self.table("others")["state"] == "streaming"


@contextlib.asynccontextmanager
async def scene(
    settings: Settings, database: Database, qdrant: QdrantTarget
) -> AsyncIterator[Scene]:
    """Run a pipeline until it streams; it ends abruptly."""
    async with running(settings, database, qdrant) as life:
        # A stopped table that nothing is seen to have changed about is tried again after a minute.
        life.patience_seconds = 100.0
        yield Scene(life)
