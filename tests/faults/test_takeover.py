"""Two daemons on one slot: whenever the active one is killed, the other takes over within seconds,
and nothing is lost or invented."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.fault_cases import twin
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.workload import Writer, create_everything_table, load

LIMIT_SECONDS = 10.0


def takeovers(
    database: Database, sync_table: SyncTable, directory: Path, *, kills: int, seed: int
) -> list[float]:
    """Kill the active daemon again and again; returns how long each takeover took, in seconds."""
    choose = random.Random(seed)
    with database.connect() as connection:
        table = create_everything_table(connection, "everything", dim=64)
        load(connection, table, 500, seed=seed)
    synced = sync_table(database, "everything")
    writers = [
        Writer(database.url, table, seed=seed + n, key_space=1_000, pause_seconds=0.01)
        for n in range(1, 4)
    ]
    took = []
    with twin(synced, directory) as second:
        active, standby = synced.daemon, second
        for writer in writers:
            writer.start()
        try:
            for _ in range(kills):
                standby.start(wait=False)
                standby.wait_state("standby")
                time.sleep(choose.uniform(0.0, 2.0))
                active.kill()
                killed = time.monotonic()
                wait_active(standby)
                took.append(time.monotonic() - killed)
                active, standby = standby, active
        finally:
            for writer in writers:
                writer.finish()
        active.wait_caught_up()
        synced.daemon = active
        synced.assert_equal()
    return took


def wait_active(daemon: Daemon) -> None:
    daemon.wait(lambda: daemon.status()["state"] in ("streaming", "snapshotting"), "the takeover")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_takeovers(database18: Database, sync_table: SyncTable, tmp_path: Path) -> None:
    took = takeovers(database18, sync_table, tmp_path / "second", kills=2, seed=31)
    assert max(took) < LIMIT_SECONDS, took


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_twenty_takeovers(database: Database, sync_table: SyncTable, tmp_path: Path) -> None:
    took = takeovers(database, sync_table, tmp_path / "second", kills=20, seed=32)
    assert max(took) < LIMIT_SECONDS, took
