"""Searching to compare: with a condition, exactly or through the index, and what the collection
says about its index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from google.protobuf.timestamp_pb2 import Timestamp
from qdrant_client import grpc as q
from qdrant_client.conversions.conversion import GrpcToRest

from cdc_sync.errors import ErrorKind, SinkError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant import conditions as c
from cdc_sync.qdrant import messages
from cdc_sync.qdrant.collections import Collections, FoundVector, found_vectors
from cdc_sync.qdrant.differences import by_name
from cdc_sync.qdrant.rpc import QUERY, Rpc
from cdc_sync.qdrant.sink import StoredVector
from cdc_sync.rows import PointId


@dataclass(frozen=True, slots=True)
class SearchFacts:
    """What a collection says of itself.

    ``points`` is exact, and of the table where several share the collection; ``indexed_vectors``
    counts all vectors of the collection that are in an index (HNSW, or that of sparse vectors),
    ``all_points`` all of its points. ``status`` is Qdrant's colour. ``hnsw`` and ``quantization``
    by vector name, by the REST API's names, as they are in effect ({}: none).
    """

    points: int
    all_points: int
    indexed_vectors: int
    status: str
    vectors: Mapping[str, FoundVector]
    hnsw: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    quantization: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


class Searcher(Protocol):
    """Searches the points of one table. Made by :meth:`cdc_sync.qdrant.sink.Sink.searcher`.

    Both methods raise :class:`SinkError` as writers do, COLLECTION_MISSING without a collection.
    """

    async def nearest(
        self,
        vector_name: str,
        vector: StoredVector,
        limit: int,
        condition: c.Condition | None = None,
        *,
        exact: bool = False,
    ) -> list[tuple[PointId, float]]:
        """The ``limit`` nearest points with Qdrant's score, best first."""
        ...

    async def facts(self) -> SearchFacts:
        """What the collection says of itself."""
        ...


def missing(collection: str) -> SinkError:
    """The error for a collection that is not there to be searched."""
    return SinkError(
        ErrorKind.COLLECTION_MISSING,
        f"Collection {collection} does not exist.",
        "Copy the table first (cdc-sync migrate or cdc-sync run).",
    )


def settings_in_effect(
    found: Mapping[str, object], part: str, names: Sequence[str]
) -> dict[str, dict[str, object]]:
    """The settings ``part`` of each vector: its own, and what it has from the collection.

    ``found`` has the collection's settings by the REST API's names, vectors by theirs.
    """
    whole = found.get(part)
    base = dict(whole) if isinstance(whole, Mapping) else {}
    vectors = found.get("vectors")
    effective: dict[str, dict[str, object]] = {}
    for name in names:
        params = vectors.get(name) if isinstance(vectors, Mapping) else None
        own = params.get(part) if isinstance(params, Mapping) else None
        given = own if isinstance(own, Mapping) else {}
        effective[name] = base | {key: value for key, value in given.items() if value is not None}
    return effective


class ServerSearcher:
    """A :class:`Searcher` on a server."""

    def __init__(self, rpc: Rpc, plan: TablePlan) -> None:
        self._rpc = rpc
        self._plan = plan
        self._target = f"collection {plan.collection}"
        self._marks = messages.table_filter(plan)

    async def nearest(
        self,
        vector_name: str,
        vector: StoredVector,
        limit: int,
        condition: c.Condition | None = None,
        *,
        exact: bool = False,
    ) -> list[tuple[PointId, float]]:
        """The ``limit`` nearest points with Qdrant's score, best first."""
        wanted = q.Filter()
        if self._marks is not None:
            wanted.MergeFrom(self._marks)
        if condition is not None:
            wanted.must.append(_condition(condition))
        request = q.QueryPoints(
            collection_name=self._plan.collection,
            query=q.Query(nearest=messages.vector_input(vector)),
            using=vector_name or None,
            filter=wanted if wanted.must else None,
            params=q.SearchParams(exact=exact),
            limit=limit,
            with_payload=q.WithPayloadSelector(enable=False),
        )
        answer = await self._rpc.request(QUERY, request.SerializeToString(), self._target)
        return [(messages.point_id_value(one.id), float(one.score)) for one in answer.result]

    async def facts(self) -> SearchFacts:
        """What the collection says of itself."""
        collections = Collections(self._rpc)
        info = await collections.info(self._plan.collection)
        if info is None:
            raise missing(self._plan.collection)
        rest = GrpcToRest.convert_collection_config(info.config)
        config = rest.model_dump(mode="json", exclude_none=True)
        found = by_name({**config.pop("params"), **config})
        vectors = found_vectors(info.config.params)
        count = await collections.count(self._plan.collection)
        own = count
        if self._marks is not None:
            own = await collections.count(self._plan.collection, self._marks)
        return SearchFacts(
            points=own,
            all_points=count,
            indexed_vectors=int(info.indexed_vectors_count),
            status=q.CollectionStatus.Name(info.status).lower(),
            vectors=vectors,
            hnsw=settings_in_effect(found, "hnsw_config", list(vectors)),
            quantization=settings_in_effect(found, "quantization_config", list(vectors)),
        )


# -- conditions as messages


def _condition(condition: c.Condition) -> q.Condition:
    match condition:
        case c.Match(path, value):
            return _field(q.FieldCondition(key=path, match=_match(value)))
        case c.MatchAny(path, values):
            return _field(q.FieldCondition(key=path, match=_match_any(values)))
        case c.NumberRange(path, gt, gte, lt, lte):
            bounds = q.Range(gt=gt, gte=gte, lt=lt, lte=lte)
            return _field(q.FieldCondition(key=path, range=bounds))
        case c.TimeRange():
            return _field(q.FieldCondition(key=condition.path, datetime_range=_times(condition)))
        case c.Empty(path):
            return q.Condition(is_empty=q.IsEmptyCondition(key=path))
        case c.Null(path):
            return q.Condition(is_null=q.IsNullCondition(key=path))
        case c.Every(parts):
            return q.Condition(filter=q.Filter(must=[_condition(part) for part in parts]))
        case c.Either(parts):
            return q.Condition(filter=q.Filter(should=[_condition(part) for part in parts]))
        case c.Negation(part):
            return q.Condition(filter=q.Filter(must_not=[_condition(part)]))


def _field(message: q.FieldCondition) -> q.Condition:
    return q.Condition(field=message)


def _match(value: str | int | bool) -> q.Match:
    if isinstance(value, bool):
        return q.Match(boolean=value)
    return q.Match(integer=value) if isinstance(value, int) else q.Match(keyword=value)


def _match_any(values: tuple[str, ...] | tuple[int, ...]) -> q.Match:
    integers = [value for value in values if isinstance(value, int)]
    if integers:
        return q.Match(integers=q.RepeatedIntegers(integers=integers))
    strings = [value for value in values if isinstance(value, str)]
    return q.Match(keywords=q.RepeatedStrings(strings=strings))


_BOUNDS: Final = ("gt", "gte", "lt", "lte")


def _times(condition: c.TimeRange) -> q.DatetimeRange:
    message = q.DatetimeRange()
    for name in _BOUNDS:
        moment = getattr(condition, name)
        if moment is not None:
            stamp = Timestamp()
            stamp.FromDatetime(moment)
            getattr(message, name).CopyFrom(stamp)
    return message
