"""A slot that is lost, and a source that has gone back: the pipeline makes a new slot and reads
every table again under the stream, or stops, as it is configured. Deletes made meanwhile count."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from cdc_sync.config import Settings
from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.sync import source_history
from tests.support.fix_postgres import Database, DatabaseFactory, PrivatePostgres
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

ROWS = 300


@pytest.fixture(autouse=True)
def _marks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)


def fill(database: Database, *tables: str) -> None:
    for table in tables or ("docs",):
        database.execute(
            f"CREATE TABLE {table} (id bigint PRIMARY KEY, note text, emb vector(3));"
            f"INSERT INTO {table} SELECT i, 'note ' || i, ARRAY[i, 1, 2]::real[]::vector"
            f" FROM generate_series(1, {ROWS}) i"
        )


def change(database: Database, table: str = "docs") -> None:
    """Every kind of change, of rows of their own."""
    database.execute(
        f"DELETE FROM {table} WHERE id <= 20;"
        f"UPDATE {table} SET note = 'changed' WHERE id BETWEEN 21 AND 40;"
        f"UPDATE {table} SET emb = '[9,8,7]' WHERE id BETWEEN 41 AND 60;"
        f"UPDATE {table} SET id = id + 10000 WHERE id BETWEEN 61 AND 80;"
        f"INSERT INTO {table} SELECT i, 'new', '[5,5,5]' FROM generate_series(20001, 20020) i"
    )


def drop_slot(database: Database, slot: str) -> None:
    """Drop a slot under its consumer: it is free for a moment once that is terminated."""
    while True:
        database.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
            " WHERE slot_name = %s AND active",
            (slot,),
        )
        try:
            found = database.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                " WHERE slot_name = %s",
                (slot,),
            )
        except psycopg.errors.ObjectInUse:
            continue
        assert found
        return


def mark_set(life: Running) -> bool:
    parts = life.pipeline._together
    saved = parts.history._saved
    return saved is not None and saved.lsn > 0 and bool(saved.publications)


async def settled(life: Running) -> None:
    """Until a mark is on record, every table has been read and its points looked through."""
    await life.caught_up()
    await life.wait(lambda: mark_set(life), "a mark")

    def at_rest() -> bool:
        now = life.pipeline._relations
        return life.state == "streaming" and now is not None and not now.wanted

    await life.wait(at_rest, "the end of the copies")


async def one_life(database: Database, qdrant: QdrantTarget) -> Settings:
    """Fill ``docs``, and let a pipeline copy it and end; its settings."""
    fill(database)
    settings = pipeline_settings(database, qdrant, "docs")
    async with running(settings, database, qdrant) as life:
        await settled(life)
        await life.stop()
    return settings


@asynccontextmanager
async def healed(
    settings: Settings, database: Database, qdrant: QdrantTarget
) -> AsyncIterator[Running]:
    """Start again, and wait until everything is equal."""
    async with running(settings, database, qdrant, wait=False) as life:
        await life.wait(
            lambda: life.pipeline._streaming is not None and life.state == "streaming", "streaming"
        )
        await settled(life)
        await life.assert_equal()
        yield life


async def refused(settings: Settings, database: Database, qdrant: QdrantTarget) -> CdcSyncError:
    with pytest.raises(CdcSyncError) as caught:
        async with running(settings, database, qdrant):
            pass
    return caught.value


def stopping(settings: Settings) -> Settings:
    """The same pipeline, which stops instead of beginning anew."""
    source = settings.source.model_copy(update={"on_slot_lost": "stop"})
    return settings.model_copy(update={"source": source})


# -- slots


async def test_a_slot_dropped_under_the_stream(database: Database, qdrant: QdrantTarget) -> None:
    fill(database, "docs", "other")
    settings = pipeline_settings(database, qdrant, "docs", "other")
    async with running(settings, database, qdrant) as life:
        await settled(life)
        drop_slot(database, life.slot)
        change(database)
        change(database, "other")
        await life.wait(lambda: slots(database, life.slot) == 1, "a new slot")
        await settled(life)
        await life.assert_equal()
        assert life.metric("source_reconnects_total", reason="slot_lost") >= 1


async def test_a_slot_dropped_while_the_pipeline_is_down(
    database18: Database, qdrant: QdrantTarget
) -> None:
    settings = await one_life(database18, qdrant)
    change(database18)
    drop_slot(database18, settings.source.slot)
    change_more = "DELETE FROM docs WHERE id BETWEEN 100 AND 120"
    database18.execute(change_more)
    async with healed(settings, database18, qdrant) as life:
        # Nothing is read again at the next start.
        await life.stop()
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        assert life.metric("schema_changes_total", table="public.docs", outcome="resynced") == 0


async def test_a_lost_slot_stops_the_pipeline_if_told_so(
    database18: Database, qdrant: QdrantTarget
) -> None:
    fill(database18)
    settings = stopping(pipeline_settings(database18, qdrant, "docs"))
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        drop_slot(database18, life.slot)
        with pytest.raises(CdcSyncError) as caught:
            await life.task
    assert caught.value.kind is ErrorKind.SLOT_LOST
    error = await refused(settings, database18, qdrant)
    assert error.kind is ErrorKind.SLOT_LOST
    assert "--migration.restart" in error.remedy


async def test_a_crash_between_the_old_slot_and_the_new_one(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is on record by then, the next start reads the tables again."""
    settings = await one_life(database18, qdrant)
    drop_slot(database18, settings.source.slot)
    change(database18)

    class CrashError(Exception):
        pass

    for step in ("_prepare_source", "_create_slot"):
        with monkeypatch.context() as patch:

            def crash(*_: object) -> None:
                raise CrashError

            patch.setattr(f"cdc_sync.sync.first_copy.FirstCopy.{step}", crash)
            with pytest.raises(CrashError):
                async with running(settings, database18, qdrant):
                    pass
    # The slot is made, and that is not on record.
    with monkeypatch.context() as patch:
        patch.setattr("cdc_sync.sync.first_copy.dataclasses.replace", _crash_after(1, CrashError))
        with pytest.raises(CrashError):
            async with running(settings, database18, qdrant):
                pass
    async with healed(settings, database18, qdrant):
        pass


def _crash_after(calls: int, error: type[Exception]) -> object:
    import dataclasses

    real = dataclasses.replace
    left = [calls]

    def replace(one: object, **changes: object) -> object:
        if "slot_lsn" in changes:
            left[0] -= 1
            if left[0] == 0:
                raise error
        return real(one, **changes)  # type: ignore[type-var]

    return replace


def slots(database: Database, slot: str) -> int:
    return len(database.execute("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", (slot,)))


# -- WAL that is gone


async def test_a_slot_invalidated_by_max_slot_wal_keep_size(
    private_postgres: PrivatePostgres, database18_factory: DatabaseFactory, qdrant: QdrantTarget
) -> None:
    server = private_postgres({"max_slot_wal_keep_size": "16MB", "wal_keep_size": "0"})
    database = database18_factory(server)
    settings = await one_life(database, qdrant)
    change(database)
    lose_wal(database, settings.source.slot)
    async with healed(settings, database, qdrant):
        pass


def lose_wal(database: Database, slot: str) -> None:
    for _ in range(20):
        database.execute("SELECT pg_switch_wal(), pg_logical_emit_message(false, 'tests', 'x')")
        database.execute("CHECKPOINT")
        ((status,),) = database.execute(
            "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s", (slot,)
        )
        if status == "lost":
            return
    raise AssertionError("the slot was not invalidated")


# -- a cluster that has gone back


@pytest.fixture
def rewinding(
    private_postgres: PrivatePostgres, database18_factory: DatabaseFactory, tmp_path: Path
) -> tuple[PostgresServer, Database, Path]:
    server = private_postgres()
    return server, database18_factory(server), tmp_path / "backup"


def back_up(server: PostgresServer, backup: Path) -> None:
    server.stop()
    shutil.copytree(server.data_directory, backup, symlinks=True)
    server.start()


def restore(server: PostgresServer, backup: Path) -> None:
    server.stop()
    owner = server.data_directory.stat()
    shutil.rmtree(server.data_directory)
    shutil.copytree(backup, server.data_directory, symlinks=True)
    for path in (server.data_directory, *server.data_directory.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    server.start()


@pytest.mark.requirement("R60")
@pytest.mark.parametrize("writes", [0, 200], ids=["behind", "overtaken"])
async def test_a_cluster_restored_to_an_older_state(
    rewinding: tuple[PostgresServer, Database, Path], qdrant: QdrantTarget, writes: int
) -> None:
    """Its slot comes back with it, and the stream would go on. Past where it stood before, only
    the transactions that never happened tell."""
    server, database, backup = rewinding
    settings = await one_life(database, qdrant)
    await asyncio.to_thread(back_up, server, backup)
    async with running(settings, database, qdrant) as life:
        await settled(life)
        ((first,),) = database.execute("SELECT pg_current_xact_id()::text::int8")
        assert isinstance(first, int)
        change(database)
        await settled(life)
        history = life.pipeline._together.history
        await life.wait(
            lambda: history._saved is not None and history._saved.xid > first, "a transaction"
        )
        await life.caught_up()
        await life.stop()
    await asyncio.to_thread(restore, server, backup)
    # Work of another kind, by which the WAL grows beyond where it was, and transaction ids do not.
    with database.connect(autocommit=False) as connection:
        connection.execute("CREATE TABLE more (t text)")
        for _ in range(writes):
            connection.execute(
                "INSERT INTO more SELECT repeat('x', 1000) FROM generate_series(1, 50)"
            )
    error = await refused(stopping(settings), database, qdrant)
    assert error.kind is ErrorKind.SOURCE_REWOUND
    async with healed(settings, database, qdrant):
        pass


async def test_a_cluster_restored_under_the_stream(
    rewinding: tuple[PostgresServer, Database, Path], qdrant: QdrantTarget
) -> None:
    server, database, backup = rewinding
    fill(database)
    settings = pipeline_settings(database, qdrant, "docs")
    await asyncio.to_thread(back_up, server, backup)
    async with running(settings, database, qdrant) as life:
        await settled(life)
        change(database)
        await settled(life)
        await asyncio.to_thread(restore, server, backup)
        # The backup is older than the slot.
        await life.wait(lambda: slots(database, life.slot) == 1, "a new slot")
        await settled(life)
        await life.assert_equal()


# -- publications


async def test_a_publication_altered_and_put_back_while_the_pipeline_is_down(
    database: Database, qdrant: QdrantTarget
) -> None:
    """Nothing of what happened in between is sent; only the table concerned is read again."""
    fill(database, "docs", "other")
    settings = pipeline_settings(database, qdrant, "docs", "other")
    async with running(settings, database, qdrant) as life:
        await settled(life)
        await life.stop()
    name = settings.source.publication
    database.execute(f"ALTER PUBLICATION {name} DROP TABLE docs")
    change(database)
    database.execute(f"ALTER PUBLICATION {name} ADD TABLE docs")
    async with healed(settings, database, qdrant) as life:
        assert resynced(life, "docs") == 1
        assert resynced(life, "other") == 0


async def test_a_publication_altered_and_put_back_between_two_looks(
    database18: Database, qdrant: QdrantTarget
) -> None:
    fill(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        name = settings.source.publication
        database18.execute(
            f"BEGIN; ALTER PUBLICATION {name} DROP TABLE docs; COMMIT;"
            "DELETE FROM docs WHERE id <= 50;"
            f"ALTER PUBLICATION {name} ADD TABLE docs"
        )
        await life.wait(lambda: resynced(life, "docs") == 1, "the copy")
        await settled(life)
        await life.assert_equal()


@pytest.mark.requirement("R57", "R63")
async def test_a_publication_dropped_under_the_stream(
    database: Database, qdrant: QdrantTarget
) -> None:
    fill(database)
    settings = pipeline_settings(database, qdrant, "docs")
    async with running(settings, database, qdrant) as life:
        await settled(life)
        before = life.pipeline._streaming
        database.execute(f"DROP PUBLICATION {settings.source.publication}")
        change(database)
        await life.wait(lambda: life.pipeline._streaming is not before, "a new stream")
        await settled(life)
        await life.assert_equal()


def resynced(life: Running, table: str) -> float:
    return life.metric("schema_changes_total", table=f"public.{table}", outcome="resynced")


# -- another cluster


async def test_another_cluster_is_refused_unless_told_otherwise(
    database: Database,
    private_postgres: PrivatePostgres,
    database18_factory: DatabaseFactory,
    qdrant: QdrantTarget,
) -> None:
    """As after an upgrade by dump and restore: the same rows under other OIDs, and changes that
    were made meanwhile."""
    settings = await one_life(database, qdrant)
    other = database18_factory(private_postgres())
    other.execute("CREATE TABLE shifts_the_oids (i int)")
    fill(other)
    change(other)
    moved = pipeline_settings(other, qdrant, "docs")
    source = settings.source.model_copy(update={"url": moved.source.url})
    settings = settings.model_copy(update={"source": source})
    error = await refused(settings, other, qdrant)
    assert error.kind is ErrorKind.SOURCE_CHANGED
    source = source.model_copy(update={"on_source_changed": "recreate"})
    async with healed(settings.model_copy(update={"source": source}), other, qdrant):
        pass
