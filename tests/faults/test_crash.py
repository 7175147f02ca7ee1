"""kill -9 of the daemon at random moments, under load, ends without a difference (invariants 1 and
3)."""

from __future__ import annotations

import random
import time

import pytest

from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.workload import Writer, create_everything_table, load


def crash_loop(
    database: Database, sync_table: SyncTable, target: str, *, kills: int, seed: int, rows: int
) -> None:
    choose = random.Random(seed)
    with database.connect() as connection:
        table = create_everything_table(connection, "everything", dim=640)
        load(connection, table, rows, seed=seed)
    synced = sync_table(
        database, "everything", target=target, start=False, migration={"num_workers": 2}
    )
    writers = [
        Writer(database.url, table, seed=seed + n, key_space=2 * rows, pause_seconds=0.003)
        for n in range(1, 4)
    ]
    for writer in writers:
        writer.start()
    try:
        for _ in range(kills):
            synced.daemon.start(wait=False)
            # From before the first connection to well into the stream.
            time.sleep(choose.uniform(0.2, 4.0))
            synced.daemon.kill()
        synced.daemon.start()
    finally:
        for writer in writers:
            writer.finish()
    synced.assert_equal()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.requirement("R41", "R42")
@pytest.mark.parametrize("target", ["server", pytest.param("edge", marks=pytest.mark.campaign)])
def test_a_few_kills(database18: Database, sync_table: SyncTable, target: str) -> None:
    crash_loop(database18, sync_table, target, kills=4, seed=1, rows=1_000)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["server", "edge"])
def test_fifty_kills(database: Database, sync_table: SyncTable, target: str) -> None:
    crash_loop(database, sync_table, target, kills=50, seed=2, rows=3_000)
