"""The connection to the slot is lost while a batch is being written: from then on another process
may have the slot, and what it writes must not be overwritten by what is left of the batch. Nor is
it let go of without need: all of the batch would be sent again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.sync.monitor import SourceMonitor
from cdc_sync.sync.stream import StreamSession
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running, wal_position
from tests.support.qdrant_control import Faults, QdrantTarget

ROWS = 60
POINTS = 10


@pytest.mark.parametrize("parallel", [1, 2])
async def test_no_more_of_the_batch_is_begun(
    database18: Database,
    qdrant: QdrantTarget,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    parallel: int,
) -> None:
    ending = asyncio.Event()
    finish: Callable[..., Awaitable[None]] = StreamSession._finish

    async def finishing(session: StreamSession, *tasks: object) -> None:
        ending.set()
        await finish(session, *tasks)

    monkeypatch.setattr(StreamSession, "_finish", finishing)
    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(3));"
        f"INSERT INTO docs SELECT i, 'old', '[1,2,3]' FROM generate_series(1, {ROWS}) i"
    )
    settings = pipeline_settings(
        database18,
        qdrant,
        "docs",
        target={"parallel_requests": parallel, "request_points": POINTS},
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        faults.clear_log()
        faults.hold("Upsert", times=parallel)
        database18.execute("UPDATE docs SET note = 'new'")
        await life.wait(lambda: faults.held() == parallel, "requests in flight")
        database18.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
            " WHERE slot_name = %s",
            (life.slot,),
        )
        await life.wait(ending.is_set, "the end of the connection")
        await asyncio.sleep(0)
        faults.release()
        await life.assert_equal()
        points = [e["points"] for e in faults.log() if e["operation"] == "Upsert"]
        written = [count for count in points if count is not None]
    # Those in flight, and the batch as a whole once more.
    assert sum(written) == ROWS + parallel * POINTS


async def test_a_look_that_fails_is_no_shutdown(
    database18: Database, qdrant: QdrantTarget, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog is slow for a long time, and Qdrant refuses some of what it is sent: a batch that
    gets further, if slowly, is not given up to be sent from its beginning."""
    looks: list[bool] = []

    def slow(_: SourceMonitor, connection: PgConnection) -> None:
        looks.append(connection.closed)
        raise SourceError(ErrorKind.SOURCE_UNAVAILABLE, "the server has not answered")

    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(3));"
        f"INSERT INTO docs SELECT i, 'old', '[1,2,3]' FROM generate_series(1, {ROWS}) i"
    )
    settings = pipeline_settings(
        database18,
        qdrant,
        "docs",
        target={"parallel_requests": 1, "request_points": 4},
        pipeline={"let_go_seconds": 2.0},
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        monkeypatch.setattr(SourceMonitor, "_look", slow)
        await life.wait(lambda: len(looks) > 20, "looks")
        faults.refuse_every(2)
        database18.execute("UPDATE docs SET note = 'new'")
        bound = wal_position(database18)
        await life.wait(lambda: life.confirmed() >= bound, "the batch")
        faults.clear()
        await life.assert_equal()
