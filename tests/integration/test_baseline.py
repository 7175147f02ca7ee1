"""``cdc-sync baseline``: what it records of tables and searches, and what it refuses."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import SecretStr

from cdc_sync.cli import main
from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError, ErrorKind
from cdc_sync.verify.baseline import CaptureOptions, capture
from cdc_sync.verify.baseline_file import Baseline, Query, read_baseline
from cdc_sync.verify.baseline_queries import read_queries
from tests.support.fix_postgres import Connection, Database
from tests.support.fix_qdrant import QdrantTarget
from tests.support.search_scene import scene_settings

SCHEMA = """
CREATE TABLE docs (
    id bigint PRIMARY KEY, lang text, note text, embedding vector(4), half halfvec(4),
    sparse sparsevec(30), lone vector(4)
) PARTITION BY RANGE (id);
CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (100);
CREATE TABLE docs_2 PARTITION OF docs FOR VALUES FROM (100) TO (1000);
INSERT INTO docs SELECT i, (ARRAY['en','de',NULL])[1 + i % 3], 'a secret note',
    ARRAY[sin(i), cos(i), sin(i * 7), 1]::vector, ARRAY[i, i % 7, i % 3, 1]::vector::halfvec,
    ('{' || 1 + i % 20 || ':1.5,' || 21 + i % 10 || ':0.5}/30')::sparsevec,
    CASE WHEN i % 2 = 0 THEN ARRAY[i, 0, 0, 1]::vector END
  FROM generate_series(1, 250) i;
CREATE INDEX docs_hnsw ON docs USING hnsw (embedding vector_cosine_ops) WITH (m = 8);
CREATE INDEX docs_ivf ON docs USING ivfflat (half halfvec_l2_ops) WITH (lists = 5);
"""


@pytest.fixture
def settings(database18: Database, tmp_path: Path) -> Settings:
    database18.execute(SCHEMA)
    return scene_settings(database18, str(tmp_path / "edge"), {"name": "docs"})


def queries_of(baseline: Baseline, column: str) -> list[Query]:
    return [query for query in baseline.queries if query.column == column]


def from_file(path: Path, *queries: object) -> CaptureOptions:
    file = path / "queries.jsonl"
    file.write_text("\n".join(map(json.dumps, queries)))
    return CaptureOptions(given=tuple(read_queries(file)), sampled=0)


def test_the_inventory(settings: Settings) -> None:
    baseline = capture(settings, CaptureOptions(sampled=2))
    (table,) = baseline.tables
    assert (table.table, table.rows, table.key) == ("public.docs", 250, ["id"])
    leaves = [(leaf.name, leaf.rows) for leaf in table.partitions]
    assert leaves == [("public.docs_1", 99), ("public.docs_2", 151)]
    vectors = {vector.column: vector for vector in table.vectors}
    dense = vectors["embedding"]
    assert (dense.dimension, dense.metric) == (4, "Cosine")
    assert dense.metric_from == "index docs_hnsw (hnsw, vector_cosine_ops)"
    assert dense.indexes[0].options == {"m": 8, "ef_construction": 64}
    half = vectors["half"]
    assert (half.metric, half.datatype) == ("Euclid", "float16")
    assert half.indexes[0].options == {"lists": 5}
    assert half.quantization == "the column has half precision"
    assert (vectors["sparse"].metric, vectors["sparse"].dimension) == ("Dot", 30)
    assert (vectors["lone"].metric_from, vectors["lone"].indexes) == ("the default", [])
    assert dense.norms is not None
    assert dense.norms.rows == 200
    assert 1 <= dense.norms.minimum <= dense.norms.mean <= dense.norms.maximum <= 2
    assert baseline.server.settings["hnsw.ef_search"] == "40"
    assert baseline.server.settings["ivfflat.probes"] == "1"
    fields = {field.field: field for field in table.payload}
    assert fields["id"].types == {"integer": 100}
    assert set(fields["lang"].types) == {"null", "string"}
    assert baseline.configuration[0]["name"] == "docs"


def test_sampled_queries_have_the_results_of_plain_sql(
    settings: Settings, database18: Database
) -> None:
    baseline = capture(settings, CaptureOptions(sampled=3, k=5))
    for column, operator in (
        ("embedding", "<=>"),
        ("half", "<->"),
        ("sparse", "<#>"),
        ("lone", "<=>"),
    ):
        found = queries_of(baseline, column)
        assert len(found) == 3
        for query in found:
            assert query.exclude is not None
            expected = database18.execute(
                f"SET enable_indexscan = off; SELECT {column} {operator} (SELECT {column} FROM docs"
                f" WHERE id = {query.exclude[0]}) AS d FROM docs WHERE {column} IS NOT NULL AND"
                f" id <> {query.exclude[0]} ORDER BY d LIMIT 5"
            )
            # Ties may come in any order: their distances are the same.
            assert not expected or [hit.distance for hit in query.exact] == [
                pytest.approx(row[0]) for row in expected
            ]
            assert query.exclude not in [hit.key for hit in query.exact]
            assert (query.index is None) is (column in ("sparse", "lone"))
    used = {name for query in queries_of(baseline, "embedding") for name in query.indexes_used}
    assert used == {"docs_1_embedding_idx", "docs_2_embedding_idx"}
    assert any("leave the row itself out" in note for note in baseline.notes)


def test_the_same_rows_are_drawn_again(settings: Settings) -> None:
    def drawn(seed: int) -> list[list[str] | None]:
        return [q.exclude for q in capture(settings, CaptureOptions(sampled=5, seed=seed)).queries]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_sampled_row_may_be_among_its_results(settings: Settings) -> None:
    baseline = capture(settings, CaptureOptions(sampled=1, include_self=True))
    query = queries_of(baseline, "half")[0]
    assert query.exclude is None
    assert query.exact[0].distance == 0


def test_rows_as_near_as_the_last_are_recorded(database18: Database, tmp_path: Path) -> None:
    database18.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, embedding vector(2));"
        "INSERT INTO docs SELECT i, CASE WHEN i <= 3 THEN '[1,0]' ELSE '[0,1]' END::vector"
        "  FROM generate_series(1, 9) i"
    )
    settings = scene_settings(database18, str(tmp_path / "edge"), {"name": "docs"})
    options = from_file(tmp_path, {"vector": [1, 0], "k": 4})
    (query,) = capture(settings, options).queries
    assert len(query.exact) == 4
    assert len(query.ties) == 5
    assert {hit.distance for hit in query.ties} == {query.exact[3].distance}


def test_queries_of_a_file(settings: Settings, tmp_path: Path) -> None:
    options = from_file(
        tmp_path,
        {
            "vector": [0, 1, 0, 1],
            "column": "embedding",
            "k": 3,
            "filter": "lang = 'en' AND id < 100",
            "relevant": [3, {"key": "6", "grade": 2}],
            "label": "english",
        },
        {"vector": {"indices": [0, 25], "values": [1, 2]}, "column": "sparse", "table": "docs"},
    )
    first, second = capture(settings, options).queries
    assert (first.origin, first.label, first.k) == ("file", "english", 3)
    assert first.exclude is None
    assert all(int(hit.key[0]) % 3 == 0 and int(hit.key[0]) < 100 for hit in first.exact)
    assert first.relevant is not None
    assert [(label.key, label.grade) for label in first.relevant] == [(["3"], 1), (["6"], 2)]
    assert second.exact[0].distance == -(1.5 + 2 * 0.5) or second.exact[0].distance < 0


UNUSABLE = [
    ({"vector": [1, 2, 3], "column": "embedding"}, "of 3 dimensions; column embedding has 4"),
    ({"vector": [1, 2, 3, 4], "column": "sparse"}, "of the wrong kind for column sparse"),
    ({"vector": [1, 2, 3, 4]}, "does not say which vector column"),
    ({"vector": [1, 2, 3, 4], "column": "lang"}, "names no vector column"),
    ({"vector": [1, 2, 3, 4], "column": "embedding", "table": "x"}, "names no table"),
    ({"vector": {"indices": [30], "values": [1]}, "column": "sparse"}, "31 dimensions"),
    (
        {"vector": [1, 2, 3, 4], "column": "embedding", "filter": "lower(lang) = 'en'"},
        "the filter cannot be translated",
    ),
    (
        {
            "vector": [1, 2, 3, 4],
            "column": "embedding",
            "filter": "lang = 'x'; DROP TABLE docs",
        },
        "the filter cannot be translated",
    ),
    (
        {"vector": [1, 2, 3, 4], "column": "embedding", "relevant": ["not a number"]},
        "relevant row's key is no key",
    ),
    (
        {"vector": [1, 2, 3, 4], "column": "embedding", "relevant": [[1, 2]]},
        "relevant row's key is no key",
    ),
]


def test_queries_that_cannot_be_run(settings: Settings, tmp_path: Path) -> None:
    for query, message in UNUSABLE:
        with pytest.raises(ConfigError, match=message) as raised:
            capture(settings, from_file(tmp_path, query))
        assert raised.value.message.startswith("query 1 of the file")
        assert "not a number" not in raised.value.message


@pytest.mark.parametrize("rows", [0, 3])
def test_tables_with_hardly_any_rows(database18: Database, tmp_path: Path, rows: int) -> None:
    database18.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, embedding vector(2));"
        "CREATE INDEX ON docs USING hnsw (embedding vector_l2_ops);"
        "INSERT INTO docs SELECT i, CASE WHEN i < 3 THEN ARRAY[i, 1]::vector END"
        f"  FROM generate_series(1, {rows}) i"
    )
    settings = scene_settings(database18, str(tmp_path / "edge"), {"name": "docs"})
    baseline = capture(settings, CaptureOptions())
    assert baseline.tables[0].rows == rows
    # One row has no vector, one is the query's own.
    assert [len(query.exact) for query in baseline.queries] == ([1, 1] if rows else [])
    assert (baseline.tables[0].vectors[0].norms is None) is (not rows)
    assert any("queries; 50 or more" in note for note in baseline.notes)


def test_what_has_no_queries(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        "CREATE TABLE plain (id int PRIMARY KEY, t text); INSERT INTO plain VALUES (1, 'x');"
        "CREATE TABLE many (id int PRIMARY KEY, v vector(2)[]);"
        "INSERT INTO many VALUES (1, ARRAY['[1,2]'::vector])"
    )
    settings = scene_settings(database18, qdrant, {"name": "plain"}, {"name": "many"})
    baseline = capture(settings, CaptureOptions())
    plain, many = baseline.tables
    assert (plain.rows, plain.vectors) == (1, [])
    assert {field.field: field.types for field in plain.payload} == {
        "id": {"integer": 1},
        "t": {"string": 1},
    }
    assert (many.vectors[0].kind, many.vectors[0].norms) == ("multi", None)
    assert baseline.queries == []


def test_a_table_that_is_not_published_yet(settings: Settings, database18: Database) -> None:
    database18.execute(
        "CREATE TABLE other (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE other"
    )
    source = settings.source.model_copy(update={"publication": "p"})
    baseline = capture(settings.model_copy(update={"source": source}), CaptureOptions(sampled=1))
    assert baseline.queries


def test_it_writes_nothing_and_locks_nothing(settings: Settings, database18: Database) -> None:
    seen: set[object] = set()
    done = threading.Event()

    def look(connection: Connection) -> None:
        while not done.is_set():
            rows = connection.execute(
                "SELECT DISTINCT mode FROM pg_locks JOIN pg_stat_activity USING (pid)"
                # A scan of an HNSW index locks pages of it for others of its kind.
                " WHERE locktype = 'relation' AND application_name = 'cdc_sync'"
                " AND datname = current_database()"
                " AND relation IN (SELECT oid FROM pg_class WHERE relname LIKE 'docs%')"
            ).fetchall()
            seen.update(row[0] for row in rows)

    with database18.connect() as connection:
        watcher = threading.Thread(target=look, args=(connection,))
        watcher.start()
        try:
            capture(settings, CaptureOptions(sampled=5))
        finally:
            done.set()
            watcher.join()
    assert seen == {"AccessShareLock"}


def test_a_role_that_may_read_is_enough(settings: Settings, database18: Database) -> None:
    role = database18.create_cdc_role(["docs", "docs_1", "docs_2"])
    source = settings.source.model_copy(update={"url": SecretStr(role.url)})
    baseline = capture(settings.model_copy(update={"source": source}), CaptureOptions(sampled=2))
    assert len(baseline.queries) == 8
    assert baseline.server.settings["hnsw.ef_search"] == "40"


def test_a_query_that_takes_too_long_is_ended(settings: Settings, database18: Database) -> None:
    database18.execute(
        "ALTER TABLE docs DROP COLUMN lone;"
        "CREATE TABLE docs_3 PARTITION OF docs FOR VALUES FROM (1000) TO (10000);"
        "INSERT INTO docs SELECT i, NULL, repeat('x', 3000),"
        " '[1,2,3,4]' FROM generate_series(251, 9000) i;"
    )
    with pytest.raises(CdcSyncError, match="took longer than") as raised:
        capture(settings, CaptureOptions(sampled=50, timeout_seconds=0.0001))
    assert raised.value.kind is ErrorKind.SOURCE_UNAVAILABLE


class Commands:
    """The command line with settings of its own file."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        table = settings.tables[0]
        (path / "cdc.toml").write_text(
            f'[source]\nurl = "{settings.source.url.get_secret_value()}"\n'
            f'slot = "none"\npublication = "none"\n[qdrant]\nurl = "{settings.qdrant.url}"\n'
            f'[[tables]]\nname = "{table.name}"\ncollection = "{table.collection}"\n'
        )

    def run(self, *arguments: str) -> int:
        return main([*arguments, "--config", str(self.path / "cdc.toml")])


def test_the_command(
    settings: Settings,
    tmp_path: Path,
    database18: Database,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "before.json"
    arguments: Sequence[str] = ("baseline", "-o", str(output), "--sample", "2")
    commands = Commands(tmp_path, settings)
    assert commands.run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "public.docs: 250 rows, 2 partitions" in shown
    assert "index docs_ivf: ivfflat (lists = 5)" in shown
    assert all(len(line) <= 80 or str(output) in line for line in shown.splitlines())
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    taken = read_baseline(output)
    assert len(taken.queries) == 8
    # Values of rows only where they are asked for, and no secrets at all.
    content = output.read_text()
    assert "a secret note" not in content
    password = settings.source.url.get_secret_value().partition("//")[2].split("@")[0].split(":")[1]
    assert password not in content
    assert commands.run(*arguments) == 78
    assert "exists" in capsys.readouterr().err
    assert commands.run(*arguments, "--overwrite", "--values") == 0
    assert "a secret note" in output.read_text()
    assert not list(tmp_path.glob("*.partial"))
