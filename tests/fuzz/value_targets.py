"""Targets of what a row holds: the decoders of every type, rows through both codecs, point ids."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from google.protobuf.message import DecodeError
from qdrant_client import grpc

from cdc_sync.errors import ConfigError, MappingError
from cdc_sync.mapping.decoding import INT64_MAX, INT64_MIN, JsonValue
from cdc_sync.mapping.ids import (
    PointIdFunction,
    compile_key_text,
    compile_point_id,
    is_key_type,
)
from cdc_sync.mapping.migration_ids import MIGRATION_SCHEMES, migration_scheme
from cdc_sync.mapping.plan import ColumnPlan, Metric, Part, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.protobuf import encode_value
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.values import binary_decoder, text_decoder
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.rows import Row, TextValue
from tests.fuzz.golden_values import GoldenType, golden_type, golden_types
from tests.fuzz.limits import Run
from tests.fuzz.target import Target, selected
from tests.support.mapping_types import core, table_plan
from tests.support.points import numbers_of, payload_of, value_of, vectors_of

_UUID: Final = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# -- values


def check_json(value: JsonValue) -> None:
    """Make sure that a value is one that Qdrant takes: integers within int64, floats finite,
    strings Unicode text, not nested too deep for its parser."""
    _check_json(value)
    try:
        assert value_of(grpc.Value.FromString(encode_value(value))) == value
    except DecodeError as error:
        raise AssertionError("protobuf does not read the value back") from error


def _check_json(value: JsonValue) -> None:
    match value:
        case bool() | None:
            pass
        case int():
            assert INT64_MIN <= value <= INT64_MAX
        case float():
            assert math.isfinite(value)
        case str():
            value.encode("utf-8")
        case list():
            for item in value:
                _check_json(item)
        case dict():
            for name, item in value.items():
                name.encode("utf-8")
                _check_json(item)


def value_runs() -> tuple[tuple[GoldenType, Run, Run], ...]:
    """The decoders of binary and of text of every golden type."""
    return tuple(
        (
            golden,
            _value_run(binary_decoder(golden.type)),
            _value_run(text_decoder(golden.type)),
        )
        for golden in golden_types()
    )


def _value_run(decode: Callable[[bytes], JsonValue]) -> Run:
    def run(data: bytes) -> bool:
        try:
            value = decode(data)
        except MappingError:
            return False
        check_json(value)
        return True

    return run


def values_target() -> Target:
    """Every decoder of values; the first byte of an input chooses one."""
    runs: list[Run] = []
    seeds: list[bytes] = []
    for golden, binary, text in value_runs():
        seeds += [bytes([len(runs)]) + value for value in golden.binary]
        seeds += [bytes([len(runs) + 1]) + value for value in golden.text]
        runs += [binary, text]
    return Target("values", selected(runs), tuple(seeds), share=6)


# -- points: rows with one column, by both codecs

_KEY: Final = ColumnPlan("id", core("int8"))
_KEY_VALUE: Final = bytes(7) + b"\x07"

#: (type, kind, dimension, metric) of vector columns.
_VECTORS: Final = (
    ("vector", VectorKind.DENSE, 3, Metric.COSINE),
    ("vector", VectorKind.DENSE, 8, Metric.EUCLID),
    ("halfvec", VectorKind.DENSE, 3, Metric.DOT),
    ("sparsevec", VectorKind.SPARSE, None, Metric.DOT),
    ("vector[]", VectorKind.MULTI, 2, Metric.COSINE),
    ("halfvec[]", VectorKind.MULTI, 2, Metric.DOT),
    ("varbit", VectorKind.DENSE, 18, Metric.MANHATTAN),
    ("bit(8)", VectorKind.DENSE, 8, Metric.MANHATTAN),
)


def point_run(column: ColumnPlan) -> Run:
    """Encodes a row with one column besides the key; the first byte of an input says whether it is
    in binary or in text format."""
    plan = table_plan(_KEY, column)
    wire, python = WireCodec(plan), PythonCodec(plan)

    def run(data: bytes) -> bool:
        if not data:
            return False
        return _agree(wire, python, [_KEY_VALUE, data[1:] if data[0] & 1 else TextValue(data[1:])])

    return run


def _agree(wire: WireCodec, python: PythonCodec, row: Row) -> bool:
    """What Qdrant's own library reads of the encoded row is what the other codec makes of it."""
    try:
        encoded = wire.point(7, row)
    except MappingError:
        try:
            python.vectors(row)
            python.payload(row)
        except MappingError:
            return False
        raise AssertionError("only one of the codecs takes it") from None
    point = grpc.PointStruct.FromString(encoded)
    assert payload_of(point) == python.payload(row)
    assert vectors_of(point.vectors) == numbers_of(python.vectors(row))
    return True


def point_columns() -> tuple[tuple[GoldenType, ColumnPlan], ...]:
    """A vector column of every kind, a payload column of every type, and the parts of the objects
    that presets make."""
    columns = []
    for sql, kind, size, metric in _VECTORS:
        golden = golden_type(sql)
        vector = VectorPlan("v", kind, size, metric)
        columns.append((golden, ColumnPlan("v", golden.type, vector=vector)))
    columns += [(golden, ColumnPlan("c", golden.type, field="c")) for golden in golden_types()]
    for sql, part in (("jsonb", Part.MEMBERS), ("text[]", Part.MEMBER)):
        golden = golden_type(sql)
        columns.append((golden, ColumnPlan("c", golden.type, field="c", part=part)))
    return tuple(columns)


def points_target() -> Target:
    """Rows through both codecs: the first byte of an input chooses the column, the second the
    format."""
    cases = [(golden, point_run(column)) for golden, column in point_columns()]
    return _one_of("points", cases, share=4)


def _one_of(name: str, cases: Iterable[tuple[GoldenType, Run]], *, share: int) -> Target:
    """A target whose inputs choose a case by their first byte; the second is 1 for binary."""
    runs: list[Run] = []
    seeds: list[bytes] = []
    for golden, run in cases:
        place = bytes([len(runs)])
        seeds.extend(place + b"\x01" + value for value in golden.binary)
        seeds.extend(place + b"\x00" + value for value in golden.text)
        runs.append(run)
    return Target(name, selected(runs), tuple(seeds), share=share)


# -- nodes of LlamaIndex: a text that goes back into the document beside it

_NODE_TEXT: Final = TextValue("the text \U0001f600".encode())
_NODE_SEEDS: Final = (
    b'{"_node_content": "{\\"text\\": \\"\\", \\"id_\\": \\"1\\"}", "year": 2026}',
    b'{"_node_content": "{\\"image_resource\\": null, \\"x\\": [1e999, NaN]}"}',
    b'{"_node_content": "[]", "text": "mine"}',
    b"[1]",
)


def node_target() -> Target:
    """The metadata of nodes, as json; their text stands in another column."""
    metadata = ColumnPlan("metadata_", core("json"), part=Part.MEMBERS)
    plan = table_plan(_KEY, metadata, ColumnPlan("text", core("text"), part=Part.NODE_TEXT))
    wire, python = WireCodec(plan), PythonCodec(plan)
    return Target(
        "nodes", lambda data: _agree(wire, python, [_KEY_VALUE, data, _NODE_TEXT]), _NODE_SEEDS
    )


# -- keys


def key_runs() -> tuple[tuple[GoldenType, Run], ...]:
    """Point ids and key texts of every type that can be a key, by every scheme that can be; the
    first byte of an input chooses the format."""
    found = []
    for golden in golden_types():
        if is_key_type(golden.type):
            plan = table_plan(ColumnPlan("id", golden.type))
            found.append((golden, _key_run(compile_point_id(plan), compile_key_text(plan))))
            found += [(golden, run) for run in _migration_runs(plan)]
    return tuple(found)


def _migration_runs(plan: TablePlan) -> Iterator[Run]:
    for name in sorted(scheme.value for scheme in MIGRATION_SCHEMES):
        key = [("id", plan.columns[0].type)]
        try:
            scheme = migration_scheme("public.docs", key, None, name)
        except ConfigError:
            continue
        yield _key_run(compile_point_id(dataclasses.replace(plan, id_scheme=scheme)), None)


def _key_run(point_id: PointIdFunction, text: Callable[[Row], str] | None) -> Run:
    def run(data: bytes) -> bool:
        if not data:
            return False
        row: Row = [data[1:] if data[0] & 1 else TextValue(data[1:])]
        try:
            found = point_id(row)
            if text is not None:
                text(row).encode("utf-8")
        except MappingError:
            return False
        if isinstance(found, int):
            assert 0 <= found < 1 << 64
        else:
            assert _UUID.fullmatch(found)
        return True

    return run


def keys_target() -> Target:
    """Keys of every type: the first byte of an input chooses type and scheme, the second the
    format."""
    return _one_of("keys", key_runs(), share=2)
