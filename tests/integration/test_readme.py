"""The README keeps its word: its commands, configuration, SQL and tables are run and compared."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from cdc_sync.errors import ErrorKind, ExitCode, policy
from tests.support.fix_postgres import PrivatePostgres, create_database
from tests.support.oracle import assert_equal
from tests.support.qdrant_control import QdrantTarget

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the README's shell blocks, without comments."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_make_targets_exist() -> None:
    targets = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test", "lint", "bench", "campaign"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_cdc_sync_commands_exist() -> None:
    ours = [words[1:] for words in commands() if words[0] == "cdc-sync"]
    assert len(ours) >= 4
    for words in ours:
        names = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
        done = subprocess.run(
            [sys.executable, "-m", "cdc_sync", *names, "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, words
        for word in words:
            if word.startswith("--"):
                assert word in done.stdout, word


def test_exit_codes_are_all_there() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert listed == {int(code) for code in ExitCode}
    assert {int(policy(kind).exit_code) for kind in ErrorKind} <= listed


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.requirement("R85")
def test_the_way_from_sql_to_a_running_pipeline(
    tmp_path: Path, private_postgres: PrivatePostgres, qdrant: QdrantTarget
) -> None:
    """Prepare Postgres by the README's SQL, take its configuration, run as the role it creates."""
    server = private_postgres()
    database = create_database(server)
    database.execute(
        "CREATE TABLE documents (id bigint PRIMARY KEY, title text, embedding vector(3))"
    )
    database.execute("INSERT INTO documents VALUES (1, 'one', '[1,2,3]')")
    (sql,) = blocks("sql")
    for statement in re.sub(r"--.*", "", sql).replace("…", "s3cret").split(";"):
        if statement.strip():
            database.execute(statement)
    (toml,) = blocks("toml")
    url = f"postgresql://cdc:s3cret@127.0.0.1:{server.port}/{database.name}"
    collection = qdrant.new_collection_name()
    toml = re.sub(r'url = "postgresql:[^"]*"', f'url = "{url}"', toml)
    toml = toml.replace("http://localhost:6334", qdrant.url)
    toml += f'collection = "{collection}"\n[pipeline]\nname = "{collection}"\n[http]\nport = 0\n'
    if qdrant.api_key is not None:
        toml = toml.replace("[qdrant]", f'[qdrant]\napi_key = "{qdrant.api_key}"')
    config = tmp_path / "cdc-sync.toml"
    config.write_text(toml, encoding="utf-8")

    command = [sys.executable, "-m", "cdc_sync"]
    checked = subprocess.run(
        [*command, "check", "--config", str(config)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    log = (tmp_path / "log").open("w+b")
    with (
        log,
        subprocess.Popen(
            [*command, "run", "--config", str(config)], stdout=log, stderr=log
        ) as daemon,
    ):
        try:
            _wait_for_slot(server.url(database.name), "cdc_sync")
            database.execute("UPDATE documents SET title = 'uno' WHERE id = 1")
            database.execute("INSERT INTO documents VALUES (2, 'two', '[3,2,1]')")
            _wait_confirmed(server.url(database.name), "cdc_sync")
        finally:
            daemon.terminate()
            code = daemon.wait(30)
    assert code == 0, (tmp_path / "log").read_text()
    assert_equal(
        database.url,
        "documents",
        qdrant_url=qdrant.url,
        collection=collection,
        api_key=qdrant.api_key,
        rows=2,
    )


def _wait_for_slot(url: str, slot: str) -> None:
    _until(url, "SELECT active FROM pg_replication_slots WHERE slot_name = %s", (slot,))


def _wait_confirmed(url: str, slot: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
    _until(
        url,
        "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s",
        (row[0], slot),
    )


def _until(url: str, query: str, parameters: tuple[object, ...]) -> None:
    deadline = time.monotonic() + 60
    with psycopg.connect(url, autocommit=True) as connection:
        while True:
            row = connection.execute(query.encode(), parameters).fetchone()
            if row is not None and row[0]:
                return
            assert time.monotonic() < deadline, query
            connection.execute("SELECT pg_logical_emit_message(false, 'tests', '')")
            time.sleep(0.1)
