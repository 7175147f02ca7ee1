"""Requests to Qdrant as protobuf wire bytes, put together from parts that are encoded already; and
answers as Python values.

Field numbers: Qdrant's ``points.proto``, unchanged since 1.14. Wire format: Protocol Buffers
documentation, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from qdrant_client import grpc as q

from cdc_sync.mapping.comparison import StoredArray
from cdc_sync.mapping.plan import SHARD_FIELD, TablePlan
from cdc_sync.mapping.protobuf import delimited, varint
from cdc_sync.mapping.vectors import Floats, SparseValue
from cdc_sync.qdrant.sink import StoredVector
from cdc_sync.rows import PointId

_WAIT: Final = b"\x10\x01"  # field 2, varint 1: ``wait`` of every update message


def point_id(value: PointId) -> q.PointId:
    """The message of a point id."""
    return q.PointId(num=value) if isinstance(value, int) else q.PointId(uuid=value)


def point_id_value(message: q.PointId) -> PointId:
    """The point id of a message; UUIDs as Qdrant prints them: hyphenated, lower case."""
    if message.WhichOneof("point_id_options") == "num":
        return int(message.num)
    return str(message.uuid)


def _ids(ids: Iterable[bytes]) -> bytes:
    """PointsSelector { points = 1: PointsIdsList { ids = 1 } } of serialized ids."""
    parts: list[bytes] = []
    for one in ids:
        parts += (b"\x0a", varint(len(one)), one)
    return delimited(1, b"".join(parts))


def upsert(collection: str, points: Iterable[bytes]) -> bytes:
    """UpsertPoints of serialized PointStructs, to be waited for."""
    parts = [delimited(1, collection.encode()), _WAIT]
    for point in points:
        parts += (b"\x1a", varint(len(point)), point)
    return b"".join(parts)


def delete(collection: str, ids: Iterable[bytes]) -> bytes:
    """DeletePoints of serialized ids, to be waited for."""
    return delimited(1, collection.encode()) + _WAIT + delimited(3, _ids(ids))


def touch(collection: str, ids: Iterable[bytes]) -> bytes:
    """SetPayload of nothing on all ids, to be waited for: the barrier after a batch (see
    ``partials.py``).
    """
    return delimited(1, collection.encode()) + _WAIT + delimited(5, _ids(ids))


def overwrite_payload(id_: bytes, payload_entries: bytes) -> bytes:
    """PointsUpdateOperation that replaces one point's payload by entries (of field 1)."""
    # PointsSelector (field 2), PointsIdsList, PointId: of a number or UUID, so of few bytes.
    size = len(id_)
    selector = bytes((0x12, size + 4, 0x0A, size + 2, 0x0A, size))
    whole = len(payload_entries) + len(selector) + size
    return b"".join((b"\x22", varint(whole), payload_entries, selector, id_))


def update_vectors(points: Iterable[tuple[bytes, bytes]]) -> bytes:
    """PointsUpdateOperation that writes serialized Vectors to serialized ids, other vectors
    staying.
    """
    return delimited(
        7, b"".join([delimited(1, delimited(1, id_) + delimited(2, v)) for id_, v in points])
    )


def delete_vectors(ids: Iterable[bytes], names: Iterable[str]) -> bytes:
    """PointsUpdateOperation that removes the vectors of these names."""
    return delimited(
        8,
        delimited(1, _ids(ids)) + delimited(2, b"".join([delimited(1, n.encode()) for n in names])),
    )


def update_batch(collection: str, operations: Iterable[bytes], *, wait: bool) -> bytes:
    """UpdateBatchPoints of serialized operations, run in order."""
    parts = [delimited(1, collection.encode())]
    if wait:
        parts.append(_WAIT)
    for operation in operations:
        parts += (b"\x1a", varint(len(operation)), operation)
    return b"".join(parts)


def get(
    collection: str, ids: Iterable[bytes], *, with_payload: bool, with_vectors: bool = False
) -> bytes:
    """GetPoints of serialized ids."""
    return (
        delimited(1, collection.encode())
        + b"".join([delimited(2, one) for one in ids])
        + delimited(4, b"\x08\x01" if with_payload else b"\x08\x00")
        + delimited(5, b"\x08\x01" if with_vectors else b"\x08\x00")
    )


def table_filter(plan: TablePlan) -> q.Filter | None:
    """The filter that selects the table's points in its collection: None, or its marks."""
    if not plan.marks:
        return None
    return q.Filter(must=[keyword_condition(name, value) for name, value in plan.marks])


def foreign_filter(plan: TablePlan) -> q.Filter | None:
    """The filter that selects points in a sharded table's collection that no shard of the same
    division has written; None for a table without shards."""
    if plan.shard is None:
        return None
    _, _, count = plan.shard.partition("/")
    shards = [f"{index}/{count}" for index in range(1, int(count) + 1)]
    match = q.Match(keywords=q.RepeatedStrings(strings=shards))
    condition = q.Condition(field=q.FieldCondition(key=SHARD_FIELD, match=match))
    return q.Filter(must_not=[condition])


def keyword_condition(name: str, value: str) -> q.Condition:
    """The condition that a payload field is a string."""
    match = q.Match(keyword=value)
    return q.Condition(field=q.FieldCondition(key=name, match=match))


def stored_vectors(output: q.VectorsOutput) -> dict[str, StoredVector]:
    """The vectors of an answer by name, "" for the unnamed one."""
    return {name: _stored_vector(one) for name, one in _named(output)}


def _stored_vector(output: q.VectorOutput) -> StoredVector:
    kind = output.WhichOneof("vector")
    if kind == "dense":
        return list(output.dense.data)
    if kind == "sparse":
        return SparseValue(list(output.sparse.indices), list(output.sparse.values))
    if kind == "multi_dense":
        return [list(row.data) for row in output.multi_dense.vectors]
    # Servers before 1.16 fill the flat fields instead of the oneof.
    if output.HasField("indices"):
        return SparseValue(list(output.indices.data), list(output.data))
    if output.HasField("vectors_count") and output.vectors_count > 0:
        size = len(output.data) // output.vectors_count
        return [list(output.data[i : i + size]) for i in range(0, len(output.data), size)]
    return list(output.data)


def retrieved_vectors(output: q.VectorsOutput) -> dict[str, StoredArray]:
    """The vectors of an answer by name as :func:`stored_vectors`, but as arrays."""
    return {name: _retrieved_vector(one) for name, one in _named(output)}


def _named(output: q.VectorsOutput) -> Iterable[tuple[str, q.VectorOutput]]:
    kind = output.WhichOneof("vectors_options")
    if kind == "vector":
        return [("", output.vector)]
    return output.vectors.vectors.items() if kind == "vectors" else []


def _retrieved_vector(output: q.VectorOutput) -> StoredArray:
    if output.WhichOneof("vector") == "dense":
        return _components(output.dense)
    vector = _stored_vector(output)
    return vector if isinstance(vector, SparseValue) else np.array(vector, dtype="<f4")


def _components(message: q.DenseVector) -> Floats:
    # The packed floats are the end of the serialized message: twenty times faster than to go
    # through Python numbers.
    data = message.SerializeToString()
    count = len(message.data)
    return np.frombuffer(data, "<f4", count, len(data) - 4 * count)


def vector_input(vector: StoredVector) -> q.VectorInput:
    """The message of a vector to search with."""
    if isinstance(vector, SparseValue):
        sparse = q.SparseVector(indices=vector.indices, values=vector.values)
        return q.VectorInput(sparse=sparse)
    if vector and isinstance(vector[0], list):
        rows: Sequence[q.DenseVector] = [q.DenseVector(data=row) for row in vector]
        return q.VectorInput(multi_dense=q.MultiDenseVector(vectors=rows))
    return q.VectorInput(dense=q.DenseVector(data=vector))  # type: ignore[arg-type]
