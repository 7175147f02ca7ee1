"""A commit is streamed before it is visible: a synchronous standby that does not answer keeps a
transaction in the stream and out of every snapshot. Rows that must be read again are read once it
is visible, and not before (R84)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import psycopg
import pytest

from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.postgres import refetch
from cdc_sync.sync import reading as engine
from cdc_sync.sync import source_history
from tests.support.fix_postgres import Database, DatabaseFactory
from tests.support.pipeline_task import Running, pipeline_settings, running, wal_position
from tests.support.qdrant_control import QdrantTarget

DIM: Final = 1536
SLOW: Final = "pg_sleep(20) IS NOT NULL"


@pytest.fixture
def database(standby_server: PostgresServer, database18_factory: DatabaseFactory) -> Database:
    made = database18_factory(standby_server)
    made.execute(
        f"CREATE TABLE docs (id bigint PRIMARY KEY, note text, kept bool, emb vector({DIM}));"
        "INSERT INTO docs SELECT i, 'note ' || i, i % 2 = 0, (SELECT array_agg(i + n / 7.0)"
        f" FROM generate_series(1, {DIM}) n)::vector({DIM}) FROM generate_series(1, 6) i"
    )
    return made


class Hanging:
    """A statement that has committed, and waits for a standby that nobody has."""

    def __init__(self, database: Database, statement: str) -> None:
        self._database = database
        self._thread = threading.Thread(target=self._run, args=(statement,), daemon=True)
        self._connection = database.connect()
        with database.connect() as connection:
            # It is the checkpointer that puts the setting into force: let it be idle.
            connection.execute("CHECKPOINT")
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            _reload(connection, "nobody")
            time.sleep(0.2)
        self._thread.start()

    def wait(self) -> None:
        """Wait until it waits."""
        end = time.monotonic() + 10
        while not self.waits:
            assert time.monotonic() < end, "the commit does not wait"
            time.sleep(0.01)

    def _run(self, statement: str) -> None:
        self._connection.execute(statement.encode())

    @property
    def waits(self) -> bool:
        """Whether the transaction is committed and still invisible."""
        return bool(
            self._database.execute(
                "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'SyncRep'",
                (self._connection.info.backend_pid,),
            )
        )

    def let_go(self) -> None:
        """Do without the standby: the transaction becomes visible."""
        with self._database.connect() as connection:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            _reload(connection, "")
        self._thread.join(10)
        self._connection.close()
        assert not self._thread.is_alive()


def _reload(connection: psycopg.Connection[tuple[object, ...]], expected: str) -> None:
    connection.execute("SELECT pg_reload_conf()")
    end = time.monotonic() + 10
    while connection.execute("SHOW synchronous_standby_names").fetchone() != (expected,):
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def hanging(database: Database, statement: str) -> Iterator[Hanging]:
    commit = Hanging(database, statement)
    try:
        commit.wait()
        yield commit
    finally:
        commit.let_go()


@dataclass(frozen=True)
class Case:
    """Something that makes the engine read a row again: the row's id afterwards, a point that is
    taken away beforehand, the publication's row filter."""

    statement: str
    id: int
    missing: int | None = None
    row_filter: str | None = None


CASES: Final = {
    "metadata of a missing point": Case("UPDATE docs SET note = 'x' WHERE id = 1", 1, missing=1),
    "a changed key": Case("UPDATE docs SET id = 100 WHERE id = 2", 100),
    "a changed key of a missing point": Case(
        "UPDATE docs SET id = 100, note = 'x' WHERE id = 3", 100, missing=3
    ),
    "into the row filter": Case("UPDATE docs SET id = 100 WHERE id = 4", 100, row_filter="id <> 4"),
}


async def follow(database: Database, qdrant: QdrantTarget, case: Case) -> None:
    """Let the statement be streamed while it is invisible. Nothing of it may be confirmed, nor
    anything be written in its place; once it is visible both sides are equal."""
    settings = pipeline_settings(database, qdrant, "docs")
    collection = str(settings.tables[0].collection)
    client = qdrant.client()
    if case.row_filter is not None:
        name = settings.source.publication
        database.execute(f'CREATE PUBLICATION "{name}" FOR TABLE docs WHERE ({case.row_filter})')
    async with running(settings, database, qdrant) as life:
        await life.caught_up()
        if case.missing is not None:
            client.delete(collection, points_selector=[case.missing], wait=True)
        with hanging(database, case.statement) as commit:
            bound = wal_position(database)
            await life.wait(lambda: commits(life) == 1, "the commit in the stream")
            end = time.monotonic() + 1.2
            while time.monotonic() < end:
                assert commit.waits
                assert life.confirmed() < bound, "confirmed before it could be read"
                assert client.retrieve(collection, [case.id]) == [], "read before it was visible"
                await asyncio.sleep(0.05)
        await life.assert_equal(where=case.row_filter)
        (point,) = client.retrieve(collection, [case.id], with_vectors=True)
        assert isinstance(point.vector, dict)
        stored = point.vector["emb"]
        assert isinstance(stored, list)
        assert len(stored) == DIM


def commits(life: Running) -> float:
    return life.metric("received_messages_total", kind="commit")


@pytest.mark.requirement("R84", "R23")
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
async def test_rows_are_read_once_they_are_visible(
    database: Database, qdrant: QdrantTarget, case: Case
) -> None:
    await follow(database, qdrant, case)


@pytest.mark.requirement("R84")
async def test_a_read_that_gives_up_is_tried_again(
    database: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_FETCH_TIMEOUT_SECONDS", 0.2)
    await follow(database, qdrant, CASES["a changed key"])


@pytest.mark.parametrize("case", ["metadata of a missing point", "a changed key"])
async def test_the_test_sees_a_read_that_does_not_wait(
    database: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(refetch, "_hidden", lambda snapshot, xids: [])
    with pytest.raises(AssertionError, match="before it"):
        await follow(database, qdrant, CASES[case])


@pytest.mark.requirement("R84")
async def test_it_can_be_stopped_while_it_waits(database: Database, qdrant: QdrantTarget) -> None:
    settings = pipeline_settings(
        database, qdrant, "docs", pipeline={"shutdown_timeout_seconds": 0.5}
    )
    async with running(settings, database, qdrant) as life:
        await life.caught_up()
        with hanging(database, "UPDATE docs SET id = 100 WHERE id = 2"):
            bound = wal_position(database)
            await life.wait(lambda: commits(life) == 1, "the commit in the stream")
            await life.wait(reading(life).locked, "the read")
            await stop_quickly(life, bound)
    async with running(settings, database, qdrant) as life:
        await life.assert_equal()


async def test_it_can_be_stopped_while_a_read_takes_long(
    database: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread inside of a statement is interrupted; its connection is not freed under it."""
    query = refetch._query
    monkeypatch.setattr(refetch, "_query", lambda *parts: f"{query(*parts)} AND {SLOW}")
    settings = pipeline_settings(
        database, qdrant, "docs", pipeline={"shutdown_timeout_seconds": 0.3}
    )
    async with running(settings, database, qdrant) as life:
        await life.caught_up()
        database.execute("UPDATE docs SET id = 100 WHERE id = 2")
        bound = wal_position(database)
        await life.wait(lambda: readers(database, SLOW) == 1, "the read")
        await stop_quickly(life, bound)
    monkeypatch.undo()
    async with running(settings, database, qdrant) as life:
        await life.assert_equal()


@pytest.mark.requirement("R59")
async def test_the_history_is_not_another_while_it_is_invisible(
    database: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says of such a transaction that it is in progress, as of one that was rewound and
    whose number somebody else has now."""
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    settings = pipeline_settings(database, qdrant, "docs")
    stops = settings.source.model_copy(update={"on_slot_lost": "stop"})
    settings = settings.model_copy(update={"source": stops})
    async with running(settings, database, qdrant) as life:
        await life.caught_up()
        with hanging(database, "UPDATE docs SET note = 'x' WHERE id = 1"):
            bound = wal_position(database)
            await life.wait(lambda: life.confirmed() >= bound, "the change")
            history = life.pipeline._together.history
            await life.wait(
                lambda: history._saved is not None and history._saved.lsn >= bound, "a mark"
            )
            await life.stop()
            async with running(settings, database, qdrant) as life:
                await life.caught_up()
    async with running(settings, database, qdrant) as life:
        await life.assert_equal()


async def stop_quickly(life: Running, bound: int) -> None:
    """Stop without waiting for the read. Its thread ends too, or the process would not."""
    started = time.monotonic()
    await life.stop()
    assert life.confirmed() < bound
    while reading(life).locked():
        assert time.monotonic() - started < 4
        await asyncio.sleep(0.02)


def reading(life: Running) -> threading.Lock:
    """Held while rows are read again."""
    streaming = life.pipeline._streaming
    assert streaming is not None
    return streaming.reader._lock


def readers(database: Database, text: str = "") -> int:
    """Connections for reading rows again whose last statement contains the text."""
    rows = database.execute(
        "SELECT 1 FROM pg_stat_activity WHERE application_name = 'cdc_sync read'"
        " AND datname = current_database() AND strpos(query, %s) > 0",
        (text,),
    )
    return len(rows)
