"""The daemon's life: signals in every state, a second one on the same slot, workers that die, rows
that cannot be written, and what it says about all of it."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.daemon import Daemon
from tests.support.fault_cases import (
    check,
    create_items,
    create_loaded,
    is_ready,
    slot_active,
    twin,
    under_load,
    until,
)
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.proxy import ProxyTo, TcpProxy
from tests.support.qdrant_control import Faults, QdrantProcess

pytestmark = pytest.mark.timeout(120)

#: A short grace, and what a loaded machine may need on top of it.
GRACE = {"shutdown_timeout_seconds": 2}
LIMIT_SECONDS = 6.0


@pytest.fixture
def faults(qdrant_private: QdrantProcess) -> Faults:
    return qdrant_private.script


def writing(daemon: Daemon, faults: Faults, collection: str) -> None:
    """Wait until rows of the copy are being written."""
    daemon.wait(
        lambda: any(e["collection"] == collection and e["points"] for e in faults.log()),
        "the copy",
    )


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
    create_loaded(database18, rows=1500)
    synced = sync_table(
        database18,
        "everything",
        qdrant=qdrant_private,
        start=False,
        pipeline={"copy_workers": workers, **GRACE},
    )
    faults.slow("Upsert", 0.2, times=10_000)
    synced.daemon.start(wait=False)
    writing(synced.daemon, faults, synced.collection)
    assert synced.daemon.status()["state"] == "snapshotting"
    terminate(synced.daemon)
    faults.clear()
    # What is gone by the next copy must not be left from the last one.
    database18.execute("DELETE FROM everything WHERE id % 3 = 0")
    synced.daemon.start()
    synced.assert_equal()


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


def test_sigterm_finishes_the_batch_in_flight_and_confirms_it(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private)
    daemon = synced.daemon
    faults.hold("write")
    database18.execute("UPDATE items SET note = 'in flight'")
    ((end,),) = database18.execute("SELECT pg_current_wal_insert_lsn()::text")
    daemon.wait(lambda: faults.held() > 0, "the request")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_state("draining")
    assert daemon.get("/readyz")[0] == 503
    faults.release()
    assert daemon.process.wait(LIMIT_SECONDS) == 0
    confirmed = database18.execute(
        "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s",
        (end, daemon.slot),
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


def test_the_standby_knows_what_the_other_one_parked(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, tmp_path: Path
) -> None:
    create_free(database18, 10)
    synced = sync_free(database18, sync_table, qdrant_private, start=True)
    with twin(synced, tmp_path / "second", table_settings={"dimensions": {"free": 3}}) as second:
        second.start(wait=False)
        second.wait_state("standby")
        database18.execute("INSERT INTO free VALUES (100, 'poison', '[1,2,3,4]')")
        synced.daemon.wait_caught_up()
        assert len(dead_letters(synced)) == 1
        synced.daemon.kill()
        second.wait_state("streaming", 15)
        assert second.metric("cdc_sync_dead_letters_pending") == 1
        database18.execute("UPDATE free SET free = '[1,2,3]' WHERE id = 100")
        second.wait_caught_up()
        assert dead_letters(synced) == []
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
    synced = sync_table(database18, "everything", qdrant=qdrant_private, start=False)
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
    create_loaded(database18, rows=1500)
    synced = sync_table(database18, "everything", qdrant=qdrant_private, start=False)
    faults.slow("Upsert", 0.3, times=10_000)
    with twin(synced, tmp_path / "second") as second:
        synced.daemon.start(wait=False)
        writing(synced.daemon, faults, synced.collection)
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
    create_loaded(database18, rows=1500)
    synced = sync_table(database18, "everything", qdrant=qdrant_private, start=False)
    faults.slow("Upsert", 0.2, times=10_000)
    synced.daemon.start(wait=False)
    writing(synced.daemon, faults, synced.collection)
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
    create_loaded(database18, rows=1500)
    synced = sync_table(database18, "everything", qdrant=qdrant_private, start=False)
    faults.slow("Upsert", 0.5, times=10_000)
    synced.daemon.start(wait=False)
    writing(synced.daemon, faults, synced.collection)
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


# -- rows that cannot be written


def create_free(database: Database, rows: int) -> None:
    """A table whose vector column takes any dimension (R17)."""
    database.execute("CREATE TABLE free (id bigint PRIMARY KEY, note text, free vector)")
    database.execute(
        "INSERT INTO free SELECT i, 'note ' || i, ARRAY[i, 1, 2]::vector"
        " FROM generate_series(1, %s) i",
        (rows,),
    )


def sync_free(
    database: Database,
    sync_table: SyncTable,
    qdrant: QdrantProcess,
    *,
    start: bool,
    limit: int = 1000,
) -> Synced:
    return sync_table(
        database,
        "free",
        qdrant=qdrant,
        start=start,
        dimensions={"free": 3},
        pipeline={"dead_letter_limit": limit},
        compare_options={"where": "vector_dims(free) = 3"},
    )


def dead_letters(synced: Synced) -> list[dict[str, Any]]:
    """The dead letters on record, as Qdrant holds them."""
    assert synced.qdrant is not None
    points, _ = synced.qdrant.client().scroll("_cdc_sync", limit=100, with_payload=True)
    found = [point.payload or {} for point in points]
    return [record for record in found if record.get("kind") == "dead_letter"]


CANARY = f"canary-{secrets.token_hex(8)}"


@pytest.mark.requirement("R17")
def test_poison_among_good_rows_in_the_copy_and_in_the_stream(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    create_free(database18, 1000)
    database18.execute("INSERT INTO free VALUES (1001, %s, '[9.125,2,3,4]')", (CANARY,))
    synced = sync_free(database18, sync_table, qdrant_private, start=True)
    daemon = synced.daemon
    synced.assert_equal()
    (letter,) = dead_letters(synced)
    assert (letter["table"], letter["key"]) == ("public.free", "1001")
    assert "4" in letter["reason"]
    assert daemon.metric("cdc_sync_dead_letters_total", table="public.free") == 1
    assert daemon.metric("cdc_sync_dead_letters_pending", table="public.free") == 1
    with database18.connect(autocommit=False) as connection:
        connection.execute(
            "INSERT INTO free SELECT i, 'more', ARRAY[i, 1, 2]::vector"
            " FROM generate_series(2000, 2999) i"
        )
        connection.execute("INSERT INTO free VALUES (3000, %s, '[9.125]')", (CANARY,))
        connection.commit()
    synced.assert_equal()
    assert {letter["key"] for letter in dead_letters(synced)} == {"1001", "3000"}
    assert daemon.metric("cdc_sync_dead_letters_total", table="public.free") == 2
    (table,) = daemon.status()["tables"]
    assert table["dead_letters"] == 2
    events = [e for e in daemon.events() if e["event"] == "dead_letter"]
    assert len(events) == 2
    assert all(e["reason"] and e["table"] == "public.free" for e in events)
    assert CANARY not in daemon.log()
    assert "9.125" not in daemon.log()

    database18.execute("UPDATE free SET free = '[1,2,3]' WHERE id = 3000")
    synced.assert_equal()
    assert [letter["key"] for letter in dead_letters(synced)] == ["1001"]
    database18.execute("DELETE FROM free WHERE id = 1001")
    synced.assert_equal()
    assert dead_letters(synced) == []
    assert daemon.metric("cdc_sync_dead_letters_pending", table="public.free") == 0


def test_a_dead_letter_is_not_released_by_an_update_that_leaves_the_bad_value(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    """The update comes without the vector, which is TOASTed: what it leaves unchanged is not what
    Qdrant holds."""
    database18.execute("CREATE TABLE free (id bigint PRIMARY KEY, note text, free vector)")
    database18.execute("INSERT INTO free VALUES (1, 'a', array_fill(1, ARRAY[640])::vector)")
    synced = sync_table(
        database18,
        "free",
        qdrant=qdrant_private,
        dimensions={"free": 640},
        compare_options={"where": "vector_dims(free) = 640"},
    )
    database18.execute("UPDATE free SET free = array_fill(2, ARRAY[641])::vector")
    synced.daemon.wait_caught_up()
    assert len(dead_letters(synced)) == 1
    database18.execute("UPDATE free SET note = 'b'")
    synced.daemon.wait_caught_up()
    assert len(dead_letters(synced)) == 1
    database18.execute("UPDATE free SET free = array_fill(3, ARRAY[640])::vector")
    synced.assert_equal()
    assert dead_letters(synced) == []


def test_qdrant_refuses_a_batch_then_a_point(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_items(database18, 1000)
    synced = sync_table(database18, "items", qdrant=qdrant_private)
    daemon = synced.daemon
    # Whole requests are refused until they have been halved a few times; then all is taken.
    faults.reject("write", "INVALID_ARGUMENT", "Wrong input: scripted", times=12)
    database18.execute("UPDATE items SET note = 'changed'")
    synced.assert_equal()
    assert faults.queued() == 0
    assert daemon.metric("cdc_sync_dead_letters_total") == 0
    # A point alone: this is the one.
    faults.reject("write", "INVALID_ARGUMENT", f'Wrong input: "{CANARY}" [1.5, 2.5]')
    database18.execute("UPDATE items SET note = 'refused' WHERE id = 5")
    daemon.wait_caught_up()
    (letter,) = dead_letters(synced)
    assert letter["key"] == "5"
    assert "Wrong input" in letter["reason"]
    assert CANARY not in letter["reason"] + daemon.log()
    database18.execute("UPDATE items SET note = 'corrected' WHERE id = 5")
    synced.assert_equal()
    assert dead_letters(synced) == []


@pytest.mark.parametrize("where", ["copy", "stream"])
def test_too_many_dead_letters_end_it_with_65(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, where: str
) -> None:
    create_free(database18, 50)
    poison = "INSERT INTO free SELECT i, 'poison', '[1]' FROM generate_series(100, 103) i"
    synced = sync_free(database18, sync_table, qdrant_private, start=False, limit=3)
    if where == "copy":
        database18.execute(poison)
        synced.daemon.start(wait=False)
    else:
        synced.daemon.start()
        database18.execute(poison)
    assert synced.daemon.process is not None
    assert synced.daemon.process.wait(30) == 65
    assert "pipeline.dead_letter_limit" in synced.daemon.log()
    assert not slot_active(database18, synced.daemon.slot)
    assert len(dead_letters(synced)) == 4
    database18.execute("UPDATE free SET free = '[1,2,3]' WHERE id > 101")
    database18.execute("DELETE FROM free WHERE id IN (100, 101)")
    synced.daemon.start()
    synced.assert_equal()
    assert dead_letters(synced) == []


# -- what it says


def test_the_endpoint_of_a_running_daemon(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    create_items(database18, 10)
    synced = sync_table(database18, "items", qdrant=qdrant_private)
    daemon = synced.daemon
    database18.execute("UPDATE items SET note = 'x' WHERE id <= 4")
    daemon.wait_caught_up()
    assert daemon.get("/livez")[0] == 200
    assert daemon.get("/readyz")[0] == 200
    families = {f.name: f for f in text_string_to_metric_families(daemon.get("/metrics")[1])}
    samples = {s.name: s for f in families.values() for s in f.samples}
    assert families["cdc_sync_changes"].type == "counter"
    assert samples["cdc_sync_source_up"].value == 1
    assert samples["cdc_sync_sink_up"].value == 1
    assert daemon.metric("cdc_sync_changes_total", op="update") == 4
    assert daemon.metric("cdc_sync_state", state="streaming") == 1
    assert daemon.metric("cdc_sync_snapshot_rows_total") == 10
    status = daemon.status()
    assert (status["state"], status["alive"], status["ready"]) == ("streaming", True, True)
    (table,) = status["tables"]
    assert (table["name"], table["collection"]) == ("public.items", synced.collection)
    assert (table["rows_copied"], table["changes_applied"]) == (10, 4)
    assert status["positions"]["applied"] is not None
    assert daemon.get("/nothing")[0] == 404


def test_no_secret_and_no_value_is_ever_said(
    database18: Database, sync_table: SyncTable, tmp_path: Path, proxy_to: ProxyTo
) -> None:
    api_key = f"key-{secrets.token_hex(8)}"
    password = urlsplit(database18.url).password
    assert password
    said: list[str] = []
    qdrant = QdrantProcess(tmp_path / "qdrant", api_key=api_key)
    try:
        proxy = proxy_to(database18.server.host, database18.server.port)
        create_free(database18, 20)
        database18.execute(
            "INSERT INTO free VALUES (100, %s, '[1,2,3]'), (101, %s, '[1]')", (CANARY, CANARY)
        )
        synced = sync_table(
            database18,
            "free",
            qdrant=qdrant,
            start=False,
            pg_url=database18.url_through(proxy),
            dimensions={"free": 3},
        )
        daemon = synced.daemon
        # In the walsender this filter fails on the row, and Postgres quotes the value.
        database18.execute("ALTER TABLE free REPLICA IDENTITY FULL")
        database18.execute(
            f'CREATE PUBLICATION "{daemon.slot}" FOR TABLE free WHERE (id < 1000 OR pg_size_bytes(note) > 0)'
        )
        daemon.start()
        listen = listener(daemon, said)
        qdrant.script.reject("write", "INVALID_ARGUMENT", f'Wrong input: "{CANARY}" [1.5]')
        qdrant.script.reject("write", "INTERNAL", f'Service error: {{"note": "{CANARY}"}}')
        database18.execute("UPDATE free SET note = note || 'x' WHERE id = 100")
        daemon.wait_caught_up()
        listen()
        proxy.refuse()
        proxy.cut()
        daemon.wait(lambda: not is_ready(daemon), "the end of readiness")
        listen()
        proxy.accept()
        qdrant.script.reject("write", "UNAUTHENTICATED", f"Invalid API key {api_key}")
        daemon.wait(lambda: is_ready(daemon), "readiness again", 20)
        database18.execute("INSERT INTO free VALUES (102, %s, '[1,2]')", (CANARY,))
        assert daemon.process is not None
        assert daemon.process.wait(30) == 77
        daemon.start()
        listen = listener(daemon, said)
        listen()
        database18.execute("INSERT INTO free VALUES (1000, %s, '[1,2,3]')", (CANARY,))
        assert daemon.process.wait(30) != 0
        said.append(daemon.log_path.read_text())
    finally:
        qdrant.close()
    text = "\n".join(said)
    assert "dead_letter" in text
    assert "UNAUTHENTICATED" in text
    assert "a value is refused" in text
    for secret in (api_key, password, CANARY):
        assert secret not in text


def listener(daemon: Daemon, said: list[str]) -> Callable[[], None]:
    def listen() -> None:
        said.extend(daemon.get(path)[1] for path in ("/metrics", "/status", "/readyz", "/livez"))

    return listen
