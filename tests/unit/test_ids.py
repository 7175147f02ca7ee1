"""Point ids, key texts, fingerprints."""

from __future__ import annotations

import dataclasses
import json
import struct
import uuid

import pytest

from cdc_sync.errors import MappingError
from cdc_sync.mapping.ids import (
    NAMESPACE_UUID,
    compile_key_text,
    compile_point_id,
    hashed_id,
    is_key_type,
    plan_fingerprint,
)
from cdc_sync.mapping.plan import (
    ColumnPlan,
    IdScheme,
    Metric,
    PayloadIndex,
    PayloadIndexType,
    TablePlan,
    VectorKind,
    VectorPlan,
)
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.rows import UNCHANGED, RawValue, TextValue
from tests.support.mapping_types import (
    array,
    composite,
    core,
    domain,
    pgvector,
    range_of,
    table_plan,
)


def plan_of(*types: PgType, namespace: str | None = None) -> TablePlan:
    columns = [ColumnPlan(f"k{number}", type_) for number, type_ in enumerate(types)]
    return table_plan(
        *columns,
        ColumnPlan("rest", core("text"), "rest"),
        key=tuple(range(len(types))),
        namespace=namespace,
    )


def uuid5(text: str) -> str:
    return str(uuid.uuid5(uuid.UUID(NAMESPACE_UUID), text))


@pytest.mark.parametrize(
    ("name", "form", "low", "high"),
    [
        ("int2", ">h", -(2**15), 2**15 - 1),
        ("int4", ">i", -(2**31), 2**31 - 1),
        ("int8", ">q", -(2**63), 2**63 - 1),
        ("oid", ">I", 0, 2**32 - 1),
    ],
)
def test_integers(name: str, form: str, low: int, high: int) -> None:
    point_id = compile_point_id(plan_of(core(name)))
    for number in (low, 0, 1, high):
        expected = number if number >= 0 else uuid5(f'["{number}"]')
        assert point_id([struct.pack(form, number), UNCHANGED]) == expected
        assert point_id([TextValue(str(number).encode()), None]) == expected


def test_uuids_and_domains() -> None:
    value = uuid.UUID("6BA7B810-9DAD-11D1-80B4-00C04FD430C8")
    for type_ in (core("uuid"), domain(core("uuid"))):
        point_id = compile_point_id(plan_of(type_))
        assert point_id([value.bytes, UNCHANGED]) == str(value)
        assert point_id([TextValue(str(value).encode()), b""]) == str(value)


def test_the_example_of_the_documentation() -> None:
    point_id = compile_point_id(plan_of(core("text"), core("int8")))
    row: list[RawValue] = [b"acme", struct.pack(">q", 42), UNCHANGED]
    assert compile_key_text(plan_of(core("text"), core("int8")))(row) == '["acme","42"]'
    assert point_id(row) == uuid5('["acme","42"]') == "3f09165b-2688-5e63-a98d-712a9193b407"
    in_namespace = compile_point_id(plan_of(core("text"), core("int8"), namespace='n"é'))
    assert in_namespace(row) == uuid5('["n\\"é",["acme","42"]]')


def test_with_a_namespace_every_id_is_hashed() -> None:
    plan = plan_of(core("int8"), namespace="docs")
    assert plan.id_scheme is IdScheme.HASHED
    assert compile_point_id(plan)([struct.pack(">q", 42), None]) == uuid5('["docs",["42"]]')
    plan = plan_of(core("uuid"), namespace="docs")
    text = str(uuid.UUID(int=7))
    assert compile_point_id(plan)([bytes(15) + b"\7", None]) == uuid5(f'["docs",["{text}"]]')


@pytest.mark.parametrize(
    "text", ["", '"\\', "a\n\t\r\b\f", "\x00\x01\x1f\x7f", "é\U0001f600\u2028", '","', "/"]
)
def test_key_texts_are_json_as_others_write_it(text: str) -> None:
    key_text = compile_key_text(plan_of(core("text")))
    expected = json.dumps([text], ensure_ascii=False, separators=(",", ":"))
    assert key_text([text.encode(), None]) == expected
    assert hashed_id(expected) == uuid5(expected)


@pytest.mark.parametrize(
    ("type_", "data", "expected"),
    [
        (core("bool"), b"\x01", "true"),
        (core("float8"), struct.pack(">d", 1.0), "1"),
        (core("float8"), struct.pack(">d", -0.0), "0"),
        (core("float8"), struct.pack(">d", 1e16), "1e+16"),
        (core("float8"), struct.pack(">d", float("nan")), "NaN"),
        (core("float8"), struct.pack(">d", float("-inf")), "-Infinity"),
        (core("numeric"), struct.pack(">HhHHHH", 2, 0, 0, 4, 1, 5000), "1.5"),
        (core("numeric"), struct.pack(">HhHH", 0, 0, 0, 3), "0"),
        (core("numeric"), struct.pack(">HhHHH", 1, 0, 0, 0, 100), "100"),
        (core("numeric"), struct.pack(">HhHH", 0, 0, 0xC000, 0), "NaN"),
        (core("bytea"), b"\x00\xff", "AP8="),
        (core("xid8"), struct.pack(">Q", 2**64 - 1), str(2**64 - 1)),
        (PgType(0, "public", "mood", TypeKind.ENUM), b"sad", "sad"),
        (core("date"), struct.pack(">i", 0), "2000-01-01"),
    ],
)
def test_canonical_strings(type_: PgType, data: bytes, expected: str) -> None:
    plan = plan_of(type_, core("int2"))
    row: list[RawValue] = [data, struct.pack(">h", -1), None]
    assert compile_key_text(plan)(row) == json.dumps([expected, "-1"], separators=(",", ":"))


@pytest.mark.requirement("R24")
@pytest.mark.parametrize("value", [None, UNCHANGED])
def test_a_key_that_is_not_there_is_refused(value: RawValue) -> None:
    for types in ([core("int8")], [core("uuid")], [core("text")], [core("int8"), core("text")]):
        row: list[RawValue] = [b"\0" * 8] * len(types)
        row[-1] = value
        with pytest.raises(MappingError, match=rf"public\.docs: key column k{len(types) - 1}"):
            compile_point_id(plan_of(*types))([*row, b""])


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (core("int8"), b"\0"),
        (core("int8"), TextValue(b"x")),
        (core("int4"), TextValue(b"1_0")),
        (core("uuid"), b"\0"),
        (core("uuid"), TextValue(b"not a uuid")),
        (core("text"), b"\xff"),
        (core("char"), b"\xff"),
        (core("numeric"), b""),
        (core("float8"), TextValue(b"many")),
    ],
)
def test_malformed_keys_are_refused(type_: PgType, value: RawValue) -> None:
    with pytest.raises(MappingError, match="k0") as caught:
        compile_point_id(plan_of(type_))([value, None])
    assert "not a uuid" not in caught.value.message


@pytest.mark.parametrize(
    "type_",
    [
        core("json"),
        core("jsonb"),
        core("point"),
        core("xml"),
        array(core("int4")),
        composite(("a", core("int4"))),
        range_of(core("int4")),
        pgvector("vector", 3),
        PgType(0, "public", "hstore", extension="hstore"),
        PgType(0, "public", "int8"),
    ],
)
def test_types_that_are_no_keys(type_: PgType) -> None:
    assert not is_key_type(type_)
    with pytest.raises(MappingError, match="k0"):
        compile_key_text(plan_of(type_))


FINGERPRINTED = table_plan(
    ColumnPlan("id", core("int8"), "id"),
    ColumnPlan("t", core("text"), "t"),
    ColumnPlan(
        "e", pgvector("vector", 3), None, VectorPlan("e", VectorKind.DENSE, 3, Metric.COSINE)
    ),
)


def test_fingerprints_are_stable() -> None:
    assert plan_fingerprint(FINGERPRINTED) == "23cf2b50aa5f4784242649ef7353a586"


def test_fingerprints_ignore_what_does_not_change_points() -> None:
    first, second, third = FINGERPRINTED.columns
    assert third.vector is not None
    other_type = dataclasses.replace(third.type, oid=7, schema="extensions")
    tuned = dataclasses.replace(third.vector, hnsw_m=32)
    same = dataclasses.replace(
        FINGERPRINTED,
        oid=99,
        columns=(ColumnPlan("e", other_type, None, tuned), second, first),
        key=(2,),
        payload_indexes=(PayloadIndex("t", PayloadIndexType.KEYWORD),),
    )
    assert plan_fingerprint(same) == plan_fingerprint(FINGERPRINTED)


def test_fingerprints_tell_plans_apart() -> None:
    first, second, third = FINGERPRINTED.columns
    assert third.vector is not None
    dot = dataclasses.replace(third, vector=dataclasses.replace(third.vector, metric=Metric.DOT))
    others = [
        dataclasses.replace(FINGERPRINTED, collection="other"),
        dataclasses.replace(FINGERPRINTED, drop_nulls=True),
        dataclasses.replace(FINGERPRINTED, numeric_as_string=True),
        dataclasses.replace(FINGERPRINTED, namespace="n", id_scheme=IdScheme.HASHED),
        dataclasses.replace(FINGERPRINTED, key=(1,), id_scheme=IdScheme.HASHED),
        dataclasses.replace(FINGERPRINTED, columns=(first, second, dot)),
        dataclasses.replace(FINGERPRINTED, columns=(first, third)),
        dataclasses.replace(
            FINGERPRINTED, columns=(first, ColumnPlan("t", core("varchar", 9), "t"), third)
        ),
        dataclasses.replace(FINGERPRINTED, columns=(first, ColumnPlan("t", core("text")), third)),
    ]
    fingerprints = {plan_fingerprint(plan) for plan in [FINGERPRINTED, *others]}
    assert len(fingerprints) == 1 + len(others)
