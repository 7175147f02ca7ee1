"""The wire bytes of points, read back with the client library's classes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from qdrant_client import grpc

from cdc_sync.errors import MappingError
from cdc_sync.mapping.plan import ColumnPlan, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.python import PythonCodec, SparseValue
from cdc_sync.mapping.wire import WireCodec, packed_varints
from cdc_sync.rows import UNCHANGED, RawValue, Row, TextValue
from tests.support.mapping_types import array, core, pgvector, table_plan
from tests.support.points import numbers_of, payload_of, value_of, vectors_of
from tests.unit.test_values import array_bytes
from tests.unit.test_vectors import vector

ID = ColumnPlan("id", core("int8"), "id")
TITLE = ColumnPlan("título", core("text"), "título")
PRICE = ColumnPlan("price", core("numeric"), "price")


def vector_column(
    name: str,
    size: int | None = 2,
    kind: VectorKind = VectorKind.DENSE,
    vector_name: str | None = None,
) -> ColumnPlan:
    type_ = pgvector("sparsevec" if kind is VectorKind.SPARSE else "vector")
    if kind is VectorKind.MULTI:
        type_ = array(type_)
    plan = VectorPlan(name if vector_name is None else vector_name, kind, size, Metric.DOT)
    return ColumnPlan(name, type_, None, plan)


DENSE = vector_column("dense")
SPARSE = vector_column("sparse", None, VectorKind.SPARSE)
MULTI = vector_column("multi", 2, VectorKind.MULTI)
PLAN = table_plan(ID, TITLE, PRICE, DENSE, SPARSE, MULTI)
SPARSE_BYTES = struct.pack(">iiiiiff", 300, 2, 0, 0, 299, 1.5, -2)


def full_row() -> Row:
    return [
        struct.pack(">q", -7),
        "é".encode(),
        struct.pack(">HhHHHH", 2, 0, 0, 2, 12, 5000),
        vector(1, 2),
        SPARSE_BYTES,
        array_bytes(vector(1, 2), vector(3, 4)),
    ]


def parse(data: bytes) -> grpc.PointStruct:
    point: grpc.PointStruct = grpc.PointStruct.FromString(data)
    # What the library makes of it has the same length: no field was unknown to it.
    assert point.ByteSize() == len(data)
    return point


def test_a_whole_point() -> None:
    point = parse(WireCodec(PLAN).point(42, full_row()))
    assert point.id == grpc.PointId(num=42)
    assert payload_of(point) == {"id": -7, "título": "é", "price": 12.5}
    assert vectors_of(point.vectors) == {
        "dense": [1, 2],
        "sparse": SparseValue([0, 299], [1.5, -2]),
        "multi": [[1, 2], [3, 4]],
    }


def test_ids() -> None:
    codec = WireCodec(PLAN)
    text = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    assert parse(codec.point(text, full_row())).id == grpc.PointId(uuid=text)
    for number in (0, 127, 128, 2**63, 2**64 - 1):
        assert grpc.PointId.FromString(codec.point_id(number)) == grpc.PointId(num=number)


@pytest.mark.parametrize("drop_nulls", [False, True])
def test_nulls(drop_nulls: bool) -> None:
    plan = table_plan(ID, TITLE, PRICE, DENSE, SPARSE, MULTI, drop_nulls=drop_nulls)
    codec, python = WireCodec(plan), PythonCodec(plan)
    row: Row = [bytes(8), None, None, None, None, None]
    point = parse(codec.point(0, row))
    expected = {"id": 0} if drop_nulls else {"id": 0, "título": None, "price": None}
    assert payload_of(point) == python.payload(row) == expected
    # A point without vectors says so: the server refuses one that leaves the field out.
    assert point.HasField("vectors")
    assert point.vectors.WhichOneof("vectors_options") == "vectors"
    assert vectors_of(point.vectors) == python.vectors(row) == {}
    assert codec.vectors(row) is None
    assert codec.null_vectors(row) == python.null_vectors(row) == ["dense", "sparse", "multi"]
    assert codec.unknown_fields(row) == []


@pytest.mark.requirement("R19")
def test_unchanged_values_are_left_out_and_told() -> None:
    codec, python = WireCodec(PLAN), PythonCodec(PLAN)
    row = full_row()
    row[1], row[3], row[5] = UNCHANGED, UNCHANGED, array_bytes(sizes=())
    assert codec.unknown_fields(row) == ["título"]
    assert codec.null_vectors(row) == python.null_vectors(row) == ["multi"]
    entries = grpc.SetPayloadPoints.FromString(codec.payload_entries(row, 3)).payload
    assert {key: value_of(value) for key, value in entries.items()} == python.payload(row)
    vectors = codec.vectors(row)
    assert vectors is not None
    assert set(vectors_of(grpc.Vectors.FromString(vectors))) == {"sparse"}
    with pytest.raises(MappingError, match="título, dense"):
        codec.point(1, row)
    assert codec.unknown_fields(full_row()) == []


def test_payload_entries_take_any_field_number() -> None:
    codec = WireCodec(table_plan(ID, TITLE, namespace="n"))
    row: Row = [bytes(8), b"x"]
    for field in (1, 3, 15, 16, 300):
        data = codec.payload_entries(row, field)
        wire = field << 3 | 2
        tag = bytes([wire]) if wire < 128 else bytes([wire & 127 | 128, wire >> 7])
        assert data.count(tag) >= 3
        assert data.startswith(tag)
    assert codec.payload_entries([UNCHANGED, UNCHANGED], 3).startswith(b"\x1a")
    assert WireCodec(table_plan(ID)).payload_entries([UNCHANGED], 3) == b""


def test_the_namespace_is_part_of_the_payload() -> None:
    plan = table_plan(ID, namespace="docs\u00e9")
    row: Row = [bytes(8)]
    point = parse(WireCodec(plan).point(1, row))
    assert payload_of(point) == PythonCodec(plan).payload(row) == {"id": 0, "_table": "docsé"}


def test_unnamed_vectors() -> None:
    alone = table_plan(ID, vector_column("embedding", vector_name=""))
    row: Row = [bytes(8), vector(1, 2)]
    point = parse(WireCodec(alone).point(1, row))
    assert point.vectors.WhichOneof("vectors_options") == "vector"
    found = numbers_of(PythonCodec(alone).vectors(row))
    assert vectors_of(point.vectors) == found == {"": [1, 2]}
    beside = table_plan(ID, vector_column("embedding", vector_name=""), SPARSE)
    row = [bytes(8), vector(1, 2), SPARSE_BYTES]
    point = parse(WireCodec(beside).point(1, row))
    assert point.vectors.WhichOneof("vectors_options") == "vectors"
    assert set(vectors_of(point.vectors)) == {"", "sparse"}
    assert point.vectors.vectors.vectors[""].dense.data == [1, 2]


def test_an_empty_sparse_vector_is_a_vector() -> None:
    codec = WireCodec(table_plan(ID, SPARSE))
    for value in (struct.pack(">iii", 5, 0, 0), TextValue(b"{}/5")):
        vectors = vectors_of(parse(codec.point(1, [bytes(8), value])).vectors)
        assert vectors == {"sparse": SparseValue([], [])}


def test_packed_varints() -> None:
    numbers = [0, 1, 127, 128, 16383, 16384, 2**21 - 1, 2**21, 2**28, 2**32 - 1]
    packed = packed_varints(np.array(numbers, "<u4"))
    assert grpc.SparseIndices(data=numbers).SerializeToString()[2:] == packed


@pytest.mark.requirement("R14")
def test_the_format_is_told_per_value() -> None:
    codec = WireCodec(PLAN)
    binary = full_row()
    text: Row = [
        TextValue(b"-7"),
        TextValue("é".encode()),
        TextValue(b"12.50"),
        TextValue(b"[1,2]"),
        TextValue(b"{1:1.5,300:-2}/300"),
        TextValue(b'{"[1,2]","[3,4]"}'),
    ]
    expected = codec.point(1, binary)
    for mask in range(64):
        mixed = [text[i] if mask >> i & 1 else binary[i] for i in range(6)]
        assert codec.point(1, mixed) == expected


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "oid", "bool", "float4", "uuid"])
@pytest.mark.parametrize("value", [b"", b"\x07", b"\0" * 3, b"\0" * 40, TextValue(b"what?")])
def test_malformed_values_are_refused_naming_table_and_column(name: str, value: bytes) -> None:
    codec = WireCodec(table_plan(ID, ColumnPlan("odd", core(name), "odd")))
    with pytest.raises(MappingError, match=r"public\.docs: column odd .*" + name) as caught:
        codec.point(1, [bytes(8), value])
    assert "what?" not in str(caught.value)


@pytest.mark.requirement("R17")
def test_another_dimension_is_refused() -> None:
    with pytest.raises(MappingError, match=r"column dense .* 3 dimensions.* 2"):
        WireCodec(table_plan(ID, DENSE)).point(1, [bytes(8), vector(1, 2, 3)])


@pytest.mark.parametrize("row", [[], [b""], [b"", b"", b""]])
def test_rows_of_another_width_are_refused(row: list[RawValue]) -> None:
    codec = WireCodec(table_plan(ID, TITLE))
    python = PythonCodec(table_plan(ID, TITLE))
    for method in (codec.vectors, codec.unknown_fields, codec.null_vectors, python.payload):
        with pytest.raises(MappingError, match="2 columns"):
            method(row)
    with pytest.raises(MappingError):
        codec.point(1, row)


def scalar_plan(name: str) -> TablePlan:
    return table_plan(ID, ColumnPlan("v", core(name), "v"))


def test_non_finite_numbers_become_null_and_are_counted() -> None:
    codec = WireCodec(scalar_plan("float8"))
    for number in ("nan", "inf", "-inf"):
        point = parse(codec.point(1, [bytes(8), struct.pack(">d", float(number))]))
        assert payload_of(point)["v"] is None
    assert codec.non_finite == 3
    codec.point(1, [bytes(8), struct.pack(">d", 1.7976931348623157e308)])
    assert codec.non_finite == 3
    codec.point(1, [bytes(8), TextValue(b"NaN")])
    assert codec.non_finite == 4


@pytest.mark.requirement("R18")
def test_long_and_broken_text() -> None:
    codec = WireCodec(scalar_plan("text"))
    for length in (0, 1, 127, 128, 2047, 2048, 16383, 16384, 3_000_000):
        text = "é" * (length // 2)
        assert payload_of(parse(codec.point(1, [bytes(8), text.encode()])))["v"] == text
    assert payload_of(parse(codec.point(1, [bytes(8), b"a\xff"])))["v"] == "a\ufffd"
    assert payload_of(parse(codec.point(1, [bytes(8), b"a\x00b"])))["v"] == "a\x00b"
