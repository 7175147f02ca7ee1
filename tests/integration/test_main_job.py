"""The main job: a table of every type is copied under writers, followed, and ends equal value by
value.

``make test`` runs it small; the campaign (``make campaign``) with 100,000 rows of 768 dimensions on
both Postgres versions, into the server and into an embedded database.
"""

from __future__ import annotations

import pytest

from tests.support.everything import KeyKind
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.workload import Writer, create_everything_table, load


def run_job(
    database: Database,
    sync_table: SyncTable,
    target: str,
    *,
    rows: int,
    dim: int,
    after_copy_seconds: float,
    key: KeyKind = "bigint",
) -> Synced:
    """Load, start four writers, start the daemon under them, let them go on after the copy."""
    with database.connect() as connection:
        table = create_everything_table(connection, "everything", dim=dim, key=key)
        load(connection, table, rows, seed=1)
        connection.execute("ANALYZE everything")
    synced = sync_table(
        database, "everything", target=target, start=False, migration={"num_workers": 2}
    )
    writers = [
        Writer(database.url, table, seed=n, key_space=2 * rows, pause_seconds=0.002)
        for n in range(1, 5)
    ]
    for writer in writers:
        writer.start()
    try:
        synced.daemon.start(wait=False)
        synced.daemon.wait_state("streaming", timeout=900)
        synced.daemon.wait(_after(after_copy_seconds), "the writers' time", after_copy_seconds + 60)
    finally:
        stats = [writer.finish() for writer in writers]
    assert sum(s.committed for s in stats) > 50
    return synced


def _after(seconds: float):  # type: ignore[no-untyped-def]
    import time

    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.requirement("R67", "R83", "R19", "R21")
def test_copy_under_writers_ends_equal(database18: Database, sync_table: SyncTable) -> None:
    synced = run_job(database18, sync_table, "server", rows=2_000, dim=768, after_copy_seconds=4)
    synced.assert_equal()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.requirement("R67", "R83", "R19", "R21")
def test_copy_into_edge_under_writers_ends_equal(
    database16: Database, sync_table: SyncTable
) -> None:
    synced = run_job(database16, sync_table, "edge", rows=2_000, dim=768, after_copy_seconds=4)
    synced.assert_equal()


@pytest.mark.parametrize(
    "key", ["composite", *(pytest.param(k, marks=pytest.mark.campaign) for k in ("uuid", "text"))]
)
def test_other_keys(database18: Database, sync_table: SyncTable, key: KeyKind) -> None:
    synced = run_job(
        database18, sync_table, "server", rows=500, dim=32, after_copy_seconds=3, key=key
    )
    synced.assert_equal()


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["server", "edge"])
def test_100_000_rows(database: Database, sync_table: SyncTable, target: str) -> None:
    synced = run_job(database, sync_table, target, rows=100_000, dim=768, after_copy_seconds=30)
    if synced.daemon.running:
        synced.daemon.wait_caught_up(timeout=900)
    synced.assert_equal()
