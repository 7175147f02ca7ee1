"""The copy of a partitioned table under writers, with everything killed at random: it goes on from
where it was, and ends without a difference."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil
import pytest

from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database, DatabaseFactory, PrivatePostgres
from tests.support.ledger_log import blocks_done, check_ledger, count, logged_events
from tests.support.migration_load import MigrationWriter, create_partitioned, writing
from tests.support.qdrant_control import QdrantProcess

pytestmark = pytest.mark.timeout(300)

TABLE: Final = "public.items"
KILLS: Final = ("daemon", "worker", "qdrant", "postgres")


@dataclass
class Parts:
    """What can be killed."""

    synced: Synced
    database: Database
    qdrant: QdrantProcess

    def kill(self, victim: str) -> None:
        """Kill it, and start it again."""
        daemon = self.synced.daemon
        if victim == "daemon":
            daemon.kill()
            daemon.start(wait=False)
        elif victim == "worker":
            workers = copy_workers(self.synced)
            if workers:
                random.choice(workers).kill()
        elif victim == "qdrant":
            self.qdrant.kill()
            time.sleep(0.3)
            self.qdrant.restart()
        else:
            self.database.server.restart("immediate")

    def chunks(self) -> int:
        """Chunks copied, by the log of all lives."""
        return count(logged_events(self.synced.daemon.log_path), "chunk_copied")

    def copied(self) -> bool:
        """Whether the copy is over."""
        return bool(count(logged_events(self.synced.daemon.log_path), "table_copied"))

    def wait_chunks(self, number: int) -> None:
        """Until so many have been copied, or the copy is over."""
        self.synced.daemon.wait(
            lambda: self.copied() or self.chunks() >= number, "chunks", timeout=120
        )


def copy_workers(synced: Synced) -> list[psutil.Process]:
    found = []
    for process in synced.daemon.children():
        try:
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def parts(
    private_postgres: PrivatePostgres,
    database18_factory: DatabaseFactory,
    qdrant_private: QdrantProcess,
    sync_table: SyncTable,
) -> Callable[..., Parts]:
    """Make the table and a daemon, not started yet."""

    def make(rows: int, *, dim: int, migration: dict[str, object], partitions: int = 8) -> Parts:
        server = private_postgres({"max_wal_size": "4GB"})
        database = database18_factory(server)
        create_partitioned(database, rows, dim=dim, partitions=partitions)
        synced = sync_table(
            database,
            "items",
            qdrant=qdrant_private,
            start=False,
            migration={"num_workers": 2, **migration},
            metrics={"emb": "euclid"},
        )
        return Parts(synced, database, qdrant_private)

    return make


@pytest.mark.requirement("R55", "R70")
@pytest.mark.parametrize(
    "victim",
    [
        "daemon",
        "worker",
        *(pytest.param(v, marks=pytest.mark.campaign) for v in ("qdrant", "postgres")),
    ],
)
def test_what_is_on_record_is_not_copied_again(parts: Callable[..., Parts], victim: str) -> None:
    """Killed once in mid copy, with writers running."""
    made = parts(
        3_500,
        dim=128,
        partitions=2,
        migration={"window_seconds": 0.7, "chunk_rows": 100, "batch_delay": 100},
    )
    writers = [MigrationWriter(made.database, dim=128, key_space=6_000, seed=n) for n in (1, 2)]
    with writing(*writers):
        made.synced.daemon.start(wait=False)
        made.wait_chunks(7)
        done = blocks_done(logged_events(made.synced.daemon.log_path), TABLE)
        made.kill(victim)
        made.synced.daemon.wait_state("streaming")
    made.synced.assert_equal()
    events = logged_events(made.synced.daemon.log_path)
    report = check_ledger(events)
    assert report.faults == []
    assert any(done.values()), "nothing was on record when it was killed"
    assert count(events, "copy_started") == 1
    if victim == "daemon":
        assert count(events, "copy_resumed") == 1
    if victim == "worker":
        assert count(events, "copy_workers_lost") == 1


def campaign(parts: Callable[..., Parts], *, rows: int, kills: int, seed: int) -> None:
    """Kill at random, each time after the copy has come further; it has 200 chunks, about, or 80
    where the table is small."""
    choose = random.Random(seed)
    chunk_rows = max(100, rows // 200)
    made = parts(
        rows,
        dim=128,
        migration={
            "window_seconds": 1.0,
            "chunk_rows": chunk_rows,
            # So that small tables are not copied before everything is killed.
            "batch_delay": 0 if rows > 200_000 else 250,
        },
    )
    victims = [KILLS[n % len(KILLS)] for n in range(kills)]
    choose.shuffle(victims)
    in_mid_copy = 0
    writers = [
        MigrationWriter(made.database, dim=128, key_space=rows * 3 // 2, seed=seed + n)
        for n in range(2)
    ]
    with writing(*writers):
        made.synced.daemon.start(wait=False)
        for victim in victims:
            made.wait_chunks(made.chunks() + choose.randint(1, max(4, 40 // kills)))
            time.sleep(choose.uniform(0, 0.5))
            in_mid_copy += not made.copied()
            made.kill(victim)
        made.synced.daemon.wait_state("streaming", timeout=1200)
    made.synced.assert_equal()
    events = logged_events(made.synced.daemon.log_path)
    report = check_ledger(events)
    assert report.faults == []
    assert report.saves > kills
    assert report.chunks[TABLE] > 60
    assert count(events, "copy_started") == 1
    assert in_mid_copy == kills, f"only {in_mid_copy} of {kills} kills came in mid copy"


@pytest.mark.slow(seconds=30)
@pytest.mark.requirement("R55", "R70")
def test_a_few_kills_in_mid_copy(parts: Callable[..., Parts]) -> None:
    campaign(parts, rows=20_000, kills=4, seed=3)


@pytest.mark.campaign
@pytest.mark.timeout(7200)
@pytest.mark.requirement("R55", "R70")
def test_twenty_kills_of_a_large_copy(parts: Callable[..., Parts]) -> None:
    """A million rows, unless TEST_CAMPAIGN_ROWS says otherwise."""
    rows = int(os.environ.get("TEST_CAMPAIGN_ROWS", "1000000"))
    seed = int(os.environ.get("TEST_CAMPAIGN_SEED", "4"))
    campaign(parts, rows=rows, kills=20, seed=seed)
