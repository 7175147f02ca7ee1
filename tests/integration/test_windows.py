"""The copy in windows: rows that move between blocks that are copied and blocks that are not,
and snapshots that do not see what was applied."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Final

import pytest
from qdrant_client import models as q

from cdc_sync.sync.applier import Applier
from cdc_sync.sync.recent_transactions import RecentTransactions
from tests.integration.test_visibility import hanging
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.ledger_log import check_ledger, count, events_of, logged_events
from tests.support.migration_load import MigrationWriter, create_partitioned, writing
from tests.support.pipeline_task import Running
from tests.support.qdrant_control import QdrantTarget
from tests.support.windows import (
    CHUNK_PAGES,
    DIM,
    DONE,
    EUCLID,
    LEFT,
    ROWS,
    ROWS_A_PAGE,
    Windows,
    create_paged,
    docs_settings,
    first_window,
    is_copied,
    make_space,
    move,
    vector,
)

# -- everything at once


@pytest.mark.requirement("R70")
@pytest.mark.parametrize("target", ["server", "edge"])
def test_many_windows_under_writers(
    database18: Database, sync_table: SyncTable, target: str
) -> None:
    """Rows move to other blocks and partitions, by updates without their vectors, changed keys, and
    space that is made for them; a partition is emptied, of which the stream says nothing."""
    create_partitioned(database18, 3_000, dim=DIM, partitions=3, pad=900)
    synced = sync_table(
        database18,
        "items",
        target=target,
        start=False,
        migration={
            "num_workers": 2,
            "window_seconds": 0.03,
            "chunk_rows": 100,
            "batch_delay": 50,
        },
        **EUCLID,
    )
    writers = [
        MigrationWriter(database18, dim=DIM, key_space=4_500, seed=seed) for seed in range(3)
    ]
    daemon = synced.daemon
    with writing(*writers):
        daemon.start(wait=False)
        daemon.wait(lambda: count(daemon.events(), "window_closed") >= 2, "windows")
        database18.execute("SET lock_timeout = '10s'; TRUNCATE items_1")
        daemon.wait_state("streaming")
    events = logged_events(daemon.log_path)
    synced.assert_equal()
    assert count(events, "window_closed") >= 6
    assert check_ledger(events).chunks["public.items"] >= 10


# -- R69


async def move_between_windows(life: Running, windows: Windows) -> None:
    """Two rows move between two windows, and their vectors are not sent: one from a block that is
    left into a chunk that is done, so that no window will ever meet it; another the other way
    round, so that two do."""
    database = life.database
    assert is_copied(life, DONE)
    assert not is_copied(life, LEFT)
    before, after = move(database, LEFT)
    assert before >= CHUNK_PAGES > after
    # No space is left for this one.
    database.execute("UPDATE docs SET n = 0 WHERE id BETWEEN 701 AND 708")
    before, after = move(database, DONE)
    assert before < CHUNK_PAGES <= after
    await life.caught_up()
    await windows.open(life, 2)
    await windows.finish(life)
    await life.assert_equal()


@pytest.mark.requirement("R69")
async def test_ctid_ranges_across_windows_are_allowed_because_of_refetch(
    database: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "cdc_sync")
    create_paged(database, ROWS)
    make_space(database)
    async with first_window(database, qdrant) as life:
        await move_between_windows(life, windows)
        assert life.metric("unchanged_toast_total", table="public.docs", resolution="refetched") > 0
    report = check_ledger(events_of(caplog.records))
    assert report.faults == []
    assert report.chunks["public.docs"] >= 8


@pytest.mark.requirement("R69")
async def test_without_refetch_they_would_not_be(
    database18: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def nothing(*_: object) -> list[object]:
        return []

    monkeypatch.setattr(Applier, "_fetch_points", nothing)
    create_paged(database18, ROWS)
    make_space(database18)
    async with first_window(database18, qdrant) as life:
        with pytest.raises(AssertionError, match=f"{LEFT}"):
            await move_between_windows(life, windows)


@pytest.mark.requirement("R69", "R77")
async def test_a_move_that_is_in_the_snapshot_and_not_applied_yet(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """The window sees the rows where they went to, and their changes come after it; and rows that
    come, go, and change their key besides."""
    create_paged(database18, ROWS)
    make_space(database18)

    def change() -> None:
        before, after = move(database18, LEFT)
        assert before >= CHUNK_PAGES > after
        database18.execute("UPDATE docs SET id = 5000, note = 'key' WHERE id = 701")
        database18.execute("UPDATE docs SET id = 701 WHERE id = 702")
        database18.execute("UPDATE docs SET id = 2 WHERE id = 703")
        database18.execute("DELETE FROM docs WHERE id IN (10, 704, 999)")
        database18.execute("INSERT INTO docs (id, note) VALUES (704, 'again'), (999, 'again')")
        # No space is left for this one.
        database18.execute("UPDATE docs SET n = 0 WHERE id BETWEEN 711 AND 730")
        before, after = move(database18, DONE)
        assert before < CHUNK_PAGES < after

    async with first_window(database18, qdrant) as life:
        windows.before_snapshot.append(change)
        await windows.open(life, 2)
        await windows.finish(life)
        await life.assert_equal()


@pytest.mark.requirement("R69", "R82")
async def test_a_row_that_moves_during_a_resync_does_not_keep_an_older_vector(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """The point is there, with a vector that the row has not: whoever asks for a resync has a
    reason. Its row moves, without its vector being sent, out of a block that is left into a chunk
    that is done; no window will read it."""
    create_paged(database18, ROWS)
    async with first_window(database18, qdrant) as life:
        await windows.finish(life)
        await life.assert_equal()
        spoil(life, LEFT)
        make_space(database18)
        await windows.begin_resync(life)
        before, after = move(database18, LEFT)
        assert before >= CHUNK_PAGES > after
        await life.caught_up()
        await windows.finish(life)
        await life.assert_equal()


@pytest.mark.requirement("R69", "R82")
async def test_nor_does_one_that_moves_right_before_the_last_snapshot(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """Its change is still to come by the stream when the last chunk is done."""
    last = ROWS - 10
    create_paged(database18, ROWS)
    async with first_window(database18, qdrant) as life:
        await windows.finish(life)
        spoil(life, last)
        make_space(database18)
        await windows.begin_resync(life)
        chunks = -(-ROWS // ROWS_A_PAGE) // CHUNK_PAGES + 1
        await windows.open(life, chunks - 2)
        moved: list[tuple[int, int]] = []
        windows.before_snapshot.append(lambda: moved.append(move(database18, last)))
        await windows.finish(life)
        ((before, after),) = moved
        assert before >= CHUNK_PAGES > after
        await life.assert_equal()


@pytest.mark.requirement("R54", "R69")
async def test_nor_does_one_that_moves_after_all_vectors_were_computed_anew(
    database18: Database, qdrant: QdrantTarget, windows: Windows
) -> None:
    """ALTER TABLE sends no rows. This one's point came by the stream before that."""
    create_paged(database18, ROWS)
    async with first_window(database18, qdrant) as life:
        database18.execute(f"UPDATE docs SET emb = {vector('0')} WHERE id = {LEFT}")
        await life.caught_up()
        database18.execute(
            f"ALTER TABLE docs ALTER emb TYPE vector({DIM}) USING emb + emb; ANALYZE docs"
        )
        await windows.open(life, 1)
        make_space(database18)
        before, after = move(database18, LEFT)
        assert before >= CHUNK_PAGES > after
        await life.caught_up()
        await windows.finish(life)
        await life.assert_equal()


def spoil(life: Running, *ids: int) -> None:
    """Give points another vector, behind the pipeline's back."""
    collection = str(life.pipeline.settings.tables[0].collection)
    life.qdrant.client().update_vectors(
        collection, [q.PointVectors(id=id_, vector={"emb": [0.5] * DIM}) for id_ in ids], wait=True
    )


# -- R71: a commit is streamed before it is visible

HANGING: Final = {
    "an update": f"UPDATE docs SET note = 'new', emb = {vector('0')} WHERE id = {LEFT}",
    "a delete": f"DELETE FROM docs WHERE id = {LEFT}",
    "a changed key": f"UPDATE docs SET id = 9000, emb = {vector('0')} WHERE id = {LEFT}",
}
STATEMENTS: Final = [
    pytest.param(name, marks=pytest.mark.slow if name != "an update" else ()) for name in HANGING
]


async def copy_what_is_not_visible(
    life: Running, windows: Windows, statement: str, *, postponed: Callable[[], int]
) -> None:
    """Let the statement be streamed and applied while no snapshot shows it, and open a window.
    What the window reads is older than what is there."""
    seen = life.metric("received_messages_total", kind="commit")
    with hanging(life.database, statement) as commit:
        await life.wait(
            lambda: life.metric("received_messages_total", kind="commit") > seen, "the commit"
        )
        await life.wait(lambda: not life.pipeline.positions.oldest_commit, "its application")
        closed = windows.closed
        windows.limit = 1_000
        await life.wait(lambda: life.state == "streaming" or postponed() > 1, "windows")
        assert commit.waits
        assert bool(postponed()) != (windows.closed > closed)
    await windows.finish(life)
    await life.assert_equal()


@pytest.mark.requirement("R71")
@pytest.mark.parametrize("statement", STATEMENTS)
async def test_a_window_waits_until_what_was_applied_is_visible(
    unseen: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    statement: str,
) -> None:
    caplog.set_level(logging.DEBUG, "cdc_sync")

    def postponed() -> int:
        return count(events_of(caplog.records), "window_postponed")

    async with first_window(unseen, qdrant) as life:
        await copy_what_is_not_visible(life, windows, HANGING[statement], postponed=postponed)


@pytest.mark.requirement("R71")
@pytest.mark.parametrize("statement", STATEMENTS)
async def test_a_window_that_does_not_wait_loses_it(
    unseen: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
    statement: str,
) -> None:
    """The race of the design, 5.4, with the guard taken out."""
    monkeypatch.setattr(RecentTransactions, "all_visible", lambda *_: True)
    async with first_window(unseen, qdrant) as life:
        with pytest.raises(AssertionError, match=rf"\b{LEFT}\b"):
            await copy_what_is_not_visible(life, windows, HANGING[statement], postponed=lambda: 0)


@pytest.mark.requirement("R71")
async def test_the_next_life_does_not_know_what_was_applied_and_waits(
    unseen: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    """It was applied and confirmed by a life that is over."""
    caplog.set_level(logging.DEBUG, "cdc_sync")
    settings = docs_settings(unseen, qdrant)
    with contextlib.ExitStack() as stack:
        async with first_window(unseen, qdrant, settings) as life:
            commit = stack.enter_context(hanging(unseen, HANGING["an update"]))
            await life.caught_up()
        async with first_window(unseen, qdrant, settings) as life:
            windows.limit, closed = 1_000, windows.closed
            await life.wait(
                lambda: count(events_of(caplog.records), "window_postponed") > 1, "a snapshot"
            )
            assert commit.waits
            assert windows.closed == closed
            stack.close()
            await windows.finish(life)
            await life.assert_equal()
