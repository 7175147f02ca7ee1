"""Options of columns: what becomes of them, in both encoders, and which contradict each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from qdrant_client import grpc

from cdc_sync.config import TableSettings
from cdc_sync.errors import ConfigError, MappingError, SourceError
from cdc_sync.mapping.ids import plan_fingerprint
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import PayloadIndex, PayloadIndexType, TablePlan
from cdc_sync.mapping.planner import build_plan, replan
from cdc_sync.mapping.protobuf import encode_value
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.table import Column
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.qdrant.collections import index_path
from cdc_sync.rows import UNCHANGED, RawValue, Row, TextValue
from cdc_sync.sync.planning import plan_options
from tests.support.mapping_types import array, core, domain, pgvector
from tests.support.points import numbers_of, payload_of, value_of
from tests.unit.test_planner import COLUMNS, column_of, index, table, vector_of

PRICE = Column("price", 4, core("numeric"))
WEIGHT = Column("weight", 5, core("numeric"))
RAW = Column("raw", 6, core("bytea"))
PHOTO = Column("photo", 7, core("bytea"))
BITS = Column("bits", 8, core("bit", 8))
WIDE = (PRICE, WEIGHT, RAW, PHOTO, BITS)


def plan_of(**options: object) -> TablePlan:
    return build_plan(table(*WIDE), PlanOptions(**options)).plan  # type: ignore[arg-type]


def row_of(plan: TablePlan, values: Mapping[str, RawValue]) -> Row:
    return [values.get(column.name) for column in plan.columns]


VALUES: Mapping[str, RawValue] = {
    "id": (7).to_bytes(8, "big"),
    "title": b"a title",
    "price": TextValue(b"1.50"),
    "weight": TextValue(b"2.5"),
    "raw": b"\x01",
    "photo": b"\x02",
    "bits": TextValue(b"00000001"),
}


def payload(plan: TablePlan, values: Mapping[str, RawValue] = VALUES) -> dict[str, object]:
    """The payload by both encoders, which must agree."""
    row = row_of(plan, values)
    python = PythonCodec(plan).payload(row)
    point = grpc.PointStruct.FromString(WireCodec(plan).point(1, row))
    assert payload_of(point) == python
    return dict(python)


def refused(**options: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        plan_of(**options)
    assert "public.docs" in caught.value.message
    assert caught.value.remedy
    return caught.value


# -- which columns, under which names


def test_exclude() -> None:
    plan = plan_of(exclude=["title", "embedding", "raw"])
    assert [c.name for c in plan.columns] == ["id", "price", "weight", "photo", "bits"]
    assert plan.vectors == ()
    assert "title" not in payload(plan)


def test_rename_of_fields_and_vectors() -> None:
    plan = plan_of(rename={"title": "Überschrift", "embedding": "title", "id": "pk"})
    assert column_of(plan, "title").field == "Überschrift"
    assert vector_of(plan, "embedding").name == "title"
    found = payload(plan)
    assert (found["pk"], found["Überschrift"]) == (7, "a title")
    assert not {"id", "title"} & found.keys()
    # Two columns may swap their names.
    swapped = plan_of(rename={"price": "weight", "weight": "price"})
    assert (payload(swapped)["price"], payload(swapped)["weight"]) == (2.5, 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["titel"]}, "names no column"),
        ({"rename": {"titel": "t"}}, "names no column"),
        ({"drop_nulls": ("titel",)}, "names no column"),
        ({"numeric_as_string": ("titel",)}, "names no column"),
        ({"skip_bytea": ("titel",)}, "names no column"),
        ({"exclude": ["id"]}, "part of the key"),
        ({"columns": ["id", "title"], "exclude": ["title"]}, "both `columns` and `exclude`"),
        ({"rename": {"title": "price"}}, "payload field price"),
        ({"rename": {"title": "t", "price": "t"}}, "payload field t"),
        ({"rename": {"title": ""}}, "empty name"),
        ({"rename": {"title": "t"}, "exclude": ["title"]}, "left out"),
        ({"rename": {"title": "t"}, "columns": ["price"]}, "left out"),
        ({"rename": {"id": "key"}, "columns": ["price"]}, "left out"),
        ({"rename": {"raw": "r"}, "skip_bytea": True}, "left out"),
        ({"rename": {"embedding": "e"}, "unnamed_vector": "embedding"}, "unnamed_vector"),
        ({"metrics": {"embedding": "dot"}, "exclude": ["embedding"]}, "become a vector"),
        ({"bit_vectors": ["bits"], "exclude": ["bits"]}, "become a vector"),
        ({"bit_vectors": ["bits"], "rename": {"bits": "embedding"}}, "the vector embedding"),
        ({"constants": {"title": 1}}, "a constant and column title"),
        ({"constants": {"t": 1}, "rename": {"title": "t"}}, "a constant and column title"),
        ({"constants": {"": 1}}, "empty name"),
        ({"constants": {"big": 2**63}}, "int64"),
        ({"constants": {"_table": "x"}, "namespace": "n"}, "the namespace"),
        ({"constants": {"_shard": "x"}, "shard": "1/2"}, "the shard"),
        ({"payload_key": "_table", "namespace": "n"}, "the namespace"),
        ({"payload_key": "_shard", "shard": "1/2"}, "the shard"),
        ({"drop_nulls": ("embedding",)}, "payload field"),
        ({"drop_nulls": ("title",), "exclude": ["title"]}, "payload field"),
        ({"numeric_as_string": ("title",)}, "holds no numeric"),
        ({"skip_bytea": ("title",)}, "holds no bytea"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], message: str) -> None:
    assert message in refused(**options).message


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"namespace": "n", "rename": {"title": "_table"}}, "title"),
        ({"shard": "1/2", "rename": {"title": "_shard"}}, "title"),
    ],
)
def test_marks_are_not_for_columns(options: dict[str, object], name: str) -> None:
    with pytest.raises(SourceError, match=f"column {name} has the name"):
        plan_of(**options)
    # One level below there is nothing to collide with.
    assert payload(plan_of(**options, payload_key="meta"))["meta"]


# -- their values


def test_options_for_some_columns_only() -> None:
    plan = plan_of(
        drop_nulls=("title",), numeric_as_string=("price",), skip_bytea=("raw",), exclude=["bits"]
    )
    found = payload(plan)
    assert (found["price"], found["weight"]) == ("1.50", 2.5)
    assert "raw" not in found
    assert found["photo"] == "Ag=="
    nulls = payload(plan, {"id": VALUES["id"]})
    assert nulls == {"id": 7, "price": None, "weight": None, "photo": None}


def test_numeric_inside_of_other_types() -> None:
    prices = Column("prices", 4, domain(array(core("numeric"))))
    plan = build_plan(table(prices), PlanOptions(numeric_as_string=("prices",))).plan
    found = payload(plan, {"id": VALUES["id"], "prices": TextValue(b"{1.50,2}")})
    assert found["prices"] == ["1.50", "2"]


CONSTANTS = {"source": "shop", "n": -1, "share": 0.5, "ok": True, "none": None}


@pytest.mark.parametrize("namespace", [None, "n"])
def test_constants(namespace: str | None) -> None:
    plan = plan_of(constants=CONSTANTS, columns=["title"], namespace=namespace)
    mark = {} if namespace is None else {"_table": "n"}
    assert payload(plan) == {"title": "a title"} | CONSTANTS | mark
    # What is no value of a column is never left out.
    dropping = plan_of(constants=CONSTANTS, columns=["title"], drop_nulls=True)
    assert payload(dropping, {"id": VALUES["id"]}) == CONSTANTS


def test_payload_key() -> None:
    plan = plan_of(
        payload_key="meta",
        columns=["title"],
        constants={"source": "shop"},
        namespace="n",
        shard="1/2",
    )
    assert payload(plan) == {
        "meta": {"title": "a title", "source": "shop"},
        "_table": "n",
        "_shard": "1/2",
    }
    # The object is there even without anything in it, and a column may be called as it is.
    empty = plan_of(payload_key="title", columns=["title"], drop_nulls=True)
    assert payload(empty, {"id": VALUES["id"]}) == {"title": {}}
    assert payload(empty) == {"title": {"title": "a title"}}


@pytest.mark.parametrize("key", [None, "meta"])
def test_a_payload_that_is_known_in_part(key: str | None) -> None:
    plan = plan_of(
        payload_key=key, columns=["title", "price"], rename={"title": "t"}, constants={"c": 1}
    )
    row = row_of(plan, {**VALUES, "title": UNCHANGED})
    wire, python = WireCodec(plan), PythonCodec(plan)
    assert wire.unknown_fields(row) == python.unknown_fields(row) == ["t"]
    entries = wire.payload_entries(row, 3, {"t": encode_value("kept")})
    written = {
        name: value_of(value)
        for name, value in grpc.SetPayloadPoints.FromString(entries).payload.items()
    }
    fields = {"t": "kept", "price": 1.5, "c": 1}
    assert written == python.payload(row, {"t": "kept"})
    assert written == (fields if key is None else {key: fields})


# -- payload indexes


def test_payload_indexes_follow_the_fields() -> None:
    source = table(
        PRICE,
        indexes=(
            index("a", "btree", ("title", "text_ops")),
            index("b", "btree", ("price", "numeric_ops")),
        ),
    )
    options = PlanOptions(
        rename={"title": "a title"}, payload_key="meta", numeric_as_string=("price",), namespace="n"
    )
    found = build_plan(source, options).plan.payload_indexes
    assert found == (
        # With a namespace the key is not the id itself.
        PayloadIndex("id", PayloadIndexType.INTEGER, "meta"),
        PayloadIndex("a title", PayloadIndexType.KEYWORD, "meta"),
        PayloadIndex("price", PayloadIndexType.KEYWORD, "meta"),
        PayloadIndex("_table", PayloadIndexType.KEYWORD),
    )
    assert [index_path(one.field, one.parent) for one in found[1:]] == [
        'meta."a title"',
        "meta.price",
        "_table",
    ]
    assert index_path("a", 'b"') is None
    excluded = build_plan(source, PlanOptions(exclude=["title"])).plan
    assert [one.field for one in excluded.payload_indexes] == ["price"]


# -- changed tables


NAMES = [(column.name, column.type) for column in COLUMNS]
OPTIONS = PlanOptions(
    rename={"title": "t", "embedding": "dense"},
    exclude=["secret"],
    constants={"c": 1},
    payload_key="meta",
    drop_nulls=("title",),
)
BEFORE = build_plan(
    table(Column("secret", 4, core("text")), indexes=(index("t", "btree", ("title", "text_ops")),)),
    OPTIONS,
).plan


@pytest.mark.requirement("R30")
def test_a_changed_table_keeps_names_and_takes_new_columns() -> None:
    assert replan(BEFORE, NAMES, OPTIONS) == BEFORE
    plan = replan(BEFORE, [("new", core("text")), *NAMES], OPTIONS)
    assert [(c.name, c.field) for c in plan.columns] == [
        ("new", "new"),
        ("id", "id"),
        ("title", "t"),
        ("embedding", None),
    ]
    assert vector_of(plan, "embedding").name == "dense"
    assert plan.payload_indexes == BEFORE.payload_indexes != ()
    assert (plan.payload_key, plan.constants) == ("meta", (("c", 1),))
    # Dropped and added again, they are what they were.
    gone = replan(BEFORE, [NAMES[0], NAMES[2]], OPTIONS)
    again = replan(gone, [*NAMES, ("secret", core("text"))], OPTIONS)
    assert again.columns == BEFORE.columns


@pytest.mark.parametrize("name", ["t", "c"])
def test_a_new_column_with_the_name_of_a_field_stops_the_table(name: str) -> None:
    with pytest.raises(MappingError, match=f"column {name} has the name of the payload field"):
        replan(BEFORE, [(name, core("text")), *NAMES], OPTIONS)


def test_skip_bytea_of_a_new_column() -> None:
    before = build_plan(table(), PlanOptions()).plan
    raw = ("raw", core("bytea"))
    assert replan(before, [*NAMES, raw], PlanOptions(skip_bytea=True)) == before
    taken = replan(before, [*NAMES, raw], PlanOptions(skip_bytea=("other",)))
    assert column_of(taken, "raw").field == "raw"


# -- settings and fingerprints


def settings(**options: object) -> TableSettings:
    return TableSettings.model_validate({"name": "docs", **options})


def test_settings_become_options() -> None:
    options = plan_options(
        settings(
            exclude=["b", "a"],
            rename={"y": "1", "x": "2"},
            where="x",
            payload_key="m",
            constants={"b": True, "a": 1.0},
            drop_nulls=["d", "c"],
            numeric_as_string=True,
        ),
        "1/2",
    )
    assert options.exclude == ("a", "b")
    assert list(options.rename) == ["x", "y"]
    assert options.constants == {"a": 1.0, "b": True}
    assert options.constants["b"] is True
    assert (options.where, options.payload_key, options.shard) == ("x", "m", "1/2")
    assert (options.drop_nulls, options.numeric_as_string) == (("c", "d"), True)
    assert options.skip_bytea is False
    assert plan_options(settings(drop_nulls=[])) == plan_options(settings())


def test_options_are_told_apart_by_their_text() -> None:
    """The fingerprint of a configuration is made of it."""
    same = {"rename": {"a": "1", "b": "2"}, "exclude": ["x", "y"], "drop_nulls": ["p", "q"]}
    other = {"rename": {"b": "2", "a": "1"}, "exclude": ["y", "x"], "drop_nulls": ["q", "p"]}
    assert repr(plan_options(settings(**same))) == repr(plan_options(settings(**other)))
    changes: list[dict[str, object]] = [
        {"exclude": ["title"]},
        {"rename": {"title": "t"}},
        {"where": "true"},
        {"constants": {"c": 1}},
        {"constants": {"c": True}},
        {"payload_key": "m"},
        {"drop_nulls": ["title"]},
        {"numeric_as_string": ["price"]},
        {"skip_bytea": ["raw"]},
    ]
    texts = {repr(plan_options(settings(**change))) for change in [{}, *changes]}
    texts.add(repr(plan_options(settings(), "1/2")))
    assert len(texts) == len(changes) + 2


def test_plans_are_told_apart_by_their_fingerprint() -> None:
    plan = plan_of()
    others = [
        plan_of(exclude=["title"]),
        plan_of(rename={"title": "t"}),
        plan_of(rename={"embedding": "e"}),
        plan_of(drop_nulls=("title",)),
        plan_of(numeric_as_string=("price",)),
        plan_of(payload_key="m"),
        plan_of(constants={"c": 1}),
        plan_of(constants={"c": 2}),
        plan_of(shard="1/2"),
    ]
    assert len({plan_fingerprint(one) for one in [plan, *others]}) == len(others) + 1
    assert len({plan, *others}) == len(others) + 1
    moved = dataclasses.replace(plan, oid=1)
    assert plan_fingerprint(moved) == plan_fingerprint(plan)


def test_bit_vectors() -> None:
    plan = plan_of(bit_vectors=["bits"], rename={"bits": "code"})
    vector = vector_of(plan, "bits")
    assert (vector.name, vector.size) == ("code", 8)
    row = row_of(plan, VALUES)
    assert numbers_of(PythonCodec(plan).vectors(row)) == {"code": [0.0] * 7 + [1.0]}
    assert "bits" not in payload(plan)
    assert plan_of().vectors == (vector_of(plan_of(), "embedding"),)
    assert pgvector("vector", 3) == column_of(plan, "embedding").type
