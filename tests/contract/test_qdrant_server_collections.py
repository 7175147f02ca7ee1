"""What the project relies on in a Qdrant server about collections and aliases.

See test_qdrant_server.py, which has the writes.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from qdrant_client import QdrantClient, models

from tests.support.fix_qdrant import QdrantTarget
from tests.support.qdrant_cases import (
    UUIDS,
    dense,
    point,
    refused,
)


def test_health_check_tells_the_version(qdrant: QdrantTarget, client: QdrantClient) -> None:
    reply = client.info()
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
            "b": dense(
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
    client.create_collection(name, vectors_config=dense(2))
    assert client.collection_exists(name)
    assert name in {collection.name for collection in client.get_collections().collections}
    assert client.delete_collection(name) is True
    assert client.delete_collection(name) is False
    assert not client.collection_exists(name)


def test_creating_twice_is_already_exists(client: QdrantClient, plain: str) -> None:
    code, text = refused(lambda: client.create_collection(plain, vectors_config=dense(4)))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert f"Collection `{plain}` already exists!" in text


@pytest.mark.parametrize(
    "call",
    [
        lambda client, name: client.get_collection(name),
        lambda client, name: client.upsert(name, [point(1)]),
        lambda client, name: client.upsert(name, [point(1)], wait=False),
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
    code, text = refused(lambda: call(client, name))
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
    code, text = refused(lambda: client.create_collection(name, vectors_config=dense(size)))
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
        client.create_collection(name, vectors_config=dense(4))
    client.update_collection_aliases([_alias(old, alias)])
    client.upsert(alias, [point(1)])
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
    code, _ = refused(lambda: client.update_collection_aliases([operation]))
    assert code is grpc.StatusCode.NOT_FOUND


def test_alias_named_as_a_collection_is_refused(client: QdrantClient, plain: str) -> None:
    code, _ = refused(lambda: client.update_collection_aliases([_alias(plain, plain)]))
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
