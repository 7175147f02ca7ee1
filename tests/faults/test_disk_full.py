"""No space left where the pipeline keeps its records: the daemon stops with one clear message, or
tries again, and goes on once there is space, with nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fault_cases import create_items
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.full_disk import full_disk
from tests.support.qdrant_control import QdrantProcess

pytestmark = pytest.mark.timeout(120)

_EX_DATA = 65
_NO_SPACE = "Service internal error: No space left on device: WAL buffer size exceeds disk space"


def test_of_an_embedded_database(database18: Database, sync_table: SyncTable) -> None:
    create_items(database18, 300)
    synced = sync_table(database18, "items", target="edge")
    daemon = synced.daemon
    directory = Path(synced.qdrant_url.removeprefix("edge:"))
    assert daemon.process is not None
    with full_disk(directory / "state", daemon.slot):
        # The table is to be read again, which is put on record first.
        database18.execute("ALTER TABLE items ADD extra int DEFAULT 7")
        assert daemon.process.wait(30) == _EX_DATA
        assert "No space left on device" in daemon.log()
        assert "Make room on the disk" in daemon.log()
        database18.execute("DELETE FROM items WHERE id % 5 = 0")
        # It does not start either, but changes nothing.
        daemon.start(wait=False)
        assert daemon.process.wait(30) == _EX_DATA
    daemon.start()
    daemon.wait(lambda: "resync_completed" in daemon.log(), "the resync")
    synced.assert_equal()


def test_at_qdrant(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    create_items(database18, 300)
    synced = sync_table(database18, "items", qdrant=qdrant_private)
    daemon, script = synced.daemon, qdrant_private.script
    script.reject("write", "INTERNAL", _NO_SPACE, times=10_000)
    database18.execute("ALTER TABLE items ADD extra int DEFAULT 7")
    database18.execute("DELETE FROM items WHERE id % 5 = 0")
    daemon.wait(lambda: "No space left on device" in daemon.log(), "the reason", 60)
    assert daemon.get("/livez")[0] == 200
    script.clear()
    daemon.wait(lambda: "resync_completed" in daemon.log(), "the resync")
    synced.assert_equal()
