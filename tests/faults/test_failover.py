"""A standby takes over, with the slot that it has synchronised (Postgres 17 and later): with
everything that was received the stream goes on, else every table is read again."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from dataclasses import dataclass

import psycopg
import pytest

from cdc_sync.config import Settings
from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.errors import ErrorKind
from cdc_sync.sync import source_history
from tests.faults.test_slot_lost import (
    change,
    fill,
    healed,
    refused,
    resynced,
    settled,
    stopping,
)
from tests.support.fix_postgres import Database, DatabaseFactory, PrivatePostgres
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


@dataclass
class Pair:
    """A primary with a database, and its standby."""

    primary: PostgresServer
    standby: PostgresServer
    database: Database

    def promoted(self) -> Database:
        """Let the standby take over; its database."""
        with psycopg.connect(self.standby.url(), autocommit=True) as connection:
            connection.execute("SELECT pg_promote(wait => true)")
        name = self.database.name
        return Database(self.standby.url(name), name, self.standby, self.standby.major)

    def wait_slot(self, slot: str) -> None:
        """Until the standby has the slot and may take it over, as it stands on the primary."""
        query = (
            "SELECT confirmed_flush_lsn FROM pg_replication_slots"
            " WHERE slot_name = %s AND (synced OR failover) AND NOT temporary"
        )
        deadline = time.monotonic() + 60
        while True:
            ours = self.database.execute(query, (slot,))
            with psycopg.connect(self.standby.url(), autocommit=True) as connection:
                theirs = connection.execute(query, (slot,)).fetchall()
            if ours and ours == theirs:
                return
            assert time.monotonic() < deadline, (ours, theirs, self.standby.log_tail(20))
            # What makes the slot move, and with it what the standby may take over.
            self.database.execute("SELECT pg_log_standby_snapshot()")
            time.sleep(0.2)


@pytest.fixture
def pair(private_postgres: PrivatePostgres, database18_factory: DatabaseFactory) -> Pair:
    primary = private_postgres()
    database = database18_factory(primary)
    database.execute("SELECT pg_create_physical_replication_slot('standby', true)")
    standby = private_postgres(start=False)
    copy_cluster(primary, standby, database.name)
    standby.start(
        {
            "primary_conninfo": primary.url(database.name).replace("'", "''"),
            "primary_slot_name": "standby",
            "hot_standby_feedback": "on",
            "sync_replication_slots": "on",
        }
    )
    return Pair(primary, standby, database)


def copy_cluster(primary: PostgresServer, standby: PostgresServer, database: str) -> None:
    data = standby.data_directory
    owner = data.stat()
    shutil.rmtree(data)
    subprocess.run(
        [
            str(primary.binaries.program("pg_basebackup")),
            f"--pgdata={data}",
            f"--dbname={primary.url(database)}",
            "--wal-method=stream",
            "--checkpoint=fast",
        ],
        check=True,
        capture_output=True,
    )
    (data / "standby.signal").touch()
    data.chmod(0o700)
    for path in (data, *data.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    # Passwords are part of the cluster.
    password = (primary.directory / "password").read_text()
    (standby.directory / "password").write_text(password)


def moved(settings: Settings, database: Database, qdrant: QdrantTarget) -> Settings:
    """The same pipeline, with the URL of another server."""
    url = pipeline_settings(database, qdrant, "docs").source.url
    source = settings.source.model_copy(update={"url": url})
    return settings.model_copy(update={"source": source})


@pytest.fixture(autouse=True)
def _marks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)


@pytest.mark.requirement("R59", "R61")
async def test_a_standby_that_has_everything_takes_over(pair: Pair, qdrant: QdrantTarget) -> None:
    fill(pair.database)
    settings = pipeline_settings(pair.database, qdrant, "docs")
    async with running(settings, pair.database, qdrant) as life:
        await settled(life)
        change(pair.database)
        await settled(life)
        await asyncio.to_thread(pair.wait_slot, life.slot)
        await life.stop()
    pair.database.execute("UPDATE docs SET note = 'not applied yet' WHERE id > 200")
    await asyncio.to_thread(wait_standby, pair)
    await asyncio.to_thread(pair.primary.stop, "immediate")
    database = await asyncio.to_thread(pair.promoted)
    database.execute("DELETE FROM docs WHERE id > 290")
    async with healed(moved(settings, database, qdrant), database, qdrant) as life:
        assert resynced(life, "docs") == 0


def wait_standby(pair: Pair) -> None:
    """Until the standby has replayed what the primary has written."""
    ((end,),) = pair.database.execute("SELECT pg_current_wal_flush_lsn()::text")
    with psycopg.connect(pair.standby.url(), autocommit=True) as connection:
        deadline = time.monotonic() + 30
        query = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        while connection.execute(query, (end,)).fetchone() != (True,):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.requirement("R59")
async def test_a_standby_that_lacks_what_was_applied_takes_over(
    pair: Pair, qdrant: QdrantTarget
) -> None:
    fill(pair.database)
    settings = pipeline_settings(pair.database, qdrant, "docs")
    async with running(settings, pair.database, qdrant) as life:
        await settled(life)
        await asyncio.to_thread(pair.wait_slot, life.slot)
        await asyncio.to_thread(pair.standby.stop)
        change(pair.database)
        await settled(life)
        await asyncio.sleep(0.3)
        await life.caught_up()
        await life.stop()
    await asyncio.to_thread(pair.primary.stop, "immediate")
    await asyncio.to_thread(pair.standby.start)
    database = await asyncio.to_thread(pair.promoted)
    # It goes beyond where the other one was.
    database.execute("CREATE TABLE more AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)")
    settings = moved(settings, database, qdrant)
    error = await refused(stopping(settings), database, qdrant)
    assert error.kind is ErrorKind.SOURCE_REWOUND
    assert "timeline" in error.message
    async with healed(settings, database, qdrant) as life:
        assert resynced(life, "docs") == 1
