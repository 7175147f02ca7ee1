"""Read requests of Qdrant's Points service, answered by the embedded engine."""

from __future__ import annotations

from typing import cast

import qdrant_edge as edge
from qdrant_client import grpc as q

from tests.support.qdrant_convert import (
    EngineVector,
    payload_selector,
    point_id,
    point_key,
    retrieved,
    scored,
    vectors_selector,
)
from tests.support.qdrant_filters import optional_filter
from tests.support.qdrant_status import invalid, not_found, validation, wrong_input
from tests.support.qdrant_storage import Collection

_SCROLL_LIMIT = 10
_QUERY_LIMIT = 10


def get(collection: Collection, request: q.GetPoints) -> list[q.RetrievedPoint]:
    """The points that exist, in the order asked for; payload by default, vectors not."""
    keys = cast("list[edge.PointId]", [point_key(item) for item in request.ids])
    records = collection.shard.retrieve(
        keys,
        payload_selector(request.with_payload, default=True),
        vectors_selector(request.with_vectors),
    )
    return retrieved(records)


def count(collection: Collection, request: q.CountPoints) -> int:
    exact = request.exact if request.HasField("exact") else True
    condition = optional_filter(request.HasField("filter"), request.filter)
    return collection.shard.count(edge.CountRequest(exact=exact, filter=condition))


def _order_by(message: q.OrderBy) -> edge.OrderBy:
    start: int | float | str | None = None
    kind = message.start_from.WhichOneof("value")
    if kind == "timestamp":
        start = message.start_from.timestamp.ToJsonString()
    elif kind is not None:
        start = getattr(message.start_from, kind)
    descending = message.HasField("direction") and message.direction == q.Desc
    direction = edge.Direction.Desc if descending else edge.Direction.Asc
    return edge.OrderBy(message.key, direction, start)


def scroll(
    collection: Collection, request: q.ScrollPoints
) -> tuple[list[q.RetrievedPoint], q.PointId | None]:
    """A page of points by id (or by the order asked for) and the id the next page starts with."""
    limit = request.limit if request.HasField("limit") else _SCROLL_LIMIT
    if limit == 0:
        raise validation("limit", "value 0 invalid, must be 1 or larger")
    ordered = request.HasField("order_by")
    if ordered and request.HasField("offset"):
        raise wrong_input(
            "Cannot use an `offset` when using `order_by`. The alternative for paging is to use "
            "`order_by.start_from` and a filter to exclude the IDs that you've already seen for "
            "the `order_by.start_from` value"
        )
    offset = point_key(request.offset) if request.HasField("offset") else None
    records, following = collection.shard.scroll(
        edge.ScrollRequest(
            offset=cast("edge.PointId | None", offset),
            limit=limit,
            filter=optional_filter(request.HasField("filter"), request.filter),
            with_payload=payload_selector(request.with_payload, default=True),
            with_vector=vectors_selector(request.with_vectors),
            order_by=_order_by(request.order_by) if ordered else None,
        )
    )
    return retrieved(records), None if following is None else point_id(following)


def _search_params(message: q.SearchParams) -> edge.SearchParams:
    return edge.SearchParams(
        hnsw_ef=message.hnsw_ef if message.HasField("hnsw_ef") else None,
        exact=message.exact,
        indexed_only=message.indexed_only,
    )


def _stored_vector(collection: Collection, key: q.PointId, using: str) -> EngineVector:
    records = collection.shard.retrieve([point_key(key)], False, True)
    if not records:
        raise not_found(f"No point with id {point_key(key)} found")
    vectors = records[0].vector
    named = vectors if isinstance(vectors, dict) else {"": vectors}
    if named.get(using) is None:
        raise not_found(f"Vector with name `{using}` for point with id {point_key(key)} not found")
    return cast("EngineVector", named[using])


def _nearest(collection: Collection, vector: q.VectorInput, using: str) -> EngineVector:
    kind = vector.WhichOneof("variant")
    if kind == "id":
        return _stored_vector(collection, vector.id, using)
    if kind == "dense":
        return list(vector.dense.data)
    if kind == "sparse":
        return edge.SparseVector(list(vector.sparse.indices), list(vector.sparse.values))
    if kind == "multi_dense":
        return [list(row.data) for row in vector.multi_dense.vectors]
    raise invalid("Only vectors and ids can be queried for here")


def query(collection: Collection, request: q.QueryPoints) -> list[q.ScoredPoint]:
    """Nearest neighbours, an order by a payload key, or (without a query) points by id. No
    prefetches, no fusion.
    """
    using = request.using if request.HasField("using") else ""
    kind = request.query.WhichOneof("variant") if request.HasField("query") else None
    if request.prefetch or kind not in (None, "nearest", "order_by"):
        raise invalid(f"Query variant {kind} is not available here")
    scoring: edge.Query | edge.OrderBy | None = None
    condition = optional_filter(request.HasField("filter"), request.filter)
    if kind == "order_by":
        scoring = _order_by(request.query.order_by)
    elif kind == "nearest":
        vector = _nearest(collection, request.query.nearest, using)
        scoring = edge.Query.Nearest(vector, using or None)
        if request.query.nearest.HasField("id"):
            itself = edge.HasIdCondition({point_key(request.query.nearest.id)})
            condition = edge.Filter(must=[condition] if condition else None, must_not=[itself])
    return _run(
        collection,
        edge.QueryRequest(
            limit=request.limit if request.HasField("limit") else _QUERY_LIMIT,
            offset=request.offset if request.HasField("offset") else None,
            query=scoring,
            with_vector=vectors_selector(request.with_vectors),
            with_payload=payload_selector(request.with_payload, default=False),
            filter=condition,
            score_threshold=request.score_threshold
            if request.HasField("score_threshold")
            else None,
            params=_search_params(request.params),
        ),
    )


def search(collection: Collection, request: q.SearchPoints) -> list[q.ScoredPoint]:
    """Nearest neighbours, the older call."""
    if request.limit == 0:
        raise validation("limit", "value 0 invalid, must be 1 or larger")
    vector: EngineVector = list(request.vector)
    if request.HasField("sparse_indices"):
        vector = edge.SparseVector(list(request.sparse_indices.data), list(request.vector))
    using = request.vector_name if request.HasField("vector_name") else ""
    return _run(
        collection,
        edge.QueryRequest(
            limit=request.limit,
            offset=request.offset if request.HasField("offset") else None,
            query=edge.Query.Nearest(vector, using or None),
            with_vector=vectors_selector(request.with_vectors),
            with_payload=payload_selector(request.with_payload, default=False),
            filter=optional_filter(request.HasField("filter"), request.filter),
            score_threshold=request.score_threshold
            if request.HasField("score_threshold")
            else None,
            params=_search_params(request.params),
        ),
    )


def _run(collection: Collection, request: edge.QueryRequest) -> list[q.ScoredPoint]:
    return scored(collection.shard.query(request))
