"""Collections: what a plan asks for, what a server holds, and whether the two fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qdrant_client import grpc as q
from qdrant_client import models

from cdc_sync.errors import ConfigError, DimensionMismatchError, ErrorKind, SinkError
from cdc_sync.mapping.plan import (
    Datatype,
    PayloadIndex,
    PayloadIndexType,
    TablePlan,
    VectorKind,
)
from cdc_sync.qdrant.collection_config import create_request, wanted_collection
from cdc_sync.qdrant.deferral import (
    defer_creation,
    defer_settings,
    deferred_of,
    hnsw_request,
    remember_request,
    zeroed,
)
from cdc_sync.qdrant.differences import differences
from cdc_sync.qdrant.reads import PointReads
from cdc_sync.qdrant.rpc import (
    COLLECTION_INFO,
    COUNT,
    CREATE_COLLECTION,
    CREATE_FIELD_INDEX,
    DELETE_COLLECTION,
    LIST_COLLECTIONS,
    UPDATE_COLLECTION,
    Rpc,
    RpcError,
    not_completed,
    sink_error,
)

_COUNTED_PAGE: Final = 10_000
_DOT: Final = "Dot"
_DOT_WITH_IDF: Final = "Dot with IDF"


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


def wanted(plan: TablePlan) -> dict[str, FoundVector]:
    """What vectors a collection must have for a plan, by name."""
    sparse = wanted_collection(plan).sparse_vectors or {}
    return {
        vector.name: FoundVector(
            vector.kind,
            None,
            _DOT_WITH_IDF if sparse[vector.name].modifier is models.Modifier.IDF else _DOT,
            Datatype.FLOAT32.value,
        )
        if vector.kind is VectorKind.SPARSE
        else FoundVector(vector.kind, vector.size, vector.metric.value, vector.datatype.value)
        for vector in plan.vectors
    }


def check(plan: TablePlan, found: Mapping[str, FoundVector]) -> None:
    """Raise COLLECTION_MISMATCH unless the collection's vectors are exactly those of the plan."""
    wants = wanted(plan)
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
        error = DimensionMismatchError if _differ_in_size_only(wants, found) else SinkError
        raise error(
            ErrorKind.COLLECTION_MISMATCH,
            f"Collection {plan.collection} does not fit table {plan.qualified_name}: "
            f"{'; '.join(problems)}.",
            f"Name another collection for {plan.qualified_name} in the configuration, change its "
            f"metrics or dimensions there, or drop collection {plan.collection} so that it is "
            "created anew; an existing collection is never changed.",
        )


def _differ_in_size_only(
    wants: Mapping[str, FoundVector], found: Mapping[str, FoundVector]
) -> bool:
    sizeless = [
        {name: dataclasses.replace(vector, size=None) for name, vector in vectors.items()}
        for vectors in (wants, found)
    ]
    return sizeless[0] == sizeless[1]


def _label(name: str) -> str:
    return f"vector {name!r}" if name else "the unnamed vector"


def payload_indexes(plan: TablePlan) -> tuple[PayloadIndex, ...]:
    """The plan's payload indexes, and those on the fields that tell tables and shards apart where
    they share the collection."""
    marks = [PayloadIndex(name, PayloadIndexType.KEYWORD) for name, _ in plan.marks]
    return (*marks, *(index for index in plan.payload_indexes if index not in marks))


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
        metric = _DOT if sparse[name].modifier == q.Modifier.Value("None") else _DOT_WITH_IDF
        found[name] = FoundVector(VectorKind.SPARSE, None, metric, Datatype.FLOAT32.value)
    return found


def quantized_vectors(config: q.CollectionConfig) -> frozenset[str]:
    """The names of the dense vectors that are kept quantized too."""
    vectors = config.params.vectors_config
    if vectors.WhichOneof("config") == "params":
        named = {"": vectors.params}
    else:
        named = dict(vectors.params_map.map)
    everywhere = config.HasField("quantization_config")
    return frozenset(
        name
        for name, params in named.items()
        if everywhere or params.HasField("quantization_config")
    )


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

    async def names(self) -> list[str]:
        """The names of all collections."""
        request = q.ListCollectionsRequest().SerializeToString()
        answer = await self._rpc.request(LIST_COLLECTIONS, request, "the list of collections")
        return [one.name for one in answer.collections]

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
        try:
            response = await self._rpc.call(COUNT, request.SerializeToString())
            return int(response.result.count)
        except RpcError as failure:
            if failure.exact_forbidden:
                return await self._count_ids(name, condition)
            raise sink_error(failure, f"collection {name}") from failure

    async def _count_ids(self, name: str, condition: q.Filter | None) -> int:
        """Count by reading all ids, where strict mode forbids to be exact otherwise."""
        reads = PointReads(self._rpc, name)
        request = q.ScrollPoints(
            collection_name=name,
            filter=condition,
            with_payload=q.WithPayloadSelector(enable=False),
        )
        count = 0
        while True:
            request.limit = _COUNTED_PAGE
            try:
                page = await reads.scroll(request, patient=True)
            except RpcError as failure:
                raise sink_error(failure, f"collection {name}") from failure
            count += len(page.result)
            if not page.HasField("next_page_offset"):
                return count
            request.offset.CopyFrom(page.next_page_offset)

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

    async def ensure(self, plan: TablePlan, *, create: bool, defer_hnsw: bool) -> tuple[str, ...]:
        """Create the plan's collection, or check the one that exists; then the payload indexes that
        are absent. Returns what is other than asked for in a collection that exists.

        The indexes come before any point, so that Qdrant's graph is built with them in view.
        """
        info = await self.info(plan.collection)
        existed = info is not None
        if info is None:
            if not create:
                raise absent(plan)
            await self.create(_creation(plan, defer_hnsw=defer_hnsw))
            info = await self.info(plan.collection)
            if info is None:
                raise SinkError(
                    ErrorKind.COLLECTION_MISSING,
                    f"Collection {plan.collection} was removed right after its creation.",
                )
        check(plan, found_vectors(info.config.params))
        for index in payload_indexes(plan):
            path = index_path(index.field, index.parent)
            if path is not None and path not in info.payload_schema:
                await self.create_index(plan.collection, PayloadIndex(path, index.type))
        return differences(plan, info.config) if existed else ()

    async def drop(self, name: str) -> None:
        """Remove a collection; one that does not exist is none."""
        request = q.DeleteCollection(collection_name=name).SerializeToString()
        await self._rpc.request(DELETE_COLLECTION, request, f"collection {name}")

    async def defer(self, name: str) -> None:
        """Take HNSW from the collection's dense vectors, and remember what they had."""
        config = (await self._existing(name)).config
        # What is deferred already may have m = 0 by that; its record stays.
        deferred = defer_settings(config) | deferred_of(config)
        request = hnsw_request(name, config, zeroed(deferred))
        if request is not None:
            # The record comes first: what it names and still has its graph is only restored to it.
            await self._update(remember_request(name, deferred))
            await self._update(request)

    async def build(self, name: str) -> None:
        """Give back what was deferred, if anything was; Qdrant builds the graphs in the
        background.
        """
        config = (await self._existing(name)).config
        deferred = deferred_of(config)
        if not deferred:
            return
        request = hnsw_request(name, config, deferred)
        if request is not None:
            await self._update(request)
        await self._update(remember_request(name, None))

    async def _existing(self, name: str) -> q.CollectionInfo:
        info = await self.info(name)
        if info is None:
            raise SinkError(ErrorKind.COLLECTION_MISSING, f"Collection {name} does not exist.")
        return info

    async def _update(self, request: q.UpdateCollection) -> None:
        target = f"collection {request.collection_name}"
        await self._rpc.request(UPDATE_COLLECTION, request.SerializeToString(), target)


def _creation(plan: TablePlan, *, defer_hnsw: bool) -> q.CreateCollection:
    request = create_request(plan)
    if defer_hnsw:
        defer_creation(wanted_collection(plan), request)
    return request


def absent(plan: TablePlan) -> ConfigError:
    """The error for a collection that does not exist and is not to be created."""
    vectors = "; ".join(f"{_label(name)} ({want})" for name, want in wanted(plan).items())
    return ConfigError(
        f"Collection {plan.collection} of table {plan.qualified_name} does not exist, and "
        "migration.create_collection is false.",
        f"Create it with {vectors or 'no vectors'}; or set migration.create_collection = true.",
    )


def index_path(field: str, parent: str | None = None) -> str | None:
    """A payload field, or one of the object ``parent``, as the JSON path of its index, in the form
    in which Qdrant lists it.

    Quoted unless it is a plain name, since dots and brackets would mean nesting. None for a field
    with a quote or backslash in its name: Qdrant's paths have no escapes, so such a field cannot be
    indexed (it can still be stored). Source: Qdrant, ``lib/segment/src/json_path/parse.rs``.
    """
    if parent is not None:
        above, below = index_path(parent), index_path(field)
        return None if above is None or below is None else f"{above}.{below}"
    if field and all(c.isalnum() or c in "_-" for c in field):
        return field
    return None if '"' in field or "\\" in field else f'"{field}"'
