"""The sink on a Qdrant server or cluster, over gRPC."""

from __future__ import annotations

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.collections import Collections, check, found_vectors
from cdc_sync.qdrant.rpc import HEALTH_CHECK, Rpc
from cdc_sync.qdrant.server_state import ServerStateStore
from cdc_sync.qdrant.sink import CollectionState, RequestObserver
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
            answer = await rpc.request(HEALTH_CHECK, b"", f"Qdrant at {target}")
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

    @property
    def version(self) -> str:
        """The server's version when the sink was opened."""
        return self._version

    @property
    def state(self) -> ServerStateStore:
        """The records in collection ``_cdc_sync``."""
        return self._state

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
        return CollectionState(True, await self._collections.count(plan.collection))

    async def ensure_collection(self, plan: TablePlan) -> None:
        """Create collection and payload indexes where absent. Raises COLLECTION_MISMATCH."""
        await self._collections.ensure(plan)

    def writer(self, plan: TablePlan) -> ServerWriter:
        """A writer for the plan's table."""
        return ServerWriter(self._rpc, self._settings, plan)

    async def make_durable(self) -> None:
        """Nothing to do: with ``wait=true`` the server syncs its WAL before it says Completed."""

    async def close(self) -> None:
        """Close the connections."""
        self._rpc.close()


def _release(version: str) -> tuple[int, ...]:
    parts = version.lstrip("v").split("-")[0].split(".")[:2]
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        # A build without a release number: taken as new enough, its answers will tell.
        return OLDEST_SERVER
