"""Qdrant is away for long, under load: memory stays flat, Postgres can be shut down, the metrics
say how far behind it really is, and everything is applied afterwards (section 8 of the design)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

import psutil
import psycopg
import pytest

from cdc_sync.demo.embedded import PostgresServer
from tests.support.daemon import Daemon
from tests.support.fault_cases import create_loaded, is_ready, under_load
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database, DatabaseFactory, PrivatePostgres
from tests.support.qdrant_control import QdrantProcess

#: Where no session runs, the source is looked at every five seconds; a look that meets a restart
#: is lost.
_STALE_SECONDS: Final = 7.0
_STALE_BYTES_SECONDS: Final = 13.0
#: What was in flight when Qdrant went away.
_BEFORE_SECONDS: Final = 3.0
_SHUTDOWN_SECONDS: Final = 5.0
_GROWTH_BYTES: Final = 24 << 20
_BATCH_BYTES: Final = 2 << 20


@dataclass
class Observer:
    """Compares what the daemon says with what is so. ``behind`` are bytes of WAL at moments."""

    daemon: Daemon
    database: Database
    gone: float
    marked: float
    rss: list[tuple[float, int]] = field(default_factory=list)
    behind: list[tuple[float, int]] = field(default_factory=list)
    samples: int = 0

    def look(self) -> None:
        """One look; fails where the metrics are not true."""
        now = time.time()
        assert self.daemon.process is not None
        self.rss.append((now, psutil.Process(self.daemon.process.pid).memory_info().rss))
        assert self.daemon.get("/livez")[0] == 200
        self._look_at_seconds(now)
        try:
            ((behind,),) = self.database.execute(
                "SELECT (pg_current_wal_flush_lsn() - confirmed_flush_lsn)::int8"
                " FROM pg_replication_slots WHERE slot_name = %s",
                (self.daemon.slot,),
            )
        except psycopg.OperationalError:
            return  # It is being restarted.
        self.behind.append((now, int(str(behind))))
        self._look_at_bytes(now)
        self.samples += 1

    def _look_at_seconds(self, now: float) -> None:
        """The oldest commit that is not applied is that of the mark, or one shortly before."""
        shown = self.daemon.metric("cdc_sync_lag_seconds")
        least, most = now - self.marked - _STALE_SECONDS, now - self.gone + _BEFORE_SECONDS
        assert least <= shown <= most, f"lag_seconds is {shown}, not {least:.1f} to {most:.1f}"

    def _look_at_bytes(self, now: float) -> None:
        """Nothing is confirmed meanwhile, so what is behind only grows."""
        shown = self.daemon.metric("cdc_sync_lag_bytes")
        earlier = [size for at, size in self.behind if at < now - _STALE_BYTES_SECONDS]
        least, most = max(earlier, default=0), self.behind[-1][1] + (1 << 20)
        assert least <= shown <= most, f"lag_bytes is {shown}, not {least} to {most}"

    def growth(self) -> int:
        """Bytes of memory by which it grew in the last two thirds."""
        third = len(self.rss) // 3
        return max(size for _, size in self.rss[third:]) - max(size for _, size in self.rss[:third])


def stay_away(
    synced: Synced, server: PostgresServer, qdrant: QdrantProcess, *, seconds: float, shutdowns: int
) -> Observer:
    """Kill Qdrant, look on for so many seconds, shut Postgres down some times; Qdrant comes
    back."""
    daemon, gone = synced.daemon, time.time()
    qdrant.kill()
    synced.execute(
        "UPDATE everything SET revision = -1 WHERE id = (SELECT min(id) FROM everything)"
    )
    observer = Observer(daemon, synced.database, gone, time.time())
    due = [gone + seconds * (n + 1) / (shutdowns + 1) for n in range(shutdowns)]
    while time.time() < gone + seconds:
        observer.look()
        if due and time.time() >= due[0]:
            due.pop(0)
            started = time.monotonic()
            server.stop("fast", timeout_seconds=60)
            took = time.monotonic() - started
            assert took < _SHUTDOWN_SECONDS, f"a fast shutdown took {took:.1f} s"
            server.start()
        time.sleep(0.5)
    status, _ = daemon.get("/readyz")
    assert status == 503
    qdrant.restart()
    return observer


def qdrant_away(
    private_postgres: PrivatePostgres,
    database18_factory: DatabaseFactory,
    sync_table: SyncTable,
    qdrant: QdrantProcess,
    *,
    seconds: float,
    let_go_seconds: float,
    shutdowns: int,
) -> None:
    server = private_postgres({"max_wal_size": "4GB"})
    database = database18_factory(server)
    table = create_loaded(database, rows=500)
    synced = sync_table(
        database,
        "everything",
        qdrant=qdrant,
        pipeline={"let_go_seconds": let_go_seconds, "batch_bytes": _BATCH_BYTES},
    )
    daemon = synced.daemon
    with under_load(database, table, seed=5, reconnect=True):
        time.sleep(4)
        daemon.wait(lambda: daemon.metric("cdc_sync_lag_seconds") < 2, "a small lag")
        observer = stay_away(synced, server, qdrant, seconds=seconds, shutdowns=shutdowns)
        daemon.wait(lambda: is_ready(daemon), "readiness again", 60)
    daemon.wait_caught_up(max(120.0, 2 * seconds))
    synced.assert_equal()
    daemon.wait(lambda: daemon.metric("cdc_sync_lag_seconds") == 0, "no lag", 60)
    assert observer.samples > seconds / 4
    assert observer.growth() < _GROWTH_BYTES, f"grew by {observer.growth() >> 20} MB"
    assert "slot_let_go" in daemon.log()


@pytest.mark.campaign
@pytest.mark.timeout(240)
@pytest.mark.requirement("R7")
def test_qdrant_away_for_a_while(
    private_postgres: PrivatePostgres,
    database18_factory: DatabaseFactory,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
) -> None:
    qdrant_away(
        private_postgres,
        database18_factory,
        sync_table,
        qdrant_private,
        seconds=24,
        let_go_seconds=5,
        shutdowns=1,
    )


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.requirement("R7")
def test_qdrant_away_for_five_minutes(
    private_postgres: PrivatePostgres,
    database18_factory: DatabaseFactory,
    sync_table: SyncTable,
    qdrant_private: QdrantProcess,
) -> None:
    qdrant_away(
        private_postgres,
        database18_factory,
        sync_table,
        qdrant_private,
        seconds=300,
        let_go_seconds=30,
        shutdowns=2,
    )
