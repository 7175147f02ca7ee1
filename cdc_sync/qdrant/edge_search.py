"""Searching an embedded database to compare: as :mod:`cdc_sync.qdrant.search` does a server."""

from __future__ import annotations

import uuid
from typing import cast

import qdrant_edge as edge
from numpy import bool_

from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.qdrant import conditions as c
from cdc_sync.qdrant.differences import by_name
from cdc_sync.qdrant.edge_database import EdgeDatabase
from cdc_sync.qdrant.search import SearchFacts, missing, settings_in_effect
from cdc_sync.qdrant.sink import StoredVector
from cdc_sync.rows import PointId


class EdgeSearcher:
    """A :class:`~cdc_sync.qdrant.search.Searcher` in this process."""

    def __init__(self, database: EdgeDatabase, plan: TablePlan) -> None:
        self._database = database
        self._plan = plan
        self._marks: list[edge.ConditionType] = [
            edge.FieldCondition(key=name, match=edge.MatchValue(value))
            for name, value in plan.marks
        ]

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
        must = list(self._marks)
        if condition is not None:
            must.append(_condition(condition))
        given: edge.NamedVector = (
            edge.SparseVector(vector.indices, vector.values)
            if isinstance(vector, SparseValue)
            else vector
        )
        request = edge.QueryRequest(
            limit=limit,
            query=edge.Query.Nearest(given, using=vector_name or None),
            filter=edge.Filter(must=must) if must else None,
            params=edge.SearchParams(exact=exact),
        )
        found = await self._database.run(self._query, request)
        return [(_id(one.id), one.score) for one in found]

    def _query(self, request: edge.QueryRequest) -> list[edge.ScoredPoint]:
        if not self._database.exists(self._plan.collection):
            raise missing(self._plan.collection)
        return self._database.shard(self._plan.collection).query(request)

    async def facts(self) -> SearchFacts:
        """What the collection says of itself. Its status is always green: nothing is indexed in the
        background.
        """
        return await self._database.run(self._facts)

    def _facts(self) -> SearchFacts:
        # Here and not above: the module of the sink imports this one.
        from cdc_sync.qdrant.edge import found_vectors

        name = self._plan.collection
        if not self._database.exists(name):
            raise missing(name)
        config = self._database.config(name)
        shard = self._database.shard(name)
        marks = edge.Filter(must=self._marks) if self._marks else None
        vectors = found_vectors(config)
        found = by_name(config)
        return SearchFacts(
            points=shard.count(edge.CountRequest(exact=True, filter=marks)),
            all_points=shard.count(edge.CountRequest(exact=True)),
            indexed_vectors=shard.info().indexed_vectors_count,
            status="green",
            vectors=vectors,
            hnsw=settings_in_effect(found, "hnsw_config", list(vectors)),
            quantization=settings_in_effect(found, "quantization_config", list(vectors)),
        )


def _id(value: edge.PointId) -> PointId:
    return str(value) if isinstance(value, uuid.UUID) else value


def _condition(condition: c.Condition) -> edge.ConditionType:
    match condition:
        case c.Match(path, value):
            # The binding takes a bool for the integer 0 or 1, but not a NumPy one.
            given = cast("bool", bool_(value)) if isinstance(value, bool) else value
            return edge.FieldCondition(path, match=edge.MatchValue(given))
        case c.MatchAny(path, values):
            wanted = cast("list[str] | list[int]", list(values))
            return edge.FieldCondition(path, match=edge.MatchAny(wanted))
        case c.NumberRange(path, gt, gte, lt, lte):
            bounds = edge.RangeFloat(gt=gt, gte=gte, lt=lt, lte=lte)
            return edge.FieldCondition(path, range=bounds)
        case c.TimeRange(path, gt, gte, lt, lte):
            times = edge.RangeDateTime(
                gt=gt.isoformat() if gt is not None else None,
                gte=gte.isoformat() if gte is not None else None,
                lt=lt.isoformat() if lt is not None else None,
                lte=lte.isoformat() if lte is not None else None,
            )
            return edge.FieldCondition(path, range=times)
        case c.Empty(path):
            return edge.IsEmptyCondition(path)
        case c.Null(path):
            return edge.IsNullCondition(path)
        case c.Every(parts):
            return edge.Filter(must=[_condition(part) for part in parts])
        case c.Either(parts):
            return edge.Filter(should=[_condition(part) for part in parts])
        case c.Negation(part):
            return edge.Filter(must_not=[_condition(part)])
