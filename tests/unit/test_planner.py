"""Plans from catalog facts: keys, vectors, payload, indexes, and refusals with their remedies."""

from __future__ import annotations

import dataclasses

import pytest

from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import (
    ColumnPlan,
    Datatype,
    IdScheme,
    Metric,
    PayloadIndex,
    PayloadIndexType,
    TablePlan,
    VectorKind,
    VectorPlan,
)
from cdc_sync.mapping.planner import build_plan
from cdc_sync.mapping.table import Column, Index, IndexColumn, PgType, Table, TypeKind
from tests.support.mapping_types import array, composite, core, domain, pgvector

PRIMARY = Index("docs_pkey", "btree", (IndexColumn("id", "int8_ops"),), unique=True, primary=True)
COLUMNS = (
    Column("id", 1, core("int8"), not_null=True),
    Column("title", 2, core("text")),
    Column("embedding", 3, pgvector("vector", 3)),
)


def table(
    *extra: Column,
    columns: tuple[Column, ...] = COLUMNS,
    indexes: tuple[Index, ...] = (),
    primary_key: tuple[str, ...] = ("id",),
    replica_identity: str = "d",
    identity_columns: tuple[str, ...] | None = None,
    deferrable_key: bool = False,
) -> Table:
    primary = dataclasses.replace(
        PRIMARY,
        columns=tuple(IndexColumn(name, "ops") for name in primary_key),
        immediate=not deferrable_key,
    )
    return Table(
        oid=16384,
        schema="public",
        name="docs",
        partitioned=False,
        columns=(*columns, *extra),
        primary_key=primary_key,
        replica_identity=replica_identity,
        identity_columns=primary_key if identity_columns is None else identity_columns,
        indexes=((primary,) if primary_key else ()) + indexes,
        leaves=(),
        deferrable_key=deferrable_key,
    )


def index(name: str, method: str, *columns: tuple[str | None, str], unique: bool = False) -> Index:
    return Index(
        name, method, tuple(IndexColumn(column, ops) for column, ops in columns), unique=unique
    )


def refusal(source: Table, options: PlanOptions | None = None) -> SourceError:
    with pytest.raises(SourceError) as caught:
        build_plan(source, options or PlanOptions())
    assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
    assert caught.value.message.startswith("public.docs: ")
    return caught.value


def column_of(plan: TablePlan, name: str) -> ColumnPlan:
    return next(column for column in plan.columns if column.name == name)


def vector_of(plan: TablePlan, name: str) -> VectorPlan:
    vector = column_of(plan, name).vector
    assert vector is not None
    return vector


def test_a_plain_table() -> None:
    result = build_plan(table(), PlanOptions())
    assert result.plan == TablePlan(
        oid=16384,
        schema="public",
        table="docs",
        collection="docs",
        columns=(
            ColumnPlan("id", core("int8"), "id"),
            ColumnPlan("title", core("text"), "title"),
            ColumnPlan(
                "embedding",
                pgvector("vector", 3),
                None,
                VectorPlan("embedding", VectorKind.DENSE, 3, Metric.COSINE),
            ),
        ),
        key=(0,),
        id_scheme=IdScheme.INTEGER,
    )
    (warning,) = result.warnings
    assert "embedding" in warning
    assert "Cosine" in warning


def test_options_reach_the_plan() -> None:
    options = PlanOptions(
        collection="c",
        namespace="n",
        drop_nulls=True,
        numeric_as_string=True,
        unnamed_vector="embedding",
        metrics={"embedding": "dot"},
    )
    result = build_plan(table(), options)
    plan = result.plan
    assert (plan.collection, plan.namespace, plan.drop_nulls) == ("c", "n", True)
    assert plan.numeric_as_string
    assert plan.id_scheme is IdScheme.HASHED
    assert vector_of(plan, "embedding").name == ""
    assert vector_of(plan, "embedding").metric is Metric.DOT
    assert plan.payload_indexes == (
        PayloadIndex("id", PayloadIndexType.INTEGER),
        PayloadIndex("_table", PayloadIndexType.KEYWORD),
    )
    assert result.warnings == ()


# -- keys -------------------------------------------------------------------------------------


@pytest.mark.requirement("R25")
def test_without_a_primary_key_the_remedies_are_told() -> None:
    error = refusal(table(primary_key=()))
    assert "ALTER TABLE public.docs ADD PRIMARY KEY" in error.remedy
    unique = index("docs_Code", "btree", ("code", "ops"), unique=True)
    code = Column("code", 4, core("text"), not_null=True)
    error = refusal(table(code, primary_key=(), indexes=(unique,)))
    assert 'ALTER TABLE public.docs REPLICA IDENTITY USING INDEX "docs_Code";' in error.remedy
    assert 'key = ["code"]' in error.remedy


@pytest.mark.requirement("R25")
@pytest.mark.parametrize("key", [None, ("id",)])
def test_replica_identity_nothing_is_refused(key: tuple[str, ...] | None) -> None:
    error = refusal(table(replica_identity="n", identity_columns=()), PlanOptions(key=key))
    assert error.remedy == "ALTER TABLE public.docs REPLICA IDENTITY DEFAULT;"


@pytest.mark.requirement("R28")
@pytest.mark.parametrize("identity", ["d", "f"])
def test_a_deferrable_key_is_refused_with_the_sql(identity: str) -> None:
    error = refusal(table(deferrable_key=True, replica_identity=identity, identity_columns=("id",)))
    assert "deferrable" in error.message
    assert error.remedy == (
        "ALTER TABLE public.docs DROP CONSTRAINT docs_pkey, ADD PRIMARY KEY (id);"
    )


@pytest.mark.requirement("R22")
def test_the_identity_must_carry_the_key() -> None:
    code = Column("code", 4, core("text"), not_null=True)
    unique = index("docs_code", "btree", ("code", "ops"), unique=True)
    by_index = table(code, indexes=(unique,), replica_identity="i", identity_columns=("code",))
    error = refusal(by_index)
    assert "ALTER TABLE public.docs REPLICA IDENTITY DEFAULT;" in error.remedy
    plan = build_plan(by_index, PlanOptions(key=["code"])).plan
    assert (plan.key, plan.id_scheme) == ((3,), IdScheme.HASHED)
    error = refusal(table(code, indexes=(unique,)), PlanOptions(key=["code"]))
    assert "REPLICA IDENTITY USING INDEX docs_code;" in error.remedy
    full = table(code, indexes=(unique,), replica_identity="f")
    assert build_plan(full, PlanOptions(key=["code"])).plan.key == (3,)


@pytest.mark.requirement("R22")
def test_key_columns_must_be_not_null_and_unique() -> None:
    code = Column("Code", 4, core("text"))
    unique = index("docs_code", "btree", ("Code", "ops"), unique=True)
    source = table(code, indexes=(unique,), replica_identity="f")
    error = refusal(source, PlanOptions(key=["Code"]))
    assert error.remedy == 'ALTER TABLE public.docs ALTER COLUMN "Code" SET NOT NULL;'
    code = dataclasses.replace(code, not_null=True)
    for useless in (
        dataclasses.replace(unique, valid=False),
        dataclasses.replace(unique, predicate="true"),
        dataclasses.replace(unique, immediate=False),
        dataclasses.replace(unique, unique=False),
        dataclasses.replace(unique, columns=(IndexColumn(None, "ops", 'lower("Code")'),)),
    ):
        source = table(code, indexes=(useless,), replica_identity="f")
        error = refusal(source, PlanOptions(key=["Code"]))
        assert error.remedy == 'CREATE UNIQUE INDEX ON public.docs ("Code");'
    # More columns than the unique index has are as unique.
    source = table(code, indexes=(unique,), replica_identity="f")
    assert build_plan(source, PlanOptions(key=["Code", "id"])).plan.key == (3, 0)


def test_types_that_cannot_be_keys() -> None:
    columns = (Column("id", 1, core("jsonb"), not_null=True),)
    error = refusal(table(columns=columns))
    assert "key column id is of type jsonb" in error.message


@pytest.mark.parametrize("key", [[], ["id", "id"]])
def test_a_key_of_nothing_or_of_the_same_twice(key: list[str]) -> None:
    with pytest.raises(ConfigError, match="key"):
        build_plan(table(), PlanOptions(key=key))


def test_key_order_is_the_configured_one_and_key_columns_may_stay_out_of_the_payload() -> None:
    tenant = Column("tenant", 4, core("uuid"), not_null=True)
    source = table(tenant, primary_key=("tenant", "id"))
    plan = build_plan(source, PlanOptions(columns=["title", "embedding"])).plan
    assert [plan.columns[position].name for position in plan.key] == ["tenant", "id"]
    assert column_of(plan, "id") == ColumnPlan("id", core("int8"))
    assert column_of(plan, "title").field == "title"


# -- columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(columns=["titel"]),
        PlanOptions(key=["titel"]),
        PlanOptions(metrics={"titel": "dot"}),
        PlanOptions(dimensions={"titel": 3}),
        PlanOptions(unnamed_vector="titel"),
        PlanOptions(bit_vectors=["titel"]),
    ],
)
def test_unknown_columns_get_the_nearest_name(options: PlanOptions) -> None:
    with pytest.raises(ConfigError, match="titel") as caught:
        build_plan(table(), options)
    assert caught.value.remedy == "Did you mean title?"


def test_unknown_columns_far_from_any_get_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        build_plan(table(), PlanOptions(columns=["xxxxxxx"]))
    assert caught.value.remedy == "Its columns are: id, title, embedding."


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(metrics={"title": "dot"}),
        PlanOptions(dimensions={"title": 3}),
        PlanOptions(unnamed_vector="title"),
        PlanOptions(columns=["id", "title"], unnamed_vector="embedding"),
    ],
)
def test_vector_options_must_name_vectors(options: PlanOptions) -> None:
    with pytest.raises(ConfigError, match="does not become a vector"):
        build_plan(table(), options)


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(metrics={"embedding": "hamming"}),
        PlanOptions(dimensions={"embedding": 0}),
        PlanOptions(dimensions={"embedding": 65537}),
        PlanOptions(dimensions={"embedding": 4}),
        PlanOptions(bit_vectors=["title"]),
        PlanOptions(collection="a/b"),
        PlanOptions(collection="x" * 256),
    ],
)
def test_options_that_do_not_fit(options: PlanOptions) -> None:
    with pytest.raises(ConfigError, match=r"public\.docs"):
        build_plan(table(), options)


@pytest.mark.parametrize(
    "type_",
    [
        core("tsquery"),
        array(core("tsquery")),
        composite(("a", core("tsquery"))),
        PgType(0, "app", "weird", TypeKind.BASE),
    ],
)
def test_unsupported_types_are_refused_naming_column_and_type(type_: PgType) -> None:
    source = table(Column("odd", 4, type_))
    error = refusal(source)
    assert "column odd" in error.message
    assert "tsquery" in error.message or "app.weird" in error.message
    assert error.remedy == 'Leave it out: columns = ["id", "title", "embedding"]'
    options = PlanOptions(columns=["id", "title", "embedding"])
    assert len(build_plan(source, options).plan.columns) == 3


@pytest.mark.requirement("R36")
@pytest.mark.parametrize("generated", ["s", "v"])
def test_generated_columns_are_left_out_unless_published(generated: str) -> None:
    source = table(Column("gen", 4, core("int4"), generated=generated))
    result = build_plan(source, PlanOptions())
    assert "gen" not in {column.name for column in result.plan.columns}
    assert any("gen" in warning and "generated" in warning for warning in result.warnings)
    error = refusal(source, PlanOptions(columns=["id", "gen"]))
    assert "gen" in error.message
    if generated == "s":
        assert "publish_generated_columns" in error.remedy
        published = ["id", "title", "embedding", "gen"]
        plan = build_plan(source, PlanOptions(), published).plan
        assert column_of(plan, "gen").field == "gen"


@pytest.mark.requirement("R37")
def test_columns_outside_the_publication() -> None:
    result = build_plan(table(), PlanOptions(), ["id", "embedding"])
    assert [column.name for column in result.plan.columns] == ["id", "embedding"]
    assert any("title" in warning for warning in result.warnings)
    for options in (PlanOptions(columns=["id", "title"]), PlanOptions()):
        with pytest.raises(SourceError, match="not in the publication"):
            build_plan(table(), options, ["title"] if options.columns is None else ["id"])


def test_skip_bytea() -> None:
    source = table(Column("raw", 4, core("bytea")), Column("raws", 5, array(core("bytea"))))
    plan = build_plan(source, PlanOptions(skip_bytea=True)).plan
    assert [column.name for column in plan.columns] == ["id", "title", "embedding"]
    assert len(build_plan(source, PlanOptions()).plan.columns) == 5
    columns = (Column("id", 1, core("bytea"), not_null=True),)
    plan = build_plan(table(columns=columns), PlanOptions(skip_bytea=True)).plan
    assert plan.columns == (ColumnPlan("id", core("bytea")),)


def test_a_table_without_vectors_is_allowed_with_a_warning() -> None:
    result = build_plan(table(columns=COLUMNS[:2]), PlanOptions())
    assert result.plan.vectors == ()
    assert any("no vector column" in warning for warning in result.warnings)


def test_a_column_named_as_the_namespace_field() -> None:
    source = table(Column("_table", 4, core("text")))
    assert column_of(build_plan(source, PlanOptions()).plan, "_table").field == "_table"
    assert "_table" in refusal(source, PlanOptions(namespace="n")).message


# -- vectors ----------------------------------------------------------------------------------


def test_vector_kinds() -> None:
    source = table(
        Column("half", 4, domain(pgvector("halfvec", 4))),
        Column("sparse", 5, pgvector("sparsevec", 30000)),
        Column("multi", 6, array(pgvector("halfvec", 128), 128)),
        Column("bits", 7, core("bit", 64)),
        Column("more_bits", 8, core("varbit", 8)),
        Column("sparses", 9, array(pgvector("sparsevec", 5))),
    )
    result = build_plan(source, PlanOptions(bit_vectors=["bits"]))
    plan = result.plan
    half = VectorPlan("half", VectorKind.DENSE, 4, Metric.COSINE, Datatype.FLOAT16)
    assert vector_of(plan, "half") == half
    assert vector_of(plan, "sparse") == VectorPlan("sparse", VectorKind.SPARSE, None, Metric.DOT)
    assert vector_of(plan, "multi") == dataclasses.replace(
        half, name="multi", kind=VectorKind.MULTI, size=128
    )
    bits = VectorPlan("bits", VectorKind.DENSE, 64, Metric.MANHATTAN, Datatype.UINT8)
    assert vector_of(plan, "bits") == bits
    assert column_of(plan, "more_bits").field == "more_bits"
    assert column_of(plan, "sparses").field == "sparses"


def test_a_vector_without_a_dimension_is_refused_with_both_remedies() -> None:
    for type_, sql in (
        (pgvector("vector"), "TYPE vector(<n>);"),
        (array(pgvector("halfvec")), "TYPE halfvec(<n>)[];"),
    ):
        source = table(columns=(COLUMNS[0], Column("Emb", 2, type_)))
        error = refusal(source)
        assert f'ALTER TABLE public.docs ALTER COLUMN "Emb" {sql}' in error.remedy
        assert "dimensions" in error.remedy
        plan = build_plan(source, PlanOptions(dimensions={"Emb": 7})).plan
        assert vector_of(plan, "Emb").size == 7
    plan = build_plan(table(Column("s", 4, pgvector("sparsevec"))), PlanOptions()).plan
    assert vector_of(plan, "s").size is None


def test_too_many_dimensions_are_refused() -> None:
    source = table(Column("bits", 4, core("bit", 65537)))
    error = refusal(source, PlanOptions(bit_vectors=["bits"]))
    assert "65537" in error.message
    assert "65536" in error.message
    assert column_of(build_plan(source, PlanOptions()).plan, "bits").field == "bits"


@pytest.mark.parametrize(
    ("method", "opclass", "metric"),
    [
        ("hnsw", "vector_cosine_ops", Metric.COSINE),
        ("hnsw", "vector_l2_ops", Metric.EUCLID),
        ("ivfflat", "extensions.vector_ip_ops", Metric.DOT),
        ("hnsw", "halfvec_l1_ops", Metric.MANHATTAN),
    ],
)
def test_metrics_come_from_operator_classes(method: str, opclass: str, metric: Metric) -> None:
    source = table(indexes=(index("v", method, ("embedding", opclass)),))
    result = build_plan(source, PlanOptions())
    assert vector_of(result.plan, "embedding").metric is metric
    assert result.warnings == ()
    invalid = dataclasses.replace(source.indexes[1], valid=False)
    source = dataclasses.replace(source, indexes=(source.indexes[0], invalid))
    assert vector_of(build_plan(source, PlanOptions()).plan, "embedding").metric is Metric.COSINE


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        ("embedding", "((embedding)::halfvec(3))"),
        ("embedding", "(embedding)::extensions.halfvec(3)"),
        ('Em"b', '(("Em""b")::halfvec(3))'),
    ],
)
def test_indexes_on_a_cast_to_halfvec_count(name: str, expression: str) -> None:
    column = Column(name, 2, pgvector("vector", 3))
    cast = Index("v", "hnsw", (IndexColumn(None, "halfvec_l2_ops", expression),))
    plan = build_plan(table(columns=(COLUMNS[0], column), indexes=(cast,)), PlanOptions()).plan
    assert vector_of(plan, name).metric is Metric.EUCLID


def test_other_expressions_do_not_count() -> None:
    expression = "(binary_quantize(embedding)::bit(3))"
    other = Index("v", "hnsw", (IndexColumn(None, "bit_hamming_ops", expression),))
    plan = build_plan(table(indexes=(other,)), PlanOptions()).plan
    assert vector_of(plan, "embedding").metric is Metric.COSINE


def test_indexes_that_disagree_are_refused_naming_both() -> None:
    source = table(
        indexes=(
            index("by_l2", "hnsw", ("embedding", "vector_l2_ops")),
            index("by_cosine", "ivfflat", ("embedding", "vector_cosine_ops")),
        )
    )
    error = refusal(source)
    assert "by_l2" in error.message
    assert "by_cosine" in error.message
    assert 'metrics = { embedding = "euclid" }' in error.remedy
    plan = build_plan(source, PlanOptions(metrics={"embedding": "cosine"})).plan
    assert vector_of(plan, "embedding").metric is Metric.COSINE


def test_hnsw_parameters_carry_over_unless_they_are_the_defaults() -> None:
    def hnsw(**options: str) -> VectorPlan:
        found = dataclasses.replace(
            index("v", "hnsw", ("embedding", "vector_l2_ops")), options=options
        )
        return vector_of(build_plan(table(indexes=(found,)), PlanOptions()).plan, "embedding")

    tuned = hnsw(m="32", ef_construction="200")
    assert (tuned.hnsw_m, tuned.hnsw_ef_construct) == (32, 200)
    default = hnsw(m="16", ef_construction="64")
    assert (default.hnsw_m, default.hnsw_ef_construct) == (None, None)
    assert hnsw(m="8").hnsw_m == 8
    ivfflat = dataclasses.replace(
        index("v", "ivfflat", ("embedding", "vector_l2_ops")), options={"lists": "100"}
    )
    plan = build_plan(table(indexes=(ivfflat,)), PlanOptions()).plan
    assert vector_of(plan, "embedding").hnsw_m is None


def test_sparse_vectors_are_named_and_compared_by_dot_product() -> None:
    source = table(
        Column("s", 4, pgvector("sparsevec", 5)),
        indexes=(index("v", "hnsw", ("s", "sparsevec_l2_ops")),),
    )
    assert any("dot product" in warning for warning in build_plan(source, PlanOptions()).warnings)
    with pytest.raises(ConfigError, match="dot product"):
        build_plan(source, PlanOptions(metrics={"s": "cosine"}))
    with pytest.raises(ConfigError, match="sparse"):
        build_plan(source, PlanOptions(unnamed_vector="s"))


def test_warnings_about_bits() -> None:
    source = table(
        Column("bits", 4, core("bit", 8)),
        indexes=(index("v", "hnsw", ("bits", "bit_hamming_ops")),),
    )
    assert any("bit_vectors" in warning for warning in build_plan(source, PlanOptions()).warnings)
    jaccard = table(
        Column("bits", 4, core("bit", 8)),
        indexes=(index("by_jaccard", "hnsw", ("bits", "bit_jaccard_ops")),),
    )
    result = build_plan(jaccard, PlanOptions(bit_vectors=["bits"]))
    assert any("by_jaccard" in warning for warning in result.warnings)
    assert vector_of(result.plan, "bits").metric is Metric.MANHATTAN


# -- payload indexes --------------------------------------------------------------------------


def test_payload_indexes() -> None:
    geometry = PgType(0, "public", "geometry", extension="postgis")
    mood = PgType(0, "public", "mood", TypeKind.ENUM)
    source = table(
        Column("n", 4, core("int4")),
        Column("price", 5, core("numeric")),
        Column("at", 6, domain(core("timestamptz"))),
        Column("tags", 7, array(core("text"))),
        Column("doc", 8, core("tsvector")),
        Column("place", 9, geometry),
        Column("mood", 10, mood),
        Column("flag", 11, core("bool")),
        Column("owner", 12, core("uuid")),
        Column("data", 13, core("jsonb")),
        Column("body", 14, core("text")),
        Column("lone", 15, core("text")),
        indexes=(
            index("a", "btree", ("n", "int4_ops"), ("price", "numeric_ops"), (None, "text_ops")),
            index("b", "btree", ("at", "timestamptz_ops")),
            index("c", "gin", ("tags", "array_ops")),
            index("d", "gin", ("doc", "tsvector_ops")),
            index("e", "gist", ("place", "gist_geometry_ops_2d")),
            index("f", "hash", ("mood", "enum_ops")),
            index("g", "btree", ("flag", "bool_ops"), ("owner", "uuid_ops")),
            index("h", "gin", ("data", "jsonb_ops")),
            index("i", "gin", ("body", "gin_trgm_ops")),
            index("j", "gin", ("title", "public.gin_trgm_ops")),
            index("k", "btree", ("title", "text_ops")),
            index("l", "brin", ("lone", "text_minmax_ops")),
            dataclasses.replace(index("m", "btree", ("lone", "text_ops")), predicate="n > 0"),
            dataclasses.replace(index("n", "btree", ("lone", "text_ops")), valid=False),
        ),
    )
    plan = build_plan(source, PlanOptions()).plan
    kinds = PayloadIndexType
    expected = {
        "title": kinds.KEYWORD,
        "n": kinds.INTEGER,
        "price": kinds.FLOAT,
        "at": kinds.DATETIME,
        "tags": kinds.KEYWORD,
        "doc": kinds.TEXT,
        "place": kinds.GEO,
        "mood": kinds.KEYWORD,
        "flag": kinds.BOOL,
        "owner": kinds.UUID,
        "body": kinds.TEXT,
    }
    assert {found.field: found.type for found in plan.payload_indexes} == expected
    as_string = build_plan(source, PlanOptions(numeric_as_string=True)).plan
    assert PayloadIndex("price", kinds.KEYWORD) in as_string.payload_indexes


def test_key_columns_get_a_payload_index_only_if_they_are_not_the_id() -> None:
    assert build_plan(table(), PlanOptions()).plan.payload_indexes == ()
    tenant = Column("tenant", 4, core("text"), not_null=True)
    plan = build_plan(table(tenant, primary_key=("tenant", "id")), PlanOptions()).plan
    assert plan.payload_indexes == (
        PayloadIndex("id", PayloadIndexType.INTEGER),
        PayloadIndex("tenant", PayloadIndexType.KEYWORD),
    )
