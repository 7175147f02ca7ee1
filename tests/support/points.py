"""Reads protobuf points back into Python, to hold the encoders to what the client library
understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from qdrant_client import grpc

from cdc_sync.mapping.python import SparseValue, VectorValue
from cdc_sync.mapping.values import JsonValue

#: A vector of plain numbers, so that they can be compared.
Numbers: TypeAlias = "list[float] | SparseValue | list[list[float]]"


def value_of(value: grpc.Value) -> JsonValue:
    """Return the JSON value of a ``Value``."""
    kind = value.WhichOneof("kind")
    if kind == "null_value":
        return None
    if kind == "struct_value":
        return {key: value_of(item) for key, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [value_of(item) for item in value.list_value.values]
    assert kind is not None, "a Value without a kind"
    plain: JsonValue = getattr(value, kind)
    return plain


def payload_of(point: grpc.PointStruct) -> dict[str, JsonValue]:
    """Return the payload of a point."""
    return {key: value_of(value) for key, value in point.payload.items()}


def vector_of(vector: grpc.Vector) -> Numbers:
    """Return a dense vector, a sparse vector, or the rows of a multivector."""
    kind = vector.WhichOneof("vector")
    if kind == "dense":
        return list(vector.dense.data)
    if kind == "sparse":
        return SparseValue(list(vector.sparse.indices), list(vector.sparse.values))
    assert kind == "multi_dense", kind
    return [list(row.data) for row in vector.multi_dense.vectors]


def vectors_of(vectors: grpc.Vectors) -> dict[str, Numbers]:
    """Return vectors by name; a single unnamed one under ""."""
    if vectors.WhichOneof("vectors_options") == "vector":
        return {"": vector_of(vectors.vector)}
    return {name: vector_of(vector) for name, vector in vectors.vectors.vectors.items()}


def numbers_of(vectors: Mapping[str, VectorValue]) -> dict[str, Numbers]:
    """Return vectors as PythonCodec decodes them, as plain numbers."""
    return {
        name: list(map(float, vector)) if isinstance(vector, memoryview) else vector
        for name, vector in vectors.items()
    }
