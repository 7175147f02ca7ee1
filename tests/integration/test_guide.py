"""What Qdrant's guide "Migrate from pgvector" promises: each concept, flag and gotcha by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from qdrant_client import QdrantClient, models

from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantTarget

SCHEMA = """
CREATE TABLE docs (
  id bigint PRIMARY KEY, title text, year int, tags text[], rating numeric, maybe text,
  cos vector(3), l2 vector(3), ip vector(3));
CREATE INDEX ON docs USING hnsw (cos vector_cosine_ops);
CREATE INDEX ON docs USING hnsw (l2 vector_l2_ops);
CREATE INDEX ON docs USING hnsw (ip vector_ip_ops);
INSERT INTO docs SELECT i, 'title ' || i, 2000 + i, ARRAY['a', 'b'], i + 0.5,
  CASE WHEN i % 2 = 0 THEN 'there' END,
  format('[%s,1,2]', i)::vector, format('[%s,1,2]', i)::vector,
  CASE WHEN i <> 7 THEN format('[%s,1,2]', i)::vector END
  FROM generate_series(1, 50) i;
"""


class Migration:
    """``cdc-sync migrate`` of one table by the guide's flags."""

    def __init__(self, database: Database, qdrant: QdrantTarget) -> None:
        self.database = database
        self.collection = qdrant.new_collection_name()
        self._qdrant = qdrant
        self.client: QdrantClient = qdrant.client()

    def run(self, *more: str, table: str = "docs") -> dict[str, Any]:
        name = self.database.name
        key = ["--qdrant.api-key", self._qdrant.api_key] if self._qdrant.api_key else []
        ended = subprocess.run(
            [
                sys.executable, "-m", "cdc_sync", "migrate", "--json", "--http.port", "0",
                "--pg.url", self.database.url, "--pg.table", table,
                "--qdrant.url", self._qdrant.url, "--qdrant.collection", self.collection, *key,
                "--source.slot", name, "--source.publication", name, *more,
            ],
            capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        summary: dict[str, Any] = json.loads(ended.stdout)
        return summary

    @property
    def points(self) -> dict[object, models.Record]:
        found, _ = self.client.scroll(self.collection, limit=1000, with_vectors=True)
        return {point.id: point for point in found}

    @property
    def vectors(self) -> Mapping[str, models.VectorParams]:
        params = self.client.get_collection(self.collection).config.params.vectors
        assert isinstance(params, dict)
        return params


@pytest.fixture
def migration(database18: Database, qdrant: QdrantTarget) -> Migration:
    database18.execute(SCHEMA)
    return Migration(database18, qdrant)


def payload(migration: Migration, id_: int) -> dict[str, Any]:
    return dict(migration.points[id_].payload or {})


# -- concepts


def test_concept_table_to_collection_and_row_to_point(migration: Migration) -> None:
    migration.run()
    assert migration.client.collection_exists(migration.collection)
    assert set(migration.points) == set(range(1, 51))


def test_concept_vector_column_to_vector_and_other_columns_to_payload(migration: Migration) -> None:
    migration.run()
    point = migration.points[4]
    assert isinstance(point.vector, dict)
    assert point.vector["l2"] == [4.0, 1.0, 2.0]
    assert point.payload == {
        "id": 4, "title": "title 4", "year": 2004, "tags": ["a", "b"], "rating": 4.5,
        "maybe": "there",
    }  # fmt: skip


def test_concept_operator_class_to_distance(migration: Migration) -> None:
    """Also the scores: similarity is 1 - distance, inner products are negative in pgvector."""
    migration.run()
    assert {name: params.distance for name, params in migration.vectors.items()} == {
        "cos": models.Distance.COSINE,
        "l2": models.Distance.EUCLID,
        "ip": models.Distance.DOT,
    }
    for name, operator in (("cos", "<=>"), ("l2", "<->"), ("ip", "<#>")):
        found = migration.client.query_points(
            migration.collection, query=[3.0, 1.0, 2.5], using=name, limit=10
        ).points
        expected = migration.database.execute(
            f"SELECT id, {name} {operator} '[3,1,2.5]' FROM docs WHERE {name} IS NOT NULL"
            " ORDER BY 2 LIMIT 10"
        )
        shift, sign = {"cos": (1.0, -1.0), "l2": (0.0, 1.0), "ip": (0.0, -1.0)}[name]
        assert [point.score for point in found] == pytest.approx(
            [shift + sign * float(str(distance)) for _, distance in expected], abs=1e-5
        )
        assert {point.id for point in found} == {id_ for id_, _ in expected}


# -- flags


def test_flag_pg_key_column(migration: Migration) -> None:
    migration.database.execute(
        "ALTER TABLE docs ALTER year SET NOT NULL; CREATE UNIQUE INDEX by_year ON docs (year);"
        "ALTER TABLE docs REPLICA IDENTITY USING INDEX by_year"
    )
    migration.run("--pg.key-column", "year")
    assert set(migration.points) == set(range(2001, 2051))


def test_flag_pg_columns(migration: Migration) -> None:
    migration.run("--pg.columns", "id,title,cos")
    assert payload(migration, 1) == {"id": 1, "title": "title 1"}
    assert set(migration.vectors) == {"cos"}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_flag_migration_num_workers(migration: Migration, workers: str) -> None:
    migration.run("--migration.num-workers", workers)
    assert len(migration.points) == 50


def test_flag_qdrant_distance_metric(migration: Migration) -> None:
    migration.run("--qdrant.distance-metric", "cos=dot", "--qdrant.distance-metric", "ip=euclid")
    assert migration.vectors["cos"].distance == models.Distance.DOT
    assert migration.vectors["ip"].distance == models.Distance.EUCLID
    assert migration.vectors["l2"].distance == models.Distance.EUCLID


def test_flags_migration_batch_size_and_batch_delay(migration: Migration) -> None:
    summary = migration.run("--migration.batch-size", "10", "--migration.batch-delay", "100")
    assert len(migration.points) == 50
    # Four rests between five batches.
    assert summary["total"]["seconds"] >= 0.4


# -- gotchas


def test_gotcha_partitions(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, emb vector(3)) PARTITION BY RANGE (id);"
        "CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (100);"
        "CREATE TABLE docs_2 PARTITION OF docs FOR VALUES FROM (100) TO (200)"
        " PARTITION BY HASH (id);"
        "CREATE TABLE docs_2a PARTITION OF docs_2 FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE docs_2b PARTITION OF docs_2 FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
        "CREATE TABLE docs_rest PARTITION OF docs DEFAULT;"
        "INSERT INTO docs SELECT i, '[1,2,3]' FROM generate_series(0, 299) i"
    )
    migration = Migration(database18, qdrant)
    migration.run()
    assert set(migration.points) == set(range(300))


def test_gotcha_partitions_made_by_hand(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, emb vector(3));"
        "CREATE TABLE docs_1 (PRIMARY KEY (id)) INHERITS (docs);"
        "CREATE TABLE docs_2 (PRIMARY KEY (id)) INHERITS (docs);"
        "INSERT INTO docs_1 SELECT i, '[1,2,3]' FROM generate_series(1, 10) i;"
        "INSERT INTO docs_2 SELECT i, '[1,2,3]' FROM generate_series(11, 20) i"
    )
    migration = Migration(database18, qdrant)
    migration.run()
    assert set(migration.points) == set(range(1, 21))


def test_gotcha_nulls(migration: Migration) -> None:
    """A NULL is a null that `is_null` finds; a NULL vector is no vector."""
    migration.run()
    assert payload(migration, 1)["maybe"] is None
    found, _ = migration.client.scroll(
        migration.collection,
        scroll_filter=models.Filter(
            must=[models.IsNullCondition(is_null=models.PayloadField(key="maybe"))]
        ),
        limit=100,
    )
    assert {point.id for point in found} == set(range(1, 51, 2))
    vector = migration.points[7].vector
    assert isinstance(vector, dict)
    assert set(vector) == {"cos", "l2"}


def test_gotcha_ivfflat(migration: Migration) -> None:
    migration.database.execute(
        "DROP INDEX docs_l2_idx; CREATE INDEX ON docs USING ivfflat (l2 vector_l2_ops)"
        " WITH (lists = 1)"
    )
    migration.run()
    assert migration.vectors["l2"].distance == models.Distance.EUCLID


def test_gotcha_counts(migration: Migration) -> None:
    """Not the statistics: they know nothing of these rows."""
    migration.database.execute(
        "ALTER TABLE docs SET (autovacuum_enabled = off); DELETE FROM docs WHERE id > 30"
    )
    summary = migration.run()
    table = summary["tables"][0]
    assert table["source_rows"] == 30
    assert table["points"] == 30
