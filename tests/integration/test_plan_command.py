"""``cdc-sync plan``: what it shows, and that it touches nothing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import models

from cdc_sync.postgres.estimates import WalFacts
from cdc_sync.sync.explain import explain, wal_advice
from cdc_sync.sync.retention import copy_budget
from tests.support.fix_postgres import Database
from tests.support.fix_qdrant import QdrantTarget
from tests.support.pipeline_task import pipeline_settings, running

SCHEMA = """
CREATE TABLE items (
    id bigint PRIMARY KEY, title text, price numeric, blob bytea, embedding vector(600),
    small halfvec(8), bare vector(3)
) PARTITION BY RANGE (id);
CREATE TABLE items_1 PARTITION OF items FOR VALUES FROM (0) TO (500);
CREATE TABLE items_2 PARTITION OF items FOR VALUES FROM (500) TO (100000);
INSERT INTO items SELECT i, 'title', 1.5, 'x',
       (SELECT array_agg(random())::vector FROM generate_series(1, 600) WHERE i > 0),
       '[1,2,3,4,5,6,7,8]', '[1,2,3]' FROM generate_series(1, 1000) i;
CREATE INDEX items_ann ON items USING hnsw (embedding vector_l2_ops) WITH (m = 24);
CREATE INDEX items_title ON items (title);
ANALYZE items;
"""


class Command:
    """Runs `cdc-sync plan` with settings of its own file."""

    def __init__(self, path: Path, database: Database, qdrant_url: str) -> None:
        self._file = path / "cdc.toml"
        self._database = database
        self._qdrant_url = qdrant_url

    def run(
        self, *arguments: str, tables: str = '[[tables]]\nname = "items"', more: str = ""
    ) -> subprocess.CompletedProcess[str]:
        self._file.write_text(
            f'[source]\nurl = "{self._database.url}"\nslot = "planned"\npublication = "planned"\n'
            f'[qdrant]\nurl = "{self._qdrant_url}"\n{more}\n{tables}\n'
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CDC_SYNC_")}
        return subprocess.run(
            [sys.executable, "-m", "cdc_sync", "plan", "--config", str(self._file), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )

    def json(self, code: int = 0, **options: str) -> dict[str, Any]:
        done = self.run("--json", **options)
        assert done.returncode == code, done.stdout + done.stderr
        content: dict[str, Any] = json.loads(done.stdout)
        assert content["ok"] is (code == 0)
        return content


@pytest.fixture
def command(tmp_path: Path, database18: Database, qdrant: QdrantTarget) -> Command:
    return Command(tmp_path, database18, qdrant.url)


def test_everything_is_shown(database18: Database, command: Command) -> None:
    database18.execute(SCHEMA)
    plan = command.json()
    assert plan["server"]["version"].startswith("18.")
    assert plan["server"]["database"] == database18.name
    assert plan["qdrant"]["reachable"] is True
    assert plan["copy"]["chunk_rows"] == 5000
    (table,) = plan["tables"]
    assert (table["table"], table["collection"]) == ("public.items", "items")
    assert (table["key"], table["key_from"]) == (["id"], "the primary key")
    assert "the number itself" in table["ids"]
    assert [part["name"] for part in table["partitions"]] == ["public.items_1", "public.items_2"]
    assert table["chunks"] == sum(part["chunks"] for part in table["partitions"]) >= 2
    assert 900 <= table["rows"] <= 1100
    assert table["rows_from"] == "the planner's estimate"
    # The vectors are out of line, and count.
    assert table["bytes"] > 1000 * 600 * 4
    assert table["vector_bytes"] == table["rows"] * (600 * 4 + 8 * 2 + 3 * 4)
    becomes = {column["name"]: (column["type"], column["becomes"]) for column in table["columns"]}
    assert becomes["embedding"] == ("vector(600)", "vector embedding")
    assert becomes["price"] == ("numeric", "payload field price")
    vectors = {vector["name"]: vector for vector in table["vectors"]}
    assert vectors["embedding"]["metric"] == "Euclid"
    assert vectors["embedding"]["metric_from"] == "index items_ann (hnsw, vector_l2_ops)"
    assert vectors["embedding"]["dimension_from"] == "the column's type"
    assert vectors["embedding"]["settings"] == {"hnsw_config": {"m": 24}}
    assert vectors["small"]["datatype"] == "float16"
    assert vectors["bare"]["metric_from"] == "the default"
    assert table["payload_indexes"] == [{"field": "title", "type": "keyword"}]
    assert any("column bare" in warning for warning in table["warnings"])
    assert table["collection_exists"] is False
    assert "created" in table["action"]
    assert plan["wal"]["wal_level"] == "logical"
    assert plan["wal"]["bytes_kept_while_copying"] > 0
    assert any("max_slot_wal_keep_size" in advice for advice in plan["wal"]["advice"])


def test_the_text_says_the_same(database18: Database, command: Command) -> None:
    database18.execute(SCHEMA)
    done = command.run()
    assert done.returncode == 0, done.stderr
    for text in (
        "public.items -> collection items",
        "planned, would be created",
        "CREATE PUBLICATION",
        "about 1,000 rows (the planner's estimate)",
        "public.items_2 (1)",
        "Euclid from",
        "items_ann",
        "title (keyword)",
        "payload field price",
        "max_slot_wal_keep_size",
    ):
        assert text in done.stdout, done.stdout
    assert all(len(line) <= 130 or "CREATE" in line for line in done.stdout.splitlines())


def test_nothing_is_touched(database18: Database, qdrant: QdrantTarget, command: Command) -> None:
    database18.execute(SCHEMA)
    for statement, expected in (
        ("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'planned'", [(0,)]),
        ("SELECT count(*) FROM pg_publication", [(0,)]),
    ):
        assert database18.execute(statement) == expected
    before = {c.name for c in qdrant.client().get_collections().collections}
    qdrant.script.clear_log()
    command.run()
    assert database18.execute("SELECT count(*) FROM pg_publication") == [(0,)]
    slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'planned'"
    assert database18.execute(slots) == [(0,)]
    assert {c.name for c in qdrant.client().get_collections().collections} == before
    written = {"Create", "Update", "Upsert", "UpdateBatch", "Delete", "CreateFieldIndex"}
    operations = set(qdrant.script.operations())
    assert not {name.removeprefix("Collections.") for name in operations} & written


def test_an_embedded_database_is_not_made(tmp_path: Path, database18: Database) -> None:
    database18.execute(SCHEMA)
    plan = Command(tmp_path, database18, f"edge:{tmp_path / 'edge'}").json()
    assert plan["copy"]["workers"] == 1
    assert plan["tables"][0]["collection_exists"] is False
    assert not (tmp_path / "edge").exists()


def test_many_partitions_are_counted_in_the_text(database18: Database, command: Command) -> None:
    database18.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v vector(3)) PARTITION BY RANGE (id)"
    )
    for n in range(15):
        database18.execute(
            f"CREATE TABLE items_{n:02} PARTITION OF items FOR VALUES FROM ({n}) TO ({n + 1})"
        )
    assert len(command.json()["tables"][0]["partitions"]) == 15
    text = command.run().stdout
    assert "public.items_11 (1) and 3 more" in " ".join(text.split())
    assert "about 0 rows" in text


def test_flags_work_too(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(SCHEMA)
    arguments = ["--pg.url", database18.url, "--pg.table", "items", "--qdrant.url", qdrant.url]
    arguments += ["--qdrant.collection", "other", "--qdrant.distance-metric", "bare=dot"]
    done = subprocess.run(
        [sys.executable, "-m", "cdc_sync", "plan", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (table,) = json.loads(done.stdout)["tables"]
    assert table["collection"] == "other"
    bare = next(vector for vector in table["vectors"] if vector["name"] == "bare")
    assert (bare["metric"], bare["metric_from"]) == ("Dot", "the configuration")


def test_qdrant_need_not_be_there(tmp_path: Path, database18: Database) -> None:
    database18.execute(SCHEMA)
    plan = Command(tmp_path, database18, "http://127.0.0.1:9").json()
    assert plan["qdrant"]["reachable"] is False
    (finding,) = plan["findings"]
    assert (finding["severity"], finding["subject"]) == ("warning", "qdrant")
    (table,) = plan["tables"]
    assert table["collection_exists"] is None
    assert table["rows"] > 0
    text = Command(tmp_path, database18, "http://127.0.0.1:9").run().stdout
    assert "not reachable: what exists there is not known" in text


def test_a_wrong_address_of_qdrant_is_an_error(tmp_path: Path, database18: Database) -> None:
    database18.execute(SCHEMA)
    plan = Command(tmp_path, database18, "ftp://127.0.0.1").json(code=78)
    assert len(plan["tables"]) == 1
    assert plan["findings"][0]["severity"] == "error"


def test_postgres_must_be_there(tmp_path: Path, database18: Database) -> None:
    away = Database("postgresql://127.0.0.1:9/x", "x", database18.server, 18)
    plan = Command(tmp_path, away, "http://127.0.0.1:9").json(code=69)
    assert plan["tables"] == []
    done = Command(tmp_path, away, "http://127.0.0.1:9").run()
    assert done.returncode == 69
    assert "error" in done.stdout


def test_a_wrong_setting_is_one_clear_error(database18: Database, command: Command) -> None:
    database18.execute(SCHEMA)
    tables = '[[tables]]\nname = "items"\ncollection_config = { hnsw_config = { mm = 3 } }'
    plan = command.json(code=78, tables=tables)
    assert "hnsw_config.mm" in plan["findings"][0]["message"]
    assert "Did you mean m?" in plan["findings"][0]["remedy"]


def test_what_keeps_a_run_from_starting_is_an_error_beside_the_plan(
    tmp_path: Path, database18: Database, qdrant: QdrantTarget
) -> None:
    database18.execute(SCHEMA)
    role = database18.create_cdc_role(["items", "items_1", "items_2"])
    database18.execute(f"ALTER ROLE {role.name} NOREPLICATION")
    database18.execute(f"REVOKE SELECT ON items FROM {role.name}")
    plan = Command(tmp_path, replace(database18, url=role.url), qdrant.url).json(code=77)
    (finding,) = plan["findings"]
    assert finding["kind"] == "source_permission"
    assert "may not replicate" in finding["message"]
    (table,) = plan["tables"]
    assert table["rows"] is None
    assert "permission denied" in table["rows_from"]
    assert table["vectors"]
    assert table["bytes"] > 0


def test_existing_collections_are_compared(
    database18: Database, qdrant: QdrantTarget, command: Command
) -> None:
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(3))")
    database18.execute("CREATE INDEX ON docs USING hnsw (v vector_l2_ops) WITH (m = 24)")
    name = qdrant.new_collection_name()
    tables = f'[[tables]]\nname = "docs"\ncollection = "{name}"'
    client = qdrant.client()
    params = models.VectorParams(size=3, distance=models.Distance.EUCLID)
    client.create_collection(name, vectors_config={"v": params})
    (table,) = command.json(tables=tables)["tables"]
    assert (table["collection_exists"], table["points"]) == (True, 0)
    assert any("vectors.v.hnsw_config.m = 16" in warning for warning in table["warnings"])
    client.upsert(name, [models.PointStruct(id=1, vector={"v": [1.0, 2.0, 3.0]})])
    plan = command.json(code=78, tables=tables)
    assert "1 points that this pipeline has not written" in plan["findings"][0]["message"]
    plan = command.json(tables=tables, more="[migration]\nadopt = true")
    assert "compared" in plan["tables"][0]["action"]
    database18.execute("ALTER TABLE docs ALTER v TYPE vector(4)")
    plan = command.json(code=78, tables=tables)
    assert "3 dimensions" in plan["findings"][0]["message"]


def test_an_absent_collection_that_may_not_be_created(
    database18: Database, command: Command
) -> None:
    database18.execute(SCHEMA)
    plan = command.json(code=78, more="[migration]\ncreate_collection = false")
    assert "does not exist" in plan["findings"][0]["message"]


async def test_a_pipeline_that_runs_is_shown_as_it_is(
    tmp_path: Path, database18: Database, qdrant: QdrantTarget
) -> None:
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(3))")
    database18.execute("INSERT INTO docs VALUES (1, '[1,2,3]'), (2, '[1,2,3]')")
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal()
        await life.stop()
    explained = await asyncio.to_thread(explain, settings)
    assert explained.findings == []
    assert explained.publication["exists"] is True
    assert explained.slot["exists"] is True
    (table,) = explained.tables
    assert (table.points, table.action) == (2, "is copied already; changes are followed")


def test_no_secret_is_shown(tmp_path: Path, database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(SCHEMA)
    for arguments in ([], ["--json"]):
        done = Command(tmp_path, database18, qdrant.url).run(
            *arguments, more='api_key = "s3cret-key"'
        )
        assert "s3cret-key" not in done.stdout + done.stderr


def test_a_limit_smaller_than_the_copy_needs_is_said() -> None:
    def advice(limit: int | None) -> str:
        facts = WalFacts("logical", limit, 1, 1, 1e6, 60.0)
        budget = copy_budget(None, limit)
        return " ".join(wal_advice(facts, 60_000_000, 3_600_000_000, None, budget))

    assert "no limit" in advice(None)
    assert "slot keep 40.0 MB of WAL, less than it does" in advice(50_000_000)
    assert "windows end early during the copy" in advice(70_000_000)
    assert "an hour" in advice(100_000_000)
    assert advice(4_000_000_000) == ""
