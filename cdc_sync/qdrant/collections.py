"""Collections: what a plan asks for, what a server holds, and whether the two fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qdrant_client import grpc as q

from cdc_sync.errors import ErrorKind, SinkError
from cdc_sync.mapping.plan import (
    NAMESPACE_FIELD,
    Datatype,
    Metric,
    PayloadIndex,
    PayloadIndexType,
    TablePlan,
    VectorKind,
    VectorPlan,
)
from cdc_sync.qdrant.rpc import (
    COLLECTION_INFO,
    COUNT,
    CREATE_COLLECTION,
    CREATE_FIELD_INDEX,
    Rpc,
    RpcError,
    not_completed,
    sink_error,
)


@dataclass(frozen=True, slots=True)
class FoundVector:
    """A vector that a collection has. ``metric`` and ``datatype`` by Qdrant's names, whether or not
    a plan can have them.
    """

    kind: VectorKind
    size: int | None
    metric: str
    datatype: str

    def __str__(self) -> str:
        if self.kind is VectorKind.SPARSE:
            return f"sparse, {self.metric}"
        return f"{self.kind.value}, {self.size} dimensions, {self.metric}, {self.datatype}"


def wanted(vector: VectorPlan) -> FoundVector:
    """What a collection must have for this vector of a plan."""
    if vector.kind is VectorKind.SPARSE:
        return FoundVector(vector.kind, None, Metric.DOT.value, Datatype.FLOAT32.value)
    return FoundVector(vector.kind, vector.size, vector.metric.value, vector.datatype.value)


def check(plan: TablePlan, found: Mapping[str, FoundVector]) -> None:
    """Raise COLLECTION_MISMATCH unless the collection's vectors are exactly those of the plan."""
    wants = {vector.name: wanted(vector) for vector in plan.vectors}
    problems: list[str] = []
    for name, want in wants.items():
        has = found.get(name)
        if has is None:
            problems.append(f"{_label(name)} is absent, the plan wants ({want})")
        elif has != want:
            problems.append(f"{_label(name)} is ({has}), the plan wants ({want})")
    problems += [
        f"{_label(name)} ({has}) is not in the plan"
        for name, has in found.items()
        if name not in wants
    ]
    if problems:
        raise SinkError(
            ErrorKind.COLLECTION_MISMATCH,
            f"Collection {plan.collection} does not fit table {plan.qualified_name}: "
            f"{'; '.join(problems)}.",
            f"Name another collection for {plan.qualified_name} in the configuration, change its "
            f"metrics or dimensions there, or drop collection {plan.collection} so that it is "
            "created anew; an existing collection is never changed.",
        )


def _label(name: str) -> str:
    return f"vector {name!r}" if name else "the unnamed vector"


def payload_indexes(plan: TablePlan) -> tuple[PayloadIndex, ...]:
    """The plan's payload indexes, and one on the namespace where tables share the collection."""
    if plan.namespace is None:
        return plan.payload_indexes
    namespace = PayloadIndex(NAMESPACE_FIELD, PayloadIndexType.KEYWORD)
    return (namespace, *plan.payload_indexes)


_DISTANCES: Final = {
    Metric.COSINE: q.Distance.Cosine,
    Metric.EUCLID: q.Distance.Euclid,
    Metric.DOT: q.Distance.Dot,
    Metric.MANHATTAN: q.Distance.Manhattan,
}
_DATATYPES: Final = {Datatype.FLOAT16: q.Datatype.Float16, Datatype.UINT8: q.Datatype.Uint8}
_FIELD_TYPES: Final = {
    PayloadIndexType.KEYWORD: q.FieldType.FieldTypeKeyword,
    PayloadIndexType.INTEGER: q.FieldType.FieldTypeInteger,
    PayloadIndexType.FLOAT: q.FieldType.FieldTypeFloat,
    PayloadIndexType.BOOL: q.FieldType.FieldTypeBool,
    PayloadIndexType.DATETIME: q.FieldType.FieldTypeDatetime,
    PayloadIndexType.UUID: q.FieldType.FieldTypeUuid,
    PayloadIndexType.TEXT: q.FieldType.FieldTypeText,
    PayloadIndexType.GEO: q.FieldType.FieldTypeGeo,
}


def _params(vector: VectorPlan) -> q.VectorParams:
    assert vector.size is not None, "only sparse vectors have no size"
    params = q.VectorParams(size=vector.size, distance=_DISTANCES[vector.metric])
    if vector.datatype is not Datatype.FLOAT32:
        params.datatype = _DATATYPES[vector.datatype]
    if vector.kind is VectorKind.MULTI:
        params.multivector_config.comparator = q.MultiVectorComparator.MaxSim
    if vector.hnsw_m is not None:
        params.hnsw_config.m = vector.hnsw_m
    if vector.hnsw_ef_construct is not None:
        params.hnsw_config.ef_construct = vector.hnsw_ef_construct
    return params


def create_request(plan: TablePlan) -> q.CreateCollection:
    """The request that creates the plan's collection."""
    request = q.CreateCollection(collection_name=plan.collection)
    dense = [vector for vector in plan.vectors if vector.kind is not VectorKind.SPARSE]
    if len(dense) == 1 and dense[0].name == "":
        request.vectors_config.params.CopyFrom(_params(dense[0]))
    else:
        params_map = request.vectors_config.params_map
        params_map.SetInParent()
        for vector in dense:
            params_map.map[vector.name].CopyFrom(_params(vector))
    for vector in plan.vectors:
        if vector.kind is VectorKind.SPARSE:
            request.sparse_vectors_config.map[vector.name].SetInParent()
    return request


def found_vectors(params: q.CollectionParams) -> dict[str, FoundVector]:
    """The vectors of a collection by name, "" for the unnamed one."""
    found: dict[str, FoundVector] = {}
    if params.vectors_config.WhichOneof("config") == "params":
        found[""] = _found(params.vectors_config.params)
    else:
        dense = params.vectors_config.params_map.map
        found |= {name: _found(dense[name]) for name in dense}
    sparse = params.sparse_vectors_config.map
    for name in sparse:
        metric = "Dot" if sparse[name].modifier == q.Modifier.Value("None") else "Dot with IDF"
        found[name] = FoundVector(VectorKind.SPARSE, None, metric, Datatype.FLOAT32.value)
    return found


def _found(params: q.VectorParams) -> FoundVector:
    multi = params.HasField("multivector_config")
    datatype = q.Datatype.Name(params.datatype).lower()
    return FoundVector(
        VectorKind.MULTI if multi else VectorKind.DENSE,
        int(params.size),
        q.Distance.Name(params.distance),
        Datatype.FLOAT32.value if datatype == "default" else datatype,
    )


class Collections:
    """The collections of a server."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    async def info(self, name: str) -> q.CollectionInfo | None:
        """The collection's (or alias's) description; None when there is none."""
        request = q.GetCollectionInfoRequest(collection_name=name)
        try:
            response = await self._rpc.call(COLLECTION_INFO, request.SerializeToString())
        except RpcError as failure:
            if failure.collection_missing:
                return None
            raise sink_error(failure, f"collection {name}") from failure
        info: q.CollectionInfo = response.result
        return info

    async def count(self, name: str, condition: q.Filter | None = None) -> int:
        """Exact number of points, of those the condition selects."""
        request = q.CountPoints(collection_name=name, exact=True, filter=condition)
        response = await self._rpc.request(COUNT, request.SerializeToString(), f"collection {name}")
        return int(response.result.count)

    async def create(self, request: q.CreateCollection) -> bool:
        """Create a collection; False when another process was first."""
        name = request.collection_name
        try:
            await self._rpc.call(CREATE_COLLECTION, request.SerializeToString())
        except RpcError as failure:
            if f"`{name}` already exists" in failure.details or "Alias with" in failure.details:
                return False
            raise sink_error(failure, f"collection {name}") from failure
        return True

    async def create_index(self, name: str, index: PayloadIndex) -> None:
        """Create a payload index and wait for it."""
        request = q.CreateFieldIndexCollection(
            collection_name=name,
            wait=True,
            field_name=index.field,
            field_type=_FIELD_TYPES[index.type],
        )
        target = f"field {index.field} of collection {name}"
        response = await self._rpc.request(CREATE_FIELD_INDEX, request.SerializeToString(), target)
        if response.result.status != q.UpdateStatus.Completed:
            raise not_completed(response.result.status, CREATE_FIELD_INDEX, target)

    async def ensure(self, plan: TablePlan) -> None:
        """Create the plan's collection, or check the one that exists; then the payload indexes that
        are absent.

        The indexes come before any point, so that Qdrant's graph is built with them in view.
        """
        info = await self.info(plan.collection)
        if info is None:
            await self.create(create_request(plan))
            info = await self.info(plan.collection)
            if info is None:
                raise SinkError(
                    ErrorKind.COLLECTION_MISSING,
                    f"Collection {plan.collection} was removed right after its creation.",
                )
        check(plan, found_vectors(info.config.params))
        for index in payload_indexes(plan):
            path = index_path(index.field)
            if path is not None and path not in info.payload_schema:
                await self.create_index(plan.collection, PayloadIndex(path, index.type))


def index_path(field: str) -> str | None:
    """A payload field as the JSON path of its index, in the form in which Qdrant lists it.

    Quoted unless it is a plain name, since dots and brackets would mean nesting. None for a field
    with a quote or backslash in its name: Qdrant's paths have no escapes, so such a field cannot be
    indexed (it can still be stored). Source: Qdrant, ``lib/segment/src/json_path/parse.rs``.
    """
    if field and all(c.isalnum() or c in "_-" for c in field):
        return field
    return None if '"' in field or "\\" in field else f'"{field}"'
