"""Qdrant refuses every request when it comes for the first time, or one of so many: whatever the
pipeline asks for, at a start, in a copy or in the stream, it asks for again, and never ends because
of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cdc_sync.config import Settings
from cdc_sync.sync import source_history
from tests.faults.test_slot_lost import change, drop_slot, fill, settled
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantProcess


@pytest.fixture(autouse=True)
def _marks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)


@asynccontextmanager
async def refused_first(
    settings: Settings, database: Database, qdrant: QdrantProcess, *, restart: bool = False
) -> AsyncIterator[Running]:
    """A life in which each request is refused once. Every kind of change is made in it, and at the
    end both sides are equal."""
    qdrant.script.refuse_first_tries()
    async with running(settings, database, qdrant, wait=False, restart=restart) as life:
        await life.wait(lambda: life.state == "streaming", "streaming")
        yield life
        await settled(life)
        await life.assert_equal()
        await life.stop()


def settings_of(database: Database, qdrant: QdrantProcess, *tables: str) -> Settings:
    # A request that is refused with its like goes alone then; it is met once only all the same.
    return pipeline_settings(database, qdrant, *tables, target={"parallel_requests": 1})


def with_tables(settings: Settings, qdrant: QdrantProcess, *names: str) -> Settings:
    section = settings.tables[0].model_copy
    more = [
        section(update={"name": name, "collection": qdrant.new_collection_name()}) for name in names
    ]
    return settings.model_copy(update={"tables": [*settings.tables, *more]})


#: More than the pipeline ever asks for in one try.
_ONE_OF = 13


async def test_every_request_of_a_first_copy(
    database18: Database, qdrant_private: QdrantProcess
) -> None:
    fill(database18)
    settings = settings_of(database18, qdrant_private, "docs")
    for before in range(_ONE_OF):
        qdrant_private.script.refuse_every(_ONE_OF, before)
        async with running(settings, database18, qdrant_private, restart=before > 0) as life:
            await life.wait(lambda: life.state == "streaming", "streaming")
            await life.assert_equal()


async def test_first_copy_and_stream(database18: Database, qdrant_private: QdrantProcess) -> None:
    fill(database18, "docs", "notes")
    settings = settings_of(database18, qdrant_private, "docs", "notes")
    async with refused_first(settings, database18, qdrant_private):
        await asyncio.to_thread(change, database18)
        database18.execute("TRUNCATE notes")
    async with refused_first(settings, database18, qdrant_private, restart=True):
        database18.execute("INSERT INTO notes VALUES (1, 'after', '[1,2,3]')")


async def test_restart_with_changes_around_it(
    database18: Database, qdrant_private: QdrantProcess
) -> None:
    fill(database18, "docs", "more", "gone")
    settings = settings_of(database18, qdrant_private, "docs", "gone")
    async with running(settings, database18, qdrant_private) as life:
        await settled(life)
    change(database18)
    # One table joins, one is stopped until it is there again, one is read again.
    database18.execute("DROP TABLE gone")
    database18.execute("ALTER TABLE docs ADD COLUMN extra int DEFAULT 7")
    settings = with_tables(settings, qdrant_private, "more")
    async with refused_first(settings, database18, qdrant_private) as life:
        await life.wait(lambda: life.metric("table_stopped", table="public.gone") == 1, "the stop")
        fill(database18, "gone")
        publication = settings.source.publication
        database18.execute(f'ALTER PUBLICATION "{publication}" ADD TABLE gone')
        await life.wait(lambda: life.metric("table_stopped", table="public.gone") == 0, "a start")


async def test_lost_slot(database18: Database, qdrant_private: QdrantProcess) -> None:
    fill(database18)
    settings = settings_of(database18, qdrant_private, "docs")
    async with running(settings, database18, qdrant_private) as life:
        await settled(life)
    database18.execute("DELETE FROM docs WHERE id > 280")
    drop_slot(database18, settings.source.slot)
    async with refused_first(settings, database18, qdrant_private):
        await asyncio.to_thread(change, database18)
