"""Executors: what has the chunks of a window copied. Local processes, this process, or a Ray
cluster (:mod:`cdc_sync.sync.ray_executor`); each is a pool of workers
(:mod:`cdc_sync.sync.worker_pool`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError
from cdc_sync.ops.logging import get_logger
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.copy_process import STOP_SECONDS, ProcessWorker
from cdc_sync.sync.copying import ChunkCopier, ChunkResult, CopyTask, OnRetry
from cdc_sync.sync.worker_pool import (
    ChunkExecutor,
    ChunkSource,
    ChunkWorker,
    Done,
    WorkerPool,
)

log = get_logger(__name__)

_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def log_retry(error: CdcSyncError, seconds: float) -> None:
    """Say in the log that a worker tries again."""
    log.warning("retrying", kind=error.kind.value, error=error.message, seconds=round(seconds, 2))


def available_cpus(quota: Path = _QUOTA) -> int:
    """How many CPUs this process may use: by its affinity, and by the quota of its control group
    (``cpu.max`` of cgroup v2: microseconds a period, the period), where there is one."""
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        microseconds, period = quota.read_text().split()
        return max(1, min(cpus, round(int(microseconds) / int(period))))
    except (OSError, ValueError):  # none, or "max"
        return cpus


def open_executor(settings: Settings, sink: Sink, on_retry: OnRetry = log_retry) -> ChunkExecutor:
    """The executor that the settings ask for; it starts workers as there are chunks for them.

    ``on_retry`` is told of retries as they happen, in whichever process. Raises
    :class:`ConfigError` where Ray is asked for but not installed, or cannot write to the sink.
    """
    migration = settings.migration
    workers = migration.num_workers or available_cpus()
    if migration.executor == "ray":
        if not sink.multi_process:
            raise ConfigError(
                "migration.executor is ray, but an embedded database can be written to by this "
                "process only.",
                "Set migration.executor to processes, or qdrant.url to a server.",
            )
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "migration.executor is ray, but Ray is not installed.",
                "pip install 'cdc-sync[ray]', here and on every node of the cluster.",
            )
        # Here and not above, since the package is optional.
        from cdc_sync.sync.ray_executor import RayCluster

        return RayCluster(settings, on_retry)
    here = InProcess(sink, on_retry)
    if not sink.multi_process or workers == 1:
        return here
    return _FewHere(here, LocalProcesses(workers, on_retry))


class LocalProcesses(WorkerPool):
    """Copies in processes of this machine."""

    def __init__(self, workers: int, on_retry: OnRetry = log_retry) -> None:
        async def start(place: int) -> ChunkWorker:
            return ProcessWorker(on_retry)

        super().__init__(workers, start)


class InProcess(WorkerPool):
    """Copies in this process, one chunk after the other, by the sink that is open."""

    def __init__(self, sink: Sink, on_retry: OnRetry = log_retry) -> None:
        async def start(place: int) -> ChunkWorker:
            return _WorkerHere(sink, on_retry)

        super().__init__(1, start)


class _WorkerHere:
    def __init__(self, sink: Sink, on_retry: OnRetry) -> None:
        self._copier = ChunkCopier(sink)
        self._on_retry = on_retry
        self._stop = asyncio.Event()
        self._copying: asyncio.Task[ChunkResult] | None = None

    async def copy(self, task: CopyTask) -> ChunkResult:
        # Cancelled is the waiting only: the request in flight has to be answered.
        self._copying = asyncio.create_task(self._copier.copy(task, self._stop, self._on_retry))
        return await asyncio.shield(self._copying)

    async def rest(self) -> None:
        self._copier.rest()

    async def stop(self) -> None:
        self._stop.set()
        if self._copying is not None:
            await asyncio.wait({self._copying}, timeout=STOP_SECONDS)
            self._copying.cancel()
            await asyncio.gather(self._copying, return_exceptions=True)
        await self._copier.close()


class _FewHere:
    """Copies a single chunk in this process: starting another takes longer than that."""

    def __init__(self, here: ChunkExecutor, processes: ChunkExecutor) -> None:
        self._here = here
        self._processes = processes

    async def copy(self, source: ChunkSource, done: Done) -> None:
        first = source.next()
        second = source.next() if first is not None else None
        taken = _Taken([task for task in (first, second) if task is not None], source)
        await (self._here if second is None else self._processes).copy(taken, done)

    async def close(self) -> None:
        await self._here.close()
        await self._processes.close()


class _Taken:
    """A source of which some chunks were taken already."""

    def __init__(self, taken: list[CopyTask], source: ChunkSource) -> None:
        self._taken = taken
        self._source = source

    def next(self) -> CopyTask | None:
        return self._taken.pop(0) if self._taken else self._source.next()

    def put_back(self, task: CopyTask) -> None:
        self._source.put_back(task)
