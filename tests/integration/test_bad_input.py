"""Bad input ends with one clear message, a documented exit code, and nothing created or changed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.daemon import write_config
from tests.support.fix_postgres import Database, PrivatePostgres
from tests.support.qdrant_control import QdrantTarget

UNAVAILABLE, PERMISSION, CONFIG = 69, 77, 78


class Attempt:
    """Runs ``cdc-sync run`` and ``check`` with a configuration that cannot work."""

    def __init__(self, directory: Path, database: Database, qdrant: QdrantTarget) -> None:
        self.directory = directory
        self.database = database
        self.qdrant = qdrant
        self.collection = qdrant.new_collection_name()
        self.source: dict[str, object] = {
            "url": database.url,
            "slot": "bad_input",
            "publication": "bad_input",
        }
        self.target: dict[str, object] = {"url": qdrant.url}
        if qdrant.api_key is not None:
            self.target["api_key"] = qdrant.api_key
        self.table: dict[str, object] = {"name": "docs", "collection": self.collection}

    def run(
        self,
        command: str = "run",
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        config = write_config(
            self.directory / "bad.toml",
            [self.table],
            source=self.source,
            qdrant=self.target,
            pipeline={"startup_timeout_seconds": 1, "name": "bad_input"},
            http={"enabled": False},
        )
        done = subprocess.run(
            [sys.executable, "-m", "cdc_sync", command, "--config", str(config), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=None if env is None else {"PATH": "/usr/bin:/bin", **env},
        )
        return done.returncode, done.stdout + done.stderr

    def assert_nothing_created(self) -> None:
        for catalog in (
            "pg_publication",
            "pg_replication_slots WHERE database = current_database()",
        ):
            assert self.database.execute(f"SELECT count(*) FROM {catalog}") == [(0,)], catalog
        client = self.qdrant.client()
        assert not client.collection_exists(self.collection)

    def fails(self, code: int, *says: str) -> str:
        """Both ``run`` and ``check`` end with the code and say all of it."""
        outputs = []
        for command in ("check", "run"):
            exit_code, output = self.run(command)
            assert exit_code == code, (command, output)
            assert "Traceback" not in output, output
            for text in says:
                assert re.search(text, re.sub(r"[│\s]+", " ", output)), (command, text, output)
            outputs.append(output)
        return outputs[-1]


@pytest.fixture
def attempt(tmp_path: Path, database18: Database, qdrant: QdrantTarget) -> Attempt:
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(3))")
    return Attempt(tmp_path, database18, qdrant)


def test_a_host_that_does_not_answer(attempt: Attempt) -> None:
    attempt.source["url"] = "postgresql://user:hidden@127.0.0.1:1/db"
    output = attempt.fails(UNAVAILABLE, "127.0.0.1")
    assert "hidden" not in output
    attempt.assert_nothing_created()


def test_a_wrong_password(attempt: Attempt) -> None:
    server = attempt.database.server
    attempt.source["url"] = (
        f"postgresql://postgres:wrong-secret@127.0.0.1:{server.port}/{attempt.database.name}"
    )
    output = attempt.fails(PERMISSION, "password")
    assert "wrong-secret" not in output
    attempt.assert_nothing_created()


def test_a_database_that_does_not_exist(attempt: Attempt) -> None:
    attempt.source["url"] = attempt.database.server.url("nowhere")
    attempt.fails(CONFIG, "nowhere")
    attempt.assert_nothing_created()


def test_a_table_that_does_not_exist(attempt: Attempt) -> None:
    attempt.table["name"] = "dosc"
    attempt.fails(CONFIG, "dosc", "docs")
    attempt.assert_nothing_created()


def test_a_key_column_that_does_not_exist(attempt: Attempt) -> None:
    attempt.table["key"] = ["idd"]
    attempt.fails(CONFIG, "idd", "id")
    attempt.assert_nothing_created()


def test_a_table_without_usable_key(attempt: Attempt) -> None:
    attempt.database.execute("ALTER TABLE docs DROP CONSTRAINT docs_pkey")
    attempt.fails(CONFIG, "docs", "ADD PRIMARY KEY")
    attempt.assert_nothing_created()


def test_a_vector_column_without_dimension(attempt: Attempt) -> None:
    attempt.database.execute("ALTER TABLE docs ADD free vector")
    attempt.fails(CONFIG, "free", r"vector\(n\)|vector\(", "dimensions")
    attempt.assert_nothing_created()


@pytest.mark.parametrize(("size", "distance"), [(4, "COSINE"), (3, "DOT")])
def test_a_collection_that_does_not_fit(attempt: Attempt, size: int, distance: str) -> None:
    from qdrant_client import models

    client = attempt.qdrant.client()
    client.create_collection(
        attempt.collection,
        vectors_config={"emb": models.VectorParams(size=size, distance=models.Distance[distance])},
    )
    before = client.get_collection(attempt.collection).config
    attempt.fails(CONFIG, attempt.collection, "emb")
    assert client.get_collection(attempt.collection).config == before
    assert attempt.database.execute("SELECT count(*) FROM pg_publication") == [(0,)]


def test_a_collection_with_points_of_others(attempt: Attempt) -> None:
    from qdrant_client import models

    client = attempt.qdrant.client()
    client.create_collection(
        attempt.collection,
        vectors_config={"emb": models.VectorParams(size=3, distance=models.Distance.COSINE)},
    )
    client.upsert(
        attempt.collection, [models.PointStruct(id=7, vector={"emb": [1.0, 2.0, 3.0]})], wait=True
    )
    attempt.fails(CONFIG, attempt.collection, "1 points?")
    assert client.count(attempt.collection, exact=True).count == 1


def test_a_qdrant_that_does_not_answer(attempt: Attempt) -> None:
    attempt.target["url"] = "http://127.0.0.1:1"
    attempt.fails(UNAVAILABLE, "127.0.0.1:1")
    attempt.assert_nothing_created()


def test_a_wrong_api_key(attempt: Attempt, tmp_path: Path) -> None:
    from tests.support.qdrant_control import QdrantProcess

    guarded = QdrantProcess(tmp_path / "guarded", api_key="right-key")
    try:
        attempt.target.update(url=guarded.url, api_key="wrong-key")
        output = attempt.fails(PERMISSION, "(?i)api key")
        assert "wrong-key" not in output
    finally:
        guarded.close()
    attempt.assert_nothing_created()


def test_an_unknown_configuration_key(attempt: Attempt) -> None:
    attempt.table["collectoin"] = "x"
    attempt.fails(CONFIG, "collectoin", "collection")
    attempt.assert_nothing_created()


def test_an_unknown_environment_variable(attempt: Attempt) -> None:
    code, output = attempt.run(env={"CDC_SYNC_SORUCE__SLOT": "x"})
    assert code == CONFIG
    assert "CDC_SYNC_SORUCE__SLOT" in output
    assert "CDC_SYNC_SOURCE__SLOT" in output
    attempt.assert_nothing_created()


def test_a_role_without_privileges(attempt: Attempt) -> None:
    role = attempt.database.create_cdc_role(["docs"])
    attempt.source["url"] = role.url
    attempt.database.execute(f'REVOKE SELECT ON docs FROM "{role.name}"')
    attempt.fails(PERMISSION, "GRANT SELECT ON")
    attempt.database.execute(f'GRANT SELECT ON docs TO "{role.name}"')
    attempt.fails(PERMISSION, "CREATE PUBLICATION")
    attempt.database.execute(f'ALTER ROLE "{role.name}" NOREPLICATION')
    attempt.fails(PERMISSION, "ALTER ROLE .* REPLICATION")
    attempt.assert_nothing_created()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"wal_level": "replica"}, "ALTER SYSTEM SET wal_level"),
        ({"max_replication_slots": "0"}, "max_replication_slots"),
    ],
)
def test_a_server_that_is_not_set_up(
    tmp_path: Path,
    private_postgres: PrivatePostgres,
    qdrant: QdrantTarget,
    settings: Mapping[str, str],
    says: str,
) -> None:
    from tests.support.fix_postgres import create_database

    database = create_database(private_postgres(settings))
    database.execute("CREATE TABLE docs (id bigint PRIMARY KEY, emb vector(3))")
    attempt = Attempt(tmp_path, database, qdrant)
    attempt.fails(CONFIG, says)
    attempt.assert_nothing_created()
