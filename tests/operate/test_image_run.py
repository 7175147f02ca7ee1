"""The image itself: built, and run as a container does the main job."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.test_main_job import run_job
from tests.operate.container import Container, Image, built_image
from tests.support.daemon import Daemon
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and mounts need root"),
]

#: What `docker stop` and Kubernetes leave, less some.
STOP_SECONDS = 25.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    with built_image(tmp_path_factory.mktemp("image")) as built:
        yield built


def in_container(image: Image, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> list[Container]:
    """Have a daemon started from the image; returns its containers, as they are started."""
    started: list[Container] = []
    # It is not root that reads them.
    daemon.config.parent.chmod(0o755)
    daemon.config.chmod(0o644)

    def start(*arguments: str, wait: bool = True) -> Daemon:
        daemon._port = None
        daemon._log_start = daemon.log_path.stat().st_size if daemon.log_path.exists() else 0
        command = [*image.config["Entrypoint"], "run", "--config", str(daemon.config), *arguments]
        environ = {"CDC_SYNC_HTTP__HOST": "127.0.0.1", "CDC_SYNC_HTTP__PORT": str(free_port())}
        container = Container(image, daemon.config.parent, command, environ, daemon.log_path)
        started.append(container)
        daemon.process = container.outer
        if wait:
            daemon.wait_state("streaming")
        return daemon

    monkeypatch.setattr(daemon, "start", start)
    return started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_its_configuration(image: Image) -> None:
    config = image.config
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] == "SIGTERM"
    assert image.command == [
        "/opt/cdc-sync/bin/cdc-sync", "run", "--config", "/etc/cdc-sync/cdc-sync.toml",
    ]  # fmt: skip
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"
    assert set(config["ExposedPorts"]) == {"9464/tcp"}
    assert image.environ["CDC_SYNC_HTTP__HOST"] == "0.0.0.0"
    assert image.environ["CDC_SYNC_REVISION"] == "0123abc"


def test_nothing_of_the_build_is_left_in_it(image: Image) -> None:
    place = image.root / "opt" / "cdc-sync"
    names = {path.name for path in (place / "bin").iterdir()}
    assert {"cdc-sync", "healthcheck.py"} <= names
    assert not {"pip", "hatchling"} & names
    assert not (image.root / "source").exists()
    assert not (image.root / "build").exists()
    assert not (image.root / "mnt" / "wheels").exists()
    traces = [
        path
        for path in place.rglob("*")
        if path.suffix in (".json", ".cfg", ".conf", ".txt", "") and path.is_file()
        if b"/mnt/wheels" in path.read_bytes()
    ]
    assert traces == []
    # Compiled beforehand: a read-only file system keeps no bytecode.
    assert list(place.glob("lib/python3*/site-packages/cdc_sync/__pycache__/*.pyc"))


def test_the_main_job(
    image: Image,
    database18: Database,
    sync_table: SyncTable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    containers: list[Container] = []

    def contained(*arguments: Any, **options: Any) -> Synced:
        synced = sync_table(*arguments, **options)
        nonlocal containers
        containers = in_container(image, synced.daemon, monkeypatch)
        return synced

    synced = run_job(database18, contained, "server", rows=2_000, dim=768, after_copy_seconds=5)
    (container,) = containers
    try:
        look_around(container)
        synced.assert_equal()
        assert container.terminate(STOP_SECONDS) == 0
        assert synced.daemon.events()[-1]["event"] == "stopped"
    finally:
        for each in containers:
            each.close()


def look_around(container: Container) -> None:
    """As whom and where the daemon runs, and that its health check agrees."""
    status = Path(f"/proc/{container.process.pid}/status").read_text(encoding="ascii")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["Uid"].split() == ["65532"] * 4
    assert facts["Gid"].split() == ["65532"] * 4
    assert facts["NSpid"].split()[-1] == "1"
    assert int(facts["CapEff"], 16) == 0
    refused = container.execute("touch", "/opt/cdc-sync/x")
    assert "Read-only file system" in refused.stderr
    check = container.image.config["Healthcheck"]["Test"][1:]
    healthy = container.execute(*check)
    assert healthy.returncode == 0, healthy.stderr
    assert container.execute(*check, "/nowhere").returncode == 1
    version = container.execute("/opt/cdc-sync/bin/cdc-sync", "version")
    assert version.stdout.startswith("cdc-sync")
    assert re.search(r"^revision +0123abc$", version.stdout, re.MULTILINE)


def test_stops_while_copying_and_while_streaming_under_load(
    image: Image,
    database18: Database,
    sync_table: SyncTable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY, emb vector(2))")
    database18.execute("INSERT INTO docs SELECT i, ARRAY[i, 1] FROM generate_series(1, 20000) i")
    database18.execute("ANALYZE docs")
    slowly = {"num_workers": 2, "batch_size": 100, "batch_delay": 100, "chunk_rows": 1000}
    synced = sync_table(database18, "docs", start=False, migration=slowly)
    daemon = synced.daemon
    containers = in_container(image, daemon, monkeypatch)
    try:
        daemon.start(wait=False)
        daemon.wait(lambda: daemon.metric("cdc_sync_snapshot_rows_total") > 500, "some rows", 300)
        workers = containers[0].process.children(recursive=True)
        assert workers
        assert containers[0].terminate(STOP_SECONDS) == 0
        psutil.wait_procs(workers, timeout=30)
        assert not [process for process in workers if process.is_running()]
        with written(database18):
            # What was not confirmed is sent again.
            daemon.start()
            daemon.wait(lambda: daemon.metric("cdc_sync_transactions_total") > 50, "changes", 300)
            assert containers[1].terminate(STOP_SECONDS) == 0
            daemon.start()
        synced.assert_equal()
    finally:
        for each in containers:
            each.close()


@contextmanager
def written(database: Database) -> Iterator[None]:
    """Somebody changes rows."""
    ended = threading.Event()

    def write() -> None:
        with database.connect() as connection:
            for number in itertools.count():
                if ended.wait(0.005):
                    return
                connection.execute(
                    "UPDATE docs SET emb = ARRAY[%s, 2]::vector WHERE id %% 977 = %s",
                    (number, number % 977),
                )

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
