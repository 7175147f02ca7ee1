"""What keeps a window from being opened, and whoever comes next from streaming too early."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence

import pytest

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ErrorKind, SinkError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.exclusive import lock_window
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import CollectionState
from cdc_sync.sync import stopped_tables
from cdc_sync.sync.resync import Resync
from cdc_sync.sync.routing import PlannedTable
from tests.support.fix_postgres import Database
from tests.support.ledger_log import events_of
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.windows import (
    CHUNK_PAGES,
    DONE,
    Windows,
    block_of,
    create_paged,
    docs_settings,
    make_space,
)


def create(database: Database, *tables: str) -> None:
    for table in tables:
        database.execute(
            f"CREATE TABLE {table} (id bigint PRIMARY KEY, note text, emb vector(3));"
            f"INSERT INTO {table} SELECT i, 'note', '[1,2,3]' FROM generate_series(1, 50) i"
        )


@pytest.fixture(autouse=True)
def all_events(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cdc_sync")


def seen(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    """Whether an event, or a value of one, has been logged."""
    return any(text in str(event) for event in events_of(caplog.records))


def ask_for(life: Running, table: str) -> None:
    """Have a table read again."""
    body = {"resync": {"pipeline": life.pipeline.settings.pipeline.name, "table": table}}
    life.database.execute(
        "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (json.dumps(body),)
    )


async def test_a_locked_table_does_not_hold_up_the_others(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """VACUUM FULL, or an ALTER TABLE that somebody forgot to commit."""
    create(database18, "docs", "notes")
    settings = pipeline_settings(database18, qdrant, "docs", "notes")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        with database18.connect() as other:
            other.autocommit = False
            other.execute("LOCK TABLE docs IN ACCESS EXCLUSIVE MODE")
            ask_for(life, "public.docs")
            await life.wait(lambda: seen(caplog, "window_postponed"), "the postponement")
            for n in range(3):
                database18.execute("UPDATE notes SET note = %s", (f"round {n}",))
                await life.caught_up()
            assert not seen(caplog, "resync_completed")
            other.rollback()
        await life.wait(lambda: seen(caplog, "resync_completed"), "the resync")
        await life.assert_equal()


async def test_the_next_holder_of_the_slot_waits_for_the_workers_of_the_last(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create(database18, "docs")
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
    source: SourceSettings = settings.source
    database18.execute("UPDATE docs SET note = 'newer'")
    with connect(source, application_name="cdc_sync snapshot") as window:
        lock_window(window, source)
        async with running(settings, database18, qdrant, wait=False) as life:
            waiting = (
                "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory'"
                " AND application_name = 'cdc_sync lock'"
            )
            await life.wait(lambda: bool(database18.execute(waiting)), "the wait")
            assert life.state != "streaming"
            window.close()
            await life.assert_equal()


async def test_no_window_is_opened_by_whoever_has_lost_the_slot(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    create(database18, "docs")
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        await life.caught_up()
        resync = life.pipeline._resync
        assert resync is not None
        resync.walsender = -1
        ask_for(life, "public.docs")
        await life.wait(lambda: seen(caplog, "has taken the slot"), "the postponement")
        assert not seen(caplog, "resync_completed")
        resync.walsender = None
        database18.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
        await life.wait(lambda: seen(caplog, "resync_completed"), "the resync")
        await life.assert_equal()


async def test_ddl_between_the_barrier_and_the_window_postpones_it(
    database18: Database,
    qdrant: QdrantTarget,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows from before it may still be to come, and would be written over what is read."""
    create(database18, "docs")
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        await life.caught_up()
        resync = life.pipeline._resync
        assert resync is not None
        again = resync._replanner.again
        altered: list[bool] = []

        def altering(tables: Sequence[PlannedTable]) -> object:
            if not altered:
                altered.append(True)
                database18.execute(
                    "UPDATE docs SET note = 'before';"
                    "ALTER TABLE docs ALTER note TYPE text USING note || ' and after'"
                )
            return again(tables)

        monkeypatch.setattr(resync._replanner, "again", altering)
        ask_for(life, "public.docs")
        await life.wait(lambda: seen(caplog, "resync_completed"), "the resync")
        assert seen(caplog, "was altered meanwhile")
        await life.assert_equal()


async def test_a_window_that_is_tried_again_does_not_begin_what_is_completed(
    database18: Database, qdrant: QdrantTarget, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would end it, and whoever asks for the table later would wait for that end."""
    create(database18, "docs", "notes")
    complete = Resync.complete
    completed: list[str] = []
    refused = False

    async def once_refused(resync: Resync, planned: PlannedTable) -> None:
        nonlocal refused
        if completed and not refused:
            refused = True
            raise SinkError(ErrorKind.SINK_UNAVAILABLE, "gone for a moment")
        await complete(resync, planned)
        completed.append(planned.name)

    settings = pipeline_settings(database18, qdrant, "docs", "notes")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        relations = life.pipeline._relations
        assert relations is not None
        ask_for(life, "public.docs")
        ask_for(life, "public.notes")
        await life.wait(lambda: len(relations.stale) == 2, "the requests")
        monkeypatch.setattr(Resync, "complete", once_refused)
        windows.limit = 1_000_000
        await life.wait(lambda: refused and not relations.stale, "both to be read again")
        assert sorted(completed) == ["public.docs", "public.notes"]
        backfill = life.pipeline._together.backfill
        assert not any(backfill.has_begun(name) for name in completed)
        ask_for(life, completed[0])
        await life.wait(lambda: len(completed) == 3, "the table to be read once more")
        await life.assert_equal()


async def test_what_was_read_again_before_the_table_stopped_at_a_start_does_not_count(
    database18: Database, qdrant: QdrantTarget, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its changes are dropped until it starts, those of chunks that were done, too."""
    monkeypatch.setattr(stopped_tables, "FIRST_PAUSE_SECONDS", 0.1)
    inspect = ServerSink.inspect
    fits = True

    async def inspected(sink: ServerSink, plan: TablePlan) -> CollectionState:
        if not fits:
            raise SinkError(ErrorKind.COLLECTION_MISMATCH, "it does not fit")
        return await inspect(sink, plan)

    monkeypatch.setattr(ServerSink, "inspect", inspected)
    create_paged(database18, 300, dim=3)
    settings = docs_settings(database18, qdrant)
    windows.limit = 1_000_000
    async with running(settings, database18, qdrant) as life:
        await windows.wait_settled(life)
        make_space(database18)
        await life.caught_up()
        await windows.begin_resync(life)
        await life.caught_up()
        await life.stop()
    fits = False
    async with running(settings, database18, qdrant) as life:
        await life.wait(lambda: life.metric("table_stopped", table="public.docs") == 1, "its stop")
        database18.execute("UPDATE docs SET note = 'dropped' WHERE id = %s", (DONE,))
        assert block_of(database18, DONE) < CHUNK_PAGES
        await life.wait(
            lambda: life.metric("changes_dropped_total", table="public.docs") > 0, "the change"
        )
        fits = True
        windows.limit = 1_000_000
        await windows.wait_settled(life)
        await life.assert_equal()


async def test_a_request_made_during_a_copy_outlives_a_crash_after_it(
    database18: Database, qdrant: QdrantTarget, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_paged(database18, 300, dim=3)
    settings = docs_settings(database18, qdrant)
    windows.limit = 1_000_000
    async with running(settings, database18, qdrant) as life:
        await windows.wait_settled(life)
        await life.caught_up()
        await windows.begin_resync(life)
        ask_for(life, "public.docs")
        backfill = life.pipeline._together.backfill
        await life.wait(lambda: backfill.is_wanted_again("public.docs"), "the request")
        completed = asyncio.Event()
        complete = Resync.complete

        async def held(resync: Resync, planned: PlannedTable) -> None:
            await complete(resync, planned)
            completed.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(Resync, "complete", held)
            windows.limit = 1_000_000
            await life.wait(completed.is_set, "the end of the copy")
            life.task.cancel()
            await asyncio.gather(life.task, return_exceptions=True)
    async with running(settings, database18, qdrant) as life:
        await life.wait(
            lambda: (
                life.metric("schema_changes_total", table="public.docs", outcome="resynced") > 0
            ),
            "the table to be read again",
        )
        await life.assert_equal()
