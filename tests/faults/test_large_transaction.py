"""Memory is bounded by configuration, not by the transaction (invariant 6)."""

from __future__ import annotations

import pytest

from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantTarget

ROWS = 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.requirement("R42")
def test_a_million_rows_in_one_transaction(
    database18: Database, sync_table: SyncTable, qdrant: QdrantTarget
) -> None:
    database18.execute("CREATE TABLE small (id bigint PRIMARY KEY, n int, emb vector(2))")
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
    assert peak < 300 * 1000 * 1000, f"peak RSS {peak / 1e6:.0f} MB"
    client = qdrant.client()
    assert client.count(synced.collection, exact=True).count == ROWS + 1
    found = client.retrieve(synced.collection, [0, 5, 999_999], with_payload=True)
    assert {p.id: (p.payload or {})["n"] for p in found} == {0: -1, 5: -1, 999_999: 99}


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_ten_million_changes_in_one_transaction(
    database18: Database, sync_table: SyncTable, qdrant: QdrantTarget
) -> None:
    """Every row is updated a thousand times; the connection is held through all of it."""
    database18.execute("CREATE TABLE small (id bigint PRIMARY KEY, n int, emb vector(2))")
    database18.execute(
        "INSERT INTO small SELECT i, 0, ARRAY[i, 1]::vector(2) FROM generate_series(1, 10000) i"
    )
    synced = sync_table(database18, "small", qdrant=qdrant)
    synced.daemon.wait_caught_up()
    before = synced.daemon.metric("cdc_sync_source_reconnects_total")
    database18.execute("DO $$ BEGIN FOR i IN 1..1000 LOOP UPDATE small SET n = i; END LOOP; END $$")
    synced.daemon.wait_caught_up(timeout=1500)
    peak = synced.daemon.peak_rss_bytes()
    assert peak < 300 * 1000 * 1000, f"peak RSS {peak / 1e6:.0f} MB"
    assert synced.daemon.metric("cdc_sync_source_reconnects_total") == before
    synced.assert_equal()
