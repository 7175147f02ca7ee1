"""The sink on a Qdrant server or cluster, over gRPC."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

from qdrant_client.grpc import CollectionStatus, HealthCheckReply

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant import messages
from cdc_sync.qdrant.aliases import Aliases
from cdc_sync.qdrant.channel import opening_failure
from cdc_sync.qdrant.collections import Collections, check, found_vectors, quantized_vectors
from cdc_sync.qdrant.deferral import OLDEST_SERVER as OLDEST_DEFERRING
from cdc_sync.qdrant.deferral import unsupported as cannot_defer
from cdc_sync.qdrant.differences import differences
from cdc_sync.qdrant.examination import CollectionFacts, examine
from cdc_sync.qdrant.lanes import Lanes
from cdc_sync.qdrant.pace import Pace
from cdc_sync.qdrant.rpc import HEALTH_CHECK, Rpc, RpcError, sink_error
from cdc_sync.qdrant.search import ServerSearcher
from cdc_sync.qdrant.server_state import ServerStateStore
from cdc_sync.qdrant.sink import CollectionState, CollectionVectors, RequestObserver
from cdc_sync.qdrant.writer import ServerWriter

#: The oldest server whose operations have the meaning relied on here.
OLDEST_SERVER = (1, 14)


class ServerSink:
    """A :class:`~cdc_sync.qdrant.sink.Sink` on a server. Made by
    :func:`cdc_sync.qdrant.open.open_sink`.
    """

    def __init__(self, rpc: Rpc, settings: QdrantSettings, target: str, version: str) -> None:
        self._rpc = rpc
        self._settings = settings
        self._target = target
        self._version = version
        self._collections = Collections(rpc)
        self._state = ServerStateStore(rpc)
        self._paces: dict[str, Pace] = {}
        self._lanes = Lanes(settings.parallel_requests)

    @classmethod
    async def open(
        cls,
        settings: QdrantSettings,
        host: str,
        port: int,
        *,
        secure: bool,
        observer: RequestObserver | None = None,
    ) -> ServerSink:
        """Connect. Raises :class:`SinkError` unless the server answers, ConfigError if it is older
        than 1.14.
        """
        target = f"{host}:{port}"
        rpc = Rpc(settings, host, port, secure=secure, observer=observer)
        try:
            answer = await _first_answer(rpc, settings, host, port, secure=secure)
            version = str(answer.version)
            if _release(version) < OLDEST_SERVER:
                raise ConfigError(
                    f"Qdrant at {target} has version {version}; 1.14 is the oldest that works.",
                    "Upgrade Qdrant.",
                )
        except BaseException:
            rpc.close()
            raise
        return cls(rpc, settings, target, version)

    @property
    def multi_process(self) -> bool:
        """Other processes may write to the same server."""
        return True

    def guard(self, check: Callable[[], None] | None) -> None:
        """Have ``check`` called before every write from here on, its own records' too; what it
        raises keeps the write from being begun. None: no more."""
        self._rpc.guard = check

    @property
    def version(self) -> str:
        """The server's version when the sink was opened."""
        return self._version

    @property
    def parallel(self) -> int:
        """Requests that go together, whatever collections they are for."""
        return self._lanes.count

    @property
    def state(self) -> ServerStateStore:
        """The records in collection ``_cdc_sync``."""
        return self._state

    @property
    def aliases(self) -> Aliases:
        """Other names of the server's collections."""
        return Aliases(self._rpc)

    async def exists(self, collection: str) -> bool:
        """Whether there is a collection, or an alias, of this name."""
        return await self._collections.info(collection) is not None

    async def status(self, collection: str) -> str:
        """Green, yellow (being optimized), grey (waiting for that) or red; empty if there is no
        such collection."""
        info = await self._collections.info(collection)
        return "" if info is None else CollectionStatus.Name(info.status).lower()

    async def drop(self, collection: str) -> None:
        """Remove a collection by name, present or not."""
        await self._collections.drop(collection)

    async def collections(self) -> list[str]:
        """The names of the server's collections."""
        return await self._collections.names()

    async def ping(self) -> None:
        """Raise :class:`SinkError` unless the server answers."""
        await self._rpc.request(HEALTH_CHECK, b"", f"Qdrant at {self._target}")

    async def inspect(self, plan: TablePlan) -> CollectionState:
        """Compare the collection with the plan, read-only. Raises COLLECTION_MISMATCH. ``points``
        is exact.
        """
        info = await self._collections.info(plan.collection)
        if info is None:
            return CollectionState(exists=False)
        check(plan, found_vectors(info.config.params))
        points = await self._points(plan)
        return CollectionState(True, points, differences(plan, info.config))

    async def examine(self, plan: TablePlan) -> CollectionFacts | None:
        """Health, index, limits and replicas of the collection; None without one."""
        return await examine(self._rpc, plan.collection)

    async def _points(self, plan: TablePlan) -> int:
        """Points of the collection; of a shard those that are its own, since the pipelines of the
        others write to the same collection.
        """
        name, foreign = plan.collection, messages.foreign_filter(plan)
        if foreign is None:
            return await self._collections.count(name)
        others = await self._collections.count(name, foreign)
        if others:
            raise SinkError(
                ErrorKind.COLLECTION_MISMATCH,
                f"Collection {name} holds {others} points that no shard of "
                f"{(plan.shard or '').partition('/')[2]} has written.",
                "Divide a table anew only into a new collection, or drop this one first.",
            )
        return await self._collections.count(name, messages.table_filter(plan))

    async def vectors(self, plan: TablePlan) -> CollectionVectors | None:
        """The vectors of the collection; None without one."""
        info = await self._collections.info(plan.collection)
        if info is None:
            return None
        return CollectionVectors(found_vectors(info.config.params), quantized_vectors(info.config))

    async def ensure_collection(
        self, plan: TablePlan, *, create: bool = True, defer_hnsw: bool = False
    ) -> tuple[str, ...]:
        """Create collection and payload indexes where absent. Raises COLLECTION_MISMATCH, and
        ConfigError for HNSW deferred on a server before 1.16.
        """
        if defer_hnsw:
            self._check_can_defer()
        return await self._collections.ensure(plan, create=create, defer_hnsw=defer_hnsw)

    async def drop_collection(self, plan: TablePlan) -> None:
        """Remove the collection, present or not."""
        await self._collections.drop(plan.collection)

    async def defer_indexing(self, plan: TablePlan) -> None:
        """Take HNSW from the collection until :meth:`build_index`. Raises ConfigError before
        1.16.
        """
        self._check_can_defer()
        await self._collections.defer(plan.collection)

    async def configuration(self, plan: TablePlan) -> str:
        """A hash of the collection's configuration; empty without a collection."""
        info = await self._collections.info(plan.collection)
        if info is None:
            return ""
        return hashlib.sha256(info.config.SerializeToString(deterministic=True)).hexdigest()

    async def build_index(self, plan: TablePlan) -> None:
        """Give back the HNSW settings that were deferred, if any were."""
        await self._collections.build(plan.collection)

    def _check_can_defer(self) -> None:
        if _release(self._version) < OLDEST_DEFERRING:
            raise cannot_defer(self._version)

    def writer(self, plan: TablePlan) -> ServerWriter:
        """A writer for the plan's table."""
        pace = self._pace(plan.collection)
        return ServerWriter(self._rpc, self._settings, plan, pace, self._lanes)

    def _pace(self, collection: str) -> Pace:
        """That of a collection: what it has shown holds for the writer of another plan, too."""

        def on_change(pace: Pace, slower: bool) -> None:
            self._rpc.paced(collection, pace, slower=slower)

        if collection not in self._paces:
            self._paces[collection] = Pace(self._settings, on_change)
        return self._paces[collection]

    def searcher(self, plan: TablePlan) -> ServerSearcher:
        """A searcher of the plan's table."""
        return ServerSearcher(self._rpc, plan)

    async def make_durable(self) -> None:
        """Nothing to do: with ``wait=true`` the server syncs its WAL before it says Completed."""

    async def close(self) -> None:
        """Close the connections."""
        self._rpc.close()


async def _first_answer(
    rpc: Rpc, settings: QdrantSettings, host: str, port: int, *, secure: bool
) -> HealthCheckReply:
    try:
        return await rpc.call(HEALTH_CHECK, b"")
    except RpcError as failure:
        prevented = await asyncio.to_thread(
            opening_failure, failure.details, settings, host, port, secure=secure
        )
        raise prevented or sink_error(failure, f"Qdrant at {host}:{port}") from failure


def _release(version: str) -> tuple[int, ...]:
    parts = version.lstrip("v").split("-")[0].split(".")[:2]
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        # A build without a release number: taken as new enough, its answers will tell.
        return OLDEST_SERVER
