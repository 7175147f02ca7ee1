"""What the project relies on in a Qdrant server, through the official client.

Runs against the test server of this repository and, with CDC_SYNC_TEST_QDRANT_URL set, against a
real one: the test server must not differ from it in anything asserted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as q

from tests.support.fix_qdrant import QdrantTarget
from tests.support.qdrant_cases import (
    UUIDS,
    ids_of,
    payload_of,
    point,
    refused,
    vectors_of,
)

# Ids, payloads, vectors


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, *UUIDS[:1]])
def test_ids_come_back(client: QdrantClient, plain: str, key: int | str) -> None:
    client.upsert(plain, [point(key)])
    assert ids_of(client, plain) == [key]
    client.delete(plain, points_selector=[key])
    assert ids_of(client, plain) == []


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("text", ["", "1", "not-a-uuid", UUIDS[0] + "0", UUIDS[0][:-1] + "g"])
def test_bad_uuid_is_refused_at_once(
    client: QdrantClient, plain: str, text: str, wait: bool
) -> None:
    point = q.PointStruct(id=q.PointId(uuid=text), vectors=_wire([1.0] * 4))
    request = q.UpsertPoints(collection_name=plain, wait=wait, points=[point])
    code, details = refused(lambda: client.grpc_points.Upsert(request, timeout=10))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "Unable to parse UUID" in details


@pytest.mark.parametrize("form", [UUIDS[3].replace("-", ""), f"{{{UUIDS[3]}}}", UUIDS[3].upper()])
def test_other_forms_of_a_uuid_are_the_same_id(client: QdrantClient, plain: str, form: str) -> None:
    point = q.PointStruct(id=q.PointId(uuid=form), vectors=_wire([1.0] * 4))
    request = q.UpsertPoints(collection_name=plain, wait=True, points=[point])
    client.grpc_points.Upsert(request, timeout=10)
    assert ids_of(client, plain) == [UUIDS[3]]


def test_payload_values_keep_their_types(client: QdrantClient, plain: str) -> None:
    payload: dict[str, Any] = {
        "int": 7,
        "min": -(2**63),
        "max": 2**63 - 1,
        "float": 7.0,
        "tiny": 5e-324,
        "bool": True,
        "null": None,
        "text": "a\x00b \U0001f600 ß",
        "empty": "",
        "list": [1, 1.5, None, "x", [], {}],
        "object": {"a": {"b": [{"c": None}]}, "": 1},
        "": "empty key",
    }
    client.upsert(plain, [point(1, payload)])
    stored = payload_of(client, plain, 1)
    assert stored == payload
    assert stored is not None
    assert [type(stored[key]) for key in ("int", "float", "bool")] == [int, float, bool]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wait", [True, False])
def test_payload_without_json_form_is_refused_whole(
    client: QdrantClient, plain: str, value: float, wait: bool
) -> None:
    points = [point(1), point(2, {"a": [{"b": value}]})]
    code, text = refused(lambda: client.upsert(plain, points, wait=wait))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot convert to json number" in text
    assert ids_of(client, plain) == []


def test_all_kinds_of_vectors_come_back(client: QdrantClient, rich: str) -> None:
    vectors: dict[str, Any] = {
        "dense": [0.5, -2.0],
        "half": [1.0009765625, 65504.0],
        "bits": [0.0, 1.0, 255.0],
        "multi": [[1.0, 2.0], [3.0, 4.0]],
        "sparse": models.SparseVector(indices=[7, 4294967295, 0], values=[1.0, 2.0, 0.0]),
    }
    client.upsert(rich, [models.PointStruct(id=1, vector=vectors)])
    stored = vectors_of(client, rich, 1)
    sparse = stored.pop("sparse")
    assert stored == {name: vectors[name] for name in ("dense", "half", "bits", "multi")}
    assert dict(zip(sparse.indices, sparse.values, strict=True)) == {
        7: 1.0,
        4294967295: 2.0,
        0: 0.0,
    }
    [one] = client.retrieve(rich, [1], with_vectors=["bits"])
    assert one.vector == {"bits": [0.0, 1.0, 255.0]}


def test_missing_named_vectors_stay_missing(client: QdrantClient, rich: str) -> None:
    client.upsert(rich, [models.PointStruct(id=1, vector={"dense": [1.0, 2.0]})])
    client.upsert(rich, [models.PointStruct(id=2, vector={})])
    assert vectors_of(client, rich, 1) == {"dense": [1.0, 2.0]}
    assert vectors_of(client, rich, 2) == {}
    has = models.Filter(must=[models.HasVectorCondition(has_vector="dense")])
    assert ids_of(client, rich, has) == [1]


def test_cosine_normalises_and_keeps_zero(qdrant: QdrantTarget, client: QdrantClient) -> None:
    name = qdrant.new_collection_name()
    params = models.VectorParams(size=2, distance=models.Distance.COSINE)
    client.create_collection(name, vectors_config=params)
    points = [
        models.PointStruct(id=1, vector=[3.0, 4.0]),
        models.PointStruct(id=2, vector=[0.0, 0.0]),
    ]
    client.upsert(name, points)
    assert vectors_of(client, name, 1) == pytest.approx([0.6, 0.8])
    assert vectors_of(client, name, 2) == [0.0, 0.0]


def _wire(data: list[float]) -> q.Vectors:
    return q.Vectors(vector=q.Vector(dense=q.DenseVector(data=data)))


def _put(client: QdrantClient, name: str, vectors: q.Vectors) -> None:
    point = q.PointStruct(id=q.PointId(num=1), vectors=vectors)
    request = q.UpsertPoints(collection_name=name, wait=True, points=[point])
    client.grpc_points.Upsert(request, timeout=10)


def test_old_wire_form_of_vectors(client: QdrantClient, plain: str, rich: str) -> None:
    _put(client, plain, q.Vectors(vector=q.Vector(data=[1.0, 2.0, 3.0, 4.0])))
    assert vectors_of(client, plain, 1) == [1.0, 2.0, 3.0, 4.0]
    named = {
        "dense": q.Vector(data=[1.0, 2.0]),
        "multi": q.Vector(data=[1.0, 2.0, 3.0, 4.0], vectors_count=2),
        "sparse": q.Vector(data=[0.5], indices=q.SparseIndices(data=[9])),
    }
    _put(client, rich, q.Vectors(vectors=q.NamedVectors(vectors=named)))
    assert vectors_of(client, rich, 1) == {
        "dense": [1.0, 2.0],
        "multi": [[1.0, 2.0], [3.0, 4.0]],
        "sparse": models.SparseVector(indices=[9], values=[0.5]),
    }


def _named(name: str, vector: q.Vector) -> q.Vectors:
    return q.Vectors(vectors=q.NamedVectors(vectors={name: vector}))


def _sparse(indices: list[int], values: list[float]) -> q.Vector:
    return q.Vector(sparse=q.SparseVector(indices=indices, values=values))


def _rows(*rows: list[float]) -> q.Vector:
    vectors = [q.DenseVector(data=row) for row in rows]
    return q.Vector(multi_dense=q.MultiDenseVector(vectors=vectors))


@pytest.mark.parametrize(
    ("vectors", "text"),
    [
        (_named("dense", q.Vector(dense=q.DenseVector(data=[1.0]))), "dimension"),
        (_named("other", q.Vector(dense=q.DenseVector(data=[1.0]))), "Not existing vector name"),
        (_wire([1.0, 2.0]), "Not existing vector name"),
        (_named("dense", q.Vector(dense=q.DenseVector())), ""),
        (_named("dense", _sparse([1], [1.0])), ""),
        (_named("sparse", q.Vector(dense=q.DenseVector(data=[1.0]))), ""),
        (_named("sparse", _sparse([1, 1], [1.0, 2.0])), "must be unique"),
        (_named("sparse", _sparse([1, 2], [1.0])), "must be the same length as indices"),
        (_named("multi", _rows()), ""),
        (_named("multi", _rows([1.0, 2.0], [])), ""),
        (_named("multi", _rows([1.0, 2.0], [1.0])), ""),
        (q.Vectors(), "No Vector Provided"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(
    client: QdrantClient, rich: str, vectors: q.Vectors, text: str
) -> None:
    code, details = refused(lambda: _put(client, rich, vectors))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in details
    assert ids_of(client, rich) == []


def test_point_without_id_or_vectors_is_refused(client: QdrantClient, plain: str) -> None:
    for message in (
        q.PointStruct(vectors=_wire([1.0] * 4)),
        q.PointStruct(id=q.PointId(num=1)),
    ):
        request = q.UpsertPoints(collection_name=plain, wait=True, points=[message])
        code, _ = refused(partial(client.grpc_points.Upsert, request, timeout=10))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


# Writes


def test_upsert_replaces_the_whole_point(client: QdrantClient, rich: str) -> None:
    both = {"dense": [1.0, 2.0], "bits": [1.0, 0.0, 1.0]}
    client.upsert(rich, [models.PointStruct(id=1, vector=both, payload={"a": 1, "b": 2})])
    result = client.upsert(
        rich, [models.PointStruct(id=1, vector={"bits": [0.0, 0.0, 1.0]}, payload={"b": 3})]
    )
    assert result.status is models.UpdateStatus.COMPLETED
    assert vectors_of(client, rich, 1) == {"bits": [0.0, 0.0, 1.0]}
    assert payload_of(client, rich, 1) == {"b": 3}
    client.upsert(rich, [models.PointStruct(id=1, vector=both)])
    assert payload_of(client, rich, 1) == {}


def test_last_of_duplicates_in_one_call_wins(client: QdrantClient, plain: str) -> None:
    points = [point(1, {"n": number}) for number in range(100)]
    client.upsert(plain, points)
    assert payload_of(client, plain, 1) == {"n": 99}
    assert client.count(plain).count == 1


def test_delete_ignores_missing_ids(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [point(1), point(2)])
    result = client.delete(plain, points_selector=[1, 99, UUIDS[0]])
    assert result.status is models.UpdateStatus.COMPLETED
    assert ids_of(client, plain) == [2]


def test_delete_by_filter(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [point(n, {"n": n}) for n in range(10)])
    condition = models.FieldCondition(key="n", range=models.Range(gte=3))
    client.delete(plain, points_selector=models.Filter(must=[condition]))
    assert ids_of(client, plain) == [0, 1, 2]
    client.delete(plain, points_selector=models.Filter())
    assert ids_of(client, plain) == []


def test_set_payload_merges_and_null_removes(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [point(1, {"a": 1, "b": {"x": 1}, "c": 3})])
    client.set_payload(plain, {"b": {"y": 2}, "c": None, "d": 4}, points=[1])
    assert payload_of(client, plain, 1) == {"a": 1, "b": {"y": 2}, "d": 4}
    client.set_payload(plain, {"z": 5}, points=[1], key="b")
    assert payload_of(client, plain, 1) == {"a": 1, "b": {"y": 2, "z": 5}, "d": 4}
    assert vectors_of(client, plain, 1) == [1.0, 2.0, 3.0, 4.0]


def test_overwrite_payload_replaces_and_keeps_nulls(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [point(1, {"a": 1, "b": 2})])
    client.overwrite_payload(plain, {"b": None, "c": [None]}, points=[1])
    assert payload_of(client, plain, 1) == {"b": None, "c": [None]}
    assert vectors_of(client, plain, 1) == [1.0, 2.0, 3.0, 4.0]


def test_delete_and_clear_payload(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [point(1, {"a": 1, "b": 2}), point(2, {"a": 1})])
    client.delete_payload(plain, ["a", "missing"], points=[1])
    assert payload_of(client, plain, 1) == {"b": 2}
    client.clear_payload(plain, points_selector=[1])
    assert payload_of(client, plain, 1) == {}
    assert payload_of(client, plain, 2) == {"a": 1}


def test_payload_operations_by_filter(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [point(n, {"n": n}) for n in range(4)])
    odd = models.Filter(must=[models.FieldCondition(key="n", match=models.MatchAny(any=[1, 3]))])
    client.set_payload(plain, {"odd": True}, points=odd)
    client.delete_payload(plain, ["n"], points=odd)
    assert [payload_of(client, plain, n) for n in range(4)] == [
        {"n": 0},
        {"odd": True},
        {"n": 2},
        {"odd": True},
    ]


def test_update_and_delete_vectors(client: QdrantClient, rich: str) -> None:
    both = {"dense": [1.0, 2.0], "bits": [1.0, 0.0, 1.0]}
    client.upsert(rich, [models.PointStruct(id=1, vector=both, payload={"a": 1})])
    client.update_vectors(rich, [models.PointVectors(id=1, vector={"dense": [9.0, 9.0]})])
    assert vectors_of(client, rich, 1) == {"dense": [9.0, 9.0], "bits": [1.0, 0.0, 1.0]}
    client.delete_vectors(rich, ["dense"], points=[1])
    assert vectors_of(client, rich, 1) == {"bits": [1.0, 0.0, 1.0]}
    assert payload_of(client, rich, 1) == {"a": 1}


@pytest.mark.parametrize(
    "call",
    [
        lambda client, name: client.set_payload(name, {"a": 1}, points=[99]),
        lambda client, name: client.overwrite_payload(name, {"a": 1}, points=[99]),
        lambda client, name: client.delete_payload(name, ["a"], points=[99]),
        lambda client, name: client.clear_payload(name, points_selector=[99]),
        lambda client, name: client.update_vectors(
            name, [models.PointVectors(id=99, vector=[1.0, 2.0, 3.0, 4.0])]
        ),
        lambda client, name: client.delete_vectors(name, [""], points=[99]),
    ],
)
def test_partial_update_of_a_missing_point_is_not_found(
    client: QdrantClient, plain: str, call: Callable[[QdrantClient, str], object]
) -> None:
    code, text = refused(lambda: call(client, plain))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "No point with id 99 found" in text


def test_partial_update_with_a_missing_id_is_applied_in_part(
    client: QdrantClient, plain: str
) -> None:
    """Chunks of 32 ids: present ids of the failing chunk are written, later chunks are not."""
    client.upsert(plain, [point(n, {}) for n in range(1, 41)])
    ids = [999, *range(1, 41)]
    code, text = refused(lambda: client.set_payload(plain, {"done": 1}, points=ids))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "999" in text
    done = [n for n in range(1, 41) if payload_of(client, plain, n) == {"done": 1}]
    assert done == list(range(1, 32))


def test_batch_runs_in_order_and_stops_at_the_first_error(client: QdrantClient, plain: str) -> None:
    operations: list[models.UpdateOperation] = [
        models.UpsertOperation(
            upsert=models.PointsList(points=[point(1, {"n": 1}), point(2, {"n": 2})])
        ),
        models.DeleteOperation(delete=models.PointIdsList(points=[1])),
        models.SetPayloadOperation(set_payload=models.SetPayload(payload={"m": 1}, points=[2])),
        models.OverwritePayloadOperation(
            overwrite_payload=models.SetPayload(payload={"k": None}, points=[2])
        ),
    ]
    results = client.batch_update_points(plain, operations)
    assert [result.status for result in results] == [models.UpdateStatus.COMPLETED] * 4
    assert ids_of(client, plain) == [2]
    assert payload_of(client, plain, 2) == {"k": None}
    operations = [
        models.UpsertOperation(upsert=models.PointsList(points=[point(3)])),
        models.ClearPayloadOperation(clear_payload=models.PointIdsList(points=[99])),
        models.UpsertOperation(upsert=models.PointsList(points=[point(4)])),
    ]
    code, _ = refused(lambda: client.batch_update_points(plain, operations))
    assert code is grpc.StatusCode.NOT_FOUND
    assert ids_of(client, plain) == [2, 3]


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda client, name, wait: client.upsert(name, [], wait=wait),
        lambda client, name, wait: client.delete(name, [], wait=wait),
        lambda client, name, wait: client.set_payload(name, {"a": 1}, points=[], wait=wait),
        lambda client, name, wait: client.update_vectors(name, [], wait=wait),
    ],
)
def test_update_of_no_points_is_refused(
    client: QdrantClient, plain: str, call: Callable[[QdrantClient, str, bool], object], wait: bool
) -> None:
    code, text = refused(lambda: call(client, plain, wait))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "Empty update request" in text


def test_empty_batch_is_refused(client: QdrantClient, plain: str) -> None:
    request = q.UpdateBatchPoints(collection_name=plain, wait=True)
    code, _ = refused(lambda: client.grpc_points.UpdateBatch(request, timeout=10))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_unwaited_writes_are_acknowledged_and_ordered(client: QdrantClient, plain: str) -> None:
    for number in range(20):
        result = client.upsert(plain, [point(1, {"n": number})], wait=False)
        assert result.status is models.UpdateStatus.ACKNOWLEDGED
    client.delete(plain, points_selector=[99], wait=True)  # a barrier
    assert payload_of(client, plain, 1) == {"n": 19}


def test_unwaited_errors_are_swallowed(client: QdrantClient, plain: str) -> None:
    client.set_payload(plain, {"a": 1}, points=[99], wait=False)
    client.upsert(plain, [point(1, {"n": 1})], wait=True)
    assert ids_of(client, plain) == [1]
