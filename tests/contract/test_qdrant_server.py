"""What the project relies on in a Qdrant server, through the official client.

Runs against the test server of this repository and, with CDC_SYNC_TEST_QDRANT_URL set, against a real one: the test
server must not differ from it in anything asserted here.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as q

from tests.support.fix_qdrant import QdrantTarget

UUIDS = [str(uuid.UUID(int=number)) for number in range(1, 5)]


@pytest.fixture
def client(qdrant: QdrantTarget) -> QdrantClient:
    return qdrant.client()


@pytest.fixture
def plain(qdrant: QdrantTarget, client: QdrantClient) -> str:
    """A collection with one unnamed vector of 4 dimensions, Dot."""
    name = qdrant.new_collection_name()
    client.create_collection(name, vectors_config=_dense(4))
    return name


@pytest.fixture
def rich(qdrant: QdrantTarget, client: QdrantClient) -> str:
    """A collection with dense, half, bit, multi and sparse vectors."""
    name = qdrant.new_collection_name()
    client.create_collection(
        name,
        vectors_config={
            "dense": _dense(2),
            "half": _dense(2, datatype=models.Datatype.FLOAT16),
            "bits": models.VectorParams(
                size=3, distance=models.Distance.MANHATTAN, datatype=models.Datatype.UINT8
            ),
            "multi": _dense(
                2,
                multivector_config=models.MultiVectorConfig(
                    comparator=models.MultiVectorComparator.MAX_SIM
                ),
            ),
        },
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )
    return name


def _dense(size: int, **others: Any) -> models.VectorParams:
    return models.VectorParams(size=size, distance=models.Distance.DOT, **others)


def _point(key: int | str, payload: dict[str, Any] | None = None) -> models.PointStruct:
    return models.PointStruct(id=key, vector=[1.0, 2.0, 3.0, 4.0], payload=payload)


def _payload(client: QdrantClient, name: str, key: int | str) -> dict[str, Any] | None:
    [record] = client.retrieve(name, [key])
    return record.payload


def _vectors(client: QdrantClient, name: str, key: int | str) -> Any:
    [record] = client.retrieve(name, [key], with_vectors=True)
    return record.vector


def _ids(client: QdrantClient, name: str, condition: models.Filter | None = None) -> list[Any]:
    records, _ = client.scroll(name, scroll_filter=condition, limit=1000, with_payload=False)
    return [record.id for record in records]


def _refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


# Server and collections


def test_health_check_tells_the_version(qdrant: QdrantTarget, client: QdrantClient) -> None:
    reply = client.grpc_root.HealthCheck(q.HealthCheckRequest(), timeout=10)
    major, minor, *_ = reply.version.split(".")
    assert (int(major), int(minor)) >= (1, 14)
    if qdrant.faults is not None:
        assert reply.version == "1.18.0"


def test_collection_config_comes_back_whole(qdrant: QdrantTarget, client: QdrantClient) -> None:
    name = qdrant.new_collection_name()
    client.create_collection(
        name,
        vectors_config={
            "a": models.VectorParams(
                size=3,
                distance=models.Distance.COSINE,
                on_disk=True,
                datatype=models.Datatype.FLOAT16,
                hnsw_config=models.HnswConfigDiff(m=8),
            ),
            "b": _dense(
                2,
                multivector_config=models.MultiVectorConfig(
                    comparator=models.MultiVectorComparator.MAX_SIM
                ),
            ),
        },
        sparse_vectors_config={"s": models.SparseVectorParams(modifier=models.Modifier.IDF)},
        hnsw_config=models.HnswConfigDiff(m=24, ef_construct=200),
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=0),
        metadata={"source": {"table": "t", "columns": [1, None]}},
    )
    info = client.get_collection(name)
    vectors = info.config.params.vectors
    assert isinstance(vectors, dict)
    assert vectors["a"].size == 3
    assert vectors["a"].distance is models.Distance.COSINE
    assert vectors["a"].on_disk is True
    assert vectors["a"].datatype is models.Datatype.FLOAT16
    assert vectors["a"].hnsw_config is not None
    assert vectors["a"].hnsw_config.m == 8
    assert vectors["b"].multivector_config is not None
    assert info.config.params.sparse_vectors is not None
    assert info.config.params.sparse_vectors["s"].modifier is models.Modifier.IDF
    assert (info.config.hnsw_config.m, info.config.hnsw_config.ef_construct) == (24, 200)
    assert info.config.optimizer_config is not None
    assert info.config.optimizer_config.indexing_threshold == 0
    assert info.config.metadata == {"source": {"table": "t", "columns": [1, None]}}
    assert info.status is models.CollectionStatus.GREEN
    assert info.points_count == 0


def test_unnamed_vector_config_comes_back(client: QdrantClient, plain: str) -> None:
    vectors = client.get_collection(plain).config.params.vectors
    assert isinstance(vectors, models.VectorParams)
    assert (vectors.size, vectors.distance) == (4, models.Distance.DOT)


def test_collections_appear_and_go(qdrant: QdrantTarget, client: QdrantClient) -> None:
    name = qdrant.new_collection_name()
    assert not client.collection_exists(name)
    client.create_collection(name, vectors_config=_dense(2))
    assert client.collection_exists(name)
    assert name in {collection.name for collection in client.get_collections().collections}
    assert client.delete_collection(name) is True
    assert client.delete_collection(name) is False
    assert not client.collection_exists(name)


def test_creating_twice_is_already_exists(client: QdrantClient, plain: str) -> None:
    code, text = _refused(lambda: client.create_collection(plain, vectors_config=_dense(4)))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert f"Collection `{plain}` already exists!" in text


@pytest.mark.parametrize(
    "call",
    [
        lambda client, name: client.get_collection(name),
        lambda client, name: client.upsert(name, [_point(1)]),
        lambda client, name: client.upsert(name, [_point(1)], wait=False),
        lambda client, name: client.delete(name, points_selector=[1]),
        lambda client, name: client.count(name),
        lambda client, name: client.scroll(name),
        lambda client, name: client.retrieve(name, [1]),
        lambda client, name: client.update_collection(name, metadata={"a": 1}),
        lambda client, name: client.create_payload_index(name, "a", "keyword"),
    ],
)
def test_missing_collection_is_not_found(
    qdrant: QdrantTarget, client: QdrantClient, call: Callable[[QdrantClient, str], object]
) -> None:
    name = qdrant.new_collection_name()
    code, text = _refused(lambda: call(client, name))
    assert code is grpc.StatusCode.NOT_FOUND
    assert f"Collection `{name}` doesn't exist!" in text


def test_metadata_merges_by_key_and_null_removes(client: QdrantClient, plain: str) -> None:
    client.update_collection(plain, metadata={"a": 1, "b": {"x": 1}})
    client.update_collection(plain, metadata={"a": None, "b": {"y": 2}, "c": [True]})
    assert client.get_collection(plain).config.metadata == {"b": {"y": 2}, "c": [True]}


def test_update_keeps_other_settings(client: QdrantClient, plain: str) -> None:
    client.update_collection(
        plain, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=0)
    )
    client.update_collection(plain, hnsw_config=models.HnswConfigDiff(m=32))
    config = client.get_collection(plain).config
    assert config.optimizer_config is not None
    assert config.optimizer_config.indexing_threshold == 0
    assert (config.hnsw_config.m, config.hnsw_config.ef_construct) == (32, 100)


@pytest.mark.parametrize("size", [0, 65537])
def test_impossible_dimension_is_refused(
    qdrant: QdrantTarget, client: QdrantClient, size: int
) -> None:
    name = qdrant.new_collection_name()
    code, text = _refused(lambda: client.create_collection(name, vectors_config=_dense(size)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "size" in text
    assert not client.collection_exists(name)


def test_collection_without_vectors(qdrant: QdrantTarget, client: QdrantClient) -> None:
    name = qdrant.new_collection_name("state")
    client.create_collection(name, vectors_config={})
    client.upsert(name, [models.PointStruct(id=UUIDS[0], vector={}, payload={"a": 1})])
    [record] = client.retrieve(name, [UUIDS[0]], with_vectors=True)
    assert record.payload == {"a": 1}
    assert record.vector == {}
    assert client.get_collection(name).config.params.vectors in ({}, None)


# Aliases


def _alias(name: str, alias: str) -> models.CreateAliasOperation:
    return models.CreateAliasOperation(
        create_alias=models.CreateAlias(collection_name=name, alias_name=alias)
    )


def test_alias_resolves_for_reads_and_writes_and_can_be_swapped(
    qdrant: QdrantTarget, client: QdrantClient
) -> None:
    old, new, alias = (qdrant.new_collection_name() for _ in range(3))
    for name in (old, new):
        client.create_collection(name, vectors_config=_dense(4))
    client.update_collection_aliases([_alias(old, alias)])
    client.upsert(alias, [_point(1)])
    assert client.count(old).count == 1
    assert client.collection_exists(alias)
    assert client.get_collection(alias).points_count == 1
    client.update_collection_aliases([_alias(new, alias)])
    assert client.count(alias).count == 0
    assert [a.alias_name for a in client.get_collection_aliases(new).aliases] == [alias]
    assert client.get_collection_aliases(old).aliases == []
    pairs = {(a.alias_name, a.collection_name) for a in client.get_aliases().aliases}
    assert (alias, new) in pairs


def test_alias_of_a_missing_collection_is_not_found(
    qdrant: QdrantTarget, client: QdrantClient
) -> None:
    operation = _alias(qdrant.new_collection_name(), qdrant.new_collection_name())
    code, _ = _refused(lambda: client.update_collection_aliases([operation]))
    assert code is grpc.StatusCode.NOT_FOUND


def test_alias_named_as_a_collection_is_refused(client: QdrantClient, plain: str) -> None:
    code, _ = _refused(lambda: client.update_collection_aliases([_alias(plain, plain)]))
    assert code is grpc.StatusCode.ALREADY_EXISTS


def test_rename_and_delete_alias(qdrant: QdrantTarget, client: QdrantClient, plain: str) -> None:
    one, two = qdrant.new_collection_name(), qdrant.new_collection_name()
    rename = models.RenameAlias(old_alias_name=one, new_alias_name=two)
    client.update_collection_aliases(
        [_alias(plain, one), models.RenameAliasOperation(rename_alias=rename)]
    )
    assert [a.alias_name for a in client.get_collection_aliases(plain).aliases] == [two]
    delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=two))
    client.update_collection_aliases([delete])
    assert not client.collection_exists(two)


def test_deleting_a_collection_removes_its_aliases(
    qdrant: QdrantTarget, client: QdrantClient, plain: str
) -> None:
    alias = qdrant.new_collection_name()
    client.update_collection_aliases([_alias(plain, alias)])
    client.delete_collection(plain)
    assert alias not in {a.alias_name for a in client.get_aliases().aliases}


# Ids, payloads, vectors


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, UUIDS[0], str(uuid.uuid4())])
def test_ids_come_back(client: QdrantClient, plain: str, key: int | str) -> None:
    client.upsert(plain, [_point(key)])
    assert _ids(client, plain) == [key]
    client.delete(plain, points_selector=[key])
    assert _ids(client, plain) == []


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("text", ["", "1", "not-a-uuid", UUIDS[0] + "0", UUIDS[0][:-1] + "g"])
def test_bad_uuid_is_refused_at_once(
    client: QdrantClient, plain: str, text: str, wait: bool
) -> None:
    point = q.PointStruct(id=q.PointId(uuid=text), vectors=_wire([1.0] * 4))
    request = q.UpsertPoints(collection_name=plain, wait=wait, points=[point])
    code, details = _refused(lambda: client.grpc_points.Upsert(request, timeout=10))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "Unable to parse UUID" in details


@pytest.mark.parametrize("form", [UUIDS[3].replace("-", ""), f"{{{UUIDS[3]}}}", UUIDS[3].upper()])
def test_other_forms_of_a_uuid_are_the_same_id(client: QdrantClient, plain: str, form: str) -> None:
    point = q.PointStruct(id=q.PointId(uuid=form), vectors=_wire([1.0] * 4))
    request = q.UpsertPoints(collection_name=plain, wait=True, points=[point])
    client.grpc_points.Upsert(request, timeout=10)
    assert _ids(client, plain) == [UUIDS[3]]


def test_payload_values_keep_their_types(client: QdrantClient, plain: str) -> None:
    payload = {
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
    client.upsert(plain, [_point(1, payload)])
    stored = _payload(client, plain, 1)
    assert stored == payload
    assert stored is not None
    assert [type(stored[key]) for key in ("int", "float", "bool")] == [int, float, bool]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wait", [True, False])
def test_payload_without_json_form_is_refused_whole(
    client: QdrantClient, plain: str, value: float, wait: bool
) -> None:
    points = [_point(1), _point(2, {"a": [{"b": value}]})]
    code, text = _refused(lambda: client.upsert(plain, points, wait=wait))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot convert to json number" in text
    assert _ids(client, plain) == []


def test_all_kinds_of_vectors_come_back(client: QdrantClient, rich: str) -> None:
    vectors: dict[str, Any] = {
        "dense": [0.5, -2.0],
        "half": [1.0009765625, 65504.0],
        "bits": [0.0, 1.0, 255.0],
        "multi": [[1.0, 2.0], [3.0, 4.0]],
        "sparse": models.SparseVector(indices=[7, 4294967295, 0], values=[1.0, 2.0, 0.0]),
    }
    client.upsert(rich, [models.PointStruct(id=1, vector=vectors)])
    stored = _vectors(client, rich, 1)
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
    assert _vectors(client, rich, 1) == {"dense": [1.0, 2.0]}
    assert _vectors(client, rich, 2) == {}
    has = models.Filter(must=[models.HasVectorCondition(has_vector="dense")])
    assert _ids(client, rich, has) == [1]


def test_cosine_normalises_and_keeps_zero(qdrant: QdrantTarget, client: QdrantClient) -> None:
    name = qdrant.new_collection_name()
    params = models.VectorParams(size=2, distance=models.Distance.COSINE)
    client.create_collection(name, vectors_config=params)
    points = [
        models.PointStruct(id=1, vector=[3.0, 4.0]),
        models.PointStruct(id=2, vector=[0.0, 0.0]),
    ]
    client.upsert(name, points)
    assert _vectors(client, name, 1) == pytest.approx([0.6, 0.8])
    assert _vectors(client, name, 2) == [0.0, 0.0]


def _wire(data: list[float]) -> q.Vectors:
    return q.Vectors(vector=q.Vector(dense=q.DenseVector(data=data)))


def _put(client: QdrantClient, name: str, vectors: q.Vectors) -> None:
    point = q.PointStruct(id=q.PointId(num=1), vectors=vectors)
    request = q.UpsertPoints(collection_name=name, wait=True, points=[point])
    client.grpc_points.Upsert(request, timeout=10)


def test_old_wire_form_of_vectors(client: QdrantClient, plain: str, rich: str) -> None:
    _put(client, plain, q.Vectors(vector=q.Vector(data=[1.0, 2.0, 3.0, 4.0])))
    assert _vectors(client, plain, 1) == [1.0, 2.0, 3.0, 4.0]
    named = {
        "dense": q.Vector(data=[1.0, 2.0]),
        "multi": q.Vector(data=[1.0, 2.0, 3.0, 4.0], vectors_count=2),
        "sparse": q.Vector(data=[0.5], indices=q.SparseIndices(data=[9])),
    }
    _put(client, rich, q.Vectors(vectors=q.NamedVectors(vectors=named)))
    assert _vectors(client, rich, 1) == {
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
    code, details = _refused(lambda: _put(client, rich, vectors))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in details
    assert _ids(client, rich) == []


def test_point_without_id_or_vectors_is_refused(client: QdrantClient, plain: str) -> None:
    for point in (
        q.PointStruct(vectors=_wire([1.0] * 4)),
        q.PointStruct(id=q.PointId(num=1)),
    ):
        request = q.UpsertPoints(collection_name=plain, wait=True, points=[point])
        code, _ = _refused(lambda r=request: client.grpc_points.Upsert(r, timeout=10))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


# Writes


def test_upsert_replaces_the_whole_point(client: QdrantClient, rich: str) -> None:
    both = {"dense": [1.0, 2.0], "bits": [1.0, 0.0, 1.0]}
    client.upsert(rich, [models.PointStruct(id=1, vector=both, payload={"a": 1, "b": 2})])
    result = client.upsert(
        rich, [models.PointStruct(id=1, vector={"bits": [0.0, 0.0, 1.0]}, payload={"b": 3})]
    )
    assert result.status is models.UpdateStatus.COMPLETED
    assert _vectors(client, rich, 1) == {"bits": [0.0, 0.0, 1.0]}
    assert _payload(client, rich, 1) == {"b": 3}
    client.upsert(rich, [models.PointStruct(id=1, vector=both)])
    assert _payload(client, rich, 1) == {}


def test_last_of_duplicates_in_one_call_wins(client: QdrantClient, plain: str) -> None:
    points = [_point(1, {"n": number}) for number in range(100)]
    client.upsert(plain, points)
    assert _payload(client, plain, 1) == {"n": 99}
    assert client.count(plain).count == 1


def test_delete_ignores_missing_ids(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(1), _point(2)])
    result = client.delete(plain, points_selector=[1, 99, UUIDS[0]])
    assert result.status is models.UpdateStatus.COMPLETED
    assert _ids(client, plain) == [2]


def test_delete_by_filter(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(n, {"n": n}) for n in range(10)])
    condition = models.FieldCondition(key="n", range=models.Range(gte=3))
    client.delete(plain, points_selector=models.Filter(must=[condition]))
    assert _ids(client, plain) == [0, 1, 2]
    client.delete(plain, points_selector=models.Filter())
    assert _ids(client, plain) == []


def test_set_payload_merges_and_null_removes(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(1, {"a": 1, "b": {"x": 1}, "c": 3})])
    client.set_payload(plain, {"b": {"y": 2}, "c": None, "d": 4}, points=[1])
    assert _payload(client, plain, 1) == {"a": 1, "b": {"y": 2}, "d": 4}
    client.set_payload(plain, {"z": 5}, points=[1], key="b")
    assert _payload(client, plain, 1) == {"a": 1, "b": {"y": 2, "z": 5}, "d": 4}
    assert _vectors(client, plain, 1) == [1.0, 2.0, 3.0, 4.0]


def test_overwrite_payload_replaces_and_keeps_nulls(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(1, {"a": 1, "b": 2})])
    client.overwrite_payload(plain, {"b": None, "c": [None]}, points=[1])
    assert _payload(client, plain, 1) == {"b": None, "c": [None]}
    assert _vectors(client, plain, 1) == [1.0, 2.0, 3.0, 4.0]


def test_delete_and_clear_payload(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(1, {"a": 1, "b": 2}), _point(2, {"a": 1})])
    client.delete_payload(plain, ["a", "missing"], points=[1])
    assert _payload(client, plain, 1) == {"b": 2}
    client.clear_payload(plain, points_selector=[1])
    assert _payload(client, plain, 1) == {}
    assert _payload(client, plain, 2) == {"a": 1}


def test_payload_operations_by_filter(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(n, {"n": n}) for n in range(4)])
    odd = models.Filter(must=[models.FieldCondition(key="n", match=models.MatchAny(any=[1, 3]))])
    client.set_payload(plain, {"odd": True}, points=odd)
    client.delete_payload(plain, ["n"], points=odd)
    assert [_payload(client, plain, n) for n in range(4)] == [
        {"n": 0},
        {"odd": True},
        {"n": 2},
        {"odd": True},
    ]


def test_update_and_delete_vectors(client: QdrantClient, rich: str) -> None:
    both = {"dense": [1.0, 2.0], "bits": [1.0, 0.0, 1.0]}
    client.upsert(rich, [models.PointStruct(id=1, vector=both, payload={"a": 1})])
    client.update_vectors(rich, [models.PointVectors(id=1, vector={"dense": [9.0, 9.0]})])
    assert _vectors(client, rich, 1) == {"dense": [9.0, 9.0], "bits": [1.0, 0.0, 1.0]}
    client.delete_vectors(rich, ["dense"], points=[1, 99])
    assert _vectors(client, rich, 1) == {"bits": [1.0, 0.0, 1.0]}
    assert _payload(client, rich, 1) == {"a": 1}


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
    ],
)
def test_partial_update_of_a_missing_point_is_not_found(
    client: QdrantClient, plain: str, call: Callable[[QdrantClient, str], object]
) -> None:
    code, text = _refused(lambda: call(client, plain))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "No point with id 99 found" in text


def test_partial_update_with_a_missing_id_is_applied_in_part(
    client: QdrantClient, plain: str
) -> None:
    """Ids go in chunks of 32: the chunk with the missing one is applied to those present, later ones are not."""
    client.upsert(plain, [_point(n, {}) for n in range(1, 41)])
    ids = [999, *range(1, 41)]
    code, text = _refused(lambda: client.set_payload(plain, {"done": 1}, points=ids))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "999" in text
    done = [n for n in range(1, 41) if _payload(client, plain, n) == {"done": 1}]
    assert done == list(range(1, 32))


def test_batch_runs_in_order_and_stops_at_the_first_error(client: QdrantClient, plain: str) -> None:
    operations = [
        models.UpsertOperation(
            upsert=models.PointsList(points=[_point(1, {"n": 1}), _point(2, {"n": 2})])
        ),
        models.DeleteOperation(delete=models.PointIdsList(points=[1])),
        models.SetPayloadOperation(set_payload=models.SetPayload(payload={"m": 1}, points=[2])),
        models.OverwritePayloadOperation(
            overwrite_payload=models.SetPayload(payload={"k": None}, points=[2])
        ),
    ]
    results = client.batch_update_points(plain, operations)
    assert [result.status for result in results] == [models.UpdateStatus.COMPLETED] * 4
    assert _ids(client, plain) == [2]
    assert _payload(client, plain, 2) == {"k": None}
    operations = [
        models.UpsertOperation(upsert=models.PointsList(points=[_point(3)])),
        models.ClearPayloadOperation(clear_payload=models.PointIdsList(points=[99])),
        models.UpsertOperation(upsert=models.PointsList(points=[_point(4)])),
    ]
    code, _ = _refused(lambda: client.batch_update_points(plain, operations))
    assert code is grpc.StatusCode.NOT_FOUND
    assert _ids(client, plain) == [2, 3]


def test_empty_batch_is_refused(client: QdrantClient, plain: str) -> None:
    request = q.UpdateBatchPoints(collection_name=plain, wait=True)
    code, _ = _refused(lambda: client.grpc_points.UpdateBatch(request, timeout=10))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_unwaited_writes_are_acknowledged_and_ordered(client: QdrantClient, plain: str) -> None:
    for number in range(20):
        result = client.upsert(plain, [_point(1, {"n": number})], wait=False)
        assert result.status is models.UpdateStatus.ACKNOWLEDGED
    client.delete(plain, points_selector=[99], wait=True)  # a barrier
    assert _payload(client, plain, 1) == {"n": 19}


def test_unwaited_errors_are_swallowed(client: QdrantClient, plain: str) -> None:
    client.set_payload(plain, {"a": 1}, points=[99], wait=False)
    client.upsert(plain, [_point(1, {"n": 1})], wait=True)
    assert _ids(client, plain) == [1]


# Reads


def test_scroll_pages_by_id(client: QdrantClient, plain: str) -> None:
    keys: list[int | str] = [5, 1, 2**64 - 1, 3, UUIDS[1], UUIDS[0]]
    client.upsert(plain, [_point(key, {"k": str(key), "x": 1}) for key in keys])
    seen: list[Any] = []
    offset: Any = None
    while True:
        page, offset = client.scroll(plain, limit=4, offset=offset, with_payload=["k"])
        assert all(record.payload == {"k": str(record.id)} for record in page)
        seen += [record.id for record in page]
        if offset is None:
            break
    assert seen == [1, 3, 5, 2**64 - 1, UUIDS[0], UUIDS[1]]


def test_scroll_selects_payload_and_vectors(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(1, {"a": 1, "b": 2})])
    [bare], _ = client.scroll(plain, with_payload=False)
    assert (bare.payload, bare.vector) == ({}, None)
    [full], _ = client.scroll(plain, with_payload=True, with_vectors=True)
    assert (full.payload, full.vector) == ({"a": 1, "b": 2}, [1.0, 2.0, 3.0, 4.0])
    selector = models.PayloadSelectorExclude(exclude=["a"])
    [part], _ = client.scroll(plain, with_payload=selector)
    assert part.payload == {"b": 2}


def test_retrieve_leaves_out_missing_ids(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(key) for key in (1, 2, UUIDS[0])])
    found = client.retrieve(plain, [99, UUIDS[0], 1])
    assert {record.id for record in found} == {UUIDS[0], 1}


def test_count_exact_with_filter(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(n, {"n": n}) for n in range(50)])
    condition = models.FieldCondition(key="n", range=models.Range(lt=20))
    assert client.count(plain, exact=True).count == 50
    assert client.count(plain, count_filter=models.Filter(must=[condition])).count == 20


def test_query_nearest_with_filter_and_vectors(client: QdrantClient, rich: str) -> None:
    points = [
        models.PointStruct(
            id=n,
            vector={
                "dense": [float(n), 0.0],
                "sparse": models.SparseVector(indices=[1], values=[float(n)]),
                "multi": [[float(n), 0.0]],
            },
            payload={"n": n},
        )
        for n in range(1, 6)
    ]
    client.upsert(rich, points)
    small = models.Filter(must=[models.FieldCondition(key="n", range=models.Range(lte=4))])
    hits = client.query_points(
        rich,
        query=[1.0, 0.0],
        using="dense",
        query_filter=small,
        limit=2,
        with_payload=True,
        with_vectors=["dense"],
    ).points
    assert [(hit.id, hit.score, hit.payload, hit.vector) for hit in hits] == [
        (4, 4.0, {"n": 4}, {"dense": [4.0, 0.0]}),
        (3, 3.0, {"n": 3}, {"dense": [3.0, 0.0]}),
    ]
    sparse = models.SparseVector(indices=[1], values=[1.0])
    hits = client.query_points(rich, query=sparse, using="sparse", limit=1).points
    assert [hit.id for hit in hits] == [5]
    hits = client.query_points(rich, query=[[1.0, 0.0]], using="multi", limit=1).points
    assert [hit.id for hit in hits] == [5]
    hits = client.query_points(rich, query=1, using="dense", limit=5).points
    assert [hit.id for hit in hits] == [5, 4, 3, 2]


def test_search_call(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [_point(1), _point(2)])
    request = q.SearchPoints(collection_name=plain, vector=[1.0, 0.0, 0.0, 0.0], limit=5)
    response = client.grpc_points.Search(request, timeout=10)
    assert {point.id.num for point in response.result} == {1, 2}
    assert [point.score for point in response.result] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("vector", "using", "text"),
    [([1.0], "dense", "dimension"), ([1.0, 2.0], "other", "Not existing vector name")],
)
def test_query_that_does_not_fit_is_refused(
    client: QdrantClient, rich: str, vector: list[float], using: str, text: str
) -> None:
    code, details = _refused(lambda: client.query_points(rich, query=vector, using=using))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in details


# Filters


DOCUMENTS: dict[int, dict[str, Any]] = {
    1: {"word": "red", "n": 1, "flag": True, "at": "2026-01-01T00:00:00Z", "tags": ["a", "b"]},
    2: {"word": "blue", "n": 2, "flag": False, "at": "2026-06-01 10:00:00.5+02", "tags": []},
    3: {"word": "red", "n": 2.5, "where": {"lon": 13.4, "lat": 52.5}, "tags": ["c"]},
    4: {"word": None, "items": [{"k": 1, "v": "x"}, {"k": 2, "v": "y"}]},
    5: {"items": [{"k": 1, "v": "y"}], "word": "green"},
}


def _field(key: str, **condition: Any) -> models.FieldCondition:
    return models.FieldCondition(key=key, **condition)


def _must(*conditions: Any) -> models.Filter:
    return models.Filter(must=list(conditions))


FILTERS: list[tuple[models.Filter, list[int]]] = [
    (_must(_field("word", match=models.MatchValue(value="red"))), [1, 3]),
    (_must(_field("n", match=models.MatchValue(value=2))), [2]),
    (_must(_field("flag", match=models.MatchValue(value=False))), [2]),
    (_must(_field("word", match=models.MatchAny(any=["blue", "green"]))), [2, 5]),
    (_must(_field("word", match=models.MatchExcept(**{"except": ["red"]}))), [2, 5]),
    (_must(_field("n", range=models.Range(gt=1, lte=2.5))), [2, 3]),
    (_must(_field("at", range=models.DatetimeRange(gte="2026-06-01T08:00:00Z"))), [2]),
    (_must(_field("at", range=models.DatetimeRange(lt="2026-02-01T00:00:00Z"))), [1]),
    (_must(models.IsNullCondition(is_null=models.PayloadField(key="word"))), [4]),
    (_must(models.IsEmptyCondition(is_empty=models.PayloadField(key="tags"))), [2, 4, 5]),
    (_must(models.HasIdCondition(has_id=[1, 5, 77])), [1, 5]),
    (_must(_field("tags", values_count=models.ValuesCount(gte=1))), [1, 3]),
    (_must(_field("tags", match=models.MatchValue(value="b"))), [1]),
    (
        _must(
            _field(
                "where",
                geo_radius=models.GeoRadius(
                    center=models.GeoPoint(lon=13.41, lat=52.51), radius=5000
                ),
            )
        ),
        [3],
    ),
    (
        _must(
            _field(
                "where",
                geo_bounding_box=models.GeoBoundingBox(
                    top_left=models.GeoPoint(lon=0, lat=1),
                    bottom_right=models.GeoPoint(lon=1, lat=0),
                ),
            )
        ),
        [],
    ),
    (
        _must(
            models.NestedCondition(
                nested=models.Nested(
                    key="items",
                    filter=_must(
                        _field("k", match=models.MatchValue(value=1)),
                        _field("v", match=models.MatchValue(value="y")),
                    ),
                )
            )
        ),
        [5],
    ),
    (models.Filter(must_not=[_field("word", match=models.MatchValue(value="red"))]), [2, 4, 5]),
    (
        models.Filter(
            should=[
                _field("n", match=models.MatchValue(value=1)),
                _must(_field("word", match=models.MatchValue(value="green"))),
            ]
        ),
        [1, 5],
    ),
    (
        models.Filter(
            min_should=models.MinShould(
                conditions=[
                    _field("word", match=models.MatchValue(value="red")),
                    _field("n", range=models.Range(lt=2)),
                    _field("flag", match=models.MatchValue(value=True)),
                ],
                min_count=2,
            )
        ),
        [1],
    ),
    (models.Filter(), [1, 2, 3, 4, 5]),
]


@pytest.mark.parametrize("indexed", [False, True])
def test_filters(client: QdrantClient, plain: str, indexed: bool) -> None:
    if indexed:
        for key, schema in (("word", "keyword"), ("n", "float"), ("at", "datetime")):
            client.create_payload_index(plain, key, schema)
    client.upsert(plain, [_point(key, payload) for key, payload in DOCUMENTS.items()])
    for condition, expected in FILTERS:
        assert _ids(client, plain, condition) == expected, condition


def test_text_match(client: QdrantClient, plain: str) -> None:
    client.create_payload_index(plain, "t", "text")
    client.upsert(plain, [_point(1, {"t": "the quick fox"}), _point(2, {"t": "slow"})])
    condition = _must(_field("t", match=models.MatchText(text="Quick")))
    assert _ids(client, plain, condition) == [1]


def test_condition_without_content_is_refused(client: QdrantClient, plain: str) -> None:
    for condition in (q.Condition(), q.Condition(field=q.FieldCondition(key="a"))):
        request = q.CountPoints(collection_name=plain, filter=q.Filter(must=[condition]))
        code, _ = _refused(lambda r=request: client.grpc_points.Count(r, timeout=10))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


# Payload indexes


INDEXES = ["keyword", "integer", "float", "bool", "geo", "datetime", "text", "uuid"]


def test_payload_indexes_are_reported_and_dropped(client: QdrantClient, plain: str) -> None:
    for schema in INDEXES:
        client.create_payload_index(plain, f"f_{schema}", schema)
    reported = client.get_collection(plain).payload_schema
    assert {key: info.data_type for key, info in reported.items()} == {
        f"f_{schema}": models.PayloadSchemaType(schema) for schema in INDEXES
    }
    client.delete_payload_index(plain, "f_text")
    assert "f_text" not in client.get_collection(plain).payload_schema


def test_payload_index_parameters_are_reported(client: QdrantClient, plain: str) -> None:
    tenant = models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
    client.create_payload_index(plain, "tenant", tenant)
    info = client.get_collection(plain).payload_schema["tenant"]
    assert isinstance(info.params, models.KeywordIndexParams)
    assert info.params.is_tenant is True


def test_scroll_ordered_by_a_payload_key(client: QdrantClient, plain: str) -> None:
    client.create_payload_index(plain, "n", "integer")
    client.upsert(plain, [_point(n, {"n": -n}) for n in range(5)])
    page, offset = client.scroll(plain, order_by="n", limit=3)
    assert [record.id for record in page] == [4, 3, 2]
    assert offset is None
    descending = models.OrderBy(key="n", direction=models.Direction.DESC, start_from=-2)
    page, _ = client.scroll(plain, order_by=descending)
    assert [record.id for record in page] == [2, 3, 4]
