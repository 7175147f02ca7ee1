"""Conversions between Qdrant's gRPC messages and the objects of the embedded engine: ids, payloads,
vectors, results.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import TypeAlias, cast

import qdrant_edge as edge
from qdrant_client import grpc as q

from tests.support.qdrant_status import invalid, validation, wrong_input

PointKey: TypeAlias = int | str
"""A point id: an unsigned integer or a hyphenated lower-case UUID."""

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
EngineVector: TypeAlias = "list[float] | list[list[float]] | edge.SparseVector"
EngineVectors: TypeAlias = "list[float] | list[list[float]] | dict[str, EngineVector]"

PLACEHOLDER = "__no_vectors"
"""Name of the hidden vector of a collection without vectors, which the engine cannot have."""

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_UUID_FORMS = re.compile(
    r"[0-9a-f]{32}|(?:urn:uuid:)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    r"|\{[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\}",
    re.IGNORECASE,
)


def point_key(message: q.PointId) -> PointKey:
    """The id in its canonical form. Refuses what the server cannot parse as a UUID."""
    kind = message.WhichOneof("point_id_options")
    if kind == "num":
        return message.num
    if kind is None:
        raise invalid("No ID options provided")
    text = message.uuid
    if _UUID.fullmatch(text):
        return text
    if not _UUID_FORMS.fullmatch(text):
        raise invalid(f"Unable to parse UUID: {text}")
    return str(uuid.UUID(text))


def point_id(key: int | str | uuid.UUID) -> q.PointId:
    if isinstance(key, int):
        return q.PointId(num=key)
    return q.PointId(uuid=str(key))


def json_value(value: q.Value) -> Json:
    """A payload value; integers stay integers. Refuses NaN and infinities, which JSON has not."""
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return value.string_value
    if kind == "integer_value":
        return value.integer_value
    if kind == "double_value":
        if not math.isfinite(value.double_value):
            raise invalid("cannot convert to json number")
        return value.double_value
    if kind == "bool_value":
        return value.bool_value
    if kind == "list_value":
        return [json_value(item) for item in value.list_value.values]
    if kind == "struct_value":
        return {key: json_value(item) for key, item in value.struct_value.fields.items()}
    return None


def json_object(fields: Mapping[str, q.Value]) -> dict[str, Json]:
    return {key: json_value(value) for key, value in fields.items()}


def fill_value(target: q.Value, value: Json) -> None:
    """Set a message in place, which is faster than to build and copy it."""
    if isinstance(value, str):
        target.string_value = value
    elif value is None:
        target.null_value = q.NULL_VALUE
    elif isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int):
        if -(2**63) <= value < 2**63:
            target.integer_value = value
        else:
            target.double_value = float(value)
    elif isinstance(value, float):
        target.double_value = value
    elif isinstance(value, list):
        target.list_value.SetInParent()
        for item in value:
            fill_value(target.list_value.values.add(), item)
    else:
        target.struct_value.SetInParent()
        for key, item in value.items():
            fill_value(target.struct_value.fields[key], item)


def _sparse(where: str, indices: list[int], values: list[float]) -> edge.SparseVector:
    if len(indices) != len(values):
        raise validation(f"{where}.values", "must be the same length as indices")
    if len(set(indices)) != len(indices):
        raise validation(f"{where}.indices", "must be unique")
    return edge.SparseVector(indices=indices, values=values)


def _multi(where: str, rows: list[list[float]]) -> list[list[float]]:
    if not rows:
        raise validation(f"{where}.vectors", "multivector must not be empty")
    if any(not row for row in rows):
        raise validation(f"{where}.vectors", "all vectors must be non-empty")
    if any(len(row) != len(rows[0]) for row in rows):
        raise validation(f"{where}.vectors", "all vectors must have the same dimension")
    return rows


def _flat_multi(data: list[float], count: int) -> list[list[float]]:
    problem = ""
    if count == 0 or not data:
        problem = f"Empty multi-vector data with vectors count: {count}"
    elif len(data) % count:
        problem = (
            "Data length is not divisible by vectors count. "
            f"Data length: {len(data)}, vectors count: {count}"
        )
    if problem:
        raise invalid(f"Unable to convert to multi-dense vector: Validation failed: {problem}")
    width = len(data) // count
    return [data[start : start + width] for start in range(0, len(data), width)]


def engine_vector(where: str, vector: q.Vector) -> EngineVector:
    """A vector in the present wire form (`dense`, `sparse`, `multi_dense`) or the old one (`data`,
    `indices`).
    """
    kind = vector.WhichOneof("vector")
    if kind == "dense":
        data: list[float] = vector.dense.data[:]
        if not data:
            raise wrong_input(f"{where}: dense vector must not be empty")
        return data
    if kind == "sparse":
        return _sparse(where, vector.sparse.indices[:], vector.sparse.values[:])
    if kind == "multi_dense":
        return _multi(where, [row.data[:] for row in vector.multi_dense.vectors])
    if kind is not None:
        raise invalid("InferenceService is not initialized. Please check if it was properly set up")
    if vector.HasField("indices"):
        return _sparse(where, vector.indices.data[:], vector.data[:])
    if vector.HasField("vectors_count"):
        return _flat_multi(vector.data[:], vector.vectors_count)
    data = cast("list[float]", vector.data[:])
    if not data:
        raise wrong_input(f"{where}: dense vector must not be empty")
    return data


def engine_vectors(where: str, vectors: q.Vectors) -> EngineVectors:
    """The vectors of one point: one unnamed, or a mapping by name."""
    kind = vectors.WhichOneof("vectors_options")
    if kind == "vector":
        vector = engine_vector(where, vectors.vector)
        if isinstance(vector, edge.SparseVector):
            raise invalid("Sparse vector must be named")
        return vector
    if kind == "vectors":
        named = vectors.vectors.vectors
        return {name: engine_vector(where, vector) for name, vector in named.items()}
    raise invalid("No Vector Provided")


def engine_point(number: int, point: q.PointStruct) -> edge.Point:
    where = f"points[{number}].vector"
    if not point.HasField("id"):
        raise invalid("Empty ID is not allowed")
    if not point.HasField("vectors"):
        raise invalid("Expected some vectors")
    vectors = engine_vectors(where, point.vectors)
    payload = json_object(point.payload)
    return edge.Point(point_key(point.id), vectors, payload)


def _vector_output(vector: object) -> q.VectorOutput:
    if isinstance(vector, edge.SparseVector):
        sparse = q.SparseVector(values=vector.values, indices=vector.indices)
        return q.VectorOutput(sparse=sparse)
    rows = cast("list[object]", vector)
    if rows and isinstance(rows[0], list):
        matrix = cast("list[list[float]]", vector)
        multi = q.MultiDenseVector(vectors=[q.DenseVector(data=row) for row in matrix])
        return q.VectorOutput(multi_dense=multi)
    return q.VectorOutput(dense=q.DenseVector(data=cast("list[float]", vector)))


def vectors_output(vectors: object) -> q.VectorsOutput | None:
    """The vectors of a result. One that has only the unnamed vector is sent as a single vector."""
    if vectors is None:
        return None
    if not isinstance(vectors, dict):
        return q.VectorsOutput(vector=_vector_output(vectors))
    named = {name: vector for name, vector in vectors.items() if name != PLACEHOLDER}
    if set(named) == {""}:
        return q.VectorsOutput(vector=_vector_output(named[""]))
    outputs = {name: _vector_output(vector) for name, vector in named.items()}
    return q.VectorsOutput(vectors=q.NamedVectorsOutput(vectors=outputs))


def _fill_payload(message: q.RetrievedPoint | q.ScoredPoint, payload: object) -> None:
    fields = cast("dict[str, Json] | None", payload)
    for key, value in (fields or {}).items():
        fill_value(message.payload[key], value)


def _order_value(value: int | float | None) -> q.OrderValue | None:
    if value is None:
        return None
    return q.OrderValue(int=value) if isinstance(value, int) else q.OrderValue(float=value)


def retrieved(records: Iterable[edge.Record]) -> list[q.RetrievedPoint]:
    messages = []
    for record in records:
        message = q.RetrievedPoint(
            id=point_id(record.id),
            vectors=vectors_output(record.vector),
            order_value=_order_value(record.order_value),
        )
        _fill_payload(message, record.payload)
        messages.append(message)
    return messages


def scored(points: Iterable[edge.ScoredPoint]) -> list[q.ScoredPoint]:
    messages = []
    for point in points:
        message = q.ScoredPoint(
            id=point_id(point.id),
            score=point.score,
            version=point.version,
            vectors=vectors_output(point.vector),
            order_value=_order_value(point.order_value),
        )
        _fill_payload(message, point.payload)
        messages.append(message)
    return messages


def payload_selector(selector: q.WithPayloadSelector, default: bool) -> bool | edge.PayloadSelector:
    kind = selector.WhichOneof("selector_options")
    if kind == "include":
        return edge.PayloadSelector.Include(list(selector.include.fields))
    if kind == "exclude":
        return edge.PayloadSelector.Exclude(list(selector.exclude.fields))
    return selector.enable if kind == "enable" else default


def vectors_selector(selector: q.WithVectorsSelector) -> bool | list[str]:
    kind = selector.WhichOneof("selector_options")
    if kind == "include":
        return list(selector.include.names)
    return selector.enable if kind == "enable" else False
