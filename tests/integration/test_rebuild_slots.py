"""Slots of rebuilds that were left: which the pipeline takes for its own, and where it says so."""

from __future__ import annotations

import logging
import time

import pytest

from cdc_sync.config import Settings
from cdc_sync.errors import SourceError
from cdc_sync.ops import attention
from cdc_sync.ops.attention import RebuildSlot
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.exclusive import lock_pipeline
from cdc_sync.sync.rebuild_slots import rebuild_slots, worker_names
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.rebuild_scene import create_items

ITEMS = "public.items"


def settings_of(database: Database, slot: str, pipeline: str = "p") -> Settings:
    return Settings.model_validate(
        {
            "source": {"url": database.url, "slot": slot, "publication": "p"},
            "pipeline": {"name": pipeline},
            "tables": [{"name": "items"}],
        }
    )


def create_slot(database: Database, name: str) -> str:
    database.execute(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
    return name


def found(settings: Settings, *tables: str) -> dict[str, str | None]:
    """The pipeline's, with the tables they are known to be of."""
    with connect(settings.source) as connection:
        return {s.slot: s.table for s in rebuild_slots(connection, settings, tables)}


def test_slots_are_known_by_their_names(database: Database) -> None:
    """On every version; the names as they are given, and such as only look alike."""
    settings = settings_of(database, database.name)
    name = settings.source.slot
    assert found(settings, ITEMS) == {}
    ours = create_slot(database, worker_names(settings, ITEMS)[1])
    gone = create_slot(database, worker_names(settings, "public.gone")[1])
    for other in (
        name,
        f"{name}_rebuild_",
        f"{name}_rebuild_0123456x",
        f"{name}_rebuild_01234567_",
    ):
        create_slot(database, other)
    # Of a pipeline whose slot's name begins with this one's.
    longer = settings_of(database, f"{name}_rebuild")
    create_slot(database, worker_names(longer, ITEMS)[1])
    assert found(settings, ITEMS, "public.others") == {ours: ITEMS, gone: None}
    assert len(found(longer, ITEMS)) == 1


def test_of_names_that_are_cut_off_only_what_is_known_is_taken(database: Database) -> None:
    long = f"{database.name}_{'x' * 63}"[:62]
    first, second = (settings_of(database, f"{long}{i}", f"p{i}") for i in range(2))
    ours, theirs = (create_slot(database, worker_names(s, ITEMS)[1]) for s in (first, second))
    assert ours[:50] == theirs[:50]
    assert found(first, ITEMS) == {ours: ITEMS}
    assert found(second, ITEMS) == {theirs: ITEMS}
    assert found(first) == {}


def test_a_slot_is_in_use_while_somebody_copies_under_it(database: Database) -> None:
    """Nobody is connected to it then."""
    settings = settings_of(database, database.name)
    slot = create_slot(database, worker_names(settings, ITEMS)[1])
    worker = settings.source.model_copy(update={"slot": slot})

    def look() -> RebuildSlot:
        with connect(settings.source) as connection:
            (seen,) = rebuild_slots(connection, settings, [ITEMS])
        return seen

    assert not look().in_use
    with lock_pipeline(settings.source):  # of the pipeline itself
        assert not look().in_use
    with lock_pipeline(worker):
        assert look().in_use
    # The server ends a session a moment after its client has.
    deadline = time.monotonic() + 60
    while look().in_use:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    database.execute("SELECT pg_logical_emit_message(false, 'tests', repeat('x', 100000))")
    database.execute("SELECT pg_switch_wal()")
    kept = look().retained_bytes
    assert kept is not None
    assert kept > 100_000


def test_a_connection_that_is_gone_is_said_to_be(database18: Database) -> None:
    settings = settings_of(database18, database18.name)
    connection = connect(settings.source)
    connection.close()
    with pytest.raises(SourceError):
        rebuild_slots(connection, settings, [ITEMS])


async def test_the_pipeline_says_that_nobody_reads_it(
    database18: Database,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(attention, "UNUSED_SECONDS", 0.2)
    create_items(database18, 10)
    settings = pipeline_settings(database18, qdrant, "items")
    slot = worker_names(settings, ITEMS)[1]
    with caplog.at_level(logging.WARNING):
        async with running(settings, database18, qdrant) as life:
            assert life.pipeline.board.snapshot()["rebuilds"] == []
            create_slot(database18, slot)
            await life.wait(lambda: bool(notices(life.pipeline.board.snapshot())), "a notice")
            answer = life.pipeline.board.snapshot()
            rebuilds = answer["rebuilds"]
            assert isinstance(rebuilds, list)
            (seen,) = rebuilds
            assert (seen["slot"], seen["table"], seen["in_use"]) == (slot, ITEMS, False)
            assert seen["unused_since"] is not None
            labels = {"table": ITEMS, "slot": slot}
            registry = life.pipeline.metrics.registry
            kept = "cdc_sync_rebuild_slot_retained_wal_bytes"
            assert registry.get_sample_value("cdc_sync_rebuild_slot_active", labels) == 0
            assert registry.get_sample_value(kept, labels) == seen["retained_bytes"]
            # The pipeline is well, and goes on.
            await life.assert_equal()
            database18.execute(f"SELECT pg_drop_replication_slot('{slot}')")
            await life.wait(
                lambda: registry.get_sample_value(kept, labels) is None, "the end of the sample"
            )
            assert life.pipeline.board.snapshot()["rebuilds"] == []
            assert notices(life.pipeline.board.snapshot()) == []
    # Once, and an hour later again.
    assert [record.message for record in caplog.records].count("rebuild_slot_unread") == 1


def notices(answer: dict[str, object]) -> list[object]:
    attention_ = answer["attention"]
    assert isinstance(attention_, list)
    return [one for one in attention_ if "rebuild" in one["title"]]
