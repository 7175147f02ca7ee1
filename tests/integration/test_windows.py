"""The copy in windows, held where a test wants it: rows that move between blocks that are copied
and blocks that are not, tables that change under the copy, and snapshots that do not see what was
applied."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

import pytest
from qdrant_client import models as q

from cdc_sync.sync.applier import Applier
from cdc_sync.sync.resync import RecentTransactions
from tests.support.fix_postgres import Database
from tests.support.ledger_log import check_ledger, count, events_of
from tests.support.pipeline_task import Running, pipeline_settings, running, wal_position
from tests.support.qdrant_control import QdrantTarget
from tests.support.windows import (
    CHUNK_PAGES,
    DIM,
    EUCLID,
    ONE_CHUNK,
    ROWS_A_PAGE,
    Windows,
    block_of,
    create_paged,
    vector,
)

ROWS: Final = 1_000
#: A row of the first chunk, and one of a chunk far from it.
DONE, LEFT = 20, 700


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Windows:
    return Windows(monkeypatch)


@contextlib.asynccontextmanager
async def first_window(
    database: Database, qdrant: QdrantTarget, **table: object
) -> AsyncIterator[Running]:
    """A pipeline that has copied the first chunk of ``docs``, streams, and opens no window."""
    settings = pipeline_settings(
        database, qdrant, {"name": "docs", **EUCLID, **table}, migration=ONE_CHUNK
    )
    async with running(settings, database, qdrant, wait=False) as life:
        await life.wait(
            lambda: life.pipeline._watching is not None and life.state == "snapshotting",
            "the stream",
        )
        await life.caught_up()
        yield life


# -- R69


def make_space(database: Database) -> None:
    """Free some of the first blocks, so that what is updated moves there."""
    database.execute("DELETE FROM docs WHERE id <= 8")
    # Else so few dead rows are left in their blocks.
    database.execute("VACUUM (INDEX_CLEANUP ON) docs")


def move(database: Database, id_: int) -> tuple[int, int]:
    """Update a row without its vector; returns the block where it was, and where it is."""
    before = block_of(database, id_)
    database.execute("UPDATE docs SET note = 'moved' WHERE id = %s", (id_,))
    return before, block_of(database, id_)


def is_copied(life: Running, id_: int) -> bool:
    found = life.qdrant.client().retrieve(str(life.pipeline.settings.tables[0].collection), [id_])
    return bool(found)


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
        windows.before_snapshot = None
        before, after = move(database18, LEFT)
        assert before >= CHUNK_PAGES > after
        database18.execute("UPDATE docs SET id = 5000, note = 'key' WHERE id = 701")
        database18.execute("UPDATE docs SET id = 701 WHERE id = 702")
        database18.execute("UPDATE docs SET id = 2 WHERE id = 703")
        database18.execute("DELETE FROM docs WHERE id IN (10, 704, 999)")
        database18.execute("INSERT INTO docs (id, note) VALUES (704, 'again'), (999, 'again')")
        before, after = move(database18, DONE)
        assert before < CHUNK_PAGES < after

    async with first_window(database18, qdrant) as life:
        windows.before_snapshot = change
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


def spoil(life: Running, *ids: int) -> None:
    """Give points another vector, behind the pipeline's back."""
    collection = str(life.pipeline.settings.tables[0].collection)
    life.qdrant.client().update_vectors(
        collection, [q.PointVectors(id=id_, vector={"emb": [0.5] * DIM}) for id_ in ids], wait=True
    )
