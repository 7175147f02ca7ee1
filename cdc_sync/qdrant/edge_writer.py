"""Writes the points of one table to an embedded database."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Final, TypeAlias, TypeVar, cast

import numpy as np
import qdrant_edge as edge

from cdc_sync.errors import CdcSyncError, ErrorKind, MappingError, SinkError
from cdc_sync.mapping.comparison import StoredArray
from cdc_sync.mapping.decoding import JsonValue
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.stored_doubles import may_be_written_back
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.qdrant.edge_database import STEP_POINTS, EdgeDatabase, first_line
from cdc_sync.qdrant.rpc import reason
from cdc_sync.qdrant.sink import (
    Applied,
    Changes,
    PreparedRequest,
    RetrievedPoint,
    StoredPoint,
    StoredVector,
)
from cdc_sync.qdrant.writer import require_disjoint
from cdc_sync.rows import PointId, Row

Item = TypeVar("Item")
Refusals: TypeAlias = list[tuple[PointId, str]]

#: What the engine says when a point is invalid, and not the database unwell (``OperationError`` in
#: its source).
_INVALID: Final = re.compile(
    "Vector dimension error|Not existing vector name|Wrong usage of (sparse|multi)"
    "|Conversion between|Validation error|Wrong input|Type (inference )?error",
    re.IGNORECASE,
)
#: What it says of a point that it is to change and has not (``PointIdError``); before it does
#: anything, if it is to change no other point.
_MISSING: Final = re.compile("No point with id")
_NOTHING: Final[Mapping[str, JsonValue]] = {}


class EdgeWriter:
    """A :class:`~cdc_sync.qdrant.sink.TableWriter` for an embedded database."""

    def __init__(self, database: EdgeDatabase, plan: TablePlan) -> None:
        self._database = database
        self._plan = plan
        self._codec = PythonCodec(plan)
        self._filter = _table_filter(plan)

    @property
    def plan(self) -> TablePlan:
        """The plan it was made for."""
        return self._plan

    @property
    def values_nulled(self) -> int:
        """NaN and infinities written as null so far."""
        return self._codec.non_finite

    async def apply(self, changes: Changes) -> Applied:
        """See :meth:`~cdc_sync.qdrant.sink.TableWriter.apply`. Survives a kill at once, a power
        loss after make_durable.
        """
        require_disjoint(changes)
        refused: Refusals = []
        unmappable: Refusals = []
        missing: set[PointId] = set()
        run = self._database.run
        for rows in _steps(changes.upserts):
            refused += await run(self._upsert, rows, unmappable)
        for rows in _steps(changes.partials):
            absent, bad = await run(self._partial, rows, unmappable)
            missing |= absent
            refused += bad
        for ids in _steps(changes.deletes):
            await run(self._update, edge.UpdateOperation.delete_points(list(ids)))
        return Applied(
            frozenset(missing),
            (*unmappable, *refused),
            frozenset(id_ for id_, _ in unmappable),
        )

    def prepare(self, rows: Sequence[tuple[PointId, Row]]) -> list[PreparedRequest]:
        """Turn rows, of which points can be made, into operations that are applied later: what the
        engine takes without us.
        """
        requests = []
        for some in _steps(rows):
            points = [self._point(id_, row) for id_, row in some]
            operation = edge.UpdateOperation.upsert_points(points)
            requests.append(PreparedRequest(len(some), partial(self._send_prepared, operation)))
        return requests

    async def _send_prepared(self, operation: edge.UpdateOperation, _: int) -> None:
        await self._database.run(self._update, operation)

    def _upsert(self, rows: Sequence[tuple[PointId, Row]], unmappable: Refusals) -> Refusals:
        refused: Refusals = []
        points: list[tuple[PointId, edge.Point]] = []
        for id_, row in rows:
            try:
                points.append((id_, self._point(id_, row)))
            except MappingError as exc:
                unmappable.append((id_, exc.message))
            except (TypeError, ValueError) as exc:
                refused.append((id_, reason(first_line(exc))))
        self._divide(points, refused)
        return refused

    def _point(self, id_: PointId, row: Row) -> edge.Point:
        payload = self._codec.payload(row)
        return edge.Point(id_, self._known_vectors(row), payload)

    def _known_vectors(self, row: Row) -> dict[str, edge.NamedVector]:
        """The vectors that are in the row and not NULL, by name."""
        return {
            name: edge.SparseVector(vector.indices, vector.values)
            if isinstance(vector, SparseValue)
            # The engine takes any sequence of numbers.
            else cast("list[float]", vector)
            for name, vector in self._codec.vectors(row).items()
        }

    def _partial(
        self, rows: Sequence[tuple[PointId, Row]], unmappable: Refusals
    ) -> tuple[set[PointId], Refusals]:
        """Change points in place, and return the ids of those that are missing, or lack a field
        that they would have to keep, or cannot keep it as it is.

        Only fields that must be kept are read before: that a point is missing the engine says when
        it is to be changed.
        """
        refused: Refusals = []
        missing: set[PointId] = set()
        gaps = {id_: unknown for id_, row in rows if (unknown := self._codec.unknown_fields(row))}
        stored = self._stored(list(gaps)) if gaps else {}
        for id_, row in rows:
            kept = _NOTHING
            if id_ in gaps:
                there = stored.get(id_, _NOTHING)
                kept = {
                    field: there[field]
                    for field in gaps[id_]
                    if field in there and may_be_written_back(there[field])
                }
            if self._codec.has_unknown_object(row) or len(kept) < len(gaps.get(id_, ())):
                missing.add(id_)
                continue
            try:
                todo = self._operations(id_, row, kept)
            except MappingError as exc:
                unmappable.append((id_, exc.message))
                continue
            except (TypeError, ValueError) as exc:
                refused.append((id_, reason(first_line(exc))))
                continue
            try:
                for operation in todo:
                    self._database.update(self._plan.collection, operation)
            except CdcSyncError:
                raise
            except Exception as exc:  # the engine raises nothing more precise
                if _MISSING.match(str(exc)):
                    missing.add(id_)
                elif _INVALID.search(str(exc)):
                    refused.append((id_, reason(first_line(exc))))
                else:
                    raise self._unknown(exc) from exc
        return missing, refused

    def _operations(
        self, id_: PointId, row: Row, kept: Mapping[str, JsonValue]
    ) -> list[edge.UpdateOperation]:
        payload = self._codec.payload(row, kept)
        vectors = self._known_vectors(row)
        nulls = self._codec.null_vectors(row)
        found = [edge.UpdateOperation.overwrite_payload([id_], payload)]
        if vectors:
            found.append(edge.UpdateOperation.update_vectors([edge.PointVectors(id_, vectors)]))
        if nulls:
            found.append(edge.UpdateOperation.delete_vectors([id_], nulls))
        return found

    def _stored(self, ids: Sequence[PointId]) -> dict[PointId, Mapping[str, JsonValue]]:
        """What columns became, by id: the payload, or the object in it that holds them."""
        shard = self._database.shard(self._plan.collection)
        records = shard.retrieve(list(ids), with_payload=True, with_vector=False)
        return {_id(record.id): self._fields(record.payload or {}) for record in records}

    def _fields(self, payload: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        if self._plan.payload_key is None:
            return payload
        nested = payload.get(self._plan.payload_key)
        return nested if isinstance(nested, dict) else {}

    def _divide(self, points: Sequence[tuple[PointId, edge.Point]], refused: Refusals) -> None:
        """Write points, halving them as long as the engine takes something in them as invalid."""
        if not points:
            return
        try:
            self._database.update(
                self._plan.collection,
                edge.UpdateOperation.upsert_points([point for _, point in points]),
            )
        except CdcSyncError:
            raise
        except Exception as exc:  # the engine raises nothing more precise
            if not _INVALID.search(str(exc)):
                raise self._unknown(exc) from exc
            if len(points) == 1:
                refused.append((points[0][0], reason(first_line(exc))))
                return
            half = len(points) // 2
            self._divide(points[:half], refused)
            self._divide(points[half:], refused)

    def _update(self, operation: edge.UpdateOperation) -> None:
        try:
            self._database.update(self._plan.collection, operation)
        except CdcSyncError:
            raise
        except Exception as exc:  # the engine raises nothing more precise
            raise self._unknown(exc) from exc

    def _unknown(self, exc: Exception) -> SinkError:
        return SinkError(
            ErrorKind.SINK_UNKNOWN,
            f"Update of collection {self._plan.collection} in {self._database.path} failed: "
            f"{reason(first_line(exc))}.",
            "See whether the disk is full or failing.",
        )

    async def clear(self) -> None:
        """Remove every point of the table, in small steps."""
        while ids := await self._database.run(self._some_ids):
            await self._database.run(self._update, edge.UpdateOperation.delete_points(list(ids)))

    def _some_ids(self) -> list[PointId]:
        records, _ = self._scroll(STEP_POINTS, None, payload=False, vectors=False)
        return [_id(record.id) for record in records]

    async def count(self) -> int:
        """Exact number of points of the table."""
        return await self._database.run(self._count)

    def _count(self) -> int:
        shard = self._database.shard(self._plan.collection)
        return shard.count(edge.CountRequest(exact=True, filter=self._filter))

    async def retrieve(self, ids: Sequence[PointId]) -> list[RetrievedPoint]:
        """The points of these ids that exist, in any order, with payload and vectors."""
        found: list[RetrievedPoint] = []
        for some in _steps(ids):
            found += await self._database.run(self._retrieve, some)
        return found

    def _retrieve(self, ids: Sequence[PointId]) -> list[RetrievedPoint]:
        shard = self._database.shard(self._plan.collection)
        return [
            RetrievedPoint(
                _id(record.id),
                record.payload or {},
                {name: _array(vector) for name, vector in _stored_vectors(record.vector).items()},
            )
            for record in shard.retrieve(list(ids), with_payload=True, with_vector=True)
        ]

    async def scroll_ids(self, page: int = 1000) -> AsyncIterator[list[PointId]]:
        """All ids of the table's points, in pages."""
        offset: edge.PointId | None = None
        while True:
            records, offset = await self._database.run(
                self._scroll, page, offset, payload=False, vectors=False
            )
            if records:
                yield [_id(record.id) for record in records]
            if offset is None:
                return

    async def scroll_points(
        self, page: int = 256, with_vectors: bool = True
    ) -> AsyncIterator[list[StoredPoint]]:
        """All points of the table with their payload, in pages."""
        offset: edge.PointId | None = None
        while True:
            records, offset = await self._database.run(
                self._scroll, page, offset, payload=True, vectors=with_vectors
            )
            if records:
                yield [
                    StoredPoint(_id(one.id), one.payload or {}, _stored_vectors(one.vector))
                    for one in records
                ]
            if offset is None:
                return

    def _scroll(
        self, page: int, offset: edge.PointId | None, *, payload: bool, vectors: bool
    ) -> tuple[list[edge.Record], edge.PointId | None]:
        request = edge.ScrollRequest(
            limit=page,
            offset=offset,
            filter=self._filter,
            with_payload=payload,
            with_vector=vectors,
        )
        return self._database.shard(self._plan.collection).scroll(request)

    async def search(
        self, vector_name: str, vector: StoredVector, limit: int
    ) -> list[tuple[PointId, float, dict[str, object]]]:
        """The ``limit`` nearest points of the table with score and payload, best first."""
        query = edge.Query.Nearest(_edge_vector(vector), using=vector_name)
        request = edge.QueryRequest(
            limit=limit, query=query, filter=self._filter, with_payload=True
        )
        found = await self._database.run(
            lambda: self._database.shard(self._plan.collection).query(request)
        )
        return [(_id(one.id), one.score, one.payload or {}) for one in found]


def _table_filter(plan: TablePlan) -> edge.Filter | None:
    if not plan.marks:
        return None
    return edge.Filter(
        must=[
            edge.FieldCondition(key=name, match=edge.MatchValue(value))
            for name, value in plan.marks
        ]
    )


def _id(value: edge.PointId) -> PointId:
    return str(value) if isinstance(value, uuid.UUID) else value


def _edge_vector(vector: StoredVector) -> edge.NamedVector:
    if isinstance(vector, SparseValue):
        return edge.SparseVector(vector.indices, vector.values)
    return vector


def _stored_vectors(vectors: edge.Vector | None) -> dict[str, StoredVector]:
    if vectors is None:
        return {}
    if isinstance(vectors, dict):
        return {name: _stored_vector(vector) for name, vector in vectors.items()}
    return {"": vectors}


def _stored_vector(vector: edge.NamedVector) -> StoredVector:
    if isinstance(vector, edge.SparseVector):
        return SparseValue(list(vector.indices), list(vector.values))
    return vector


def _array(vector: StoredVector) -> StoredArray:
    return vector if isinstance(vector, SparseValue) else np.array(vector, dtype="<f4")


def _steps(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + STEP_POINTS] for start in range(0, len(items), STEP_POINTS)]
