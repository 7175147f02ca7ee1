"""Memory is bounded by configuration, not by the transaction (invariant 6)."""

from __future__ import annotations

import pytest

from tests.support.daemon import Daemon
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantTarget

MB = 1_000_000
ROWS = 1_000_000


def small_table(database: Database) -> None:
    database.execute("CREATE TABLE small (id bigint PRIMARY KEY, n int, emb vector(2))")


def spilled_bytes(database: Database, daemon: Daemon) -> int:
    """What decoding has written to the server's disk."""
    query = "SELECT spill_bytes FROM pg_stat_replication_slots WHERE slot_name = %s"
    ((found,),) = database.execute(query, (daemon.slot,))
    return int(str(found))


@pytest.mark.requirement("R42")
def test_a_transaction_of_more_bytes_than_may_be_held(
    database18: Database, sync_table: SyncTable, qdrant: QdrantTarget
) -> None:
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, body text, emb vector(2))")
    database18.execute("INSERT INTO docs VALUES (0, '', '[1,2]')")
    synced = sync_table(database18, "docs", qdrant=qdrant, pipeline={"batch_bytes": 1 << 20})
    daemon = synced.daemon
    daemon.wait_caught_up()
    before = daemon.peak_rss_bytes()
    # 120 MB in 15,000 rows, on the wire and as they would be held; in the WAL, too.
    database18.execute("ALTER TABLE docs ALTER body SET STORAGE plain")
    database18.execute(
        "INSERT INTO docs SELECT i, repeat('x', 8000), ARRAY[i, 1]::vector(2)"
        " FROM generate_series(1, 15000) i"
    )
    daemon.wait_caught_up(timeout=150)
    growth = daemon.peak_rss_bytes() - before
    assert growth < 60 * MB, f"grew by {growth / MB:.0f} MB"
    assert spilled_bytes(database18, daemon) > 0, "the server holds what it has not sent"
    assert qdrant.client().count(synced.collection, exact=True).count == 15_001


@pytest.mark.slow(seconds=40)
@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.requirement("R42")
def test_a_million_rows_in_one_transaction(
    database18: Database, sync_table: SyncTable, qdrant: QdrantTarget
) -> None:
    small_table(database18)
    database18.execute("INSERT INTO small VALUES (0, 0, '[1,2]')")
    synced = sync_table(database18, "small", qdrant=qdrant)
    database18.execute(
        "INSERT INTO small SELECT i, i %% 100, ARRAY[i, 1]::vector(2) "
        "FROM generate_series(1, %s) i",
        (ROWS,),
    )
    database18.execute("UPDATE small SET n = -1 WHERE id <= 10")
    synced.daemon.wait_caught_up(timeout=500)
    peak = synced.daemon.peak_rss_bytes()
    assert peak < 300 * MB, f"peak RSS {peak / MB:.0f} MB"
    client = qdrant.client()
    assert client.count(synced.collection, exact=True).count == ROWS + 1
    found = client.retrieve(synced.collection, [0, 5, 999_999], with_payload=True)
    assert {p.id: (p.payload or {})["n"] for p in found} == {0: -1, 5: -1, 999_999: 99}


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_ten_million_changes_in_one_transaction(
    database18: Database, sync_table: SyncTable, qdrant: QdrantTarget
) -> None:
    """Every row is updated two hundred times; the connection is held through all of it.

    Each update looks at all dead versions, hence not fewer rows; and a batch takes all of them, so
    that it is not the engine behind the test server that is measured.
    """
    small_table(database18)
    database18.execute(
        "INSERT INTO small SELECT i, 0, ARRAY[i, 1]::vector(2) FROM generate_series(1, 50000) i"
    )
    synced = sync_table(database18, "small", qdrant=qdrant, pipeline={"batch_rows": 100_000})
    synced.daemon.wait_caught_up()
    before = synced.daemon.metric("cdc_sync_source_reconnects_total")
    database18.execute("DO $$ BEGIN FOR i IN 1..200 LOOP UPDATE small SET n = i; END LOOP; END $$")
    synced.daemon.wait_caught_up(timeout=1500)
    peak = synced.daemon.peak_rss_bytes()
    assert peak < 300 * MB, f"peak RSS {peak / MB:.0f} MB"
    assert synced.daemon.metric("cdc_sync_source_reconnects_total") == before
    synced.assert_equal()


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["stream", "copy"])
@pytest.mark.parametrize(("megabytes", "written", "times"), [(100, False, 4.5), (100, True, 6.5)])
def test_a_row_of_a_hundred_megabytes(
    database18: Database,
    sync_table: SyncTable,
    qdrant: QdrantTarget,
    how: str,
    megabytes: int,
    written: bool,
    times: float,
) -> None:
    """It takes a few times its size, as docs/failures.md says; or a little less, and becomes a dead
    letter."""
    large = f"SELECT 1, repeat('x', {megabytes * MB}), '[1,2]'"
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, body text, emb vector(2))")
    database18.execute("INSERT INTO docs VALUES (0, '', '[1,2]')")
    if how == "copy":
        database18.execute(f"INSERT INTO docs {large}")
    synced = sync_table(
        database18,
        "docs",
        qdrant=qdrant,
        qdrant_settings={"max_row_bytes": 2 * megabytes * MB} if written else None,
        migration={"num_workers": 1},
    )
    daemon = synced.daemon
    if how == "stream":
        database18.execute(f"INSERT INTO docs {large}")
    daemon.wait_caught_up(timeout=500)
    assert daemon.peak_rss_bytes() < (150 + times * megabytes) * MB
    assert daemon.metric("cdc_sync_source_reconnects_total") == 0
    assert qdrant.client().count(synced.collection, exact=True).count == (2 if written else 1)
    assert daemon.metric("cdc_sync_dead_letters_pending") == (0 if written else 1)
