"""Properties of the mapping: both encoders agree, both formats agree, keys and ids correspond,
nothing else is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import decimal
import json
import math
import struct
import uuid
from typing import TypeAlias

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import grpc

from cdc_sync.errors import MappingError
from cdc_sync.mapping.decoding import JsonValue
from cdc_sync.mapping.ids import compile_key_text, compile_point_id
from cdc_sync.mapping.plan import ColumnPlan, Constant, Metric, VectorKind, VectorPlan
from cdc_sync.mapping.protobuf import encode_value
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.mapping.values import binary_decoder, text_decoder
from cdc_sync.mapping.vectors import compile_vector
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.rows import UNCHANGED, RawValue, Row, TextValue
from tests.support.mapping_types import (
    array,
    composite,
    core,
    domain,
    multirange_of,
    pgvector,
    range_of,
    table_plan,
)
from tests.support.points import numbers_of, payload_of, value_of, vectors_of
from tests.unit.test_values import array_bytes, int4

#: A value of a type in both formats, as the server would write it.
Forms: TypeAlias = tuple[bytes, bytes]

EPOCH = dt.datetime(2000, 1, 1)


def numeric_forms(number: decimal.Decimal) -> Forms:
    sign, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int)
    scale = max(0, -exponent)
    unscaled = int("".join(map(str, digits))) * 10 ** max(0, exponent)
    whole, fraction = divmod(unscaled, 10**scale)
    padded = str(fraction).rjust(scale, "0") if scale else ""
    padded += "0" * (-len(padded) % 4)
    whole_text = str(whole).rjust(-(-len(str(whole)) // 4) * 4, "0") if whole else ""
    text = whole_text + padded
    words = [int(text[i : i + 4]) for i in range(0, len(text), 4)]
    weight = len(whole_text) // 4 - 1
    while words and words[0] == 0:
        words.pop(0)
        weight -= 1
    while words and words[-1] == 0:
        words.pop()
    negative = bool(sign and words)
    header = struct.pack(
        ">HhHH", len(words), weight if words else 0, 0x4000 if negative else 0, scale
    )
    plain = str(whole) + ("." + str(fraction).rjust(scale, "0") if scale else "")
    return header + struct.pack(f">{len(words)}H", *words), (
        ("-" if negative else "") + plain
    ).encode()


def timestamp_forms(moment: dt.datetime) -> Forms:
    microseconds = (moment - EPOCH) // dt.timedelta(microseconds=1)
    text = moment.strftime("%H:%M:%S")
    if moment.microsecond:
        text += f".{moment.microsecond:06d}".rstrip("0")
    return struct.pack(">q", microseconds), f"{moment.date().isoformat()} {text}+00".encode()


def float_text(number: float) -> bytes:
    if math.isnan(number):
        return b"NaN"
    if math.isinf(number):
        return b"Infinity" if number > 0 else b"-Infinity"
    return repr(number).removesuffix(".0").encode()


def integers(name: str, form: str, bits: int) -> st.SearchStrategy[tuple[PgType, Forms]]:
    numbers = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return numbers.map(lambda n: (core(name), (struct.pack(form, n), str(n).encode())))


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
SCALARS: st.SearchStrategy[tuple[PgType, Forms]] = st.one_of(
    integers("int2", ">h", 16),
    integers("int4", ">i", 32),
    integers("int8", ">q", 64),
    st.booleans().map(lambda b: (core("bool"), (bytes([b]), b"t" if b else b"f"))),
    st.floats().map(lambda x: (core("float8"), (struct.pack(">d", x), float_text(x)))),
    st.floats(width=32).map(lambda x: (core("float4"), (struct.pack(">f", x), float_text(x)))),
    st.decimals(allow_nan=False, allow_infinity=False).map(
        lambda d: (core("numeric"), numeric_forms(d))
    ),
    TEXTS.map(lambda t: (core("text"), (t.encode(), t.encode()))),
    st.uuids().map(lambda u: (core("uuid"), (u.bytes, str(u).encode()))),
    st.datetimes().map(lambda d: (core("timestamptz"), timestamp_forms(d))),
    st.binary().map(lambda b: (core("bytea"), (b, b"\\x" + b.hex().encode()))),
    JSONS.map(json.dumps).map(lambda t: (core("jsonb"), (b"\x01" + t.encode(), t.encode()))),
)


def quoted(text: bytes) -> bytes:
    return b'"' + text.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def doubled(text: bytes) -> bytes:
    return b'"' + text.replace(b"\\", b"\\\\").replace(b'"', b'""') + b'"'


def counted(data: bytes | None) -> bytes:
    return int4(-1) if data is None else int4(len(data)) + data


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[tuple[PgType, Forms]]) -> tuple[PgType, Forms]:
    """An array: one value of some type, several times and NULLs between."""
    type_, (binary, text) = draw(inner)
    while type_.kind is TypeKind.ARRAY:
        type_, (binary, text) = draw(inner)
    present = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    items = [binary if there else None for there in present]
    texts = [quoted(text) if there else b"NULL" for there in present]
    twice = draw(st.booleans())
    if twice:
        data = array_bytes(*items, *items, sizes=(2, len(items)))
        row = b"{" + b",".join(texts) + b"}"
        return array(type_), (data, b"{" + row + b"," + row + b"}")
    return array(type_), (array_bytes(*items), b"{" + b",".join(texts) + b"}")


@st.composite
def composites(
    draw: st.DrawFn, inner: st.SearchStrategy[tuple[PgType, Forms]]
) -> tuple[PgType, Forms]:
    parts = draw(st.lists(st.tuples(inner, st.booleans()), min_size=1, max_size=3))
    fields = [(f"f{number}", type_) for number, ((type_, _), _) in enumerate(parts)]
    binary = int4(len(parts)) + b"".join(
        bytes(4) + counted(forms[0] if there else None) for (_, forms), there in parts
    )
    text = b",".join(doubled(forms[1]) if there else b"" for (_, forms), there in parts)
    return composite(*fields), (binary, b"(" + text + b")")


@st.composite
def ranges(draw: st.DrawFn, inner: st.SearchStrategy[tuple[PgType, Forms]]) -> tuple[PgType, Forms]:
    type_, (binary, text) = draw(inner)
    lower, upper = draw(st.booleans()), draw(st.booleans())
    flags = (2 if lower else 8) | (0 if upper else 16)
    data = (
        bytes([flags]) + (counted(binary) if lower else b"") + (counted(binary) if upper else b"")
    )
    words = (b"[" if lower else b"(") + (doubled(text) if lower else b"") + b","
    words += (doubled(text) if upper else b"") + b")"
    if draw(st.booleans()):
        two = int4(2) + counted(data) + counted(data)
        return multirange_of(type_), (two, b"{" + words + b"," + words + b"}")
    return range_of(type_), (data, words)


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        arrays(inner),
        composites(inner),
        ranges(inner),
        inner.map(lambda value: (domain(value[0]), value[1])),
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_both_formats_give_the_same_value(value: tuple[PgType, Forms]) -> None:
    type_, (binary, text) = value
    by_binary = binary_decoder(type_)(binary)
    # repr tells 1 from 1.0 and from True, and 0.0 from -0.0.
    assert repr(by_binary) == repr(text_decoder(type_)(text))


SOME_COLUMNS = st.lists(st.sampled_from(["id", "c0", "c1", "c2"]), max_size=3).map(tuple)
CONSTANTS = st.dictionaries(
    TEXTS.map(lambda text: f"constant {text}"),
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    max_size=3,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(VALUES, st.sampled_from(["binary", "text", "null", "unchanged"])), max_size=5
    ),
    st.booleans() | SOME_COLUMNS,
    st.booleans() | SOME_COLUMNS,
    st.none() | TEXTS,
    st.none() | TEXTS.filter(lambda text: text not in ("_table", "_shard")),
    CONSTANTS,
    st.sampled_from([None, "2/3"]),
)
def test_both_codecs_give_the_same_payload(
    values: list[tuple[tuple[PgType, Forms], str]],
    drop_nulls: bool | tuple[str, ...],
    numeric_as_string: bool | tuple[str, ...],
    namespace: str | None,
    payload_key: str | None,
    constants: dict[str, Constant],
    shard: str | None,
) -> None:
    columns = [ColumnPlan("id", core("int8"), "id")]
    row: Row = [bytes(8)]
    for number, ((type_, (binary, text)), form) in enumerate(values):
        columns.append(ColumnPlan(f"c{number}", type_, f"field {number}"))
        forms: dict[str, RawValue] = {
            "binary": binary,
            "text": TextValue(text),
            "null": None,
            "unchanged": UNCHANGED,
        }
        row.append(forms[form])
    plan = dataclasses.replace(
        table_plan(*columns, namespace=namespace),
        drop_nulls=drop_nulls,
        numeric_as_string=numeric_as_string,
        payload_key=payload_key,
        constants=tuple(constants.items()),
        shard=shard,
    )
    wire, python = WireCodec(plan), PythonCodec(plan)
    expected = python.payload(row)
    fields = expected if payload_key is None else expected[payload_key]
    assert isinstance(fields, dict)
    assert set(wire.unknown_fields(row)) == set(python.unknown_fields(row))
    assert not set(fields) & set(wire.unknown_fields(row))
    assert set(expected) - set(fields) <= {payload_key, "_table", "_shard"}
    entries = grpc.SetPayloadPoints.FromString(wire.payload_entries(row, 3)).payload
    written = {key: value_of(value) for key, value in entries.items()}
    assert sorted_repr(written) == sorted_repr(expected)
    assert wire.non_finite == python.non_finite
    kept: dict[str, JsonValue] = {name: ["kept", None] for name in wire.unknown_fields(row)}
    filled = wire.payload_entries(
        row, 3, {name: encode_value(value) for name, value in kept.items()}
    )
    entries = grpc.SetPayloadPoints.FromString(filled).payload
    written = {key: value_of(value) for key, value in entries.items()}
    assert sorted_repr(written) == sorted_repr(python.payload(row, kept))
    if UNCHANGED not in row:
        point = grpc.PointStruct.FromString(wire.point(1, row))
        assert sorted_repr(payload_of(point)) == sorted_repr(expected)


def sorted_repr(value: object) -> str:
    """Return a repr in which objects have their keys in order, as protobuf maps have none."""
    if isinstance(value, dict):
        return repr([(key, sorted_repr(value[key])) for key in sorted(value)])
    if isinstance(value, list):
        return repr([sorted_repr(item) for item in value])
    return repr(value)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(FLOATS, min_size=3, max_size=3),
    st.dictionaries(st.integers(0, 2**31 - 2), FLOATS, max_size=40),
    st.lists(st.lists(FLOATS, min_size=2, max_size=2), max_size=3),
    st.lists(st.sampled_from(["value", "null", "unchanged"]), min_size=3, max_size=3),
)
def test_both_codecs_give_the_same_vectors(
    dense: list[float],
    sparse: dict[int, float],
    multi: list[list[float]],
    states: list[str],
) -> None:
    indices = sorted(sparse)
    values: list[RawValue] = [
        struct.pack(">hh3f", 3, 0, *dense),
        struct.pack(">iii", 2**31 - 1, len(indices), 0)
        + struct.pack(f">{len(indices)}i", *indices)
        + struct.pack(f">{len(indices)}f", *(sparse[index] for index in indices)),
        array_bytes(*(struct.pack(">hh2f", 2, 0, *row) for row in multi))
        if multi
        else array_bytes(sizes=()),
    ]
    chosen: dict[str, RawValue] = {"null": None, "unchanged": UNCHANGED}
    row: Row = [bytes(8)]
    row += [chosen.get(state, value) for state, value in zip(states, values, strict=True)]

    def column(name: str, type_: PgType, kind: VectorKind, size: int | None) -> ColumnPlan:
        return ColumnPlan(name, type_, None, VectorPlan(name, kind, size, Metric.DOT))

    plan = table_plan(
        ColumnPlan("id", core("int8"), "id"),
        column("dense", pgvector("vector"), VectorKind.DENSE, 3),
        column("sparse", pgvector("sparsevec"), VectorKind.SPARSE, None),
        column("multi", array(pgvector("vector")), VectorKind.MULTI, 2),
    )
    wire = WireCodec(plan)
    python = PythonCodec(plan)
    expected = numbers_of(python.vectors(row))
    data = wire.vectors(row)
    written = {} if data is None else vectors_of(grpc.Vectors.FromString(data))
    assert written == expected
    unchanged = {
        name
        for name, state in zip(("dense", "sparse", "multi"), states, strict=True)
        if state == "unchanged"
    }
    assert set(wire.null_vectors(row)) == {"dense", "sparse", "multi"} - set(expected) - unchanged
    assert wire.null_vectors(row) == python.null_vectors(row)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.integers(-(2**63), 2**63 - 1)), min_size=2, max_size=2))
def test_keys_and_ids_correspond(keys: list[tuple[str, int]]) -> None:
    plan = table_plan(ColumnPlan("t", core("text")), ColumnPlan("n", core("int8")), key=(0, 1))
    text, point_id = compile_key_text(plan), compile_point_id(plan)
    rows: list[Row] = [[t.encode(), struct.pack(">q", n)] for t, n in keys]
    for row, (t, n) in zip(rows, keys, strict=True):
        assert json.loads(text(row)) == [t, str(n)]
        assert uuid.UUID(str(point_id(row))).version == 5
    assert (point_id(rows[0]) == point_id(rows[1])) == (keys[0] == keys[1])


ALL_TYPES = [
    *map(core, ("bool", "int4", "int8", "xid8", "float4", "float8", "numeric", "money", "text")),
    *map(core, ("char", "uuid", "bytea", "varbit", "tsvector", "pg_lsn", "tid", "json", "jsonb")),
    *map(core, ("date", "timestamptz", "timestamp", "time", "timetz", "interval", "jsonpath")),
    *map(
        core, ("inet", "cidr", "macaddr", "point", "line", "path", "polygon", "circle", "regclass")
    ),
    PgType(0, "public", "hstore", extension="hstore"),
    PgType(0, "public", "geometry", extension="postgis"),
    *map(pgvector, ("vector", "halfvec", "sparsevec")),
    array(core("int4")),
    array(array(core("text"))),
    composite(("a", core("text")), ("b", array(core("numeric")))),
    range_of(core("numeric")),
    multirange_of(core("date")),
]
# Bytes that look like something: small counts, text characters, infinities.
NOISE = st.lists(
    st.one_of(
        st.binary(max_size=6),
        st.integers(-2, 3).map(int4),
        st.sampled_from(
            [b"\0\0", b"\x7f\xff\xff\xff", b"{", b"}", b'"', b"\\", b"(", b",", b"[", b"1"]
        ),
    ),
    max_size=12,
).map(b"".join)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(ALL_TYPES), NOISE)
def test_noise_raises_nothing_but_mapping_errors(type_: PgType, noise: bytes) -> None:
    for decode in (binary_decoder(type_), text_decoder(type_)):
        with contextlib.suppress(MappingError):
            json.dumps(decode(noise), allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["vector", "halfvec", "sparsevec", "bit", "vector[]"]), NOISE, st.booleans())
def test_noise_in_vectors_raises_nothing_but_mapping_errors(
    name: str, noise: bytes, textual: bool
) -> None:
    kind = VectorKind.DENSE
    if name == "bit":
        type_ = core("bit")
    elif name == "vector[]":
        type_, kind = array(pgvector("vector")), VectorKind.MULTI
    else:
        type_ = pgvector(name)
        kind = VectorKind.SPARSE if name == "sparsevec" else kind
    plan = VectorPlan("v", kind, None if kind is VectorKind.SPARSE else 1, Metric.COSINE)
    readers = compile_vector("t", ColumnPlan("v", type_, None, plan))
    with contextlib.suppress(MappingError):
        readers[textual](noise)
