"""``cdc-sync rebuild`` as it is typed, beside a daemon of a role with the least rights, and other
commands after it, with the file that is out of date."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cdc_sync.errors import ExitCode
from tests.support.command_line import in_process
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.rebuild_scene import create_items

_PATIENCE_SECONDS = 120.0


def command(*arguments: str) -> tuple[int, str]:
    """Run a command here; its exit code, and what it printed."""
    done = in_process(*arguments)
    return done.returncode, done.stdout + done.stderr


def rebuild(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: it takes signals, and sets up logs."""
    return subprocess.run(
        [sys.executable, "-m", "cdc_sync", "rebuild", *arguments],
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )


def afterwards(synced: Synced, collection: str, more: str) -> Path:
    """The configuration as it shall be."""
    text = synced.daemon.config.read_text(encoding="utf-8")
    new = text.replace(f'"{synced.collection}"', f'"{collection}"') + more
    assert new != text
    path = synced.daemon.config.with_suffix(".new.toml")
    path.write_text(new, encoding="utf-8")
    return path


def assert_kept(synced: Synced, database: Database, collection: str) -> None:
    synced.daemon.wait_caught_up()
    assert synced.qdrant is not None
    assert_equal(
        database.url,
        "items",
        qdrant_url=synced.qdrant_url,
        collection=collection,
        api_key=synced.qdrant.api_key,
        exclude=["body"],
    )


def test_from_the_first_row_to_the_end_of_the_old_collection(
    database18: Database, sync_table: SyncTable
) -> None:
    create_items(database18, 100)
    synced = sync_table(database18, "items")
    assert synced.qdrant is not None
    client = synced.qdrant.client()
    old, new = synced.collection, synced.qdrant.new_collection_name()
    alias = synced.qdrant.new_collection_name("alias")
    to = str(afterwards(synced, new, 'exclude = ["body"]\n'))
    config = ("--config", str(synced.daemon.config), "--table", "items")

    assert command("rebuild", *config, "--drop-old", old, "--yes")[0] == ExitCode.CONFIG
    taken = rebuild(*config, "--to", to, "--alias", alias)
    assert taken.returncode == ExitCode.OK, taken.stderr
    assert f"public.items is kept in {new} now, and {alias} stands for it" in taken.stdout
    database18.execute("UPDATE items SET n = 0 WHERE id < 10; DELETE FROM items WHERE id > 90")
    assert_kept(synced, database18, new)
    others_know(synced, new)

    code, text = command("rebuild", *config, "--abort")
    assert (code, "is under way" in text) == (ExitCode.CONFIG, True)
    assert command("rebuild", *config, "--drop-old", new, "--yes")[0] == ExitCode.CONFIG
    assert client.count(old).count == 100
    code, text = command("rebuild", *config, "--drop-old", old, "--yes")
    assert code == ExitCode.OK, text
    assert not client.collection_exists(old)
    assert synced.daemon.terminate() == ExitCode.OK
    # A restart with the file of before.
    synced.daemon.start()
    database18.execute("UPDATE items SET n = 1 WHERE id < 10")
    assert_kept(synced, database18, new)
    assert synced.qdrant.violations() == []


def others_know(synced: Synced, new: str) -> None:
    """The other commands go by the collection in use, with the file of before."""
    config = ("--config", str(synced.daemon.config))
    code, text = command("verify", *config)
    assert code == ExitCode.OK, text
    assert new in text
    code, text = command("resync", *config, "--keys", "1", "2", "--wait")
    assert code == ExitCode.OK, text
    code, text = command("check", *config, "--json")
    found = {one["id"]: one for one in json.loads(text)["findings"]}
    assert found["rebuilt-table"]["severity"] == "warning"
    assert new in found["rebuilt-table"]["message"]
    assert new in found["collection"]["subject"]
    assert synced.daemon.status()["attention"][0]["title"].endswith("is out of date")
    assert synced.collection not in json.dumps(synced.daemon.status()["tables"])


def test_a_signal_stops_it_and_an_abort_removes_it(
    database18: Database, sync_table: SyncTable
) -> None:
    create_items(database18, 100)
    synced = sync_table(database18, "items")
    assert synced.qdrant is not None
    old = synced.collection
    new, alias = (synced.qdrant.new_collection_name() for _ in range(2))
    to = str(afterwards(synced, new, 'exclude = ["body"]\n'))
    config = ("--config", str(synced.daemon.config), "--table", "public.items")
    # Nobody could go over: it waits, until it is told to end.
    assert synced.daemon.terminate() == ExitCode.OK
    filled = rebuild(*config, "--to", to, "--alias", alias, "--no-swap", "--json")
    assert filled.returncode == ExitCode.OK, filled.stderr
    report = json.loads(filled.stdout)
    assert (report["outcome"], report["collection"], report["replaces"]) == ("filled", new, old)
    assert report["verification"]["equal"] is True
    code, text = command("rebuild", *config, "--status", "--json")
    assert code == ExitCode.OK
    status = json.loads(text)
    assert status["phase"] == "filling"
    assert (status["copied"], status["running"], status["daemon_running"]) == (True, False, False)
    assert status["retained_bytes"] is not None
    assert command("rebuild", *config, "--status")[1].startswith("public.items: filling, ")
    code, text = command("check", *config[:2], "--json")
    found = {one["id"]: one for one in json.loads(text)["findings"]}
    assert found["rebuild-slot"]["severity"] == "warning"
    assert found["rebuild-slot"]["subject"] == status["slot"]
    assert found["rebuild-slot"]["remedy"].endswith("rebuild --table public.items --abort")

    with subprocess.Popen(
        [sys.executable, "-m", "cdc_sync", "rebuild", *config, "--to", to, "--alias", alias],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "nothing streams from slot" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(_PATIENCE_SECONDS) == 128 + signal.SIGTERM
        assert "Stopped before the end. Run the same command again to go on" in rest
    code, text = command("uninstall", *config[:2], "--slot", synced.daemon.slot)
    assert (code, "rebuild of table public.items is under way" in text) == (ExitCode.CONFIG, True)
    code, text = command("rebuild", *config, "--abort")
    assert code == ExitCode.OK, text
    for what in (f"alias {alias}: removed", f"collection {new}: removed", "slot "):
        assert what in text
    ((slots,),) = database18.execute(
        "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    )
    assert slots == 1
    code, text = command("check", *config[:2], "--json")
    assert "rebuild-slot" not in {one["id"] for one in json.loads(text)["findings"]}
    assert not synced.qdrant.client().collection_exists(new)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "x.toml"], ExitCode.USAGE, "--to and --alias are needed"),
        (["--status", "--abort"], ExitCode.USAGE, "exclude each other"),
        (["--to", "absent.toml", "--alias", "a"], ExitCode.CONFIG, "absent.toml"),
    ],
)
def test_wrong_command_lines(
    tmp_path: Path, arguments: list[str], code: ExitCode, message: str
) -> None:
    config = tmp_path / "app.toml"
    config.write_text(
        '[source]\nurl = "postgresql://localhost:1/x"\n[[tables]]\nname = "items"\n',
        encoding="utf-8",
    )
    found, text = command("rebuild", "--config", str(config), "--table", "items", *arguments)
    assert (found, message in text) == (code, True), text


def test_an_embedded_database_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "app.toml"
    config.write_text(
        '[source]\nurl = "postgresql://localhost:1/x"\n[[tables]]\nname = "items"\n'
        f'[qdrant]\nurl = "edge:{tmp_path / "edge"}"\n',
        encoding="utf-8",
    )
    code, text = command("rebuild", "--config", str(config), "--table", "items", "--abort")
    assert code == ExitCode.CONFIG
    assert "an embedded database has no aliases" in text
