"""Numbers that come round: transaction ids across 2^32, object ids above 2^31."""

from __future__ import annotations

import asyncio
import os
import subprocess

import psycopg
import pytest

from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.sync import source_history
from tests.faults.test_slot_lost import change, fill, mark_set, resynced, settled
from tests.support.fix_postgres import DatabaseFactory, PrivatePostgres
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(300)]

_EPOCH = 1 << 32
#: Transactions in a file of pg_xact.
_IN_A_FILE = 32 * 8192 * 4


def set_next(server: PostgresServer, xid: int, oid: int) -> None:
    """Have a server that is stopped go on with these numbers, and start it."""
    log = server.data_directory / "pg_xact" / f"{xid // _IN_A_FILE:04X}"
    owner = server.data_directory.stat()
    if not log.exists():
        log.write_bytes(bytes(_IN_A_FILE // 4))
        os.chown(log, owner.st_uid, owner.st_gid)
    command = [str(server.binaries.program("pg_resetwal")), "-x", str(xid), "-o", str(oid)]
    subprocess.run(
        [*command, str(server.data_directory)],
        check=True,
        capture_output=True,
        user=owner.st_uid if os.getuid() == 0 else None,
    )
    server.start()


def freeze(server: PostgresServer) -> None:
    """Forget every transaction of the past, in every database."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("ALTER DATABASE template0 ALLOW_CONNECTIONS true")
        names = connection.execute("SELECT datname FROM pg_database").fetchall()
    for (name,) in names:
        with psycopg.connect(server.url(name), autocommit=True) as connection:
            connection.execute("VACUUM (FREEZE)")
    server.stop()


@pytest.mark.requirement("R75")
async def test_under_a_pipeline(
    private_postgres: PrivatePostgres,
    database18_factory: DatabaseFactory,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    server = private_postgres()
    for xid in (2_000_000_000, 3_900_000_000, _EPOCH - 200):
        await asyncio.to_thread(freeze, server)
        await asyncio.to_thread(set_next, server, xid, 3_000_000_000)
    database = database18_factory(server)
    fill(database)
    ((oid,),) = database.execute("SELECT 'docs'::regclass::oid::int8")
    assert isinstance(oid, int)
    assert oid >= 3_000_000_000
    database.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok');"
        "ALTER TABLE docs ADD mood mood;"
        "CREATE TABLE days (id int, day int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);"
        "CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM (1) TO (2);"
        "INSERT INTO days SELECT i, 1 FROM generate_series(1, 100) i"
    )
    settings = pipeline_settings(database, qdrant, "docs", "days")
    async with running(settings, database, qdrant) as life:
        await settled(life)
        ((before,),) = database.execute("SELECT pg_current_xact_id()::text::int8")
        assert isinstance(before, int)
        assert before < _EPOCH
        for number in range(250):
            database.execute(f"UPDATE docs SET note = 'n {number}' WHERE id = {number % 300 + 1}")
            database.execute(f"INSERT INTO days VALUES ({number + 1000}, 1)")
        change(database)
        ((after,),) = database.execute("SELECT pg_current_xact_id()::text::int8")
        assert isinstance(after, int)
        assert after > _EPOCH
        await life.assert_equal()
        # A window, whose snapshot must show everything that was applied.
        database.execute("ALTER TABLE docs ADD extra int DEFAULT 7")
        await life.wait(lambda: resynced(life, "docs") == 1, "the resync")
        database.execute("UPDATE docs SET mood = 'ok'")
        await settled(life)
        await life.assert_equal()
        await life.wait(lambda: mark_set(life), "a mark")
        await life.stop()
    async with running(settings, database, qdrant) as life:
        await settled(life)
        await life.assert_equal()
        assert resynced(life, "docs") == 0
