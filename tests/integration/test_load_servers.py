"""Copies from servers of other kinds than one that stands alone and commits at once: with standbys,
with asynchronous commits, with prepared transactions (R73, R77, R81)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Final

import psycopg
import pytest

from cdc_sync.config import SourceSettings
from cdc_sync.demo.embedded import PostgresServer, find_binaries
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres import snapshot as snapshots
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.refetch import fetch_rows
from cdc_sync.postgres.snapshot import SnapshotHolder
from tests.support.fix_postgres import Database, DatabaseFactory, PrivatePostgres
from tests.support.ledger_log import logged
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.row_writers import RowWriters
from tests.support.source_tables import raw_plan, source_settings
from tests.support.windows import (
    DONE,
    EUCLID,
    LEFT,
    ROWS,
    Windows,
    create_paged,
    docs_settings,
    first_window,
    is_copied,
    vector,
)

#: A row of the second chunk.
SECOND: Final = 150

pytestmark = pytest.mark.usefixtures("all_events")


# -- R73: on the server of the slot


def clone(primary: PostgresServer, *, standby: bool) -> PostgresServer:
    """Another server of the same cluster, not started: a standby that streams from the first, or
    what a primary that was cut off is. Stops the first and starts it again."""
    primary.stop()
    made = PostgresServer(primary.binaries)
    shutil.copytree(primary.data_directory, made.data_directory)
    shutil.copy(primary.directory / "password", made.directory)
    if standby:
        (made.data_directory / "standby.signal").touch()
    owner = primary.data_directory.stat()
    for path in (made.data_directory, *made.data_directory.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    made.data_directory.chmod(0o700)
    primary.start()
    return made


@pytest.fixture
def pair(
    private_postgres: PrivatePostgres, database18_factory: DatabaseFactory
) -> Iterator[tuple[Database, PostgresServer]]:
    """A database, and a standby of its server that has stopped replaying."""
    primary = private_postgres()
    database = database18_factory(primary)
    create_paged(database, ROWS)
    standby = clone(primary, standby=True)
    try:
        standby.start({"primary_conninfo": f"{primary.url()}?application_name=standby"})
        with psycopg.connect(standby.url(), autocommit=True) as connection:
            connection.execute("SELECT pg_wal_replay_pause()")
        yield database, standby
    finally:
        standby.close()


def both(database: Database, standby: PostgresServer) -> str:
    """A URL with two hosts, the standby first."""
    primary = database.server
    return primary.url(database.name).replace(
        f"@{primary.host}:{primary.port}/",
        f"@{standby.host}:{standby.port},{primary.host}:{primary.port}/",
    )


@pytest.mark.requirement("R73")
async def test_of_several_hosts_every_connection_takes_the_primary(
    pair: tuple[Database, PostgresServer], qdrant: QdrantTarget
) -> None:
    database, standby = pair
    url = both(database, standby)
    for replication in (False, True):
        with connect(source_settings(url), replication=replication) as connection:
            assert connection.info.port == database.server.port
    migration = {"window_seconds": 0.001, "chunk_rows": 100}
    settings = pipeline_settings(
        database, qdrant, {"name": "docs", **EUCLID}, pg_url=url, migration=migration
    )
    database.execute("UPDATE docs SET note = 'not on the standby' WHERE id > 500")
    async with running(settings, database, qdrant) as life:
        await life.assert_equal()
        with psycopg.connect(standby.url()) as connection:
            sessions = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cdc_sync%'"
            ).fetchone()
        assert sessions == (0,)


def test_who_names_the_kind_of_server_is_heeded(pair: tuple[Database, PostgresServer]) -> None:
    url = both(*pair) + "?target_session_attrs=standby"
    with connect(source_settings(url)) as connection:
        assert connection.info.port == pair[1].port


@pytest.mark.requirement("R73")
def test_a_snapshot_of_a_standby_is_refused(pair: tuple[Database, PostgresServer]) -> None:
    database, standby = pair
    url = standby.url(database.name)
    with pytest.raises(SourceError, match="is a standby") as refused:
        connect(source_settings(url))
    assert refused.value.kind is ErrorKind.SOURCE_UNAVAILABLE
    source = source_settings(f"{url}?target_session_attrs=any")
    with connect(source) as connection:
        table = find_table(connection, "docs")
    with pytest.raises(SourceError, match="standby") as caught:
        SnapshotHolder.fresh(source, [table])
    # A proxy may lead to it while the primary is being replaced.
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
    assert "primary" in (caught.value.remedy or "")


@contextlib.contextmanager
def leading_elsewhere(monkeypatch: pytest.MonkeyPatch, url: str) -> Iterator[None]:
    """Connections for snapshots lead to another server."""

    def elsewhere(
        source: SourceSettings, *, application_name: str = "", autocommit: bool = True
    ) -> PgConnection:
        return connect(
            source_settings(url, slot=source.slot),
            application_name=application_name,
            autocommit=autocommit,
        )

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "connect", elsewhere)
        yield


@pytest.mark.requirement("R73")
async def test_no_window_has_a_snapshot_of_another_server(
    private_postgres: PrivatePostgres,
    database18_factory: DatabaseFactory,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was the same one until it was cut off; what happened since is not there, and nothing in
    its snapshots tells: its transactions have the same numbers. It has the slot, too."""
    primary = private_postgres()
    database = database18_factory(primary)
    create_paged(database, ROWS)
    settings = docs_settings(database, qdrant)
    async with first_window(database, qdrant, settings) as life:
        await life.stop()
    former = clone(primary, standby=False)
    try:
        former.start()
        async with first_window(database, qdrant, settings) as life:
            database.execute(f"UPDATE docs SET emb = {vector('0')} WHERE id = {LEFT}")
            await life.caught_up()
            with psycopg.connect(former.url(database.name), autocommit=True) as connection:
                for _ in range(50):
                    connection.execute("SELECT pg_current_xact_id()")
            with leading_elsewhere(monkeypatch, former.url(database.name)):
                closed, windows.limit = windows.closed, 1_000
                await life.wait(lambda: logged(caplog, "window_postponed") > 1, "a window")
                assert windows.closed == closed
            assert logged(caplog, "window_postponed", "another server") > 1
            await windows.finish(life)
            await life.assert_equal()
    finally:
        former.close()


# -- R77: commits that are visible before they are in the stream


@pytest.fixture(scope="module")
def lazy_server() -> Iterator[PostgresServer]:
    """A server that takes its time to write what is committed asynchronously."""
    with PostgresServer(find_binaries(18)) as server:
        server.restart(settings={"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"})
        yield server


@pytest.fixture
def lazy(lazy_server: PostgresServer, database18_factory: DatabaseFactory) -> Database:
    made = database18_factory(lazy_server)
    create_paged(made, ROWS)
    return made


def change_asynchronously(database: Database, *ids: int) -> int:
    """Everything that can happen to rows, these and those next to them. Returns how many bytes of
    WAL are not written then."""
    with database.connect() as connection:
        connection.execute("SET synchronous_commit = off")
        for id_ in ids:
            for statement in (
                f"UPDATE docs SET note = 'first' WHERE id = {id_}",
                f"UPDATE docs SET note = 'second', emb = {vector('0')} WHERE id = {id_}",
                f"DELETE FROM docs WHERE id = {id_ + 1}",
                f"UPDATE docs SET id = {id_ + 5_000} WHERE id = {id_ + 2}",
                f"UPDATE docs SET id = {id_ + 2} WHERE id = {id_ + 3}",
                f"INSERT INTO docs (id, note) VALUES ({id_ + 6_000}, 'new')",
                f"UPDATE docs SET id = {id_ + 6_001} WHERE id = {id_ + 6_000}",
                f"INSERT INTO docs (id, note) VALUES ({id_ + 7_000}, 'comes')",
                f"DELETE FROM docs WHERE id = {id_ + 7_000}",
                f"UPDATE docs SET emb = NULL WHERE id = {id_ + 4}",
            ):
                connection.execute(statement.encode())
    ((size,),) = database.execute(
        "SELECT (pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn())::int8"
    )
    return int(str(size))


@pytest.mark.requirement("R77")
async def test_a_window_that_is_ahead_of_the_stream_converges(
    lazy: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """Of rows that are copied already, and rows that are not."""
    ahead: list[int] = []
    async with first_window(lazy, qdrant) as life:
        for _ in range(2):
            windows.before_snapshot.append(
                lambda: ahead.append(change_asynchronously(lazy, DONE, LEFT))
            )
            await windows.open(life, 1)
            lazy.execute("DELETE FROM docs WHERE id > 5000")
        await windows.finish(life)
        await life.assert_equal()
    assert min(ahead) > 0


@pytest.mark.requirement("R77")
@pytest.mark.slow
async def test_windows_under_writers_that_do_not_wait_for_the_disk(
    lazy: Database, qdrant: QdrantTarget
) -> None:
    settings = pipeline_settings(
        lazy,
        qdrant,
        {"name": "docs", **EUCLID},
        migration={"window_seconds": 0.01, "chunk_rows": 100, "batch_delay": 50},
    )
    with RowWriters(lazy, 3, settings="SET synchronous_commit = off").writing():
        async with running(settings, lazy, qdrant) as life:
            await life.stop()
    async with running(settings, lazy, qdrant) as life:
        await life.assert_equal()


async def crash_after_a_window(
    database: Database, qdrant: QdrantTarget, windows: Windows, row: int
) -> None:
    """A commit that is visible and not on disk is lost with the server, and never streamed: a
    window that has shown it would leave points of rows that never were, and none of rows that
    are."""
    ahead: list[int] = []
    async with first_window(database, qdrant) as life:
        windows.before_snapshot.append(lambda: ahead.append(change_asynchronously(database, row)))
        await windows.open(life, 1)
        assert is_copied(life, row + 10)
        await asyncio.to_thread(database.server.stop, "immediate")
        await asyncio.to_thread(database.server.start)
        await windows.finish(life)
        await life.assert_equal()
    assert ahead
    assert ahead[0] > 0


@pytest.mark.requirement("R77")
@pytest.mark.campaign
async def test_nothing_is_copied_that_a_crash_may_undo(
    lazy: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    await crash_after_a_window(lazy, qdrant, windows, SECOND)


@pytest.mark.campaign
async def test_without_a_wait_for_the_disk_it_would_be(
    lazy: Database, qdrant: QdrantTarget, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "write_out", lambda _: None)
    with pytest.raises(AssertionError, match=rf"\b{SECOND + 1}\b"):
        await crash_after_a_window(lazy, qdrant, windows, SECOND)


@pytest.mark.requirement("R77", "R84")
def test_nothing_is_read_again_that_a_crash_may_undo(lazy: Database) -> None:
    source = source_settings(lazy.url)
    with connect(source) as connection:
        plan = raw_plan(find_table(connection, "public.docs"))
        with lazy.connect() as writer:
            writer.execute("SET synchronous_commit = off")
            writer.execute("UPDATE docs SET note = 'late' WHERE id = 7")
            end = writer.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
        assert end is not None
        flushed = "SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn"
        assert lazy.execute(flushed, end) == [(False,)]
        rows = fetch_rows(connection, plan, [((7).to_bytes(8, "big"),)], xids=())
    assert any(value == b"late" for value in rows[0])
    assert lazy.execute(flushed, end) == [(True,)]


@pytest.mark.requirement("R77")
def test_a_role_that_may_write_nothing_waits_for_the_disk(database18: Database) -> None:
    create_paged(database18, 10)
    role = database18.create_cdc_role(["docs"])
    for type_ in ("text", "bytea"):
        database18.execute(
            f"REVOKE EXECUTE ON FUNCTION pg_logical_emit_message(bool, text, {type_}, bool)"
            " FROM PUBLIC"
        )
    source = source_settings(role.url)
    with connect(source) as connection:
        table = find_table(connection, "public.docs")
    with database18.connect() as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute("UPDATE docs SET note = 'late'")
        end = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
        assert end is not None
    holder = SnapshotHolder.fresh(source, [table])
    written = database18.execute("SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn", end)
    holder.close()
    assert written == [(True,)]


# -- R81: prepared transactions


@pytest.fixture(scope="module")
def preparing_server() -> Iterator[PostgresServer]:
    """A server that takes prepared transactions."""
    with PostgresServer(find_binaries(18)) as server:
        server.restart(settings={"max_prepared_transactions": "4"})
        yield server


@pytest.fixture
def prepared(
    preparing_server: PostgresServer, database18_factory: DatabaseFactory
) -> Iterator[Database]:
    made = database18_factory(preparing_server)
    create_paged(made, ROWS)
    yield made
    for (name,) in made.execute("SELECT gid FROM pg_prepared_xacts"):
        made.execute(f"ROLLBACK PREPARED '{name}'")


def prepare(database: Database, name: str, statements: str) -> None:
    with database.connect() as connection:
        connection.execute(f"BEGIN; {statements}; PREPARE TRANSACTION '{name}'".encode())


def changes_of(id_: int) -> str:
    return (
        f"INSERT INTO docs (id, note) VALUES ({id_ + 5_000}, 'prepared');"
        f"UPDATE docs SET note = 'prepared', emb = {vector('0')} WHERE id = {id_};"
        f"UPDATE docs SET id = {id_ + 6_000} WHERE id = {id_ + 1};"
        f"DELETE FROM docs WHERE id = {id_ + 2}"
    )


@pytest.mark.requirement("R81", "R51")
async def test_one_prepared_before_the_slot_is_waited_for_by_name(
    prepared: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    settings = docs_settings(prepared, qdrant)
    source = settings.source.model_copy(update={"slot_creation_timeout_seconds": 0.3})
    settings = settings.model_copy(update={"source": source})
    prepare(prepared, "not in the snapshot", changes_of(LEFT))
    async with running(settings, prepared, qdrant, wait=False) as life:
        await life.wait(
            lambda: logged(caplog, "retrying", "prepared transaction 'not in the snapshot'") > 0,
            "the message",
        )
        slots = prepared.execute("SELECT count(*) FROM pg_replication_slots WHERE NOT active")
        assert slots == [(0,)]
        assert not qdrant.client().count(str(settings.tables[0].collection)).count
        prepared.execute("COMMIT PREPARED 'not in the snapshot'")
        await life.wait_streaming()
        await life.assert_equal()


@pytest.mark.requirement("R81")
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("when", ["between windows", "in the snapshot", "after the copy"])
async def test_one_prepared_after_the_slot_is_there_once(
    prepared: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    end: str,
    when: str,
) -> None:
    """Prepared between two windows, and ended before a snapshot, under one that does not show it,
    or once all is copied."""
    finish = f"{end} PREPARED 'one'"

    def end_it() -> None:
        prepared.execute(finish)

    async with first_window(prepared, qdrant) as life:
        # A session that begins later does not know what was applied before it.
        await life.wait(lambda: logged(caplog, "streaming_started") > 0, "the stream")
        prepare(prepared, "one", changes_of(DONE) + ";" + changes_of(LEFT))
        await life.caught_up()
        if when == "between windows":
            end_it()
            await life.caught_up()
        await windows.open(life, 1)
        if when == "in the snapshot":
            windows.before_snapshot.append(end_it)
        await windows.finish(life)
        if when == "after the copy":
            collection = str(life.pipeline.settings.tables[0].collection)
            found = life.qdrant.client().retrieve(collection, [LEFT + 5_000])
            assert found == []
            end_it()
        await life.assert_equal()


@pytest.mark.requirement("R81", "R71")
async def test_one_prepared_before_this_life_holds_up_windows_and_not_the_stream(
    prepared: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it was applied by an earlier life is not known."""
    settings = docs_settings(prepared, qdrant)
    async with first_window(prepared, qdrant, settings) as life:
        await life.stop()
    prepare(prepared, "one", changes_of(LEFT))
    async with first_window(prepared, qdrant, settings) as life:
        closed, windows.limit = windows.closed, 1_000
        await life.wait(lambda: logged(caplog, "window_postponed", "still open") > 1, "a window")
        assert windows.closed == closed
        prepared.execute(f"UPDATE docs SET note = 'streamed' WHERE id = {DONE}")
        await life.caught_up()
        prepared.execute("COMMIT PREPARED 'one'")
        await windows.finish(life)
        await life.assert_equal()
