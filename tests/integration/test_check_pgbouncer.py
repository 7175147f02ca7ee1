"""``check`` behind PgBouncer itself, where it is installed (``apt-get install pgbouncer``)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from cdc_sync.errors import ErrorKind
from cdc_sync.sync.check import run_checks
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings
from tests.support.qdrant_control import QdrantTarget

pytestmark = pytest.mark.campaign


@contextmanager
def pgbouncer(database: Database, directory: Path, *ignored: str) -> Iterator[str]:
    """Run it with transaction pooling, and sessions of the superuser for whoever asks; the URL."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    if not Path(program).exists():
        pytest.skip("pgbouncer is not installed")
    to = urlsplit(database.url)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = directory / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n{database.name} = host=127.0.0.1 port={database.server.port}"
        f" user={to.username} password={to.password or ''}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\n"
        f"ignore_startup_parameters = {','.join(ignored)}\n"
    )
    # It does not run as root.
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    with subprocess.Popen([program, *user, str(config)], stderr=subprocess.DEVNULL) as process:
        try:
            url = f"postgresql://anybody@127.0.0.1:{port}/{database.name}"
            _wait(url, process)
            yield url
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "pgbouncer ended"
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


@pytest.mark.requirement("R66")
def test_pgbouncer_is_found_out(database18: Database, qdrant: QdrantTarget, tmp_path: Path) -> None:
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY, emb vector(3))")
    with pgbouncer(database18, tmp_path, "options", "extra_float_digits") as url:
        found = run_checks(pipeline_settings(database18, qdrant, "docs", pg_url=url))
    by_id = {one.id: one for one in found}
    assert by_id["pooler"].severity in ("warning", "error")
    assert f"port {database18.server.port} " in by_id["pooler"].remedy
    assert by_id["session-settings"].severity == "warning"
    assert by_id["replication-connection"].severity == "error"


@pytest.mark.requirement("R66")
def test_pgbouncer_as_it_comes(database18: Database, qdrant: QdrantTarget, tmp_path: Path) -> None:
    """It refuses the settings of the start-up packet, and so the connection."""
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY, emb vector(3))")
    with pgbouncer(database18, tmp_path) as url:
        found = run_checks(pipeline_settings(database18, qdrant, "docs", pg_url=url))
    (refused,) = [one for one in found if one.id == "postgres-connection"]
    assert refused.kind is ErrorKind.CONFIG
    assert "PgBouncer" in refused.remedy
