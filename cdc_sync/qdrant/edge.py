"""The sink in this process: Qdrant Edge, the same engine without a server."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import qdrant_edge as edge

from cdc_sync.errors import CdcSyncError, ErrorKind, SinkError
from cdc_sync.mapping.plan import Datatype, PayloadIndexType, TablePlan, VectorKind
from cdc_sync.qdrant.collections import FoundVector, absent, check, index_path, payload_indexes
from cdc_sync.qdrant.edge_config import edge_config, edge_differences
from cdc_sync.qdrant.edge_database import EdgeDatabase, first_line
from cdc_sync.qdrant.edge_search import EdgeSearcher
from cdc_sync.qdrant.edge_writer import EdgeWriter
from cdc_sync.qdrant.file_state import FileStateStore
from cdc_sync.qdrant.sink import CollectionState, CollectionVectors

_INDEX_TYPES: Final = {
    PayloadIndexType.KEYWORD: edge.PayloadSchemaType.Keyword,
    PayloadIndexType.INTEGER: edge.PayloadSchemaType.Integer,
    PayloadIndexType.FLOAT: edge.PayloadSchemaType.Float,
    PayloadIndexType.BOOL: edge.PayloadSchemaType.Bool,
    PayloadIndexType.DATETIME: edge.PayloadSchemaType.Datetime,
    PayloadIndexType.UUID: edge.PayloadSchemaType.Uuid,
    PayloadIndexType.TEXT: edge.PayloadSchemaType.Text,
    PayloadIndexType.GEO: edge.PayloadSchemaType.Geo,
}


def found_vectors(config: Mapping[str, object]) -> dict[str, FoundVector]:
    """The vectors of a shard by name, from its ``edge_config.json``."""
    found: dict[str, FoundVector] = {}
    for name, params in _objects(config.get("vectors")).items():
        multi = params.get("multivector_config") is not None
        size = params.get("size")
        found[name] = FoundVector(
            VectorKind.MULTI if multi else VectorKind.DENSE,
            size if isinstance(size, int) else None,
            str(params.get("distance")),
            str(params.get("datatype") or Datatype.FLOAT32.value),
        )
    for name, params in _objects(config.get("sparse_vectors")).items():
        metric = "Dot" if params.get("modifier") in (None, "none") else "Dot with IDF"
        found[name] = FoundVector(VectorKind.SPARSE, None, metric, Datatype.FLOAT32.value)
    return found


def _objects(value: object) -> dict[str, dict[str, object]]:
    if not isinstance(value, dict):
        return {}
    return {name: one for name, one in value.items() if isinstance(one, dict)}


class EdgeSink:
    """A :class:`~cdc_sync.qdrant.sink.Sink` in a directory. Made by
    :func:`cdc_sync.qdrant.open.open_sink`.
    """

    def __init__(self, database: EdgeDatabase) -> None:
        self._database = database
        self._state = FileStateStore(database)

    @classmethod
    async def open(cls, path: Path) -> EdgeSink:
        """Open the database at ``path``, which need not exist yet.

        Raises :class:`SinkError` if another process has it open, ConfigError if the path cannot be
        used.
        """
        database = EdgeDatabase(path)
        try:
            await database.run(database.open)
        except BaseException:
            await database.close()
            raise
        return cls(database)

    @property
    def multi_process(self) -> bool:
        """The database is open in this process only."""
        return False

    @property
    def version(self) -> str:
        """The engine's package version."""
        return importlib.metadata.version("qdrant-edge-py")

    @property
    def parallel(self) -> int:
        """One: a single thread works in the database."""
        return 1

    @property
    def state(self) -> FileStateStore:
        """The records in files beside the shards."""
        return self._state

    async def ping(self) -> None:
        """Always answers, being in this process."""
        await self._database.run(lambda: None)

    async def inspect(self, plan: TablePlan) -> CollectionState:
        """Compare the collection with the plan, read-only. Raises COLLECTION_MISMATCH,
        :class:`StateError`.
        """
        return await self._database.run(self._inspect, plan)

    def _inspect(self, plan: TablePlan) -> CollectionState:
        name = plan.collection
        if not self._database.exists(name):
            return CollectionState(exists=False)
        config = self._database.config(name)
        check(plan, found_vectors(config))
        points = self._database.shard(name).count(edge.CountRequest(exact=True))
        return CollectionState(True, points, edge_differences(plan, config))

    async def vectors(self, plan: TablePlan) -> CollectionVectors | None:
        """The vectors of the collection; None without one."""
        return await self._database.run(self._vectors, plan.collection)

    def _vectors(self, name: str) -> CollectionVectors | None:
        if not self._database.exists(name):
            return None
        config = self._database.config(name)
        everywhere = config.get("quantization_config") is not None
        quantized = [
            vector
            for vector, params in _objects(config.get("vectors")).items()
            if everywhere or params.get("quantization_config") is not None
        ]
        return CollectionVectors(found_vectors(config), frozenset(quantized))

    async def ensure_collection(
        self, plan: TablePlan, *, create: bool = True, defer_hnsw: bool = False
    ) -> tuple[str, ...]:
        """Create collection and payload indexes where absent. Raises COLLECTION_MISMATCH.

        There is nothing to defer: no HNSW index is ever built before :meth:`optimize`.
        """
        return await self._database.run(self._ensure, plan, create)

    async def drop_collection(self, plan: TablePlan) -> None:
        """Remove the collection, present or not."""
        await self._database.run(self._database.drop, plan.collection)

    async def defer_indexing(self, plan: TablePlan) -> None:
        """Nothing to do; see :meth:`ensure_collection`."""

    async def configuration(self, plan: TablePlan) -> str:
        """Empty: nobody else can change the collection meanwhile."""
        return ""

    async def build_index(self, plan: TablePlan) -> None:
        """Nothing to do; see :meth:`ensure_collection`."""

    def _ensure(self, plan: TablePlan, create: bool) -> tuple[str, ...]:
        name = plan.collection
        wanted = {
            path: edge.UpdateOperation.create_field_index(path, _INDEX_TYPES[index.type])
            for index in payload_indexes(plan)
            if (path := index_path(index.field, index.parent)) is not None
        }
        if not self._database.exists(name):
            if not create:
                raise absent(plan)
            self._database.create(name, edge_config(plan), list(wanted.values()))
            return ()
        config = self._database.config(name)
        check(plan, found_vectors(config))
        present = self._database.shard(name).info().payload_schema
        for path, operation in wanted.items():
            if path in present:
                continue
            try:
                self._database.update(name, operation)
            except CdcSyncError:
                raise
            except Exception as exc:  # the engine raises nothing more precise
                raise SinkError(
                    ErrorKind.SINK_REFUSED,
                    f"Field {path} of collection {name} cannot be indexed: {first_line(exc)}.",
                ) from exc
        return edge_differences(plan, config)

    def writer(self, plan: TablePlan) -> EdgeWriter:
        """A writer for the plan's table."""
        return EdgeWriter(self._database, plan)

    def searcher(self, plan: TablePlan) -> EdgeSearcher:
        """A searcher of the plan's table."""
        return EdgeSearcher(self._database, plan)

    async def make_durable(self) -> None:
        """Flush the shards that were written to."""
        await self._database.run(self._database.flush)

    async def optimize(self) -> None:
        """Index and compact what was loaded. All Python threads stand still meanwhile; see
        ``edge_database.py``.
        """
        await self._database.run(self._database.optimize)

    async def close(self) -> None:
        """Flush and close everything, and release the lock."""
        await self._database.close()
