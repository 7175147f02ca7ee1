"""The copy on a Ray cluster: one actor for each worker, spread over the nodes.

Each actor has a connection of its own on the exported snapshot and a channel of its own to Qdrant.
Chunks go to it and results come back as bytes pickled here, so that Ray itself has no object of
ours to show or log; an error is an answer and not raised in the actor, for the same reason. The
bytes hold the credentials: who may listen to the cluster's traffic may read them.

Actors end with the daemon: they are not detached, so Ray kills them when their driver has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import socket
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import ray
from ray import exceptions as ray_errors

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError
from cdc_sync.ops.logging import get_logger
from cdc_sync.sync.copy_process import STOP_SECONDS, WorkerLostError, pickled_error
from cdc_sync.sync.copying import ChunkCopier, ChunkResult, CopyTask, OnRetry
from cdc_sync.sync.worker_pool import ChunkSource, ChunkWorker, Done, NoRoomError, WorkerPool

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = get_logger(__name__)

#: How often retries in actors are asked for.
_NEWS_SECONDS: Final = 2.0
#: How long Ray may take to find room for an actor and to start it.
_PLACEMENT_SECONDS: Final = 30.0
_KNOCK_SECONDS: Final = 10.0
_MAX_WORKERS: Final = 256

_News: TypeAlias = list[tuple[CdcSyncError, float]]


class CopyActor:
    """What runs in the cluster."""

    def __init__(self) -> None:
        self._copier = ChunkCopier()
        self._stop = asyncio.Event()
        self._news: _News = []

    async def ready(self) -> None:
        """Answer once the actor is there."""

    async def copy(self, task: bytes) -> bytes:
        """Copy a pickled chunk; returns the pickled result, or error."""
        try:
            chunk: CopyTask = pickle.loads(task)
            result = await self._copier.copy(chunk, self._stop, self._on_retry)
        except Exception as error:  # noqa: BLE001 - the daemon raises it
            return pickled_error(error)
        return pickle.dumps(result)

    async def news(self) -> bytes:
        """Return pickled retries (error, seconds until the next try) since it was last asked."""
        news, self._news = self._news, []
        return pickle.dumps(news)

    async def rest(self) -> None:
        """Let go of the snapshot."""
        self._copier.rest()

    async def stop(self) -> None:
        """Let the chunk in progress end after its request in flight."""
        self._stop.set()

    def _on_retry(self, error: CdcSyncError, seconds: float) -> None:
        self._news.append((error, seconds))


class RayCluster:
    """Copies by actors of a Ray cluster. See :class:`~cdc_sync.sync.worker_pool.ChunkExecutor`."""

    def __init__(self, settings: Settings, on_retry: OnRetry) -> None:
        self._address = settings.migration.ray_address
        if self._address.startswith("ray://"):
            # Behind a proxy actors outlive a killed daemon for a while.
            raise ConfigError(
                "migration.ray_address is that of a Ray client server, which cannot be used here.",
                "Run cdc-sync on a node of the cluster (ray start --address=HEAD:6379 "
                "--num-cpus=0) and set migration.ray_address to auto.",
            )
        self._num_workers = settings.migration.num_workers
        self._on_retry = on_retry
        self._joining: asyncio.Task[int] | None = None
        self._joined = False
        self._pool: WorkerPool | None = None

    async def copy(self, source: ChunkSource, done: Done) -> None:
        """See :class:`~cdc_sync.sync.worker_pool.ChunkExecutor`. Raises :class:`ConfigError` where
        there is no cluster at the address."""
        if self._pool is None:
            # In a thread: in the main one Ray takes SIGTERM for itself.
            self._joining = asyncio.create_task(asyncio.to_thread(self._join))
            self._pool = WorkerPool(await asyncio.shield(self._joining), self._start)
        await self._pool.copy(source, done)

    async def close(self) -> None:
        """See :class:`~cdc_sync.sync.worker_pool.ChunkExecutor`; leaves the cluster."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()
        if self._joining is not None:
            await asyncio.wait({self._joining})
        if self._joined:
            self._joined = False
            await asyncio.to_thread(ray.shutdown)

    def _join(self) -> int:
        """Join the cluster, unless this process has. Returns how many workers there shall be."""
        if not ray.is_initialized():
            local = self._address == "local"
            if local:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                _knock(self._address)
                ray.init(
                    address=self._address,
                    num_cpus=self._num_workers or None if local else None,
                    include_dashboard=False if local else None,
                    namespace="cdc_sync",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"there is no Ray cluster to join at {self._address!r} "
                    f"({type(error).__name__}).",
                    "Start Ray on this machine (ray start --address=HEAD:6379), or correct "
                    "migration.ray_address.",
                ) from error
            self._joined = True
        cpus = max(1, int(ray.cluster_resources().get("CPU", 0)))
        # More than that would wait for room, each with a chunk in its hands.
        workers = min(self._num_workers or _MAX_WORKERS, cpus)
        log.info("ray_joined", nodes=sum(node["Alive"] for node in ray.nodes()), workers=workers)
        return workers

    async def _start(self, place: int) -> ChunkWorker:
        options = {"num_cpus": 1, "scheduling_strategy": "SPREAD", "name": None}
        actor = ray.remote(CopyActor).options(**options).remote()
        try:
            await asyncio.wait_for(_answer(actor.ready.remote()), _PLACEMENT_SECONDS)
        except TimeoutError:
            ray.kill(actor)
            raise NoRoomError(
                f"Ray found no room for a worker in {_PLACEMENT_SECONDS:g} s"
            ) from None
        except BaseException:
            ray.kill(actor)
            raise
        return _RayWorker(actor, self._on_retry)


def _knock(address: str) -> None:
    """Raise ``OSError`` if nobody listens at ``host:port``: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


class _RayWorker:
    """The daemon's end of an actor."""

    def __init__(self, actor: ActorHandle[CopyActor], on_retry: OnRetry) -> None:
        self._actor = actor
        self._on_retry = on_retry
        self._copying: asyncio.Task[bytes] | None = None

    async def copy(self, task: CopyTask) -> ChunkResult:
        self._copying = asyncio.create_task(_answer(self._actor.copy.remote(pickle.dumps(task))))
        while not self._copying.done():
            await asyncio.wait({self._copying}, timeout=_NEWS_SECONDS)
            await self._tell_news()
        answer: ChunkResult | Exception = pickle.loads(self._copying.result())
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def rest(self) -> None:
        await _answer(self._actor.rest.remote())

    async def stop(self) -> None:
        try:
            with contextlib.suppress(TimeoutError, WorkerLostError):
                await asyncio.wait_for(_answer(self._actor.stop.remote()), STOP_SECONDS)
                if self._copying is not None:
                    await asyncio.wait({self._copying}, timeout=STOP_SECONDS)
        finally:
            ray.kill(self._actor)
            if self._copying is not None:
                await asyncio.gather(self._copying, return_exceptions=True)

    async def _tell_news(self) -> None:
        news: _News = pickle.loads(await _answer(self._actor.news.remote()))
        for error, seconds in news:
            self._on_retry(error, seconds)


async def _answer(reference: ray.ObjectRef[bytes]) -> bytes:
    """Await an actor's answer. Raises :class:`WorkerLostError` when the actor or its node has
    gone."""
    try:
        return cast("bytes", await asyncio.wrap_future(reference.future()))
    except ray_errors.RayTaskError:
        raise
    except ray_errors.RayError as error:
        raise WorkerLostError(f"an actor was lost ({type(error).__name__})") from error
