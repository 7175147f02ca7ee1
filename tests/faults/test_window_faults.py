"""A window of the copy is cut off: Qdrant goes away in the middle of it, or Postgres shuts down."""

from __future__ import annotations

import time

import pytest

from cdc_sync.demo.embedded import PostgresServer
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.ledger_log import Event, check_ledger, count, logged_events
from tests.support.proxy import ProxyTo
from tests.support.qdrant_control import QdrantProcess
from tests.support.windows import EUCLID, create_paged

ROWS = 2_000
CHUNKS = -(-ROWS // 128)


def make(
    synced_table: SyncTable, database: Database, qdrant: QdrantProcess, **options: object
) -> Synced:
    create_paged(database, ROWS)
    return synced_table(database, "docs", qdrant=qdrant, start=False, **EUCLID, **options)


def events(synced: Synced) -> list[Event]:
    return logged_events(synced.daemon.log_path)


def in_a_window_under_the_stream(synced: Synced) -> None:
    """Until chunks of a window are being copied while the slot is held; some are on record."""

    def reached() -> bool:
        seen = [event["event"] for event in events(synced)]
        return (
            "streaming_started" in seen
            and "chunk_copied" in seen[seen.index("streaming_started") :]
            and "window_closed" not in seen
        )

    synced.daemon.wait(reached, "a window under the stream")


def slot_active(database: Database, slot: str) -> bool:
    query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
    return database.execute(query, (slot,)) == [(True,)]


def let_go(synced: Synced, seconds: float) -> None:
    """The walsender goes; it stays away for as long as Qdrant does."""
    slot = synced.daemon.slot
    synced.daemon.wait(lambda: not slot_active(synced.database, slot), "letting go", seconds)
    senders = "SELECT count(*) FROM pg_stat_replication"
    synced.daemon.wait(lambda: synced.database.execute(senders) == [(0,)], "its end", 2)


def stop_fast(server: PostgresServer, seconds: float) -> None:
    started = time.monotonic()
    server.stop("fast", timeout_seconds=60)
    assert time.monotonic() - started < seconds


def assert_resumed(synced: Synced) -> None:
    """Every chunk was copied, and none again that was on record."""
    synced.assert_equal()
    seen = events(synced)
    report = check_ledger(seen)
    assert report.faults == []
    assert CHUNKS <= report.chunks["public.docs"] <= CHUNKS + 8
    assert count(seen, "copy_started") == 1
    assert count(seen, "copy_restarted") == 0


#: In worker processes; in the daemon's own is for the campaign.
WORKERS = [
    pytest.param(2, id="processes"),
    pytest.param(1, id="in_process", marks=pytest.mark.campaign),
]


@pytest.mark.slow(seconds=30)
@pytest.mark.requirement("R7")
@pytest.mark.parametrize("workers", WORKERS)
def test_qdrant_goes_away_in_the_middle_of_a_window(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    workers: int,
) -> None:
    database, server = private_database, private_database.server
    synced = make(
        sync_table,
        database,
        qdrant_private,
        pipeline={"let_go_seconds": 2},
        migration={
            "num_workers": workers,
            "window_seconds": 3.0,
            "chunk_rows": 100,
            "batch_delay": 600 * workers,
        },
    )
    synced.daemon.start(wait=False)
    in_a_window_under_the_stream(synced)
    qdrant_private.kill()
    database.execute("UPDATE docs SET n = -1 WHERE id % 7 = 0; DELETE FROM docs WHERE id % 50 = 0")
    # Qdrant is asked every two seconds.
    let_go(synced, 12)
    time.sleep(2)
    assert not slot_active(database, synced.daemon.slot)
    assert count(events(synced), "slot_let_go") == 1
    assert synced.daemon.get("/livez")[0] == 200
    stop_fast(server, 8)
    server.start()
    database.execute("UPDATE docs SET note = 'later' WHERE id % 9 = 0")
    qdrant_private.restart()
    synced.daemon.wait_state("streaming", 90)
    assert_resumed(synced)


@pytest.mark.campaign
@pytest.mark.requirement("R7")
@pytest.mark.parametrize("workers", WORKERS)
def test_a_network_that_swallows_everything_in_the_middle_of_a_window(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    proxy_to: ProxyTo,
    workers: int,
) -> None:
    """Nothing is refused and nothing fails before its deadline; requests are in flight."""
    proxy = proxy_to("127.0.0.1", int(qdrant_private.url.rpartition(":")[2]))
    synced = make(
        sync_table,
        private_database,
        qdrant_private,
        qdrant_url=f"http://{proxy.host}:{proxy.port}",
        pipeline={"let_go_seconds": 2},
        migration={
            "num_workers": workers,
            "window_seconds": 3.0,
            "chunk_rows": 100,
            "batch_delay": 300 * workers,
        },
    )
    synced.daemon.start(wait=False)
    in_a_window_under_the_stream(synced)
    proxy.stall()
    private_database.execute("UPDATE docs SET n = -1 WHERE id % 7 = 0")
    # Ten seconds without an answer are none.
    let_go(synced, 20)
    stop_fast(private_database.server, 8)
    private_database.server.start()
    proxy.resume()
    synced.daemon.wait_state("streaming", 120)
    assert_resumed(synced)


@pytest.mark.campaign
@pytest.mark.requirement("R7")
@pytest.mark.parametrize("workers", WORKERS)
def test_a_fast_shutdown_in_the_middle_of_a_healthy_window(
    private_database: Database,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
    workers: int,
) -> None:
    """Workers that rest between two batches ask nothing of Postgres meanwhile."""
    database, server = private_database, private_database.server
    synced = make(
        sync_table,
        database,
        qdrant_private,
        migration={"num_workers": workers, "window_seconds": 1.0, "chunk_rows": 100},
    )
    daemon = synced.daemon
    # The first window copies a chunk a worker; the second has hardly begun.
    with_delay(synced, 8_000)
    daemon.start(wait=False)
    daemon.wait(lambda: count(events(synced), "window_opened") == 2, "the second window")
    held = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdc_sync copy'"
    daemon.wait(lambda: database.execute(held) == [(workers,)], "its workers")
    assert slot_active(database, daemon.slot)
    database.execute("UPDATE docs SET n = -1 WHERE id % 7 = 0")
    # The workers have read and written their chunk, and rest.
    time.sleep(1)
    stop_fast(server, 4)
    server.start()
    daemon.kill()
    with_delay(synced, 0)
    daemon.start(wait=False)
    daemon.wait_state("streaming", 90)
    assert_resumed(synced)


def with_delay(synced: Synced, milliseconds: int) -> None:
    """Configure how long workers rest, for the next start."""
    path = synced.daemon.config
    lines = [x for x in path.read_text().splitlines() if not x.startswith("batch_delay")]
    lines.insert(lines.index("[migration]") + 1, f"batch_delay = {milliseconds}")
    path.write_text("\n".join(lines) + "\n")
