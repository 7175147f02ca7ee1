"""``cdc-sync status`` and the status page of a daemon as users run it."""

from __future__ import annotations

import json

import pytest

from tests.support.command_line import python
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database

pytestmark = pytest.mark.usefixtures("clean_environment")

_SECRET = "never-in-any-answer"


def test_a_daemon_is_shown_from_its_copy_to_its_end(
    database18: Database, sync_table: SyncTable
) -> None:
    database18.execute("CREATE TABLE items (id bigint PRIMARY KEY, title text, v vector(3))")
    database18.execute(f"INSERT INTO items VALUES (1, '{_SECRET}', '[1,2,3]')")
    synced = sync_table(database18, "items")
    daemon = synced.daemon
    daemon.wait_caught_up()
    url = f"http://127.0.0.1:{daemon.port}"

    def summary() -> str:
        return str(json.loads(daemon.get("/status")[1])["summary"]["title"])

    daemon.wait(lambda: summary() == "In step", "being in step")
    daemon.wait(lambda: daemon.metric("cdc_sync_slot_active") == 1, "a look at the slot")
    status, page = daemon.get("/")
    assert status == 200
    assert page.startswith("<!doctype html>")

    shown = python("-m", "cdc_sync", "status", "--url", url)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("✓ In step")
    for words in ("public.items", "Postgres 18.", "streaming_started", "1 row copied"):
        assert words in shown.stdout

    answer = json.loads(daemon.get("/status")[1])
    events = {entry["event"] for entry in answer["events"]}
    assert {"pipeline_planned", "copy_started", "copy_completed", "streaming_started"} <= events
    assert (answer["slot"]["active"], answer["slot"]["wal_status"]) == (True, "reserved")
    assert answer["lag_history"]["seconds"][-1] is not None

    database18.execute("DROP TABLE items")
    daemon.wait(lambda: summary() == "public.items has stopped", "the stopped table")
    stopped = python("-m", "cdc_sync", "status", "--url", url)
    assert stopped.returncode == 65
    assert "✕ public.items has stopped" in stopped.stdout
    assert "try: " in stopped.stdout
    assert _SECRET not in shown.stdout + stopped.stdout + daemon.get("/status")[1]

    assert daemon.terminate() == 0
    gone = python("-m", "cdc_sync", "status", "--url", url, "--json")
    assert gone.returncode == 69
    assert "no answer from" in json.loads(gone.stdout)["error"]
