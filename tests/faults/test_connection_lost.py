"""The connection to the slot is lost while a batch is being written: from then on another process
may have the slot, and what it writes must not be overwritten by what is left of the batch. Nor is
it let go of without need: all of the batch would be sent again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from cdc_sync.config import PipelineSettings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.qdrant.server_state import COLLECTION
from cdc_sync.sync.monitor import SourceMonitor
from cdc_sync.sync.stream import StreamSession
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running, wal_position
from tests.support.qdrant_control import Faults, QdrantTarget
from tests.support.source_tables import source_settings

ROWS = 60
POINTS = 10


def create_docs(database: Database) -> None:
    """Create the table ``docs``, filled."""
    database.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(3));"
        f"INSERT INTO docs SELECT i, 'old', '[1,2,3]' FROM generate_series(1, {ROWS}) i"
    )


def end_walsender(life: Running) -> None:
    """Have the server end the connection to the slot."""
    life.database.execute(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s",
        (life.slot,),
    )


def lose_the_slot(life: Running) -> None:
    """End the walsender, and wait until it has gone: the slot is anybody's then."""
    end_walsender(life)
    query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
    for _ in range(600):
        if life.database.execute(query, (life.slot,)) == [(False,)]:
            return
        time.sleep(0.1)
    raise AssertionError("the walsender has not ended")


def written_points(faults: Faults) -> list[int]:
    """How many points each request has written to the table's collection, in their order."""
    return [
        int(entry["points"])
        for entry in sorted(faults.log(), key=lambda entry: float(entry["start"]))
        if entry["operation"] == "Upsert" and entry["collection"] != COLLECTION
    ]


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
    create_docs(database18)
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
        end_walsender(life)
        await life.wait(ending.is_set, "the end of the connection")
        await asyncio.sleep(0)
        faults.release()
        await life.assert_equal()
        points = [e["points"] for e in faults.log() if e["operation"] == "Upsert"]
        written = [count for count in points if count is not None]
    # Those in flight, and the batch as a whole once more.
    assert sum(written) == ROWS + parallel * POINTS


@pytest.mark.parametrize("paused", [False, True])
async def test_what_is_not_read_shows_it_too(
    database18: Database,
    qdrant: QdrantTarget,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    paused: bool,
) -> None:
    """Nobody reads while a full batch waits for the one that is written; and a process that was
    stopped has not read by the time it goes on. No more of either batch is begun."""
    ending, waits = asyncio.Event(), asyncio.Event()
    finish, pause = StreamSession._finish, StreamSession._pause

    async def finishing(session: StreamSession, *tasks: asyncio.Task[None]) -> None:
        ending.set()
        await finish(session, *tasks)

    async def pausing(session: StreamSession) -> None:
        waits.set()
        await pause(session)

    monkeypatch.setattr(StreamSession, "_finish", finishing)
    monkeypatch.setattr(StreamSession, "_pause", pausing)
    create_docs(database18)
    settings = pipeline_settings(
        database18,
        qdrant,
        "docs",
        target={"parallel_requests": 1, "request_points": POINTS},
        pipeline={"batch_rows": 2 * POINTS},
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        faults.clear_log()
        faults.hold("Upsert", times=1)
        database18.execute("UPDATE docs SET note = 'new'")
        await life.wait(lambda: faults.held() == 1, "a request in flight")
        await life.wait(waits.is_set, "a full batch")
        if paused:
            lose_the_slot(life)
            faults.release()
            time.sleep(0.5)  # noqa: ASYNC251 - so does the whole process
        else:
            lose_the_slot(life)
            await life.wait(ending.is_set, "the end of the connection")
            faults.release()
        await life.assert_equal()
        _, *others = written_points(faults)
    # All but the one that was in flight.
    assert sum(others) == ROWS


@pytest.mark.requirement("R1", "R50")
async def test_while_the_last_batch_is_written(
    database18: Database, qdrant: QdrantTarget, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, and Qdrant is slow: the slot is kept meanwhile, however short wal_sender_timeout may
    be; once it is lost, no more of the batch is begun."""
    lost = asyncio.Event()
    give_up: Callable[..., None] = StreamSession._give_up

    def giving_up(session: StreamSession, writer: asyncio.Task[None]) -> None:
        lost.set()
        give_up(session, writer)

    monkeypatch.setattr(StreamSession, "_give_up", giving_up)
    create_docs(database18)
    settings = pipeline_settings(
        database18,
        qdrant,
        "docs",
        target={"parallel_requests": 1, "request_points": POINTS},
        pipeline={"status_interval_seconds": 0.2, "shutdown_timeout_seconds": 300},
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        faults.clear_log()
        faults.hold("Upsert", times=1)
        database18.execute("UPDATE docs SET note = 'new'")
        await life.wait(lambda: faults.held() == 1, "a request in flight")
        life.stopping.set()
        await life.wait(lambda: life.state == "draining", "the drain")
        # More than what the session may have said until it ended.
        said = life.metric("status_updates_total", trigger="timer") + 3
        await life.wait(
            lambda: life.metric("status_updates_total", trigger="timer") > said, "signs of life"
        )
        database18.execute("INSERT INTO docs VALUES (1000, 'later', '[1,2,3]')")
        end_walsender(life)
        await life.wait(lost.is_set, "the end of the connection")
        faults.release()
        await life.task
        assert len(written_points(faults)) == 1
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal()


def test_a_network_that_is_cut_is_noticed_before_the_server_gives_the_slot_away(
    database18: Database,
) -> None:
    source = source_settings(database18.url)
    with connect(source, replication=True) as connection, connect(source) as other:
        ((timeout,),) = other.execute(
            "SELECT setting::int FROM pg_settings WHERE name = 'wal_sender_timeout'"
        ).fetchall()
        reports = 1000 * PipelineSettings().status_interval_seconds
        given_up = int(connection.info.get_parameters()["tcp_user_timeout"])
    assert given_up + 2 * reports < timeout


async def test_a_look_that_fails_is_no_shutdown(
    database18: Database, qdrant: QdrantTarget, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog is slow for a long time, and Qdrant refuses some of what it is sent: a batch that
    gets further, if slowly, is not given up to be sent from its beginning."""
    looks: list[bool] = []

    def slow(_: SourceMonitor, connection: PgConnection) -> None:
        looks.append(connection.closed)
        raise SourceError(ErrorKind.SOURCE_UNAVAILABLE, "the server has not answered")

    create_docs(database18)
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
