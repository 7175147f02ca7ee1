"""The compose file: its form, its parts, and its writer against a real Postgres."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from cdc_sync.config import HttpSettings, PipelineSettings
from cdc_sync.loading import load_settings
from tests.operate.dashboard import GRAFANA, ROOT
from tests.support.daemon import Daemon
from tests.support.fix_postgres import PrivatePostgres
from tests.support.qdrant_control import QdrantTarget

DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
_READY_SECONDS = 90.0


@pytest.mark.campaign
def test_it_is_a_compose_file() -> None:
    compose = pytest.importorskip("compose_spec", reason="the group deployment")
    # Merge keys are YAML's; the parser knows only what they become.
    parsed = compose.PyCompose.from_json(json.dumps(COMPOSE))
    assert set(parsed.service_names()) == set(SERVICES)
    parsed.to_spec()
    broken = {**COMPOSE, "services": {"x": {"image": 3, "depends_on": 4}}}
    with pytest.raises(ValueError, match="expected a string"):
        compose.PyCompose.from_json(json.dumps(broken))


def test_images_are_of_a_version() -> None:
    images = {name: service["image"] for name, service in SERVICES.items()}
    assert images.pop("cdc-sync") == images.pop("writer") == "cdc-sync:local"
    for image in images.values():
        _, _, tag = image.partition(":")
        assert tag not in ("", "latest"), image
    assert SERVICES["cdc-sync"]["build"] == {"context": "..", "dockerfile": "docker/Dockerfile"}


def test_each_starts_when_what_it_needs_is_there() -> None:
    needed = {name: set(service.get("depends_on", {})) for name, service in SERVICES.items()}
    assert needed["cdc-sync"] == {"postgres", "qdrant", "writer"}
    assert needed["writer"] == {"postgres"}
    for service in SERVICES.values():
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            # The image of cdc-sync brings its own.
            assert "healthcheck" in SERVICES[other] or other == "cdc-sync"


def test_nothing_is_reachable_from_outside() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name


def test_what_is_mounted_is_there() -> None:
    files = [secret["file"] for secret in COMPOSE["secrets"].values()]
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert mount.endswith(":ro")
                files.append(source)
            else:
                assert source in COMPOSE["volumes"]
    assert len(files) >= 8
    for file in files:
        assert (DOCKER / file).exists(), file


def test_the_daemon_is_confined_and_has_time_to_stop() -> None:
    service = SERVICES["cdc-sync"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace >= PipelineSettings().shutdown_timeout_seconds + 10


def test_prometheus_scrapes_the_services_by_their_names() -> None:
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text(encoding="utf-8"))
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]
    }
    assert targets == {
        "cdc-sync": [f"cdc-sync:{HttpSettings().port}"],
        "qdrant": ["qdrant:6333"],
    }
    source = yaml.safe_load(
        (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text(encoding="utf-8")
    )
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert {"prometheus", "qdrant", "cdc-sync"} <= SERVICES.keys()


def test_its_configuration_is_valid() -> None:
    secret = str(DOCKER / COMPOSE["secrets"]["password"]["file"])
    environ = SERVICES["cdc-sync"]["environment"]
    assert set(environ.values()) == {"/run/secrets/password"}
    settings = load_settings(
        DOCKER / "compose" / "cdc-sync.toml", {}, dict.fromkeys(environ, secret)
    ).settings
    assert settings.source.password is not None
    # The default would refuse a server elsewhere that has no TLS.
    assert settings.source.sslmode == "disable"
    assert [table.name for table in settings.tables] == ["public.packages"]


@pytest.mark.campaign
@pytest.mark.timeout(240)
def test_role_writer_and_daemon_work_together(
    private_postgres: PrivatePostgres, qdrant: QdrantTarget, tmp_path: Path
) -> None:
    """What `docker compose up` starts, without the containers."""
    server = private_postgres()
    secret = DOCKER / COMPOSE["secrets"]["password"]["file"]
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE app")
    role = (DOCKER / "compose" / "role.sql").read_text(encoding="utf-8")
    subprocess.run(
        [
            server.binaries.prefix / "bin" / "psql", "--no-psqlrc", "--quiet",
            "--set=ON_ERROR_STOP=1", "--dbname", server.url("app"),
        ],
        input=role.replace("/run/secrets/password", str(secret)),
        text=True,
        check=True,
    )  # fmt: skip
    ready = tmp_path / "ready"
    writer = subprocess.Popen(
        [sys.executable, DOCKER / "compose" / "writer.py", server.url("app")],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    password = secret.read_text(encoding="utf-8")
    daemon = Daemon(
        tmp_path,
        pg_url=server.url("app", "cdc_sync", password),
        qdrant_url=qdrant.url,
        tables=[{"name": "public.packages", "collection": qdrant.new_collection_name()}],
        slot="cdc_sync",
        api_key=qdrant.api_key,
    )
    try:
        with daemon:
            wait_for(ready, writer)
            daemon.start()
            daemon.wait(lambda: daemon.metric("cdc_sync_changes_total") > 20, "changes")
            assert daemon.terminate() == 0
    finally:
        writer.terminate()
        assert writer.wait(30) == 0


def wait_for(file: Path, writer: subprocess.Popen[bytes]) -> None:
    """Until the writer says that the table is there."""
    deadline = time.monotonic() + _READY_SECONDS
    while not file.exists():
        assert writer.poll() is None, "the writer has ended"
        assert time.monotonic() < deadline, "the writer is not ready"
        time.sleep(0.1)
