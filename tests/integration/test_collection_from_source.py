"""Collections made from what Postgres says of the table: vector indexes as real servers print them,
settings, and the order in which things are made.
"""

from __future__ import annotations

from typing import Any

import pytest
from qdrant_client import models

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.index_expressions import IndexUse
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import Datatype, Metric, VectorPlan
from cdc_sync.mapping.planner import PlanResult, build_plan
from cdc_sync.mapping.table import Table
from cdc_sync.mapping.vector_indexes import VectorIndex, index_notes, vector_indexes
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.sync.check import run_checks
from cdc_sync.sync.planning import plan_pipeline
from tests.support.fix_postgres import Database
from tests.support.fix_qdrant import QdrantTarget
from tests.support.pipeline_task import pipeline_settings, running


def read(database: Database, name: str = "docs") -> Table:
    settings = SourceSettings.model_validate({"url": database.url})
    with connect(settings) as connection:
        return find_table(connection, name)


def docs(database: Database, *statements: str, column: str = "embedding vector(4)") -> Table:
    """A table `docs` with 20 rows and what the statements add."""
    database.execute(f"CREATE TABLE docs (id bigint PRIMARY KEY, title text, {column})")
    database.execute(
        "INSERT INTO docs SELECT i, 'title ' || i, '[1,2,3,4]' FROM generate_series(1, 20) i"
    )
    for statement in statements:
        database.execute(statement)
    return read(database)


def planned(table: Table, **options: Any) -> PlanResult:
    return build_plan(table, PlanOptions(**options))


def vector_of(table: Table, **options: Any) -> VectorPlan:
    (vector,) = planned(table, **options).plan.vectors
    return vector


def found(table: Table, column: str = "embedding") -> VectorIndex:
    (one,) = vector_indexes(table, column).found
    return one


def notes(table: Table, column: str = "embedding") -> str:
    return "\n".join(index_notes(table, [(column, vector_of(table))]))


# -- vector indexes


@pytest.mark.parametrize(
    ("opclass", "metric"),
    [
        ("vector_cosine_ops", Metric.COSINE),
        ("vector_l2_ops", Metric.EUCLID),
        ("vector_ip_ops", Metric.DOT),
        ("vector_l1_ops", Metric.MANHATTAN),
    ],
)
def test_hnsw_index(database: Database, opclass: str, metric: Metric) -> None:
    table = docs(
        database,
        f"CREATE INDEX ann ON docs USING hnsw (embedding {opclass}) "
        "WITH (m = 24, ef_construction = 100)",
    )
    vector = vector_of(table)
    assert (vector.metric, vector.hnsw_m, vector.hnsw_ef_construct) == (metric, 24, 100)
    assert notes(table) == ""


def test_gotcha_ivfflat(database: Database) -> None:
    table = docs(
        database,
        "CREATE INDEX ann ON docs USING ivfflat (embedding vector_ip_ops) WITH (lists = 3)",
    )
    vector = vector_of(table)
    assert (vector.metric, vector.hnsw_m) == (Metric.DOT, None)
    for text in ("ann is IVFFlat (lists = 3)", "HNSW", "for the better"):
        assert text in notes(table)


def test_half_precision_expression(database: Database) -> None:
    table = docs(
        database,
        "CREATE INDEX ann ON docs USING hnsw ((embedding::halfvec(4)) halfvec_l2_ops) "
        "WITH (m = 30)",
    )
    assert found(table).vector.use is IndexUse.HALF
    vector = vector_of(table)
    assert (vector.metric, vector.hnsw_m, vector.datatype) == (
        Metric.EUCLID,
        30,
        Datatype.FLOAT32,
    )
    assert 'datatype = "float16"' in notes(table)
    assert planned(table).warnings == ()


def test_binary_quantize_expression(database: Database) -> None:
    table = docs(
        database,
        "CREATE INDEX ann ON docs USING hnsw ((binary_quantize(embedding)::bit(4)) "
        "bit_hamming_ops)",
    )
    assert found(table).vector.use is IndexUse.BINARY
    assert vector_of(table).metric is Metric.COSINE
    assert "binary quantization" in notes(table)


def test_subvector_and_normalizing_expressions(database: Database) -> None:
    table = docs(
        database,
        "CREATE INDEX part ON docs USING hnsw ((subvector(embedding, 1, 2)::vector(2)) "
        "vector_l2_ops)",
    )
    assert found(table).vector.use is IndexUse.PART
    assert vector_of(table).metric is Metric.COSINE
    database.execute(
        "DROP INDEX part; CREATE INDEX unit ON docs USING hnsw "
        "((l2_normalize(embedding)::vector(4)) vector_ip_ops)"
    )
    table = read(database)
    assert found(table).vector.normalized
    assert vector_of(table).metric is Metric.COSINE
    assert not any("no vector index" in warning for warning in planned(table).warnings)


def test_odd_names_and_the_extension_in_a_schema_of_its_own(database: Database) -> None:
    database.execute(
        'CREATE SCHEMA "Ext""s"; DROP EXTENSION vector; CREATE EXTENSION vector SCHEMA "Ext""s"'
    )
    database.execute(
        'CREATE TABLE docs (id bigint PRIMARY KEY, "Em (b) ""x""" "Ext""s".vector(4));'
        'CREATE INDEX ann ON docs USING hnsw (("Em (b) ""x"""::"Ext""s".halfvec(4)) '
        '"Ext""s".halfvec_ip_ops)'
    )
    table = read(database)
    assert found(table, 'Em (b) "x"').vector.use is IndexUse.HALF
    assert vector_of(table).metric is Metric.DOT


def test_vectors_declared_without_dimension(database: Database) -> None:
    table = docs(
        database,
        "CREATE INDEX ann ON docs USING hnsw ((embedding::vector(4)) vector_l2_ops) WHERE id > 3",
        column="embedding vector",
    )
    assert (vector_of(table).size, vector_of(table).metric) == (4, Metric.EUCLID)
    assert "ann is partial" in notes(table)
    database.execute(
        "CREATE INDEX other ON docs USING hnsw ((embedding::vector(9)) vector_l2_ops) WHERE id < 0"
    )
    with pytest.raises(SourceError) as caught:
        planned(read(database))
    for text in ("ann has 4", "other has 9"):
        assert text in caught.value.message
    assert vector_of(read(database), dimensions={"embedding": 4}).size == 4


def test_conflicting_metrics_name_both_indexes(database: Database) -> None:
    table = docs(
        database,
        "CREATE INDEX one ON docs USING hnsw (embedding vector_l2_ops)",
        "CREATE INDEX two ON docs USING hnsw ((embedding::halfvec(4)) halfvec_cosine_ops)",
    )
    with pytest.raises(SourceError) as caught:
        planned(table)
    assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
    for text in ("one is for Euclid", "two for Cosine"):
        assert text in caught.value.message
    assert vector_of(table, metrics={"embedding": "euclid"}).metric is Metric.EUCLID


PARTITIONED = """
CREATE TABLE docs (id bigint PRIMARY KEY, embedding vector(4)) PARTITION BY RANGE (id);
CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (10);
CREATE TABLE docs_2 PARTITION OF docs FOR VALUES FROM (10) TO (20);
CREATE TABLE docs_3 PARTITION OF docs FOR VALUES FROM (20) TO (30);
"""


def test_gotcha_partitions_with_indexes_of_their_own(database: Database) -> None:
    database.execute(PARTITIONED)
    database.execute("CREATE INDEX ON docs_2 USING hnsw (embedding vector_ip_ops) WITH (m = 20)")
    assert vector_of(read(database)).metric is Metric.DOT
    assert found(read(database)).index.relation == "public.docs_2"
    database.execute("CREATE INDEX ON docs_1 USING hnsw (embedding vector_ip_ops) WITH (m = 20)")
    assert found(read(database)).index.relation == "public.docs_1 and 1 more"
    assert "public.docs_1 and 1 more only" in notes(read(database))
    database.execute("CREATE INDEX ON docs_3 USING hnsw (embedding vector_ip_ops) WITH (m = 20)")
    assert found(read(database)).index.relation == ""
    assert notes(read(database)) == ""
    # Of different parameters the largest, of different metrics an error.
    database.execute("CREATE INDEX wide ON docs_3 USING hnsw (embedding vector_ip_ops) WITH (m=28)")
    assert vector_of(read(database)).hnsw_m == 28
    database.execute("CREATE INDEX odd ON docs_3 USING hnsw (embedding vector_l1_ops)")
    with pytest.raises(SourceError, match="odd"):
        planned(read(database))


def test_an_index_of_the_root_counts_once(database: Database) -> None:
    database.execute(PARTITIONED)
    database.execute("CREATE INDEX ann ON docs USING hnsw (embedding vector_ip_ops)")
    assert (found(read(database)).name, found(read(database)).index.relation) == ("ann", "")
    # On the root only it is not valid until every partition has it.
    database.execute(
        "DROP INDEX ann; CREATE INDEX half ON ONLY docs USING hnsw (embedding vector_ip_ops)"
    )
    assert vector_indexes(read(database), "embedding").found == ()
    assert "half of column embedding is not valid" in notes(read(database))


# -- settings


def test_wrong_settings_are_found_when_the_plan_is_made(
    database18: Database, qdrant: QdrantTarget
) -> None:
    docs(database18)
    for config, text in (
        ({"shards": 3}, "shards"),
        ({"vectors": {"embedding": {"size": 5}}}, "contradicts the table"),
        ({"vectors": {"embeding": {}}}, "Its dense vectors are: embedding"),
    ):
        settings = pipeline_settings(
            database18, qdrant, {"name": "docs", "collection_config": config}
        )
        with (
            connect(settings.source) as connection,
            pytest.raises(ConfigError) as caught,
        ):
            plan_pipeline(connection, settings)
        assert text in caught.value.message + caught.value.remedy


def test_tables_that_share_a_collection_must_agree_about_its_settings(
    database18: Database, qdrant: QdrantTarget
) -> None:
    docs(database18)
    database18.execute("CREATE TABLE more (LIKE docs INCLUDING ALL)")
    shared = {"collection": qdrant.new_collection_name(), "collection_config": {"shard_number": 2}}
    one = {"name": "docs", "namespace": "a", **shared}
    other = {"name": "more", "namespace": "b", **shared}
    settings = pipeline_settings(database18, qdrant, one, other)
    with connect(settings.source) as connection:
        plan_pipeline(connection, settings)
    settings = pipeline_settings(database18, qdrant, one, {**other, "collection_config": {}})
    with (
        connect(settings.source) as connection,
        pytest.raises(ConfigError, match="`collection_config` differs"),
    ):
        plan_pipeline(connection, settings)


async def test_the_suggestions_are_taken_by_configuration(
    database18: Database, qdrant: QdrantTarget
) -> None:
    docs(
        database18,
        "CREATE INDEX ON docs USING hnsw ((embedding::halfvec(4)) halfvec_l2_ops) WITH (m = 30)",
    )
    config = {
        "vectors": {"embedding": {"datatype": "float16", "on_disk": True}},
        "quantization_config": {"binary": {"always_ram": True}},
        "on_disk_payload": True,
    }
    settings = pipeline_settings(database18, qdrant, {"name": "docs", "collection_config": config})
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal()
        await life.stop()
    (table,) = settings.tables
    made = qdrant.client().get_collection(str(table.collection)).config
    assert isinstance(made.params.vectors, dict)
    vector = made.params.vectors["embedding"]
    assert vector.datatype is models.Datatype.FLOAT16
    assert (vector.distance, vector.on_disk) == (models.Distance.EUCLID, True)
    assert vector.hnsw_config is not None
    assert vector.hnsw_config.m == 30
    assert isinstance(made.quantization_config, models.BinaryQuantization)
    assert made.params.on_disk_payload is True


async def test_payload_indexes_are_made_before_the_load_and_hnsw_after_it(
    database18: Database, qdrant: QdrantTarget
) -> None:
    docs(database18, "CREATE INDEX ON docs (title)")
    settings = pipeline_settings(database18, qdrant, "docs", migration={"defer_hnsw": True})
    collection = str(settings.tables[0].collection)
    script = qdrant.script
    script.clear_log()
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal()
        await life.stop()
    operations = [
        str(entry["operation"]) for entry in script.log() if entry.get("collection") == collection
    ]
    first_write = operations.index("Upsert")
    assert operations.index("Collections.Create") < first_write
    assert operations.index("CreateFieldIndex") < first_write
    assert "CreateFieldIndex" not in operations[first_write:]
    last_write = len(operations) - 1 - operations[::-1].index("Upsert")
    assert operations.index("Collections.Update") > last_write
    made = qdrant.client().get_collection(collection).config
    assert isinstance(made.params.vectors, dict)
    hnsw = made.params.vectors["embedding"].hnsw_config
    assert hnsw is not None
    assert hnsw.m == 16
    assert not made.metadata


async def test_an_absent_collection_that_may_not_be_created(
    database18: Database, qdrant: QdrantTarget
) -> None:
    docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs", migration={"create_collection": False})
    collection = str(settings.tables[0].collection)
    with pytest.raises(ConfigError) as caught:
        async with running(settings, database18, qdrant):
            pass
    assert collection in caught.value.message
    assert "create_collection" in caught.value.message
    assert "4 dimensions" in caught.value.remedy
    assert not qdrant.client().collection_exists(collection)
    qdrant.client().create_collection(
        collection,
        vectors_config={"embedding": models.VectorParams(size=4, distance=models.Distance.COSINE)},
    )
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal()
        await life.stop()


def test_the_check_tells_of_collections_too(database18: Database, qdrant: QdrantTarget) -> None:
    docs(database18)
    settings = pipeline_settings(
        database18,
        qdrant,
        {"name": "docs", "collection_config": {"on_disk_payload": False}},
        migration={"create_collection": False},
    )
    collection = str(settings.tables[0].collection)
    errors = [finding for finding in run_checks(settings) if finding.severity == "error"]
    assert [finding.subject for finding in errors] == [f"collection {collection}"]
    params = models.VectorParams(size=4, distance=models.Distance.COSINE)
    qdrant.client().create_collection(collection, vectors_config={"embedding": params})
    findings = run_checks(settings)
    assert not [finding for finding in findings if finding.severity == "error"]
    warnings = [finding.message for finding in findings if finding.severity == "warning"]
    assert any("on_disk_payload = true" in warning for warning in warnings)


def test_plans_differ_in_settings_only_by_name(database18: Database) -> None:
    table = docs(database18)
    plain, configured = planned(table), planned(table, collection_config={"shard_number": 2})
    assert configured.plan == plain.plan, "settings are no reason to copy again"
    assert repr(PlanOptions(collection_config={"shard_number": 2})) == repr(PlanOptions())
