"""The daemon's life: signals in every state, a second daemon on the same slot, workers that die."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.daemon import Daemon
from tests.support.fault_cases import (
    begin_slow_copy,
    check,
    create_items,
    create_loaded,
    is_ready,
    twin,
    under_load,
    until,
)
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.proxy import ProxyTo, TcpProxy
from tests.support.qdrant_control import Faults, QdrantProcess

pytestmark = pytest.mark.timeout(120)

#: A short grace, and what a loaded machine may need on top of it.
GRACE = {"shutdown_timeout_seconds": 2}
PROCESSES = {"num_workers": 2}
LIMIT_SECONDS = 6.0


@pytest.fixture
def faults(qdrant_private: QdrantProcess) -> Faults:
    return qdrant_private.script


def terminate(daemon: Daemon) -> None:
    """SIGTERM ends it in time and in good order, workers and all."""
    assert daemon.process is not None
    family = [psutil.Process(daemon.process.pid), *daemon.children()]
    started = time.monotonic()
    assert daemon.terminate(LIMIT_SECONDS) == 0, daemon.log()[-3000:]
    assert time.monotonic() - started < LIMIT_SECONDS
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


# -- SIGTERM


@pytest.mark.parametrize("how", ["refuse", "stall"])
@pytest.mark.parametrize("whom", ["postgres", "qdrant"])
def test_sigterm_while_waiting_for_a_first_connection(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    proxy_to: ProxyTo,
    whom: str,
    how: str,
) -> None:
    create_items(database18, 10)
    postgres = proxy_to(database18.server.host, database18.server.port)
    qdrant = proxy_to("127.0.0.1", urlsplit(qdrant_private.url).port or 0)
    synced = sync_table(
        database18,
        "items",
        qdrant=qdrant_private,
        start=False,
        pg_url=database18.url_through(postgres),
        qdrant_url=f"http://{qdrant.host}:{qdrant.port}",
        pipeline=GRACE,
    )
    proxy: TcpProxy = postgres if whom == "postgres" else qdrant
    proxy.refuse() if how == "refuse" else proxy.stall()
    daemon = synced.daemon.start(wait=False)
    daemon.wait(lambda: daemon.status()["state"] == "starting", "the endpoint")
    time.sleep(0.7)
    assert not is_ready(daemon)
    terminate(daemon)
    proxy.accept() if how == "refuse" else proxy.resume()
    daemon.start()
    synced.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_while_copying(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    faults: Faults,
    workers: int,
) -> None:
    synced = begin_slow_copy(
        database18,
        sync_table,
        qdrant_private,
        request_seconds=0.2,
        workers=workers,
        pipeline=GRACE,
    )
    assert synced.daemon.status()["state"] == "snapshotting"
    terminate(synced.daemon)
    faults.clear()
    # What is gone by the next copy must not be left from the last one.
    database18.execute("DELETE FROM everything WHERE id % 3 = 0")
    synced.daemon.start()
    synced.assert_equal()


@pytest.mark.slow
def test_sigterm_while_idle_and_under_load(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    table = create_loaded(database18)
    synced = sync_table(database18, "everything", qdrant=qdrant_private, pipeline=GRACE)
    terminate(synced.daemon)
    with under_load(database18, table, seed=21):
        synced.daemon.start()
        time.sleep(1)
        terminate(synced.daemon)
        time.sleep(0.3)
        synced.daemon.start()
    synced.assert_equal()


def test_sigterm_while_qdrant_is_away(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private, pipeline=GRACE)
    faults.down()
    database18.execute("UPDATE items SET note = 'away'")
    synced.daemon.wait(lambda: not is_ready(synced.daemon), "the end of readiness")
    terminate(synced.daemon)
    faults.down(False)
    synced.daemon.start()
    synced.assert_equal()


def test_sigterm_while_qdrant_holds_a_request(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private, pipeline=GRACE)
    faults.hold("write")
    database18.execute("UPDATE items SET note = 'held'")
    synced.daemon.wait(lambda: faults.held() > 0, "the request")
    terminate(synced.daemon)
    faults.release()
    synced.daemon.start()
    synced.assert_equal()


@pytest.mark.slow
def test_sigterm_while_a_table_is_read_again(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_items(database18, 10)
    synced = sync_table(
        database18, "items", qdrant=qdrant_private, pipeline=GRACE, migration=PROCESSES
    )
    faults.hold("Upsert")
    database18.execute("ALTER TABLE items ADD extra int DEFAULT 7")
    synced.daemon.wait(lambda: faults.held() > 0, "the table to be read again")
    assert synced.daemon.get("/livez")[0] == 200
    # However long that takes, it is no sign of a loop that is stuck.
    assert "writer" not in [task["name"] for task in synced.daemon.status()["tasks"]]
    terminate(synced.daemon)
    faults.release()
    database18.execute("DELETE FROM items WHERE id = 4")
    synced.daemon.start()
    until(lambda: "resync_completed" in synced.daemon.log(), "the table to be read again after all")
    synced.assert_equal()


def test_sigterm_finishes_the_batch_in_flight_and_confirms_it(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private)
    daemon = synced.daemon
    faults.hold("write")
    with database18.connect() as connection, connection.transaction():
        connection.execute("UPDATE items SET note = 'in flight'")
        # The commit comes after it; what others write after the commit would not be confirmed.
        row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
    daemon.wait(lambda: faults.held() > 0, "the request")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_state("draining")
    assert daemon.get("/readyz")[0] == 503
    faults.release()
    assert daemon.process.wait(LIMIT_SECONDS) == 0
    confirmed = database18.execute(
        "SELECT confirmed_flush_lsn > %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s",
        (row[0], daemon.slot),
    )
    assert confirmed == [(True,)]
    synced.assert_equal()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    faults: Faults,
    second: signal.Signals,
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private)
    daemon = synced.daemon
    faults.hold("write")
    database18.execute("UPDATE items SET note = 'held'")
    daemon.wait(lambda: faults.held() > 0, "the request")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_state("draining")
    time.sleep(0.5)
    assert daemon.running
    daemon.process.send_signal(second)
    assert daemon.process.wait(2) == 128 + second
    faults.release()
    daemon.start()
    synced.assert_equal()


# -- two daemons


@pytest.mark.slow
@pytest.mark.campaign
def test_a_standby_is_ready_takes_over_and_stops_in_good_order(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, tmp_path: Path
) -> None:
    table = create_loaded(database18)
    synced = sync_table(database18, "everything", qdrant=qdrant_private)
    with twin(synced, tmp_path / "second", GRACE) as second:
        second.start(wait=False)
        second.wait_state("standby")
        terminate(second)
        second.start(wait=False)
        second.wait_state("standby")
        # Long enough that its backoff has grown.
        with under_load(database18, table, seed=22):
            time.sleep(4)
            assert check(second, "/readyz", "state") == (200, "standby")
            assert second.get("/livez")[0] == 200
            assert is_ready(synced.daemon)
            synced.daemon.kill()
            killed = time.monotonic()
            second.wait_state("streaming", 15)
            assert time.monotonic() - killed < 10
        second.wait_caught_up()
        assert is_ready(second)
        synced.assert_equal()


@pytest.mark.slow
def test_an_older_batch_does_not_overwrite_what_the_successor_wrote(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    proxy_to: ProxyTo,
    faults: Faults,
    tmp_path: Path,
) -> None:
    """Qdrant refuses the first daemon's batch; while it waits to try again, it loses the slot to
    the second."""
    create_items(database18, 10)
    proxy = proxy_to(database18.server.host, database18.server.port)
    synced = sync_table(
        database18, "items", qdrant=qdrant_private, pg_url=database18.url_through(proxy)
    )
    with twin(synced, tmp_path / "second") as second:
        second.start(wait=False)
        second.wait_state("standby")
        faults.reject("write", "RESOURCE_EXHAUSTED", "Rate limit", retry_after=5)
        database18.execute("UPDATE items SET note = 'old' WHERE id = 1")
        synced.daemon.wait(
            lambda: synced.daemon.metric("cdc_sync_sink_retries_total") > 0, "the refusal"
        )
        refused = time.monotonic()
        proxy.refuse()
        proxy.cut()
        second.wait_state("streaming", 15)
        database18.execute("UPDATE items SET note = 'new' WHERE id = 1")
        second.wait_caught_up()
        # It was in time for this to prove something; and past that time nothing is overwritten.
        assert time.monotonic() - refused < 4.5
        time.sleep(6 - (time.monotonic() - refused))
        proxy.accept()
        synced.daemon.wait_state("standby")
        synced.assert_equal()


@pytest.mark.slow
def test_two_started_together_copy_once(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    faults: Faults,
    tmp_path: Path,
) -> None:
    create_loaded(database18, rows=600)
    synced = sync_table(
        database18, "everything", qdrant=qdrant_private, start=False, migration=PROCESSES
    )
    faults.slow("Upsert", 0.1, times=10_000)
    with twin(synced, tmp_path / "second") as second:
        pair = [synced.daemon.start(wait=False), second.start(wait=False)]
        until(
            lambda: sorted(d.status()["state"] for d in pair) == ["standby", "streaming"],
            "one streaming and one standby",
            40,
        )
        copied = [any(e["event"] == "copy_started" for e in d.events()) for d in pair]
        assert sorted(copied) == [False, True]
        faults.clear()
        streaming = next(d for d in pair if d.status()["state"] == "streaming")
        database18.execute("DELETE FROM everything WHERE id % 2 = 0")
        streaming.wait_caught_up()
        streaming.kill()
        other = next(d for d in pair if d is not streaming)
        other.wait_state("streaming", 15)
        synced.assert_equal()


@pytest.mark.slow
def test_a_waiting_daemon_takes_over_an_unfinished_copy(
    database18: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    faults: Faults,
    tmp_path: Path,
) -> None:
    synced = begin_slow_copy(database18, sync_table, qdrant_private, request_seconds=0.3)
    with twin(synced, tmp_path / "second") as second:
        second.start(wait=False)
        second.wait_state("standby")
        assert second.get("/readyz")[0] == 200
        synced.daemon.kill()
        faults.clear()
        database18.execute("DELETE FROM everything WHERE id % 3 = 0")
        second.wait_state("streaming")
        synced.assert_equal()


# -- workers


@pytest.mark.slow
def test_a_worker_is_killed_during_the_copy(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    synced = begin_slow_copy(database18, sync_table, qdrant_private, request_seconds=0.2)
    workers = copy_workers(synced.daemon)
    assert len(workers) == 2
    workers[0].kill()
    synced.daemon.wait(lambda: "copy_workers_lost" in synced.daemon.log(), "the loss to be seen")
    faults.clear()
    synced.daemon.wait_state("streaming")
    synced.assert_equal()
    assert copy_workers(synced.daemon) == []


@pytest.mark.slow
def test_no_worker_outlives_a_killed_daemon(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    synced = begin_slow_copy(database18, sync_table, qdrant_private, request_seconds=0.5)
    children = synced.daemon.children()
    assert len(children) >= 2
    synced.daemon.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    faults.clear()
    database18.execute("DELETE FROM everything WHERE id % 3 = 0")
    synced.daemon.start()
    synced.assert_equal()


def copy_workers(daemon: Daemon) -> list[psutil.Process]:
    return [c for c in daemon.children() if "spawn_main" in " ".join(c.cmdline())]
