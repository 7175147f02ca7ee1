"""``cdc-sync uninstall``: nothing of ours is left on the source, and nothing of others is gone."""

from __future__ import annotations

import pytest

from cdc_sync.errors import ExitCode
from tests.support.command_line import in_process
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.resync_command import create_docs, points


def uninstall(synced: Synced, *arguments: str) -> tuple[int, str]:
    """Run the command; its exit code, and what it printed."""
    done = in_process("uninstall", "--config", str(synced.daemon.config), *arguments)
    return done.returncode, done.stdout + done.stderr


def left(database: Database) -> tuple[int, int]:
    """Slots and publications."""
    ((slots, publications),) = database.execute(
        "SELECT (SELECT count(*) FROM pg_replication_slots WHERE database = current_database()),"
        " (SELECT count(*) FROM pg_publication)"
    )
    assert isinstance(slots, int)
    assert isinstance(publications, int)
    return slots, publications


@pytest.mark.requirement("R65", "R90")
@pytest.mark.parametrize("target", ["server", "edge"])
def test_no_slot_and_no_publication_is_left(
    database18: Database, sync_table: SyncTable, target: str
) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs", target=target, superuser=True)
    synced.daemon.wait_caught_up()
    slot = synced.daemon.slot
    assert synced.daemon.terminate() == ExitCode.OK
    code, text = uninstall(synced, "--slot", f"{slot}x")
    assert code == ExitCode.CONFIG
    assert f"slot is {slot}, not {slot}x" in text
    assert left(database18) == (1, 1)
    code, text = uninstall(synced, "--slot", slot)
    assert code == ExitCode.OK, text
    assert f"slot {slot}: dropped" in text
    assert f"publication {slot}: dropped" in text
    assert f"collection {synced.collection}: kept" in text
    assert left(database18) == (0, 0)
    # Nothing says any more that the slot is ours.
    code, text = uninstall(synced, "--slot", slot)
    assert code == ExitCode.DATA
    assert "no record" in text
    if target == "server":
        assert len(points(synced)) == 30


def test_a_slot_in_use_and_a_publication_of_others_stay(
    database18: Database, sync_table: SyncTable
) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs")
    synced.daemon.wait_caught_up()
    slot = synced.daemon.slot
    code, text = uninstall(synced, "--slot", slot)
    assert code == ExitCode.TEMPORARY
    assert f"slot {slot} is used by process" in text
    assert left(database18) == (1, 1)
    synced.assert_equal()
    synced.daemon.terminate()
    code, text = uninstall(synced, "--slot", slot)
    assert code == ExitCode.OK, text
    assert f"publication {slot}: kept, since cdc-sync has not made it" in text
    assert left(database18) == (0, 1)
    # The pipeline can be begun anew, once its collection is dropped.
    assert synced.qdrant is not None
    synced.qdrant.client().delete_collection(synced.collection)
    synced.daemon.start()
    synced.assert_equal()


def test_somebody_elses_slot_stays(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs", start=False)
    slot = synced.daemon.slot
    database18.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
    code, text = uninstall(synced, "--slot", slot)
    assert code == ExitCode.DATA
    assert "no record" in text
    assert left(database18)[0] == 1
