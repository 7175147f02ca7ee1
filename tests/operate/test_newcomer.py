"""The way of a newcomer: a fresh clone, README.md and nothing else, commands copied out of it.

What is not in the README cannot be typed here: commands, SQL and configuration come from its
blocks, with the reader's own addresses put in (:class:`~tests.operate.newcomer.Readme`).
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import yaml

from cdc_sync.demo.embedded import PostgresServer
from tests.operate.newcomer import (
    PATIENCE_SECONDS,
    Readme,
    Running,
    Shell,
    clean_environ,
    edit,
    fresh_clone,
    stand_in_environment,
)
from tests.operate.prometheus import Prometheus
from tests.support.fix_postgres import PrivatePostgres, create_database
from tests.support.oracle import assert_equal
from tests.support.qdrant_control import QdrantTarget

#: With a quote, a space and what means something in URLs: passwords are not words.
PASSWORD = "s3 cret$/@%"
TABLE = """
CREATE TABLE documents (id bigint PRIMARY KEY, title text, embedding vector(3));
CREATE INDEX ON documents USING hnsw (embedding vector_cosine_ops);
INSERT INTO documents SELECT i, 'title', ARRAY[i, 1, 2]::vector FROM generate_series(1, 50) i;
"""


def _free_port() -> int:
    """A port that is free for some seconds more: above those that Linux gives to others."""
    for port in random.sample(range(61_000, 65_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@dataclass
class Given:
    """What the newcomer has: a Qdrant, and a database without a thought of replication."""

    server: PostgresServer
    url: str
    address: str
    qdrant: QdrantTarget
    http: str

    @classmethod
    def make(cls, server: PostgresServer, qdrant: QdrantTarget) -> Given:
        """Make the table in a database of its own."""
        database = create_database(server)
        database.execute(TABLE)
        http = f"http://127.0.0.1:{_free_port()}"
        address = f"127.0.0.1:{server.port}/{database.name}"
        return cls(server, database.url, address, qdrant, http)

    def environ(self) -> dict[str, str]:
        """Variables of what the README cannot know: a port that is free, and a key."""
        variables = {"CDC_SYNC_HTTP__PORT": self.http.rpartition(":")[2]}
        if self.qdrant.api_key is not None:
            variables["CDC_SYNC_QDRANT__API_KEY"] = self.qdrant.api_key
        return variables

    def execute(self, sql: str) -> None:
        """Run statements one by one, as psql does; a restart where a comment asks for it."""
        for line in sql.splitlines():
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute(line.encode())
            if "then restart" in line:
                self.server.stop()
                self.server.start()


def _wait(condition: Callable[[], object], running: Running, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert running.process.poll() is None, running.said()
        assert time.monotonic() < deadline, f"{what} did not come\n{running.said()}"
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False


def walk(shell: Shell, readme: Readme, given: Given, *, install: bool) -> None:
    """All of "Use it": prepare, install, configure, check, run, watch, stop."""
    given.execute(readme.block("sql", "Use it"))

    for line in readme.commands("Use it", "python3 -m venv"):
        if install or line.startswith("cdc-sync"):
            shell.type(line)
    edit(shell.directory / "cdc-sync.toml", readme.block("toml", "Use it"))

    *before, run = readme.commands("Use it", "export")
    said = [shell.type(line) for line in before]
    assert "no errors" in said[-1], said[-1]
    running = shell.leave_running(run)
    try:
        _watch(shell, readme, given, running)
        assert running.interrupt() == 0, running.said()
    finally:
        running.close()


def _watch(shell: Shell, readme: Readme, given: Given, running: Running) -> None:
    """With the pipeline running: everything that is to be looked at, and that a write arrives."""
    _wait(lambda: _answers(f"{given.http}/readyz"), running, "readiness")
    client = given.qdrant.client()

    def title() -> object:
        # Ready is a pipeline that copies, too.
        if not client.collection_exists("documents"):
            return None
        points = client.retrieve("documents", [7])
        return points and (points[0].payload or {}).get("title")

    with Prometheus(
        shell.directory.parent / "prometheus",
        interval_seconds=0.5,
        scrape_configs=_scrape_configs(readme),
    ) as prometheus:
        _wait(lambda: title() == "title", running, "the first copy")
        given.execute("UPDATE documents SET title = 'another' WHERE id = 7")
        given.execute("INSERT INTO documents VALUES (1000, 'new', '[3,2,1]')")
        _wait(lambda: title() == "another", running, "the change")
        said = [_look(shell, line) for line in readme.commands("Use it", "cdc-sync status")]
        _wait(
            lambda: prometheus.query('sum(cdc_sync_changes_total{job="cdc-sync"}) >= 2'),
            running,
            "a scrape",
        )
    status, livez, readyz, metrics, verified = said
    assert "In step" in status
    assert '"ok":true' in livez
    assert '"ok":true' in readyz
    assert "cdc_sync_changes_total{" in metrics
    assert verified.endswith("\nequal\n")
    assert_equal(
        given.url,
        "documents",
        qdrant_url=given.qdrant.url,
        collection="documents",
        api_key=given.qdrant.api_key,
        rows=51,
    )


def _look(shell: Shell, line: str) -> str:
    """Type it; where there is no curl, ask what it would."""
    if not line.startswith("curl ") or shutil.which("curl"):
        return shell.type(line)
    with urllib.request.urlopen(line.split()[2], timeout=30) as answer:
        return str(answer.read().decode())


def _scrape_configs(readme: Readme) -> list[object]:
    configs = yaml.safe_load(readme.block("yaml", "Use it"))["scrape_configs"]
    assert isinstance(configs, list)
    return configs


@pytest.mark.slow(12)
@pytest.mark.timeout(600)
@pytest.mark.requirement("R85")
def test_what_the_readme_says_is_enough(
    private_postgres: PrivatePostgres, qdrant: QdrantTarget, tmp_path: Path
) -> None:
    """With the packages of this environment; the rest as by somebody who has just cloned it."""
    given = Given.make(private_postgres({"wal_level": "replica"}), qdrant)
    clone = fresh_clone(tmp_path)
    environment = stand_in_environment(tmp_path)
    environ = clean_environ(**given.environ())
    environ["PATH"] = f"{environment / 'bin'}:{environ['PATH']}"
    shell = Shell(clone, environ)
    readme = _readme(clone, given)

    demo, test = readme.commands("Try it")
    assert "Embedded" in shell.type(_with(demo, "--help", environment)).title()
    # What it tests, CI does by the same command.
    assert "pytest" in shell.type(_with(test, "--version", environment))
    walk(shell, readme, given, install=False)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_a_newcomer_gets_there(
    private_postgres: PrivatePostgres, qdrant: QdrantTarget, tmp_path: Path
) -> None:
    """With virtual environments of the newcomer's own, and all that has to be installed."""
    given = Given.make(private_postgres({"wal_level": "replica"}), qdrant)
    clone = fresh_clone(tmp_path)
    shell = Shell(clone, clean_environ(**given.environ()))
    readme = _readme(clone, given)

    demo, test = readme.commands("Try it")
    assert "EQUAL" in shell.type(demo)
    assert "tests collected" in shell.type(_with(test, "--collect-only -q"))
    walk(shell, readme, given, install=True)
    # What a newcomer makes is no change of the repository.
    made = ["venv", ".venv", "cdc-sync.toml"]
    ignored = subprocess.run(
        ["git", "check-ignore", *made], cwd=clone, capture_output=True, text=True, check=True
    )
    assert ignored.stdout.split() == made


def _readme(clone: Path, given: Given) -> Readme:
    return Readme.of(
        clone,
        postgres=given.address,
        qdrant=given.qdrant.url,
        http=given.http,
        password=PASSWORD,
    )


def _with(line: str, arguments: str, environment: Path | None = None) -> str:
    """A make command with arguments, as the README says under "Develop"."""
    command = line.partition("#")[0].strip()
    place = f" VENV={environment}" if environment else ""
    return f'{command}{place} ARGS="{arguments}"'
