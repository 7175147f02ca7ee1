"""The daemon lives through everything that Qdrant, Postgres and the network do to it: whatever
fails, in the end nothing is missing and nothing is stale (section "Failures" of the design)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cdc_sync.demo.embedded import StopMode
from tests.support.fault_cases import (
    begin_slow_copy,
    check,
    create_items,
    create_loaded,
    is_ready,
    slot_active,
    under_load,
    until,
    wait_copying,
)
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.proxy import Direction, ProxyTo
from tests.support.qdrant_control import Faults, QdrantProcess

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def faults(qdrant_private: QdrantProcess) -> Faults:
    return qdrant_private.script


# -- Qdrant


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unavailable", "killed"])
def test_qdrant_away_under_load(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, how: str
) -> None:
    table = create_loaded(database18)
    synced = sync_table(database18, "everything", qdrant=qdrant_private)
    daemon = synced.daemon
    daemon.wait(lambda: is_ready(daemon), "readiness")
    with under_load(database18, table, seed=2):
        if how == "killed":
            qdrant_private.kill()
        else:
            qdrant_private.script.down()
        daemon.wait(lambda: not is_ready(daemon), "the end of readiness", 60)
        assert daemon.get("/livez")[0] == 200
        status, message = check(daemon, "/readyz", "sink")
        assert status == 503
        assert message is not None
        assert "UNAVAILABLE" in message
        assert daemon.metric("cdc_sync_sink_up") == 0
        assert daemon.metric("cdc_sync_source_up") == 1
        early, bytes_early = daemon.metric("cdc_sync_lag_seconds"), lag_bytes(daemon)
        time.sleep(1.5)
        assert daemon.metric("cdc_sync_lag_seconds") >= early + 1
        assert lag_bytes(daemon) > bytes_early
        if how == "killed":
            qdrant_private.restart()
        else:
            qdrant_private.script.down(False)
        daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
    synced.assert_equal()
    daemon.wait(lambda: daemon.metric("cdc_sync_lag_seconds") == 0, "no lag", 60)
    assert daemon.metric("cdc_sync_sink_up") == 1
    assert daemon.metric("cdc_sync_sink_retries_total", kind="sink_unavailable") > 0


def lag_bytes(daemon: Any) -> float:
    total: float = daemon.metric("cdc_sync_lag_bytes")
    return total


def test_qdrant_away_while_nothing_is_written(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private)
    assert is_ready(synced.daemon)
    qdrant_private.kill()
    synced.daemon.wait(lambda: not is_ready(synced.daemon), "the end of readiness", 60)
    qdrant_private.restart()
    synced.daemon.wait(lambda: is_ready(synced.daemon), "readiness again", 60)


@pytest.mark.slow
@pytest.mark.requirement("R7")
def test_it_lets_go_of_the_slot_while_qdrant_is_away(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
) -> None:
    database, server = private_database, private_database.server
    create_items(database, 10)
    synced = sync_table(database, "items", qdrant=qdrant_private, pipeline={"let_go_seconds": 1})
    daemon = synced.daemon
    assert slot_active(database, daemon.slot)
    qdrant_private.kill()
    database.execute("UPDATE items SET note = 'while away'")
    daemon.wait(lambda: not slot_active(database, daemon.slot), "letting go", 60)
    # It stays away as long as Qdrant does, and says how old what waits is.
    before = daemon.metric("cdc_sync_lag_seconds")
    for _ in range(16):
        time.sleep(0.4)
        assert not slot_active(database, daemon.slot)
    assert daemon.metric("cdc_sync_lag_seconds") > before + 3
    assert daemon.get("/livez")[0] == 200
    assert check(daemon, "/readyz", "sink")[0] == 503
    started = time.monotonic()
    server.stop("fast", timeout_seconds=20)
    assert time.monotonic() - started < 5
    server.start()
    database.execute("DELETE FROM items WHERE id = 3")
    qdrant_private.restart()
    daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
    synced.assert_equal()


@pytest.mark.slow
@pytest.mark.campaign
def test_qdrant_slow_limiting_and_losing_answers_under_load(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    table = create_loaded(database18)
    synced = sync_table(database18, "everything", qdrant=qdrant_private)
    with under_load(database18, table, seed=3):
        for _ in range(2):
            faults.slow("write", 0.3, times=4)
            faults.reject("write", "RESOURCE_EXHAUSTED", "Rate limit", retry_after=1, times=2)
            faults.wait_timeout("write", times=3)
            faults.fail_after_apply("write", times=3)
            faults.fail_after_apply("write", "INTERNAL", "Service internal error", times=2)
            synced.daemon.wait(lambda: faults.queued() == 0, "every fault", 60)
    synced.assert_equal()
    for kind in ("sink_rate_limited", "sink_unknown", "sink_unavailable"):
        assert synced.daemon.metric("cdc_sync_sink_retries_total", kind=kind) > 0


def test_it_waits_as_long_as_qdrant_asks_for(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private)
    faults.clear_log()
    faults.reject("write", "RESOURCE_EXHAUSTED", "Rate limit", retry_after=2)
    database18.execute("UPDATE items SET note = 'limited' WHERE id = 1")
    synced.assert_equal()
    writes = [e for e in faults.log() if e["collection"] == synced.collection and e["points"]]
    assert len(writes) == 2
    assert writes[1]["start"] - writes[0]["end"] >= 2


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_a_batch_larger_than_qdrant_takes_in_a_minute_gets_through(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    """Each try goes on where the last one ended; and it is no reason to let go of the slot."""
    create_items(database18, 3000)
    synced = sync_table(database18, "items", qdrant=qdrant_private, pipeline={"let_go_seconds": 30})
    faults.rate_limit(1800)
    database18.execute("UPDATE items SET note = 'limited'")
    synced.daemon.wait_caught_up(300)
    faults.rate_limit(None)
    synced.assert_equal()
    assert synced.daemon.metric("cdc_sync_sink_retries_total", kind="sink_rate_limited") > 0
    assert "slot_let_go" not in synced.daemon.log()


@pytest.mark.slow
@pytest.mark.requirement("R7")
def test_a_rate_limit_does_not_hold_up_a_shutdown(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
) -> None:
    """Every try writes a few more points, so it would go on for minutes; what has been written of
    the batch is written again after the server is back."""
    database, server = private_database, private_database.server
    create_items(database, 2000)
    synced = sync_table(
        database,
        "items",
        qdrant=qdrant_private,
        pipeline={"let_go_seconds": 6},
        qdrant_settings={"parallel_requests": 1, "request_points": 16},
    )
    daemon = synced.daemon
    qdrant_private.script.rate_limit(600)
    database.execute("UPDATE items SET emb = '[1,1,1,1]'")
    limited = {"kind": "sink_rate_limited"}
    daemon.wait(lambda: daemon.metric("cdc_sync_sink_retries_total", **limited) > 2, "tries")
    # Longer than it may fail while Postgres is there.
    time.sleep(7)
    assert "slot_let_go" not in daemon.log()
    server.stop("fast", timeout_seconds=60)
    assert "slot_let_go" in daemon.log()
    server.start()
    qdrant_private.script.rate_limit(None)
    daemon.wait(lambda: is_ready(daemon), "readiness again", 90)
    synced.assert_equal()


def test_a_slow_qdrant_is_no_reason_to_let_go(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private, pipeline={"let_go_seconds": 1})
    faults.clear_log()
    faults.slow("write", 3, times=1000)
    database18.execute("UPDATE items SET note = 'slow'")
    synced.assert_equal()
    assert "slot_let_go" not in synced.daemon.log()
    assert (
        sum(e["collection"] == synced.collection and bool(e["points"]) for e in faults.log()) == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, pytest.param(12, marks=pytest.mark.campaign)])
def test_random_faults_under_load(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    faults: Faults,
    seed: int,
) -> None:
    print(f"seed {seed}")  # noqa: T201 - shown when it fails
    table = create_loaded(database18, seed=seed)
    faults.random(0.2, seed)
    synced = sync_table(database18, "everything", qdrant=qdrant_private)
    with under_load(database18, table, seed=seed):
        time.sleep(4)
    faults.random(0, seed)
    synced.assert_equal()


# -- Postgres


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fast", "immediate"])
@pytest.mark.requirement("R8")
def test_postgres_restarts_while_streaming(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    mode: StopMode,
) -> None:
    database, server = private_database, private_database.server
    table = create_loaded(database)
    synced = sync_table(database, "everything", qdrant=qdrant_private)
    daemon = synced.daemon
    with under_load(database, table, seed=4, reconnect=True):
        time.sleep(0.7)
        server.stop(mode)
        daemon.wait(lambda: not is_ready(daemon), "the end of readiness", 60)
        assert daemon.get("/livez")[0] == 200
        assert check(daemon, "/readyz", "source")[1]
        assert daemon.metric("cdc_sync_source_up") == 0
        server.start()
        daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
        server.restart(mode)
        time.sleep(0.7)
    synced.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "workers"), [pytest.param("fast", 2, marks=pytest.mark.campaign), ("immediate", 1)]
)
def test_postgres_restarts_while_copying(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    faults: Faults,
    mode: StopMode,
    workers: int,
) -> None:
    database, server = private_database, private_database.server
    synced = begin_slow_copy(
        database, sync_table, qdrant_private, request_seconds=0.3, workers=workers
    )
    server.stop(mode)
    time.sleep(0.5)
    server.start()
    # Rows that the first try has copied, and the next must not leave behind.
    database.execute("DELETE FROM everything WHERE id % 3 = 0")
    faults.clear()
    synced.daemon.wait_state("streaming")
    synced.assert_equal()
    assert database.execute("SELECT count(*) FROM pg_replication_slots") == [(1,)]


@pytest.mark.slow
@pytest.mark.requirement("R7")
def test_a_fast_shutdown_is_not_held_up_by_a_row_that_must_be_read_again(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    faults: Faults,
) -> None:
    """Postgres refuses new connections by then, and waits for the stream's consumer."""
    database, server = private_database, private_database.server
    create_loaded(database, rows=20)
    synced = sync_table(database, "everything", qdrant=qdrant_private)
    qdrant_private.client().delete(synced.collection, points_selector=[7], wait=True)
    faults.hold("write")
    database.execute("UPDATE everything SET revision = 1 WHERE id = 7")
    synced.daemon.wait(lambda: faults.held() == 1, "the write")
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(server.stop, "fast", 30)
        time.sleep(1)
        started = time.monotonic()
        faults.release()
        stopped.result()
        assert time.monotonic() - started < 8
    server.start()
    synced.daemon.wait(lambda: is_ready(synced.daemon), "readiness again", 60)
    synced.assert_equal()


@pytest.mark.campaign
@pytest.mark.requirement("R7")
def test_a_fast_shutdown_is_not_held_up_by_a_table_that_is_read_again(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    faults: Faults,
) -> None:
    database, server = private_database, private_database.server
    create_loaded(database, rows=1000)
    synced = sync_table(database, "everything", qdrant=qdrant_private)
    faults.clear_log()
    faults.slow("Upsert", 0.5, times=10_000)
    database.execute("ALTER TABLE everything ADD extra int DEFAULT 7")
    wait_copying(synced, faults)
    # Changes that wait for their turn meanwhile.
    database.execute("UPDATE everything SET revision = 1 WHERE id % 50 = 0")
    started = time.monotonic()
    server.stop("fast", 30)
    assert time.monotonic() - started < 10
    server.start()
    faults.clear()
    synced.daemon.wait(lambda: "resync_completed" in synced.daemon.log(), "the end of it", 60)
    synced.assert_equal()


@pytest.mark.slow
def test_the_walsender_is_terminated_again_and_again(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    table = create_loaded(database18)
    synced = sync_table(database18, "everything", qdrant=qdrant_private)
    with under_load(database18, table, seed=5):
        for _ in range(5):
            until(lambda: slot_active(database18, synced.daemon.slot), "the walsender")
            database18.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                " WHERE slot_name = %s AND active_pid IS NOT NULL",
                (synced.daemon.slot,),
            )
            time.sleep(0.3)
    synced.assert_equal()
    assert synced.daemon.metric("cdc_sync_source_reconnects_total") >= 5


# -- the network


@pytest.mark.slow
def test_the_way_to_postgres_fails(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    proxy_to: ProxyTo,
) -> None:
    proxy = proxy_to(database18.server.host, database18.server.port)
    table = create_loaded(database18)
    synced = sync_table(
        database18, "everything", qdrant=qdrant_private, pg_url=database18.url_through(proxy)
    )
    daemon = synced.daemon
    with under_load(database18, table, seed=6):
        for count in (1, 10_000, 300_000):
            proxy.cut_after(count)
            daemon.wait(lambda: proxy.cuts > 0, "the cut")
            time.sleep(0.5)
        proxy.stall()
        time.sleep(1.5)
        proxy.resume()
        proxy.stall(Direction.UP)
        time.sleep(1)
        proxy.resume()
        proxy.delay(0.1)
        time.sleep(1)
        proxy.refuse()
        proxy.cut()
        daemon.wait(lambda: not is_ready(daemon), "the end of readiness", 60)
        proxy.accept()
        daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
        proxy.delay(0)
    synced.assert_equal()


@pytest.mark.slow
def test_a_silent_postgres_is_noticed(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    proxy_to: ProxyTo,
) -> None:
    """TCP says nothing of a peer that keeps the connection open and is gone behind it."""
    proxy = proxy_to(database18.server.host, database18.server.port)
    create_items(database18, 10)
    database18.execute(f'ALTER DATABASE "{database18.name}" SET wal_sender_timeout = 1000')
    synced = sync_table(
        database18, "items", qdrant=qdrant_private, pg_url=database18.url_through(proxy)
    )
    daemon = synced.daemon
    time.sleep(3)
    assert daemon.metric("cdc_sync_source_reconnects_total") == 0, "an idle stream is no silence"
    proxy.stall()
    daemon.wait(lambda: not is_ready(daemon), "the end of readiness", 60)
    message = check(daemon, "/readyz", "source")[1]
    assert message is not None
    assert "has not answered" in message
    proxy.resume()
    database18.execute("UPDATE items SET note = 'back'")
    daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
    synced.assert_equal()


@pytest.mark.slow
def test_the_way_to_qdrant_fails(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    proxy_to: ProxyTo,
) -> None:
    host, _, port = qdrant_private.url.removeprefix("http://").rpartition(":")
    proxy = proxy_to(host, int(port))
    table = create_loaded(database18)
    synced = sync_table(
        database18,
        "everything",
        qdrant=qdrant_private,
        qdrant_url=f"http://{proxy.host}:{proxy.port}",
        qdrant_settings={"timeout_seconds": 2},
    )
    daemon = synced.daemon
    with under_load(database18, table, seed=7):
        for count in (1, 1_000, 300_000):
            proxy.cut_after(count, Direction.UP)
            time.sleep(0.7)
        proxy.cut_after(100, Direction.DOWN)
        time.sleep(0.7)
        proxy.delay(0.1)
        time.sleep(1)
        proxy.stall()
        daemon.wait(lambda: not is_ready(daemon), "the end of readiness", 60)
        proxy.resume()
        proxy.delay(0)
        daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
        proxy.refuse()
        proxy.cut()
        daemon.wait(lambda: not is_ready(daemon), "the end of readiness", 60)
        proxy.accept()
        daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
    synced.assert_equal()
