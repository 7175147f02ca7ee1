"""Sinks that nobody is behind: everything is decoded, mapped, encoded and put together, and what
would be sent is dropped at once, or kept for a loop that sends it later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

from qdrant_client import grpc as q

from cdc_sync.config import QdrantSettings
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.edge_database import EdgeDatabase
from cdc_sync.qdrant.file_state import FileStateStore
from cdc_sync.qdrant.rpc import Method, Rpc
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import CollectionState, CollectionVectors, TableWriter

if TYPE_CHECKING:
    import qdrant_edge as edge

P = ParamSpec("P")
T = TypeVar("T")
Response = TypeVar("Response")

_COMPLETED = q.UpdateResult(status=q.UpdateStatus.Completed)
_ANSWERS: dict[type[object], object] = {
    q.PointsOperationResponse: q.PointsOperationResponse(result=_COMPLETED),
    q.UpdateBatchResponse: q.UpdateBatchResponse(result=[_COMPLETED]),
    q.HealthCheckReply: q.HealthCheckReply(title="none", version="1.18.0"),
}


class NullRpc(Rpc):
    """Answers every write with Completed once the event loop had its turn, as a server answers
    after a while. ``keep`` is given every request."""

    def __init__(self, keep: Callable[[bytes], None] | None = None) -> None:
        self._observer = None
        self._keep = keep

    async def call(
        self, method: Method[Response], request: bytes, lane: int = 0, *, unlimited: bool = False
    ) -> Response:
        if self._keep is not None:
            self._keep(request)
        await asyncio.sleep(0)
        return cast("Response", _ANSWERS[method.response])

    def close(self) -> None:
        pass


class NullEdgeDatabase(EdgeDatabase):
    """Drops every operation, or hands it to ``keep``."""

    def __init__(
        self, path: Path, keep: Callable[[edge.UpdateOperation], None] | None = None
    ) -> None:
        super().__init__(path)
        self._keep = keep

    def update(self, collection: str, operation: edge.UpdateOperation) -> None:
        if self._keep is not None:
            self._keep(operation)


class NullSink(ServerSink):
    """A server that takes everything and keeps nothing; the pipeline's records are in files under
    ``path``. ``embedded``: encodes for an embedded database instead."""

    def __init__(self, path: Path, rpc: NullRpc | None = None, *, embedded: bool = False) -> None:
        super().__init__(rpc or NullRpc(), QdrantSettings(), "nowhere", "1.18.0")
        self._database = NullEdgeDatabase(path)
        self._files = FileStateStore(self._database)
        self._embedded = embedded

    @property
    def multi_process(self) -> bool:
        """Its records are in this process."""
        return False

    @property
    def state(self) -> FileStateStore:  # type: ignore[override]
        return self._files

    async def inspect(self, plan: TablePlan) -> CollectionState:
        return CollectionState(exists=True)

    async def vectors(self, plan: TablePlan) -> CollectionVectors | None:
        return None

    async def ensure_collection(
        self, plan: TablePlan, *, create: bool = True, defer_hnsw: bool = False
    ) -> tuple[str, ...]:
        return ()

    async def drop_collection(self, plan: TablePlan) -> None:
        pass

    async def configuration(self, plan: TablePlan) -> str:
        return ""

    async def build_index(self, plan: TablePlan) -> None:
        pass

    def writer(self, plan: TablePlan) -> TableWriter:  # type: ignore[override]
        if not self._embedded:
            return super().writer(plan)
        # Here and not above: it brings the embedded engine along, which has no part in the memory
        # of a pipeline with a server.
        from cdc_sync.qdrant.edge_writer import EdgeWriter

        return EdgeWriter(self._database, plan)

    async def close(self) -> None:
        await self._database.close()
