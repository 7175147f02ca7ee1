"""The publication is dropped and made again: it is there, but not where the slot stands."""

from __future__ import annotations

import pytest

from cdc_sync.errors import ErrorKind
from cdc_sync.sync import source_history
from tests.faults.test_slot_lost import change, fill, refused, settled, stopping
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

pytestmark = pytest.mark.requirement("R56", "R63")


@pytest.fixture(autouse=True)
def _marks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)


def make_again(database: Database, publication: str) -> None:
    """With changes of rows in between."""
    database.execute(f"DROP PUBLICATION {publication}")
    change(database)
    database.execute(
        f"CREATE PUBLICATION {publication} FOR TABLE docs WITH (publish_via_partition_root = true)"
    )


@pytest.mark.parametrize("where", ["under_the_stream", "while_it_is_down"])
async def test_a_new_slot_is_made(database: Database, qdrant: QdrantTarget, where: str) -> None:
    fill(database)
    settings = pipeline_settings(database, qdrant, "docs")
    name = settings.source.publication
    async with running(settings, database, qdrant) as life:
        await settled(life)
        before = life.pipeline._slot_lsn
        if where == "under_the_stream":
            make_again(database, name)
            await life.wait(lambda: life.pipeline._slot_lsn > before, "a new slot")
            await settled(life)
            await life.assert_equal()
        await life.stop()
    if where == "under_the_stream":
        return
    make_again(database, name)
    async with running(settings, database, qdrant, wait=False) as life:
        await life.wait(lambda: life.pipeline._slot_lsn > before, "a new slot")
        await settled(life)
        await life.assert_equal()


async def test_or_it_stops_if_told_so(database: Database, qdrant: QdrantTarget) -> None:
    fill(database)
    settings = pipeline_settings(database, qdrant, "docs")
    async with running(settings, database, qdrant) as life:
        await settled(life)
        await life.stop()
    make_again(database, settings.source.publication)
    error = await refused(stopping(settings), database, qdrant)
    assert error.kind is ErrorKind.PUBLICATION_UNUSABLE
