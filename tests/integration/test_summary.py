"""The summary's counts: read again before a difference is called one, and given up at once when
nobody waits for them any more."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest

from cdc_sync.config import Settings
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.connect import connect
from cdc_sync.qdrant.sink import DeadLetter, Sink
from cdc_sync.sync import summary
from cdc_sync.sync.planning import plan_pipeline
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.summary import Counts, Summarizer, set_expected
from tests.support.fix_postgres import Database

_ROWS = 10


class Points:
    """A sink that says how many points there are: one number a question, the last one for ever."""

    def __init__(self, *counts: int, letters: Sequence[DeadLetter] = ()) -> None:
        self.counts = list(counts)
        self.asked = 0
        self.letters = list(letters)
        self.state = self

    def writer(self, plan: object) -> Points:
        return self

    async def count(self) -> int:
        self.asked += 1
        return self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]

    async def dead_letters(self, pipeline: str) -> list[DeadLetter]:
        return self.letters


@pytest.fixture
def settings(database18: Database) -> Settings:
    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, emb vector(2));"
        f"INSERT INTO docs SELECT i, '[1,2]' FROM generate_series(1, {_ROWS}) i;"
        "CREATE PUBLICATION p FOR TABLE docs"
    )
    source = {"url": database18.url, "slot": "summary", "publication": "p"}
    return Settings.model_validate({"source": source, "tables": [{"name": "docs"}]})


@pytest.fixture
async def slot(database18: Database) -> AsyncIterator[None]:
    database18.execute("SELECT pg_create_logical_replication_slot('summary', 'pgoutput')")
    yield
    database18.execute("SELECT pg_drop_replication_slot('summary')")


def planned(settings: Settings) -> PlannedTable:
    with connect(settings.source) as connection:
        return plan_pipeline(connection, settings).tables[0]


async def counted(settings: Settings, points: Points, *, live: bool) -> tuple[Counts, list[float]]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    board = StatusBoard("default")
    made = await Summarizer(
        settings,
        cast(Sink, points),
        [planned(settings)],
        board,
        Metrics(),
        live=live,
        sleep=sleep,
    ).run()
    return made.tables[0].counts, slept


async def test_points_that_come_a_little_later_agree(settings: Settings) -> None:
    counts, slept = await counted(settings, Points(7, 9, _ROWS), live=True)
    assert (counts.agree, counts.points, len(slept)) == (True, _ROWS, 2)


async def test_a_difference_is_one_only_after_several_readings(settings: Settings) -> None:
    points = Points(7)
    counts, slept = await counted(settings, points, live=True)
    assert counts.agree is False
    assert "3 rows have no point" in counts.meaning
    assert points.asked == len(slept) + 1 == 5


async def test_counts_that_move_are_no_difference(settings: Settings) -> None:
    counts, _ = await counted(settings, Points(5, 6, 7), live=True)
    assert counts.agree is None
    assert "is being written" in counts.meaning


@pytest.mark.usefixtures("slot")
async def test_after_the_stream_a_quiet_slot_makes_it_a_difference(settings: Settings) -> None:
    counts, _ = await counted(settings, Points(12), live=False)
    assert counts.agree is False
    assert "2 points have no row" in counts.meaning


@pytest.mark.usefixtures("slot")
async def test_after_the_stream_waiting_changes_explain_it(
    settings: Settings, database18: Database
) -> None:
    database18.execute("INSERT INTO docs VALUES (100, '[1,2]')")
    points = Points(_ROWS)
    counts, _ = await counted(settings, points, live=False)
    assert (counts.agree, counts.source_rows, points.asked) == (None, _ROWS + 1, 1)
    assert "cdc-sync run applies them" in counts.meaning


@pytest.mark.usefixtures("slot")
async def test_rows_that_are_dead_letters_are_named(settings: Settings) -> None:
    letters = [DeadLetter("default", "public.docs", str(i), "0/1", "", "why") for i in range(2)]
    counts, _ = await counted(settings, Points(_ROWS - 2, letters=letters), live=False)
    assert counts.agree is False
    assert "2 could not be written and are dead letters" in counts.meaning


async def test_a_partition_made_since_the_plan_is_counted(
    settings: Settings, database18: Database
) -> None:
    database18.execute(
        "CREATE TABLE parts (id bigint PRIMARY KEY, emb vector(2)) PARTITION BY RANGE (id);"
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);"
        "INSERT INTO parts SELECT i, '[1,2]' FROM generate_series(1, 9) i;"
        "ALTER PUBLICATION p ADD TABLE parts;"
        "ALTER PUBLICATION p SET (publish_via_partition_root = true)"
    )
    source = settings.model_copy(
        update={"tables": [settings.tables[0].model_copy(update={"name": "parts"})]}
    )
    table = planned(source)
    database18.execute("CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20)")
    database18.execute("INSERT INTO parts VALUES (15, '[1,2]')")
    made = await Summarizer(
        source, cast(Sink, Points(10)), [table], StatusBoard("default"), Metrics(), live=True
    ).run()
    assert [(leaf.name, leaf.rows) for leaf in made.tables[0].counts.leaves] == [
        ("public.parts_1", 9), ("public.parts_2", 1),
    ]  # fmt: skip


async def test_a_count_that_nobody_waits_for_is_given_up(settings: Settings) -> None:
    table = dataclasses.replace(planned(settings), row_filter="pg_sleep(30) IS NULL")
    board = StatusBoard("default")
    task = asyncio.create_task(set_expected(settings, [table], board))
    await asyncio.sleep(0.5)
    assert not task.done()
    task.cancel()
    started = time.monotonic()
    await asyncio.gather(task, return_exceptions=True)
    # The thread ends too: the loop waits for it when it is closed.
    await asyncio.get_running_loop().shutdown_default_executor()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("exact", [True, False])
async def test_what_is_expected_is_counted_only_where_that_is_cheap(
    settings: Settings, database18: Database, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    database18.execute("ANALYZE docs; DELETE FROM docs WHERE id > 4")
    if not exact:
        monkeypatch.setattr(summary, "_COUNTED_PAGES", 0)
    board = StatusBoard("default")
    await set_expected(settings, [planned(settings)], board)
    (entry,) = cast(list[dict[str, object]], board.snapshot()["tables"])
    assert (entry["rows_exact"], entry["rows_estimated"]) == (exact, 4 if exact else _ROWS)
