"""Positions: what is reported, when it moves, and what comes again (invariants 1, 2 and 7)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from psycopg import sql
from pydantic import SecretStr

from cdc_sync.config import Settings
from cdc_sync.errors import SinkError
from cdc_sync.qdrant.sink import Applied, Changes
from cdc_sync.qdrant.writer import ServerWriter
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.stream import StreamSession
from tests.support.fix_postgres import Database, DatabaseFactory
from tests.support.oracle import assert_equal
from tests.support.pipeline_process import Break, PipelineProcess
from tests.support.pipeline_task import (
    Running,
    pipeline_settings,
    running,
    slot_position,
    wal_position,
)
from tests.support.proxy import Direction, ProxyTo
from tests.support.qdrant_control import Faults, QdrantTarget
from tests.support.qdrant_faults import RandomKind

SEGMENT: Final = 16 << 20


def create_docs(database: Database, rows: int = 10) -> None:
    database.execute("CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(4))")
    insert(database, 0, rows)


def insert(database: Database, start: int, rows: int) -> None:
    database.execute(
        "INSERT INTO docs SELECT i, 'note ' || i, ARRAY[i, 1, 2, 3]::vector(4)"
        " FROM generate_series(%s::int, %s::int) i",
        (start, start + rows - 1),
    )


def commit(database: Database, statement: str) -> int:
    """Run it and return the end of the WAL then: as long as nothing behind the commit is confirmed,
    the slot stands before that."""
    database.execute(statement)
    return wal_position(database)


def walsender(database: Database, slot: str) -> tuple[object, ...]:
    """pid, write and flush position of the slot's consumer."""
    rows = database.execute(
        "SELECT s.active_pid, (r.write_lsn - '0/0')::int8, (r.flush_lsn - '0/0')::int8,"
        " (r.replay_lsn - '0/0')::int8 FROM pg_replication_slots s"
        " JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE s.slot_name = %s",
        (slot,),
    )
    return rows[0] if rows else (None, None, None, None)


def statuses(life: Running) -> float:
    triggers = ("timer", "requested", "progress")
    return sum(life.metric("status_updates_total", trigger=trigger) for trigger in triggers)


# -- what is reported


@pytest.mark.requirement("R1")
@pytest.mark.parametrize("batch_rows", [4096, 16], ids=["reading", "reader paused"])
async def test_a_stalled_sink_does_not_cost_the_connection(
    database18: Database, qdrant: QdrantTarget, faults: Faults, batch_rows: int
) -> None:
    create_docs(database18)
    with database18.connect() as connection:
        name = sql.Identifier(database18.name)
        connection.execute(sql.SQL("ALTER DATABASE {} SET wal_sender_timeout = '1s'").format(name))
    settings = pipeline_settings(database18, qdrant, "docs", pipeline={"batch_rows": batch_rows})
    async with running(settings, database18, qdrant) as life:
        pid = walsender(database18, life.slot)[0]
        assert pid is not None
        faults.hold("write")
        end = time.monotonic() + 3.5
        number = 1000
        while time.monotonic() < end:
            # More than the reader takes while a batch is in flight, in the one case.
            insert(database18, number, 100)
            number += 100
            assert walsender(database18, life.slot)[0] == pid
            await asyncio.sleep(0.1)
        assert faults.held() == 1
        assert life.pipeline.positions.applied < wal_position(database18)
        faults.release()
        await life.assert_equal()
        assert walsender(database18, life.slot)[0] == pid
        assert life.metric("source_reconnects_total", reason="source_unavailable") == 0


@pytest.mark.requirement("R2", "R3", "R45")
async def test_few_statuses_and_write_is_received_while_flush_is_durable(
    database18: Database, qdrant: QdrantTarget, faults: Faults
) -> None:
    create_docs(database18)
    settings = pipeline_settings(
        database18, qdrant, "docs", pipeline={"status_interval_seconds": 1.5}
    )
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        faults.hold("write")
        bound = commit(database18, "UPDATE docs SET note = 'held' WHERE id = 1")
        await life.wait(lambda: faults.held() == 1, "the held write")
        # A consumer that answers every keepalive while its flush stands still is asked again at
        # once: about 13,000 times a second.
        sent, started = statuses(life), time.monotonic()
        with database18.connect() as connection:
            while time.monotonic() < started + 2.0:
                connection.execute("SELECT pg_logical_emit_message(false, 'tests', 'x', true)")
                connection.execute("UPDATE docs SET note = note || 'x' WHERE id = 2")
                await asyncio.sleep(0.002)
            assert 1 <= statuses(life) - sent < 20
        # What was received is reported at the next occasion, what is durable has not moved.
        received: int = life.pipeline.positions.received
        assert received >= bound

        def reported() -> bool:
            _, write, flush, replay = walsender(database18, life.slot)
            assert isinstance(write, int)
            assert isinstance(flush, int)
            assert isinstance(replay, int)
            assert flush == replay < bound
            return write >= received

        await life.wait(reported, "the write position")
        faults.release()
        await life.assert_equal()
        _, write, flush, _ = walsender(database18, life.slot)
        assert isinstance(write, int)
        assert isinstance(flush, int)
        assert bound < flush <= write


# -- an LSN is confirmed only after Completed (invariant 1)

Script = Callable[[Faults], None]
OUTCOMES: Final[dict[str, Script]] = {
    "WaitTimeout": lambda faults: faults.wait_timeout("write", times=2),
    "UNAVAILABLE": lambda faults: faults.reject("write", "UNAVAILABLE", times=2),
    "INTERNAL": lambda faults: faults.reject("write", "INTERNAL", times=2),
    "applied, answer lost": lambda faults: faults.fail_after_apply("write", times=2),
    "applied, no answer": lambda faults: faults.never_answer("write", applied=True),
    "not applied, no answer": lambda faults: faults.never_answer("write", applied=False),
}


async def confirmed_too_early(
    database: Database, qdrant: QdrantTarget, faults: Faults, script: Script
) -> bool:
    """Whether a commit whose write Qdrant has never completed is confirmed. The next try after the
    scripted ones is held, so that nothing is ever completed."""
    create_docs(database)
    settings = pipeline_settings(database, qdrant, "docs", target={"timeout_seconds": 0.2})
    async with running(settings, database, qdrant) as life:
        await life.caught_up()
        script(faults)
        faults.hold("write", times=1000)
        bound = commit(database, "UPDATE docs SET note = 'new' WHERE id = 1")
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            # Later positions, which a keepalive brings.
            database.execute("SELECT pg_logical_emit_message(false, 'tests', 'x')")
            if life.confirmed() >= bound:
                return True
            await asyncio.sleep(0.05)
        assert faults.queued() < 1000, "no request has met the scripted outcome"
        faults.clear()
        await life.assert_equal()
        assert life.confirmed() >= bound
    return False


@pytest.mark.requirement("R43")
@pytest.mark.parametrize("outcome", list(OUTCOMES))
async def test_nothing_is_confirmed_before_it_is_completed(
    database18: Database, qdrant: QdrantTarget, faults: Faults, outcome: str
) -> None:
    assert not await confirmed_too_early(database18, qdrant, faults, OUTCOMES[outcome])


async def test_the_test_sees_an_unknown_outcome_taken_for_completed(
    database18: Database, qdrant: QdrantTarget, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = ServerWriter.apply

    async def trusting(self: ServerWriter, changes: Changes) -> Applied:
        try:
            return await apply(self, changes)
        except SinkError:
            return Applied()

    monkeypatch.setattr(ServerWriter, "apply", trusting)
    assert await confirmed_too_early(database18, qdrant, faults, OUTCOMES["WaitTimeout"])


async def test_the_test_sees_a_position_confirmed_before_the_write(
    database18: Database, qdrant: QdrantTarget, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Applier.apply

    async def not_waiting(self: Applier, batch: Batch, *_: object) -> None:
        tasks.append(asyncio.create_task(apply(self, batch)))

    tasks: list[asyncio.Task[None]] = []
    monkeypatch.setattr(Applier, "apply", not_waiting)
    try:
        assert await confirmed_too_early(database18, qdrant, faults, OUTCOMES["UNAVAILABLE"])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_pipeline_that_is_cancelled_does_not_wait_for_qdrant_to_come_back(
    database18: Database, qdrant: QdrantTarget, faults: Faults
) -> None:
    create_docs(database18)
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        await life.caught_up()
        faults.reject("write", "UNAVAILABLE", times=1000)
        bound = commit(database18, "UPDATE docs SET note = 'new' WHERE id = 1")
        await life.wait(lambda: faults.queued() < 998, "the first tries")
        life.task.cancel()
        done, _ = await asyncio.wait({life.task}, timeout=5)
        assert done
        assert life.confirmed() < bound


# -- no two requests for one point together (invariant 2)


async def test_one_point_is_never_in_two_requests(
    database18: Database, qdrant: QdrantTarget, faults: Faults
) -> None:
    """Few rows, changed all the time, in requests side by side of which many fail."""
    create_docs(database18, rows=60)
    settings = pipeline_settings(
        database18,
        qdrant,
        "docs",
        pipeline={"batch_rows": 50},
        target={"parallel_requests": 8, "request_points": 4, "timeout_seconds": 1.0},
    )
    async with running(settings, database18, qdrant) as life:
        kinds: list[RandomKind] = [
            "unavailable", "internal", "lost_response", "wait_timeout", "slow",
        ]  # fmt: skip
        faults.random(0.06, seed=7, kinds=kinds)
        with database18.connect() as connection:
            for number in range(60):
                connection.execute("UPDATE docs SET note = 'n' || %s || id", (number,))
                connection.execute("UPDATE docs SET id = -id WHERE id %% 7 = %s", (number % 7,))
                connection.execute("DELETE FROM docs WHERE id = %s", (number,))
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        faults.random(0, seed=0)
        log = faults.log()
        assert any(entry["in_flight"] for entry in log), "requests never overlapped"
        assert sum(entry["outcome"] != "OK" for entry in log if entry["points"]) > 10
        await life.assert_equal()


# -- what comes again


def written(faults: Faults, collection: str) -> int:
    """Points in requests that were completed since the log was cleared."""
    return sum(
        entry["points"]
        for entry in faults.log()
        if entry["collection"] == collection and entry["points"] and entry["outcome"] == "OK"
    )


def assert_same(database: Database, qdrant: QdrantTarget, collection: str) -> None:
    assert_equal(
        database.url,
        "docs",
        qdrant_url=qdrant.url,
        collection=collection,
        api_key=qdrant.api_key,
    )


@pytest.mark.requirement("R41")
def test_a_kill_inside_a_transaction_brings_it_again_as_a_whole(
    database18: Database, qdrant: QdrantTarget, faults: Faults, tmp_path: Path
) -> None:
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs", pipeline={"batch_rows": 4})
    collection = str(settings.tables[0].collection)
    life = PipelineProcess(settings, tmp_path / "first.log")
    with database18.connect() as connection:
        life.wait_settled(connection)
        faults.slow("write", 0.0)
        faults.hold("write")
        insert(database18, 100, 40)
        bound = wal_position(database18)
        life.wait(lambda _: faults.held() == 1, "the second batch")
        # The first part is there, and no position of the transaction is confirmed.
        assert qdrant.client().count(collection, exact=True).count == 10 + 4
        time.sleep(0.6)
        assert slot_position(database18, settings.source.slot, "confirmed_flush_lsn") < bound
        life.kill()
        faults.clear()
        faults.clear_log()
        life = PipelineProcess(settings, tmp_path / "second.log")
        life.wait_settled(connection)
    assert written(faults, collection) == 40
    life.close()
    assert_same(database18, qdrant, collection)


@pytest.mark.requirement("R42")
@pytest.mark.timeout(120)
def test_a_kill_in_the_middle_of_a_large_transaction(
    database18: Database, qdrant: QdrantTarget, faults: Faults, tmp_path: Path
) -> None:
    rows = 50_000
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    client, collection = qdrant.client(), str(settings.tables[0].collection)
    life = PipelineProcess(settings, tmp_path / "first.log")
    with database18.connect() as connection:
        life.wait_settled(connection)
        insert(database18, 100, rows)
        bound = wal_position(database18)

        def count() -> int:
            return client.count(collection, exact=True).count

        life.wait(lambda _: count() > rows / 2, "half of the transaction")
        life.kill()
        assert count() < rows, "it was over already"
        assert slot_position(database18, settings.source.slot, "confirmed_flush_lsn") < bound
        faults.clear_log()
        life = PipelineProcess(settings, tmp_path / "second.log")
        life.wait_settled(connection)
    assert slot_position(database18, settings.source.slot, "confirmed_flush_lsn") >= bound
    assert written(faults, collection) == rows
    life.close()
    assert_same(database18, qdrant, collection)


def never_confirm() -> None:
    """A break: nothing that was applied is ever confirmed."""

    async def confirm(self: StreamSession, force: bool = False) -> None:
        pass

    StreamSession._confirm = confirm  # type: ignore[method-assign]


@pytest.mark.requirement("R43", "R46")
def test_a_restart_at_each_step_repeats_what_was_not_confirmed_and_no_more(
    database18: Database, qdrant: QdrantTarget, faults: Faults, tmp_path: Path
) -> None:
    """Killed before the write, between write and confirmation, and after it. Streaming starts from
    0/0: where to go on is the slot's to know."""
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    collection = str(settings.tables[0].collection)

    def start(sabotage: Break | None = None) -> PipelineProcess:
        return PipelineProcess(settings, tmp_path / "pipeline.log", sabotage)

    def wait_written(points: int) -> None:
        end = time.monotonic() + 20
        while written(faults, collection) < points:
            assert time.monotonic() < end, (tmp_path / "pipeline.log").read_text()[-3000:]
            time.sleep(0.01)

    with database18.connect() as connection:
        life = start()
        life.wait_settled(connection)
        faults.hold("write")
        connection.execute("UPDATE docs SET note = 'one' WHERE id = 1")
        while faults.held() == 0:
            time.sleep(0.01)
        life.kill()
        faults.clear()
        faults.clear_log()
        life = start(never_confirm)
        wait_written(1)
        connection.execute("UPDATE docs SET note = 'two' WHERE id = 2")
        wait_written(2)
        life.kill()
        faults.clear_log()
        life = start()
        life.wait_settled(connection)
        assert written(faults, collection) == 2
        life.kill()
        faults.clear_log()
        life = start()
        connection.execute("UPDATE docs SET note = 'three' WHERE id = 3")
        life.wait_settled(connection)
        assert written(faults, collection) == 1
        assert life.stop().exit_code == 0
    assert_same(database18, qdrant, collection)


@pytest.mark.requirement("R46")
async def test_a_slot_ahead_of_what_this_process_applied_is_followed(
    database18: Database, qdrant: QdrantTarget, proxy_to: ProxyTo
) -> None:
    """A stand-by took over for a while: what it has confirmed does not come again, and is no
    error."""
    create_docs(database18)
    proxy = proxy_to(database18.server.host, database18.server.port)
    settings = pipeline_settings(database18, qdrant, "docs", pg_url=database18.url_through(proxy))
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        proxy.refuse()
        proxy.cut()
        await life.wait(lambda: walsender(database18, life.slot)[0] is None, "the cut")
        applied = life.pipeline.positions.applied
        other = stand_by_of(settings, database18)
        async with running(other, database18, qdrant) as stand_by:
            database18.execute("UPDATE docs SET note = 'by the other' WHERE id < 5")
            await stand_by.caught_up()
            await stand_by.stop()
        assert life.confirmed() > applied
        proxy.accept()
        database18.execute("UPDATE docs SET note = 'by the first' WHERE id = 7")
        await life.assert_equal()
        assert life.metric("received_messages_total", kind="update") == 1


@pytest.mark.requirement("R44", "R46")
async def test_a_stand_by_that_wrote_older_versions_and_died(
    database18: Database, qdrant: QdrantTarget, faults: Faults, proxy_to: ProxyTo
) -> None:
    """What this process has applied and could not confirm may have been overwritten since: it is
    applied again, and not skipped."""
    create_docs(database18)
    proxy = proxy_to(database18.server.host, database18.server.port)
    settings = pipeline_settings(
        database18,
        qdrant,
        "docs",
        pg_url=database18.url_through(proxy),
        pipeline={"batch_rows": 1},
        target={"timeout_seconds": 1.5},
    )
    client, collection = qdrant.client(), str(settings.tables[0].collection)

    def note() -> object:
        (point,) = client.retrieve(collection, [1], with_payload=True)
        return (point.payload or {})["note"]

    async with running(settings, database18, qdrant) as life:
        # With the first change it asks what the columns' types are.
        database18.execute("UPDATE docs SET note = 'first' WHERE id = 2")
        await life.caught_up()
        proxy.stall(Direction.UP)
        bound = commit(database18, "UPDATE docs SET note = 'older' WHERE id = 1")
        database18.execute("UPDATE docs SET note = 'newer' WHERE id = 1")
        await life.wait(lambda: note() == "newer", "both versions")
        await asyncio.sleep(0.6)
        proxy.refuse()
        proxy.cut()
        proxy.resume()
        await life.wait(lambda: walsender(database18, life.slot)[0] is None, "the cut")
        assert life.confirmed() < bound < life.pipeline.positions.applied
        faults.slow("write", 0.0)
        faults.never_answer("write", applied=False)
        async with running(stand_by_of(settings, database18), database18, qdrant) as stand_by:
            await stand_by.wait(lambda: faults.queued() == 0 and note() == "older", "the older one")
        proxy.accept()
        await life.assert_equal()
        assert note() == "newer"


def stand_by_of(settings: Settings, database: Database) -> Settings:
    """The same pipeline, connected directly."""
    url = SecretStr(database.url)
    return settings.model_copy(update={"source": settings.source.model_copy(update={"url": url})})


@pytest.mark.requirement("R44")
async def test_a_commit_at_exactly_the_confirmed_position_is_applied(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """A keepalive confirms the end of the WAL while a transaction is open; its commit record lands
    right there. "Applied" is an exclusive bound."""
    create_docs(database18)
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        for attempt in range(20):
            hit = await commit_at_the_applied_position(database18, life, f"attempt {attempt}")
            await life.assert_equal()
            if hit:
                return
    pytest.fail("something else was written before the commit record each time")


async def commit_at_the_applied_position(database: Database, life: Running, note: str) -> bool:
    """Update a row, with a session that began when the position before the commit record was
    applied. Returns whether the record was the next one to be written."""
    watcher = f"{life.slot}_watcher"[-63:].lstrip("_")
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (watcher,))
    with database.connect(autocommit=False) as connection:
        connection.execute("UPDATE docs SET note = %s WHERE id = 1", (note,))
        # Another commit flushes the WAL so far.
        database.execute("SELECT pg_logical_emit_message(true, 'tests', '')")
        await life.wait(lambda: life.confirmed() == wal_position(database), "the end of the WAL")
        pid = walsender(database, life.slot)[0]
        applied = life.pipeline.positions.applied
        database.execute("SELECT pg_terminate_backend(%s)", (pid,))
        await life.wait(lambda: walsender(database, life.slot)[0] not in (None, pid), "a session")
        connection.commit()
    messages = database.execute(
        "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL,"
        " 'proto_version', '1', 'publication_names', %s)",
        (watcher, f'"{life.slot}"'),
    )
    database.execute("SELECT pg_drop_replication_slot(%s)", (watcher,))
    begins = [bytes(data) for (data,) in messages if isinstance(data, bytes) and data[:1] == b"B"]
    return applied in [int.from_bytes(begin[1:9]) for begin in begins]


# -- WAL is not hoarded (invariant 7)


def insert_each(database: Database, start: int) -> None:
    for number in range(start, start + 60):
        insert(database, number, 1)


@pytest.mark.requirement("R50")
async def test_a_stop_confirms_all_that_was_stored(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """In the middle of things, and again and again: what Postgres was told is what is stored."""
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs", pipeline={"batch_rows": 50})
    for start in range(1_000, 5_000, 1_000):
        async with running(settings, database18, qdrant) as life:
            writing = asyncio.create_task(asyncio.to_thread(insert_each, database18, start))
            await life.wait(lambda: life.metric("transactions_total") > 5, "some commits")
            await life.stop()
            assert life.confirmed() == life.pipeline.positions.applied
            await writing
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal()


@pytest.mark.requirement("R43", "R62")
async def test_a_quiet_table_in_a_busy_cluster_does_not_keep_the_wal(
    database18: Database, database18_factory: DatabaseFactory, qdrant: QdrantTarget
) -> None:
    create_docs(database18)
    busy = database18_factory()
    busy.execute("CREATE TABLE other (id int, filler text)")
    async with running(pipeline_settings(database18, qdrant, "docs"), database18, qdrant) as life:
        await life.caught_up()
        applied = life.pipeline.positions.applied
        fill = "INSERT INTO other SELECT i, repeat('x', 1000) FROM generate_series(1, 30000) i"
        for _ in range(2):
            await asyncio.to_thread(busy.execute, fill)
            # restart_lsn follows over the records of running transactions, which checkpoints write.
            await asyncio.to_thread(busy.execute, "CHECKPOINT")
        end = wal_position(database18)
        assert end - applied > 2 * SEGMENT

        def retained() -> int:
            return wal_position(database18) - slot_position(database18, life.slot, "restart_lsn")

        await life.wait(lambda: life.confirmed() >= end, "the end of the WAL")
        await life.wait(lambda: retained() < SEGMENT, "the slot to let go of the WAL")
        assert life.metric("transactions_total") == 0
        # Whatever it confirmed was no change of ours.
        database18.execute("UPDATE docs SET note = 'after' WHERE id = 1")
        await life.assert_equal()
