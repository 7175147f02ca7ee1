"""The recipes of docs/operations.md that no other test follows: records that are lost, and a Qdrant
that was restored to an older snapshot."""

from __future__ import annotations

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ExitCode
from cdc_sync.qdrant.open import open_sink
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.resync_command import create_docs, points, put, remove, resynced


def write_meanwhile(database: Database) -> None:
    database.execute("UPDATE docs SET n = n + 1000 WHERE id % 3 = 0")
    database.execute("DELETE FROM docs WHERE id % 7 = 0")


async def test_without_records_it_refuses_until_it_may_adopt(
    database18: Database, sync_table: SyncTable
) -> None:
    """Without slot and records is also how ``uninstall`` leaves a collection."""
    create_docs(database18)
    synced = sync_table(database18, "docs")
    synced.daemon.wait_caught_up()
    assert synced.daemon.terminate() == ExitCode.OK
    assert synced.qdrant is not None
    sink = await open_sink(
        QdrantSettings.model_validate({"url": synced.qdrant.url, "api_key": synced.qdrant.api_key})
    )
    try:
        await sink.state.forget(synced.daemon.slot)
    finally:
        await sink.close()
    write_meanwhile(database18)
    synced.daemon.start(wait=False)
    assert synced.daemon.process is not None
    assert synced.daemon.process.wait(60) == ExitCode.DATA
    remedy = f"SELECT pg_drop_replication_slot('{synced.daemon.slot}');"
    assert remedy in synced.daemon.log()
    database18.execute(remedy)
    synced.daemon.start("--adopt")
    synced.assert_equal()


def test_after_a_restore_of_qdrant_every_table_is_read_again(
    database18: Database, sync_table: SyncTable
) -> None:
    """Points are put back to what they were, which nothing in the stream shows."""
    create_docs(database18)
    synced = sync_table(database18, "docs")
    synced.daemon.wait_caught_up()
    before = points(synced)
    write_meanwhile(database18)
    database18.execute("INSERT INTO docs (id, n) SELECT i, i FROM generate_series(101, 120) i")
    synced.daemon.wait_caught_up()
    remove(synced, *range(101, 121))
    for id_, record in before.items():
        assert isinstance(id_, int)
        put(synced, id_, record)
    assert synced.differences()
    resynced(synced, "--all", "--wait")
    synced.assert_equal()
