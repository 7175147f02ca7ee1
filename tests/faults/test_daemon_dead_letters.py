"""Rows that cannot be written become dead letters and the rest goes on (invariant 8); and what the
daemon says about its work holds no secret and no value (invariant 9)."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.daemon import Daemon
from tests.support.fault_cases import create_items, is_ready, slot_active, twin
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.proxy import ProxyTo
from tests.support.qdrant_control import Faults, QdrantProcess

pytestmark = pytest.mark.timeout(120)

CANARY = f"canary-{secrets.token_hex(8)}"


@pytest.fixture
def faults(qdrant_private: QdrantProcess) -> Faults:
    return qdrant_private.script


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
    # While the first is written the others come together: of a few rows that came alone each would
    # be refused by itself.
    faults.hold("write")
    database18.execute("UPDATE items SET note = 'first' WHERE id = 1000")
    daemon.wait(lambda: faults.held() > 0, "the first")
    faults.reject("write", "INVALID_ARGUMENT", "Wrong input: scripted", times=12)
    database18.execute("UPDATE items SET note = 'changed'")
    received = functools.partial(daemon.metric, "cdc_sync_received_messages_total", kind="update")
    daemon.wait(lambda: received() > 1000, "the others")
    # Whole requests are refused until they have been halved a few times; then all is taken.
    faults.release()
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
            f'CREATE PUBLICATION "{daemon.slot}" FOR TABLE free '
            "WHERE (id < 1000 OR pg_size_bytes(note) > 0)"
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
        daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
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
