"""What the project relies on when it reads from a Qdrant server: reads, filters, payload indexes.

See test_qdrant_server.py, which has the writes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import grpc
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as q

from tests.support.qdrant_cases import (
    UUIDS,
    ids_of,
    point,
    refused,
)

# Reads


def test_scroll_pages_by_id(client: QdrantClient, plain: str) -> None:
    keys: list[int | str] = [5, 1, 2**64 - 1, 3, UUIDS[1], UUIDS[0]]
    client.upsert(plain, [point(key, {"k": str(key), "x": 1}) for key in keys])
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
    client.upsert(plain, [point(1, {"a": 1, "b": 2})])
    [bare], _ = client.scroll(plain, with_payload=False)
    assert (bare.payload, bare.vector) == ({}, None)
    [full], _ = client.scroll(plain, with_payload=True, with_vectors=True)
    assert (full.payload, full.vector) == ({"a": 1, "b": 2}, [1.0, 2.0, 3.0, 4.0])
    selector = models.PayloadSelectorExclude(exclude=["a"])
    [part], _ = client.scroll(plain, with_payload=selector)
    assert part.payload == {"b": 2}


def test_retrieve_leaves_out_missing_ids(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [point(key) for key in (1, 2, UUIDS[0])])
    found = client.retrieve(plain, [99, UUIDS[0], 1])
    assert {record.id for record in found} == {UUIDS[0], 1}


def test_count_exact_with_filter(client: QdrantClient, plain: str) -> None:
    client.upsert(plain, [point(n, {"n": n}) for n in range(50)])
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
    client.upsert(plain, [point(1), point(2)])
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
    code, details = refused(lambda: client.query_points(rich, query=vector, using=using))
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
        for key, schema in (
            ("word", models.PayloadSchemaType.KEYWORD),
            ("n", models.PayloadSchemaType.FLOAT),
            ("at", models.PayloadSchemaType.DATETIME),
        ):
            client.create_payload_index(plain, key, schema)
    client.upsert(plain, [point(key, payload) for key, payload in DOCUMENTS.items()])
    for condition, expected in FILTERS:
        assert ids_of(client, plain, condition) == expected, condition


def test_text_match(client: QdrantClient, plain: str) -> None:
    client.create_payload_index(plain, "t", models.PayloadSchemaType.TEXT)
    client.upsert(plain, [point(1, {"t": "the quick fox"}), point(2, {"t": "slow"})])
    condition = _must(_field("t", match=models.MatchText(text="Quick")))
    assert ids_of(client, plain, condition) == [1]


def test_condition_without_content_is_refused(client: QdrantClient, plain: str) -> None:
    for condition in (q.Condition(), q.Condition(field=q.FieldCondition(key="a"))):
        request = q.CountPoints(collection_name=plain, filter=q.Filter(must=[condition]))
        code, _ = refused(partial(client.grpc_points.Count, request, timeout=10))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


# Payload indexes


def test_payload_indexes_are_reported_and_dropped(client: QdrantClient, plain: str) -> None:
    for schema in models.PayloadSchemaType:
        client.create_payload_index(plain, f"f_{schema.value}", schema)
    reported = client.get_collection(plain).payload_schema
    assert {key: info.data_type for key, info in reported.items()} == {
        f"f_{schema.value}": schema for schema in models.PayloadSchemaType
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
    client.create_payload_index(plain, "n", models.PayloadSchemaType.INTEGER)
    client.upsert(plain, [point(n, {"n": -n}) for n in range(5)])
    page, offset = client.scroll(plain, order_by="n", limit=3)
    assert [record.id for record in page] == [4, 3, 2]
    assert offset is None
    descending = models.OrderBy(key="n", direction=models.Direction.DESC, start_from=-2)
    page, _ = client.scroll(plain, order_by=descending)
    assert [record.id for record in page] == [2, 3, 4]
