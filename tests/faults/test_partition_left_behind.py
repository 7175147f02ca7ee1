"""A process dies when a partition that was attached has been read and that is not on record yet;
the partition is detached before the next one looks."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cdc_sync.sync.resync import Resync
from cdc_sync.sync.table_records import TableRecords
from tests.faults.test_partitions import ATTACH, life_of, read, rows, settled
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import running
from tests.support.qdrant_control import QdrantTarget


@pytest.mark.requirement("R34")
async def test_of_a_partition_that_was_read(
    database18: Database,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "cdc_sync")
    dying = asyncio.Event()

    async def dies(*_: object, **__: object) -> None:
        dying.set()
        await asyncio.Event().wait()

    async with life_of(database18, qdrant) as life:
        settings = life.pipeline.settings
        before = read(life)
        monkeypatch.setattr(TableRecords, "copied", dies)
        database18.execute(ATTACH)
        await life.wait(dying.is_set, "the end of the copy")
        assert read(life) == before + 30
    # It was gone from one moment to the next.
    monkeypatch.undo()
    database18.execute("ALTER TABLE docs DETACH PARTITION spare")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await life.assert_equal()


@pytest.mark.requirement("R34")
async def test_of_a_partition_that_is_known_from_the_start(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was attached while nobody looked, and rows of it come before it is read."""
    async with life_of(database18, qdrant) as life:
        settings = life.pipeline.settings
        await life.stop()
    database18.execute(ATTACH)

    async def waits(*_: object) -> None:
        return

    monkeypatch.setattr(Resync, "run", waits)
    async with running(settings, database18, qdrant) as life:
        database18.execute(rows("docs", 230, 234))
        await life.caught_up()
    # It was gone from one moment to the next.
    monkeypatch.undo()
    database18.execute("ALTER TABLE docs DETACH PARTITION spare")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await life.assert_equal()
