"""Guards of the copy that nothing else would miss, each with a test that fails without it:
collections that go, requests during a copy, other processes in between, crashes at the wrong
moment."""

from __future__ import annotations

import asyncio
from typing import Final

import pytest
from qdrant_client import models as q

from cdc_sync.config import Settings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres import exclusive
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.exclusive import wait_for_window
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.snapshot import SnapshotHolder
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.dead_letters import Refusal
from cdc_sync.sync.fingerprints import is_stale
from cdc_sync.sync.resync import Resync
from tests.support.fix_postgres import Database
from tests.support.ledger_log import events_of
from tests.support.pipeline_task import Running, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.resync_command import emit
from tests.support.source_tables import source_settings
from tests.support.windows import (
    DIM,
    DONE,
    LEFT,
    ROWS,
    Windows,
    create_paged,
    docs_settings,
    first_window,
    is_copied,
)

TABLE: Final = "public.docs"
REFUSED: Final = Refusal("999", "the row was refused", ErrorKind.MAPPING)

pytestmark = pytest.mark.usefixtures("all_events")


@pytest.fixture
def docs(database18: Database) -> Database:
    create_paged(database18, ROWS)
    return database18


def logged(caplog: pytest.LogCaptureFixture, name: str) -> int:
    return sum(event["event"] == name for event in events_of(caplog.records))


def collection_of(life: Running) -> str:
    return str(life.pipeline.settings.tables[0].collection)


def resync_of(life: Running) -> Resync:
    assert life.pipeline._resync is not None
    return life.pipeline._resync


def spoil(life: Running, *ids: int) -> None:
    """Give points other vectors, behind the pipeline's back: only a resync mends them."""
    vectors = [q.PointVectors(id=id_, vector={"emb": [0.5] * DIM}) for id_ in ids]
    life.qdrant.client().update_vectors(collection_of(life), vectors, wait=True)


def ask_for_docs(life: Running) -> None:
    name = life.pipeline.settings.pipeline.name
    emit(life.database, f'{{"resync": {{"pipeline": "{name}", "table": "{TABLE}"}}}}')


async def copy_all_in_one_window(life: Running, windows: Windows) -> None:
    """Copy what is left, and open no window after that."""
    backfill = life.pipeline._together.backfill
    migration = backfill._settings.migration.model_copy(update={"window_seconds": 60.0})
    backfill._settings = backfill._settings.model_copy(update={"migration": migration})
    await windows.open(life, 1)


async def is_recorded_stale(life: Running) -> bool:
    state = await life.pipeline.sink.state.load(life.pipeline.settings.pipeline.name)
    assert state is not None
    (table,) = state.tables
    return is_stale(table.plan_fingerprint, life.pipeline.tables[0])


async def next_session(life: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Cut the stream, and wait until it goes on."""
    before = logged(caplog, "streaming_started")
    life.database.execute(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s",
        (life.slot,),
    )
    await life.wait(lambda: logged(caplog, "streaming_started") > before, "the next session")


# -- what was copied is gone


async def test_a_collection_that_goes_between_two_windows_is_copied_from_the_beginning(
    docs: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    async with first_window(docs, qdrant) as life:
        assert is_copied(life, DONE)
        qdrant.client().delete_collection(collection_of(life))
        await windows.finish(life)
        await life.assert_equal()


# -- asked for while it is copied


async def test_a_table_asked_for_during_its_copy_is_copied_once_more(
    docs: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    async with first_window(docs, qdrant) as life:
        spoil(life, DONE)
        ask_for_docs(life)
        await life.caught_up()
        await windows.finish(life)
        assert logged(caplog, "table_copied") == logged(caplog, "resync_completed") == 1
        # Asking does not keep the copy from ending, nor make it begin again.
        assert logged(caplog, "copy_restarted") == 0
        await life.assert_equal()


async def test_so_it_is_after_a_stop_in_between(
    docs: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    settings = docs_settings(docs, qdrant)
    async with first_window(docs, qdrant, settings) as life:
        spoil(life, DONE)
        ask_for_docs(life)
        await life.caught_up()
        await copy_all_in_one_window(life, windows)
        await life.wait(lambda: logged(caplog, "table_copied") > 0, "the copy")
        await life.stop()
    async with running(settings, docs, qdrant) as life:
        await windows.finish(life)
        assert logged(caplog, "resync_completed") == 1
        await life.assert_equal()


async def test_a_request_is_on_record_before_it_is_confirmed(
    docs: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    settings = docs_settings(docs, qdrant)
    async with first_window(docs, qdrant, settings) as life:
        await windows.finish(life)
        spoil(life, DONE)
        windows.limit = windows.closed
        ask_for_docs(life)
        await life.caught_up()
        await life.stop()
    async with running(settings, docs, qdrant) as life:
        await windows.finish(life)
        await life.assert_equal()


# -- what a crash leaves


async def test_a_ledger_left_by_a_crash_at_the_end_of_a_copy_is_removed(
    docs: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table is on record as copied, and its ledger is still there: what is asked for then must
    not be taken for a copy under way that is complete."""
    settings = docs_settings(docs, qdrant)

    async def until_the_crash(life: Running) -> None:
        await copy_all_in_one_window(life, windows)
        await asyncio.wait_for(asyncio.shield(life.task), 20)

    with monkeypatch.context() as patch:

        async def crash(*_: object) -> None:
            raise SystemError("crashed")

        patch.setattr(Backfill, "end", crash)
        async with first_window(docs, qdrant, settings) as life:
            with pytest.raises(SystemError):
                await until_the_crash(life)
    async with running(settings, docs, qdrant) as life:
        state = life.pipeline.sink.state
        assert await state.ledgers(settings.pipeline.name) == []
        spoil(life, DONE)
        ask_for_docs(life)
        await life.caught_up()
        await windows.finish(life)
        await life.assert_equal()
        assert logged(caplog, "resync_completed") == 1


async def test_columns_that_a_table_had_only_for_a_while_leave_nothing_behind(
    docs: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """It has the columns of its first copy again by the next start; no comparison would show that
    some of its points were written by others."""
    settings = docs_settings(docs, qdrant)
    async with first_window(docs, qdrant, settings) as life:
        await windows.finish(life)
        backfill = life.pipeline._together.backfill
        backfill._settings = life.pipeline.settings
        windows.limit = windows.closed + 1
        docs.execute("ALTER TABLE docs ADD extra text DEFAULT 'for a while'")
        await life.wait(lambda: windows.closed >= windows.limit, "a window of the resync")
        await life.stop()
    docs.execute("ALTER TABLE docs DROP extra")
    async with running(settings, docs, qdrant) as life:
        await windows.finish(life)
        await life.assert_equal()


# -- other processes in between


@pytest.mark.requirement("R71")
async def test_what_was_begun_before_the_slot_was_taken_again_counts_as_applied(
    docs: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process may have had the slot, and have applied it."""
    async with first_window(docs, qdrant) as life:
        await life.wait(lambda: logged(caplog, "streaming_started") > 0, "the stream")
        with docs.connect(autocommit=False) as other:
            other.execute("UPDATE docs SET note = 'open' WHERE id = %s", (LEFT,))
            closed, windows.limit = windows.closed, windows.closed + 1
            await life.wait(lambda: windows.closed > closed, "a window beside it")
            await next_session(life, caplog)
            closed, windows.limit = windows.closed, 1_000
            await life.wait(lambda: logged(caplog, "window_postponed") > 1, "a postponement")
            assert windows.closed == closed
            other.commit()
        await windows.finish(life)
        await life.assert_equal()


async def test_what_is_on_record_is_read_again_with_the_slot(
    docs: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process has copied the table meanwhile: what this one had put on record before, or
    was about to copy, counts no more."""
    async with first_window(docs, qdrant) as life:
        await windows.finish(life)
        windows.limit = windows.closed
        resync = resync_of(life)
        planned = life.pipeline.tables[0]
        ask_for_docs(life)
        await life.caught_up()
        assert await is_recorded_stale(life)
        await resync._records.copied(planned)
        await next_session(life, caplog)
        assert not await is_recorded_stale(life)
        ask_for_docs(life)
        await life.caught_up()
        assert await is_recorded_stale(life)
        await windows.finish(life)
        await life.assert_equal()


async def test_a_copy_that_another_process_has_ended_is_forgotten(
    docs: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    async with first_window(docs, qdrant) as life:
        backfill = life.pipeline._together.backfill
        assert backfill.has_begun(TABLE)
        name = life.pipeline.settings.pipeline.name
        await life.pipeline.sink.state.drop_ledger(name, TABLE)
        await next_session(life, caplog)
        assert not backfill.has_begun(TABLE)
        await windows.finish(life)
        await life.assert_equal()


def test_a_snapshot_keeps_the_next_holder_of_the_slot_waiting(
    database18: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers may still write."""
    monkeypatch.setattr(exclusive, "_WINDOW_SECONDS", 0.2)
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY)")
    source = source_settings(database18.url, slot="guarded")
    with connect(source) as connection:
        table = find_table(connection, "docs")
    replication = ReplicationConnection.open(source)
    created = replication.create_slot("guarded", lock_timeout_seconds=10)
    wait_for_window(source)
    for snapshot in (created.snapshot, None):
        if snapshot is None:
            held = SnapshotHolder.fresh(source, [table])
        else:
            held = SnapshotHolder.imported(source, snapshot, [table])
        with pytest.raises(SourceError, match="another process's window"):
            wait_for_window(source)
        # Another pipeline's is no concern of ours.
        wait_for_window(source_settings(database18.url, slot="another"))
        held.close()
        wait_for_window(source)
    replication.close()


# -- beginning anew


async def test_rows_that_are_read_again_are_dead_letters_no_more(
    docs: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """Those that still cannot be written are parked again; others may be gone, or good by now."""
    async with first_window(docs, qdrant) as life:
        await windows.finish(life)
        office = life.pipeline._together.dead_letters
        await office.park(TABLE, [REFUSED], lsn=0, commit_time=0.0)
        name = life.pipeline.settings.pipeline.name
        assert len(await life.pipeline.sink.state.dead_letters(name)) == 1
        ask_for_docs(life)
        await life.caught_up()
        await windows.finish(life)
        assert await life.pipeline.sink.state.dead_letters(name) == []
        await life.assert_equal()


def with_slot(settings: Settings, slot: str) -> Settings:
    return settings.model_copy(update={"source": settings.source.model_copy(update={"slot": slot})})


async def test_a_restart_under_another_slot_drops_the_first(
    docs: Database, qdrant: QdrantTarget
) -> None:
    """It would hold back WAL for ever."""
    settings = docs_settings(docs, qdrant)
    async with running(settings, docs, qdrant) as life:
        await life.stop()
    second = with_slot(settings, f"{settings.source.slot}_2"[:63])
    async with running(second, docs, qdrant, restart=True) as life:
        await life.assert_equal()
        slots = docs.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"
        )
        assert slots == [(second.source.slot,)]


async def test_an_adoption_that_begins_anew_is_still_one(
    docs: Database, qdrant_private: QdrantTarget, windows: Windows
) -> None:
    """Its points are compared, not cleared and copied, whether or not it is said again."""
    settings = docs_settings(docs, qdrant_private)
    async with first_window(docs, qdrant_private, settings) as life:
        await windows.finish(life)
        await life.stop()
        await life.pipeline.sink.close()
    docs.execute("SELECT pg_drop_replication_slot(%s)", (settings.source.slot,))
    name = "adopting"
    adopting = settings.model_copy(
        update={
            "migration": settings.migration.model_copy(update={"adopt": True}),
            "pipeline": settings.pipeline.model_copy(update={"name": name}),
        }
    )
    windows.closed, windows.limit = 0, 1
    async with first_window(docs, qdrant_private, adopting) as life:
        await life.stop()
    docs.execute("SELECT pg_drop_replication_slot(%s)", (settings.source.slot,))
    again = settings.model_copy(update={"pipeline": adopting.pipeline})
    qdrant_private.script.clear_log()
    windows.closed, windows.limit = 0, 1
    async with first_window(docs, qdrant_private, again) as life:
        await windows.finish(life)
        await life.assert_equal()
    written = {
        entry["operation"]
        for entry in qdrant_private.script.log()
        if entry["collection"] == settings.tables[0].collection
    }
    assert not written & {"Upsert", "Delete", "Recreate"}, written
