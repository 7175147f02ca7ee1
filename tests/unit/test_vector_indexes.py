"""Metric, dimension, HNSW parameters and suggestions from vector indexes, and where they were
found.
"""

from __future__ import annotations

import dataclasses

import pytest

from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import Datatype, Metric, TablePlan, VectorPlan
from cdc_sync.mapping.planner import build_plan, replan
from cdc_sync.mapping.table import Column, Index, IndexColumn, PgType, Table
from cdc_sync.mapping.vector_indexes import index_notes, vector_indexes
from cdc_sync.mapping.vector_settings import find_dimension, find_metric
from tests.support.mapping_types import array, core, pgvector

PRIMARY = Index("docs_pkey", "btree", (IndexColumn("id", "int8_ops"),), unique=True, primary=True)


def docs(*indexes: Index, vector: PgType | None = None) -> Table:
    """A table with a column `embedding` (vector(3)) and these indexes."""
    return Table(
        oid=1,
        schema="public",
        name="docs",
        partitioned=False,
        columns=(
            Column("id", 1, core("int8"), not_null=True),
            Column("embedding", 2, vector or pgvector("vector", 3)),
        ),
        primary_key=("id",),
        replica_identity="d",
        identity_columns=("id",),
        indexes=(PRIMARY, *indexes),
        leaves=(),
    )


def on_column(name: str, opclass: str, method: str = "hnsw", **options: str) -> Index:
    return Index(name, method, (IndexColumn("embedding", opclass),), options=options)


def on_expression(name: str, expression: str, opclass: str, **options: str) -> Index:
    return Index(name, "hnsw", (IndexColumn(None, opclass, expression),), options=options)


HALF = on_expression("half", "((embedding)::halfvec(3))", "halfvec_l2_ops", m="32")
BINARY = on_expression("signs", "((binary_quantize(embedding))::bit(3))", "bit_hamming_ops")
PART = on_expression("part", "((subvector(embedding, 1, 2))::vector(2))", "vector_ip_ops", m="99")


def plan_of(table: Table, **options: object) -> TablePlan:
    return build_plan(table, PlanOptions(**options)).plan  # type: ignore[arg-type]


def vector_of(table: Table, **options: object) -> VectorPlan:
    (vector,) = plan_of(table, **options).vectors
    return vector


def notes_of(table: Table, **options: object) -> str:
    return "\n".join(index_notes(table, [("embedding", vector_of(table, **options))]))


def origins(table: Table, options: PlanOptions | None = None) -> tuple[str, str]:
    facts, column = vector_indexes(table, "embedding"), table.columns[1]
    given = options or PlanOptions()
    return (
        find_metric(table, column, facts, given).origin,
        find_dimension(table, column, facts, given).origin,
    )


@pytest.mark.parametrize("method", ["hnsw", "ivfflat"])
@pytest.mark.parametrize(
    ("opclass", "metric"),
    [
        ("vector_cosine_ops", Metric.COSINE),
        ("vector_l2_ops", Metric.EUCLID),
        ("vector_ip_ops", Metric.DOT),
        ("vector_l1_ops", Metric.MANHATTAN),
    ],
)
def test_the_metric_is_that_of_the_operator_class(
    method: str, opclass: str, metric: Metric
) -> None:
    table = docs(on_column("ann", opclass, method))
    assert vector_of(table).metric is metric
    assert origins(table) == (f"index ann ({method}, {opclass})", "the column's type")


def test_where_the_metric_was_found_without_an_index() -> None:
    assert origins(docs())[0] == "the default"
    assert origins(docs(), PlanOptions(metrics={"embedding": "dot"}))[0] == "the configuration"


def test_two_indexes_that_disagree_are_an_error_that_names_both() -> None:
    table = docs(on_column("one", "vector_l2_ops"), on_column("two", "vector_ip_ops", "ivfflat"))
    with pytest.raises(SourceError) as caught:
        plan_of(table)
    assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
    for text in ("embedding", "one", "Euclid", "two", "Dot"):
        assert text in caught.value.message
    assert "metrics" in caught.value.remedy
    assert vector_of(table, metrics={"embedding": "dot"}).metric is Metric.DOT


def test_a_half_precision_index_gives_the_metric_and_suggests_float16() -> None:
    table = docs(HALF)
    vector = vector_of(table)
    assert (vector.metric, vector.datatype, vector.hnsw_m) == (
        Metric.EUCLID,
        Datatype.FLOAT32,
        32,
    )
    assert 'vectors = { embedding = { datatype = "float16" } }' in notes_of(table)
    assert "index half" in notes_of(table)


def test_the_suggestion_is_taken_by_configuration_only() -> None:
    table = docs(HALF)
    config = {"vectors": {"embedding": {"datatype": "float16"}}}
    assert vector_of(table, collection_config=config).datatype is Datatype.FLOAT16
    assert "float16" not in notes_of(table, collection_config=config)
    unnamed = {"vectors": {"datatype": "float16"}}
    named = vector_of(table, collection_config=unnamed)
    assert named.datatype is Datatype.FLOAT32
    vector = vector_of(table, collection_config=unnamed, unnamed_vector="embedding")
    assert vector.datatype is Datatype.FLOAT16
    renamed = {"vectors": {"dense": {"datatype": "uint8"}}}
    vector = vector_of(table, collection_config=renamed, rename={"embedding": "dense"})
    assert vector.datatype is Datatype.UINT8
    renamed_options = PlanOptions(rename={"embedding": "dense"}, collection_config=renamed)
    warnings = build_plan(table, renamed_options).warnings
    assert any("from 0 to 255" in warning for warning in warnings)


def test_no_float16_is_suggested_for_halfvec_columns() -> None:
    table = docs(HALF, vector=pgvector("halfvec", -1))
    assert "half precision" not in notes_of(table)
    assert vector_of(table).datatype is Datatype.FLOAT16


def test_a_binary_index_suggests_binary_quantization_and_gives_no_metric() -> None:
    table = docs(BINARY)
    result = build_plan(table, PlanOptions())
    assert result.plan.vectors[0].metric is Metric.COSINE
    assert any("no vector index tells the metric" in warning for warning in result.warnings)
    assert not any("does not know" in warning for warning in result.warnings)
    assert "quantization_config = { binary = {} }" in notes_of(table)


def test_a_binary_index_does_not_conflict_with_another() -> None:
    assert vector_of(docs(BINARY, on_column("ann", "vector_ip_ops"))).metric is Metric.DOT
    jaccard = dataclasses.replace(
        BINARY, columns=(dataclasses.replace(BINARY.columns[0], opclass="bit_jaccard_ops"),)
    )
    assert vector_of(docs(jaccard, on_column("ann", "vector_ip_ops"))).metric is Metric.DOT


def test_nothing_is_taken_from_an_index_on_a_part() -> None:
    vector = vector_of(docs(PART))
    assert (vector.metric, vector.hnsw_m, vector.size) == (Metric.COSINE, None, 3)
    assert "part of column embedding" in notes_of(docs(PART))
    with pytest.raises(SourceError, match="without a dimension"):
        plan_of(docs(PART, vector=pgvector("vector", -1)))


def test_an_index_on_unit_vectors_is_cosine() -> None:
    for opclass in ("vector_ip_ops", "vector_l2_ops"):
        table = docs(on_expression("unit", "l2_normalize(embedding)", opclass))
        assert vector_of(table).metric is Metric.COSINE
        assert "its metric is Cosine" in notes_of(table)


def test_ivfflat_is_recognised_and_explained() -> None:
    table = docs(on_column("lists", "vector_ip_ops", "ivfflat", lists="7", m="99"))
    vector = vector_of(table)
    assert (vector.metric, vector.hnsw_m) == (Metric.DOT, None)
    notes = notes_of(table)
    for text in ("index lists is IVFFlat", "lists = 7", "HNSW", "for the better"):
        assert text in notes


def test_indexes_of_other_extensions_give_their_metric() -> None:
    table = docs(on_column("graph", "vector_ip_ops", "diskann"))
    assert vector_of(table).metric is Metric.DOT
    assert "of the method diskann" in notes_of(table)
    assert vector_of(docs(on_column("tree", "vector_ops", "btree"))).metric is Metric.COSINE


@pytest.mark.parametrize(
    ("opclass", "metric"),
    [("cosine", Metric.COSINE), ("l2", Metric.EUCLID), ("dot_product", Metric.DOT)],
)
def test_scann_indexes_give_their_metric(opclass: str, metric: Metric) -> None:
    table = docs(on_column("tree", opclass, "scann", num_leaves="100"))
    assert vector_of(table).metric is metric
    assert "of the method scann" in notes_of(table)


def test_a_method_that_nobody_knows_is_said_to_give_no_metric() -> None:
    table = docs(on_column("odd", "angular", "quantum"))
    assert vector_of(table).metric is Metric.COSINE
    assert "the operator class angular, which is not known here" in notes_of(table)
    assert "not known here" not in notes_of(docs(on_column("plain", "vector_ops", "btree")))


def test_partial_indexes_and_those_of_partitions_are_taken_and_said() -> None:
    partial = dataclasses.replace(on_column("some", "vector_ip_ops"), predicate="(id > 3)")
    assert vector_of(docs(partial)).metric is Metric.DOT
    assert "index some is partial" in notes_of(docs(partial))
    assert "id > 3" not in notes_of(docs(partial))
    of_leaf = dataclasses.replace(on_column("leaf", "vector_ip_ops"), relation="public.docs_1")
    assert vector_of(docs(of_leaf)).metric is Metric.DOT
    assert "on the partition public.docs_1 only" in notes_of(docs(of_leaf))


def test_unfinished_indexes_are_not_used_and_said() -> None:
    invalid = dataclasses.replace(on_column("ann", "vector_ip_ops"), valid=False)
    assert vector_of(docs(invalid)).metric is Metric.COSINE
    assert "index ann of column embedding is not valid" in notes_of(docs(invalid))


def test_an_expression_of_no_known_form_is_said() -> None:
    table = docs(on_expression("odd", "average(embedding)", "vector_ip_ops"))
    assert vector_of(table).metric is Metric.COSINE
    assert "index odd is on an expression that is not understood" in notes_of(table)


def test_an_array_of_numbers_indexed_as_a_vector_is_said() -> None:
    table = docs(
        on_expression("cast", "((embedding)::vector(3))", "vector_ip_ops"),
        vector=array(core("float4")),
    )
    assert plan_of(table).vectors == ()
    (note,) = index_notes(table, [])
    assert "column embedding, which does not become a vector" in note


def test_the_largest_hnsw_parameters_are_taken_unless_they_are_the_defaults() -> None:
    small = on_column("small", "vector_l2_ops", m="8", ef_construction="200")
    assert vector_indexes(docs(small, HALF), "embedding").hnsw_m == 32
    assert vector_of(docs(small, HALF)).hnsw_ef_construct == 200
    standard = on_column("standard", "vector_l2_ops", m="16", ef_construction="64")
    vector = vector_of(docs(standard))
    assert (vector.hnsw_m, vector.hnsw_ef_construct) == (None, None)


def test_the_dimension_of_an_index_stands_for_one_that_is_not_declared() -> None:
    undeclared = pgvector("vector", -1)
    cast = on_expression("sized", "((embedding)::vector(5))", "vector_l2_ops")
    assert vector_of(docs(cast, vector=undeclared)).size == 5
    assert origins(docs(cast, vector=undeclared))[1] == "index sized"
    configured = PlanOptions(dimensions={"embedding": 7})
    assert origins(docs(cast, vector=undeclared), configured)[1] == "the configuration"
    binary = on_expression("b", "((binary_quantize(embedding))::bit(6))", "bit_hamming_ops")
    assert vector_of(docs(binary, vector=undeclared)).size == 6


def test_indexes_of_different_dimensions_are_an_error_that_names_both() -> None:
    first = on_expression("three", "((embedding)::vector(3))", "vector_l2_ops")
    second = on_expression("five", "((embedding)::halfvec(5))", "halfvec_l2_ops")
    table = docs(first, second, vector=pgvector("vector", -1))
    with pytest.raises(SourceError) as caught:
        plan_of(table)
    for text in ("three has 3", "five has 5"):
        assert text in caught.value.message
    assert "dimensions" in caught.value.remedy
    assert vector_of(table, dimensions={"embedding": 5}).size == 5


def test_settings_of_a_vector_that_is_gone_go_with_it() -> None:
    vectors = {"embedding": {"on_disk": True}, "other": {"on_disk": True}}
    config: dict[str, object] = {"shard_number": 2, "vectors": vectors}
    plan = plan_of(docs(), collection_config=config)
    kept = [(column.name, column.type) for column in plan.columns]
    options = PlanOptions(collection_config=config)
    assert replan(plan, kept, options).collection_config == config
    gone = replan(plan, kept[:1], options).collection_config
    assert gone == {"shard_number": 2, "vectors": {"other": {"on_disk": True}}}
    # Those of the unnamed vector are not under a name.
    config = {"shard_number": 2, "vectors": {"on_disk": True}}
    plan = plan_of(docs(), collection_config=config, unnamed_vector="embedding")
    assert replan(plan, kept[:1], PlanOptions()).collection_config == {"shard_number": 2}


def test_a_dimension_that_contradicts_the_type_is_an_error() -> None:
    with pytest.raises(ConfigError, match="its type declares 3"):
        plan_of(docs(), dimensions={"embedding": 5})
