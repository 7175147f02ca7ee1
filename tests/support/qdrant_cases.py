"""Small collections, points and look-ups that the tests of the Qdrant server share."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from qdrant_client import QdrantClient, models

from tests.support.qdrant_control import QdrantTarget

UUIDS = [str(uuid.UUID(int=number)) for number in range(1, 5)]


def dense(size: int, **others: Any) -> models.VectorParams:
    """Parameters of a dense vector compared by Dot, which stores values as they are."""
    return models.VectorParams(size=size, distance=models.Distance.DOT, **others)


def create_plain(target: QdrantTarget) -> str:
    """A new collection with one unnamed vector of 4 dimensions."""
    name = target.new_collection_name()
    target.client().create_collection(name, vectors_config=dense(4))
    return name


def create_rich(target: QdrantTarget) -> str:
    """A new collection with vectors `dense`, `half`, `bits`, `multi` and `sparse`."""
    name = target.new_collection_name()
    maximum = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    target.client().create_collection(
        name,
        vectors_config={
            "dense": dense(2),
            "half": dense(2, datatype=models.Datatype.FLOAT16),
            "bits": models.VectorParams(
                size=3, distance=models.Distance.MANHATTAN, datatype=models.Datatype.UINT8
            ),
            "multi": dense(2, multivector_config=maximum),
        },
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )
    return name


def point(key: int | str, payload: dict[str, Any] | None = None) -> models.PointStruct:
    """A point for a collection of :func:`create_plain`."""
    return models.PointStruct(id=key, vector=[1.0, 2.0, 3.0, 4.0], payload=payload)


def payload_of(client: QdrantClient, name: str, key: int | str) -> dict[str, Any] | None:
    [record] = client.retrieve(name, [key])
    return record.payload


def vectors_of(client: QdrantClient, name: str, key: int | str) -> Any:
    [record] = client.retrieve(name, [key], with_vectors=True)
    return record.vector


def ids_of(client: QdrantClient, name: str, condition: models.Filter | None = None) -> list[Any]:
    """The ids of up to 10,000 points, in the order of a scroll."""
    records, _ = client.scroll(name, scroll_filter=condition, limit=10_000, with_payload=False)
    return [record.id for record in records]


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Code and text of the error the call must end with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()
