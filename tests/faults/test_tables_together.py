"""Tables of one batch are written side by side: how many requests together, and that whatever
fails meanwhile neither row nor order is lost."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytest

from cdc_sync.errors import CdcSyncError
from cdc_sync.sync import source_history
from cdc_sync.sync.resync import Resync
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import Faults, QdrantTarget
from tests.support.qdrant_faults import RandomKind

TABLES: Final = [f"t{number}" for number in range(6)]
REQUESTS: Final = 3


@pytest.fixture
def faults(qdrant: QdrantTarget) -> Faults:
    if qdrant.faults is None:
        pytest.skip("a real server has no scripted faults")
    return qdrant.faults


def create(database: Database, rows: int = 20) -> None:
    for table in TABLES:
        database.execute(
            f"CREATE TABLE {table} (id bigint PRIMARY KEY, note text, emb vector(4));"
            f"INSERT INTO {table} SELECT i, '', ARRAY[i, 1, 2, 3]::vector(4)"
            f" FROM generate_series(1, {rows}) i",
        )


def sections(qdrant: QdrantTarget, shared: int = 0) -> list[Mapping[str, object]]:
    """The tables, of which so many share one collection."""
    collection = qdrant.new_collection_name()
    found: list[Mapping[str, object]] = []
    for number, table in enumerate(TABLES):
        one: dict[str, object] = {"name": table}
        if number < shared:
            one |= {"collection": collection, "namespace": table}
        found.append(one)
    return found


def together(log: Sequence[Mapping[str, Any]]) -> int:
    """The most writes of points in flight at once, by when they came and were answered."""
    moments: list[tuple[float, int]] = []
    for entry in log:
        if entry["points"] is not None and entry["end"] is not None:
            moments += [(entry["start"], 1), (entry["end"], -1)]
    return max(itertools.accumulate(change for _, change in sorted(moments)))


def updates_received(life: Running) -> float:
    return life.metric("received_messages_total", kind="update")


def update_all(database: Database, note: str) -> None:
    with database.connect() as connection, connection.transaction():
        for table in TABLES:
            connection.execute(f"UPDATE {table} SET note = %s".encode(), (note,))


@pytest.fixture
def no_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark of the source is a write, too."""
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", math.inf)


@pytest.mark.usefixtures("no_marks")
async def test_as_many_tables_as_requests_may_go_together(
    database18: Database, qdrant: QdrantTarget, faults: Faults
) -> None:
    """None of the requests is answered: so the later ones did not wait for the earlier."""
    create(database18)
    settings = pipeline_settings(
        database18, qdrant, *sections(qdrant), target={"parallel_requests": REQUESTS}
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        faults.hold("write")
        database18.execute("UPDATE t0 SET note = 'first' WHERE id = 1")
        await life.wait(lambda: faults.held() == 1, "the first")
        # While it waits the others come together.
        before = updates_received(life)
        update_all(database18, "held")
        await life.wait(lambda: updates_received(life) == before + 20 * len(TABLES), "the others")
        faults.hold("write", times=REQUESTS)
        faults.clear_log()
        faults.release()
        await life.wait(lambda: faults.held() == REQUESTS, "requests side by side")
        await asyncio.sleep(0.3)
        waiting = [entry for entry in faults.log() if entry["points"] is not None]
        assert len({entry["collection"] for entry in waiting}) == len(waiting) == REQUESTS
        faults.release()
        await life.assert_equal()


@pytest.mark.usefixtures("no_marks")
async def test_tables_of_one_collection_wait_for_each_other(
    database18: Database, qdrant: QdrantTarget, faults: Faults
) -> None:
    """How much is in flight to a collection follows its answers, whatever tables it is of."""
    create(database18)
    settings = pipeline_settings(
        database18, qdrant, *sections(qdrant, shared=6), target={"parallel_requests": REQUESTS}
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        faults.hold("write")
        faults.clear_log()
        update_all(database18, "held")
        await life.wait(lambda: faults.held() == 1, "a request")
        await asyncio.sleep(0.3)
        assert sum(entry["points"] is not None for entry in faults.log()) == 1
        faults.release()
        await life.assert_equal()


async def write(life: Running, seconds: float) -> None:
    """Transactions over several tables, and cut connections."""
    end = asyncio.get_running_loop().time() + seconds
    number = 0
    with life.database.connect() as connection:
        while asyncio.get_running_loop().time() < end:
            number += 1
            with connection.transaction():
                for offset in range(4):
                    table = TABLES[(number + offset) % len(TABLES)]
                    connection.execute(
                        f"UPDATE {table} SET note = note || 'n', emb = emb + '[1, 0, 0, 0]'"
                        f" WHERE id % 3 = {number % 3}".encode()
                    )
                    connection.execute(
                        f"UPDATE {table} SET note = '{number}' WHERE id % 5 = {number % 5}".encode()
                    )
                    connection.execute(
                        f"UPDATE {table} SET id = id + 1000 WHERE id % 17 = {number % 17}".encode()
                    )
            if number % 25 == 0:
                connection.execute(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                    " WHERE slot_name = %s",
                    (life.slot,),
                )
            await asyncio.sleep(0.02)


async def test_nothing_is_lost_or_overtaken_while_requests_fail_and_connections_are_cut(
    database18: Database, qdrant: QdrantTarget, faults: Faults
) -> None:
    """Two tables share a collection. A connection that ends while one table waits for its next try
    ends the others too: a request that outlived it would meet those of the next (invariant 2)."""
    create(database18, rows=60)
    settings = pipeline_settings(
        database18,
        qdrant,
        *sections(qdrant, shared=2),
        pipeline={"batch_rows": 100},
        target={"parallel_requests": REQUESTS, "request_points": 16, "timeout_seconds": 1.0},
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        faults.clear_log()
        kinds: list[RandomKind] = ["unavailable", "internal", "lost_response", "wait_timeout"]
        faults.random(0.1, seed=11, kinds=[*kinds, "slow"])
        await write(life, 4.0)
        faults.random(0, seed=0)
        log = faults.log()
        assert sum(entry["outcome"] != "OK" for entry in log if entry["points"]) > 10
        await life.assert_equal()
        assert 1 < together(log) <= REQUESTS


async def test_collections_that_go_stop_none_of_the_tables_beside_them(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made and filled again, and the others are written meanwhile. Two tables stop at the
    same moment: what is kept of that is changed by one after the other."""
    create(database18)
    settings = pipeline_settings(
        database18, qdrant, *sections(qdrant), target={"parallel_requests": REQUESTS}
    )
    gone = [str(settings.tables[number].collection) for number in (0, 2)]
    stopping: list[str] = []
    most = 0
    stop = Resync.stop

    async def slowly(self: Resync, table: str, error: CdcSyncError) -> None:
        nonlocal most
        stopping.append(table)
        most = max(most, len(stopping))
        await asyncio.sleep(0.2)
        await stop(self, table, error)
        stopping.remove(table)

    monkeypatch.setattr(Resync, "stop", slowly)
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        for collection in gone:
            qdrant.client().delete_collection(collection)
        update_all(database18, "new")
        await life.caught_up()
        assert most == 1
        for table in settings.tables:
            assert table.collection is not None
            if table.collection not in gone:
                points, _ = qdrant.client().scroll(table.collection, limit=100)
                assert {(point.payload or {})["note"] for point in points} == {"new"}
        for collection in gone:
            await life.wait(
                lambda c=collection: (  # type: ignore[misc]
                    qdrant.client().collection_exists(c) and qdrant.client().count(c).count == 20
                ),
                "a collection and its points",
            )
        await life.wait_streaming()
        await life.assert_equal()
