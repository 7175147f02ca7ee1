"""Backfill: copying tables under one snapshot, in chunks, by several worker processes.

The snapshot is held by a connection of the daemon (:class:`SnapshotHolder`) for as long as the copy
runs, so a worker that dies is replaced and its chunk copied again, which is harmless: the same rows
give the same points.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from cdc_sync.config import Settings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.table import Leaf
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.snapshot import SnapshotGoneError, import_snapshot
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.copying import Chunk, ChunkResult, CopyTask, copy_chunk, copy_in_worker
from cdc_sync.sync.routing import PlannedTable

log = get_logger(__name__)

#: Rows a chunk, about: small enough to spread evenly and to lose little with a worker, large enough
#: not to be all overhead.
CHUNK_ROWS = 5_000
_MIN_CHUNK_PAGES = 16
_MAX_CHUNK_PAGES = 4_096

#: Times a chunk may be lost to dying workers before the copy gives up: a chunk that kills its
#: worker would do so for ever.
_MAX_CHUNK_LOSSES = 5


def cut(planned: PlannedTable) -> list[Chunk]:
    """Cut a table (each leaf partition) into ranges of blocks.

    The last range of a leaf is open-ended, for blocks added since its size was read.
    """
    chunks = []
    for leaf in planned.table.leaves:
        step = _chunk_pages(leaf)
        starts = list(range(0, max(leaf.pages, 1), step))
        for i, start in enumerate(starts):
            end = starts[i + 1] if i + 1 < len(starts) else None
            chunks.append(Chunk(planned.plan.oid, leaf, start, end))
    return chunks


def _chunk_pages(leaf: Leaf) -> int:
    if leaf.estimated_rows > 0 and leaf.pages > 0:
        pages = round(CHUNK_ROWS * leaf.pages / leaf.estimated_rows)
    else:
        pages = 128
    return min(max(pages, _MIN_CHUNK_PAGES), _MAX_CHUNK_PAGES)


@dataclass(slots=True)
class CopyTotals:
    """Sums over the chunks of one table."""

    rows: int = 0
    bytes: int = 0
    refused: int = 0


class Backfill:
    """Copies tables under a snapshot that somebody holds open."""

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        metrics: Metrics,
        on_chunk: Callable[[PlannedTable, ChunkResult], None],
        on_refused: Callable[[PlannedTable, Sequence[tuple[str, str]]], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._metrics = metrics
        self._on_chunk = on_chunk
        self._on_refused = on_refused

    @property
    def workers(self) -> int:
        """Number of worker processes."""
        return self._settings.migration.num_workers or os.cpu_count() or 1

    async def copy(self, tables: Sequence[PlannedTable], snapshot: str) -> dict[int, CopyTotals]:
        """Copy the tables; returns totals by table OID once every chunk is completed by Qdrant.

        Raises :class:`SourceError` when the snapshot or the server is gone.
        """
        by_oid = {planned.plan.oid: planned for planned in tables}
        tasks = [
            CopyTask(
                self._settings.source,
                self._settings.qdrant,
                snapshot,
                planned.plan,
                planned.row_filter,
                chunk,
            )
            for planned in tables
            for chunk in cut(planned)
        ]
        totals = {oid: CopyTotals() for oid in by_oid}
        for planned in tables:
            estimate = sum(max(0.0, leaf.estimated_rows) for leaf in planned.table.leaves)
            self._metrics.add_table(planned.name).snapshot_rows_estimated.set(estimate)
            self._metrics.add_table(planned.name).snapshot_chunks["pending"].set(
                sum(1 for t in tasks if t.chunk.table_oid == planned.plan.oid)
            )

        async def done(result: ChunkResult) -> None:
            planned = by_oid[result.chunk.table_oid]
            total = totals[planned.plan.oid]
            total.rows += result.rows
            total.bytes += result.bytes
            total.refused += len(result.refused)
            self._record(planned, result)
            if result.refused:
                await self._on_refused(planned, result.refused)
            self._on_chunk(planned, result)

        if self._sink.multi_process and self.workers > 1 and len(tasks) > 1:
            await self._copy_in_processes(tasks, done)
        else:
            await self._copy_here(tasks, done)
        return totals

    def _record(self, planned: PlannedTable, result: ChunkResult) -> None:
        table = self._metrics.add_table(planned.name)
        table.snapshot_rows.inc(result.rows)
        table.snapshot_bytes.inc(result.bytes)
        table.values_nulled.inc(result.nulled)
        table.snapshot_chunks["pending"].dec()
        table.snapshot_chunks["done"].inc()
        self._metrics.snapshot_chunk_duration_seconds.observe(result.seconds)

    async def _copy_here(
        self, tasks: Sequence[CopyTask], done: Callable[[ChunkResult], Awaitable[None]]
    ) -> None:
        if not tasks:
            return
        connection = await asyncio.to_thread(
            connect, self._settings.source, application_name="cdc_sync copy", autocommit=False
        )
        try:
            await asyncio.to_thread(import_snapshot, connection, tasks[0].snapshot)
            for task in tasks:
                await done(await copy_chunk(connection, self._sink.writer(task.plan), task))
        finally:
            connection.close()

    async def _copy_in_processes(
        self, tasks: Sequence[CopyTask], done: Callable[[ChunkResult], Awaitable[None]]
    ) -> None:
        left = list(tasks)
        losses = 0
        while left:
            pool = _pool(min(self.workers, len(left)))
            try:
                left = await self._run_pool(pool, left, done)
            finally:
                _stop_pool(pool)
            if left:
                losses += 1
                if losses > _MAX_CHUNK_LOSSES:
                    raise SourceError(
                        ErrorKind.SOURCE_UNAVAILABLE,
                        f"copy workers died {losses} times, last with {len(left)} chunks to go",
                        "See the system's log for the reason (out of memory?); fewer workers need "
                        "less memory.",
                    )
                log.warning("copy_workers_lost", chunks_left=len(left), times=losses)

    async def _run_pool(
        self,
        pool: ProcessPoolExecutor,
        tasks: Sequence[CopyTask],
        done: Callable[[ChunkResult], Awaitable[None]],
    ) -> list[CopyTask]:
        """Run tasks in a pool; returns those that were not copied because a worker died."""
        loop = asyncio.get_running_loop()
        running: dict[asyncio.Future[ChunkResult], CopyTask] = {}
        lost: list[CopyTask] = []
        for task in tasks:
            try:
                running[loop.run_in_executor(pool, copy_in_worker, task)] = task
            except BrokenProcessPool:
                lost.append(task)
        try:
            while running:
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for future in finished:
                    task = running.pop(future)
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        lost.append(task)
                        continue
                    except SnapshotGoneError:
                        raise
                    except SourceError as error:
                        if error.kind is not ErrorKind.SOURCE_UNAVAILABLE:
                            raise
                        # A cut connection: the snapshot may still be there, so the chunk is tried
                        # again.
                        lost.append(task)
                        continue
                    await done(result)
        finally:
            for future in running:
                future.cancel()
        return lost


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: forking a process that has gRPC threads and open connections is not safe.
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(),),
    )


_PR_SET_PDEATHSIG = 1


def _start_worker(daemon_pid: int) -> None:
    # Ctrl-C goes to the whole process group; the daemon decides when workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker must not outlive a killed daemon: it would write rows of an old snapshot over those
    # of the next copy.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != daemon_pid:
        os._exit(1)


def _stop_pool(pool: ProcessPoolExecutor) -> None:
    """Stop without waiting for chunks in progress: their points are written again by the next
    copy."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
