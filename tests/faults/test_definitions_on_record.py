"""What changes about a table without its rows being computed anew, while the pipeline runs, is put
on record: the next life finds only what has changed since."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from cdc_sync.sync import source_history
from cdc_sync.sync.fingerprints import recorded_definition
from tests.faults.test_partitions import settled
from tests.support.fix_postgres import Database
from tests.support.ledger_log import logged
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


@pytest.fixture(autouse=True)
def _at_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    with caplog.at_level(logging.INFO, "cdc_sync"):
        yield


async def on_record(life: Running) -> str:
    state = await life.pipeline.sink.state.load(life.pipeline.settings.pipeline.name)
    assert state is not None
    return recorded_definition(state.tables[0].plan_fingerprint)


async def change(life: Running, statement: str) -> None:
    """Until it has been seen and is on record."""
    relations = life.pipeline._relations
    assert relations is not None
    (oid,) = relations.oids.values()
    before = relations._definitions[oid]
    life.database.execute(statement)
    await life.wait(lambda: relations._definitions[oid] != before, "the look")
    await settled(life)
    while await on_record(life) != relations._definitions[oid]:
        await life.caught_up()


@pytest.mark.requirement("R31")
async def test_files_and_defaults_that_changed_one_after_the_other(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """At once they would be rows that were computed anew."""
    database18.execute(
        "CREATE TABLE docs (id int8 PRIMARY KEY, note text, emb vector(3));"
        "INSERT INTO docs SELECT i, 'x', '[1,2,3]' FROM generate_series(1, 50) i"
    )
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await change(life, "VACUUM FULL docs")
        await change(life, "ALTER TABLE docs ALTER note SET DEFAULT 'y'")
        await life.stop()
    caplog.clear()
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        assert logged(caplog, "resync_wanted") == 0
        await life.assert_equal()


@pytest.mark.requirement("R31")
async def test_a_label_that_was_added_is_renamed_while_nobody_runs(
    database18: Database, qdrant: QdrantTarget
) -> None:
    database18.execute(
        "CREATE TYPE mood AS ENUM ('glad');"
        "CREATE TABLE docs (id int8 PRIMARY KEY, feeling mood, emb vector(3))"
    )
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await change(life, "ALTER TYPE mood ADD VALUE 'sad'")
        database18.execute("INSERT INTO docs VALUES (1, 'glad', '[1,2,3]'), (2, 'sad', '[1,2,3]')")
        await life.assert_equal()
        await life.stop()
    database18.execute("ALTER TYPE mood RENAME VALUE 'sad' TO 'sorry'")
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await life.assert_equal()
