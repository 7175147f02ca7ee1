"""A pool of workers that copy the chunks of a window, wherever they run.

The copy of a chunk is a pure function of connection, snapshot, chunk and plan
(:mod:`cdc_sync.sync.copying`). An executor takes chunks from a source while there are some and time
is left, one for each worker that is free, and says when each is done. A worker that dies is
replaced and its chunk given back to the source, which is harmless: the same rows give the same
points. However a window ends, nothing is in flight any more when :meth:`ChunkExecutor.copy` ends:
what is written next must not be overtaken by the copy.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.connect import LoginRefusedError
from cdc_sync.postgres.snapshot import SnapshotGoneError
from cdc_sync.sync.copy_process import WorkerLostError
from cdc_sync.sync.copying import Chunk, ChunkResult, CopyTask

log = get_logger(__name__)

Done: TypeAlias = Callable[[ChunkResult], Awaitable[None]]

#: Times a chunk may be lost to dying workers or cut connections before the copy gives up: a chunk
#: that kills its worker would do so for ever.
MAX_LOSSES: Final = 5
_FIRST_PAUSE_SECONDS: Final = 0.1
#: The longest pause of a worker that Postgres does not let in.
_REFUSED_PAUSE_SECONDS: Final = 10.0


class ChunkSource(Protocol):
    """Where chunks come from. Called on the event loop; must not wait."""

    def next(self) -> CopyTask | None:
        """Take a chunk; None: nothing more for now (none is left, or the window's time is up)."""
        ...

    def put_back(self, task: CopyTask) -> None:
        """Give back a chunk that was lost with its worker, and has to be copied again."""
        ...


class ChunkExecutor(Protocol):
    """Has chunks copied. All chunks of one call of :meth:`copy` carry the same snapshot."""

    async def copy(self, source: ChunkSource, done: Done) -> None:
        """Copy until the source has nothing more and everything in progress is done.

        ``done`` is awaited for one chunk at a time, while the workers go on with the next. Raises
        :class:`SnapshotGoneError`; :class:`SourceError` when the server is gone or workers die
        again and again; sink errors that are not transient; and what ``done`` raises. However it
        ends, nothing is in flight any more, and no worker holds the snapshot.
        """
        ...

    async def close(self) -> None:
        """Stop the workers; nothing is in flight when it returns. May be called again."""
        ...


class NoRoomError(Exception):
    """There is no room for another worker now."""


class ChunkWorker(Protocol):
    """Copies one chunk at a time, wherever it runs."""

    async def copy(self, task: CopyTask) -> ChunkResult:
        """Copy a chunk. Raises as :func:`copy_chunk`, and :class:`WorkerLostError`."""
        ...

    async def rest(self) -> None:
        """Let go of the snapshot. Raises :class:`WorkerLostError`."""
        ...

    async def stop(self) -> None:
        """End it, and a chunk in progress after its request in flight. It cannot be used after."""
        ...


class WorkerPool:
    """Shares chunks among workers, which are kept from one window to the next.

    ``start`` starts a worker; it is given the number of its place, from 0 on. Raises
    :class:`NoRoomError` to leave the place empty until the next window.
    """

    def __init__(self, workers: int, start: Callable[[int], Awaitable[ChunkWorker]]) -> None:
        self._start = start
        self._workers: list[ChunkWorker | None] = [None] * workers
        self._losses: Counter[Chunk] = Counter()
        self._losses_in_a_row = 0

    async def copy(self, source: ChunkSource, done: Done) -> None:
        """See :class:`ChunkExecutor`."""
        results: asyncio.Queue[ChunkResult | None] = asyncio.Queue(len(self._workers))
        sharing = asyncio.create_task(self._share(source, results))
        reporting = asyncio.create_task(_report(results, done))
        completed = False
        try:
            await asyncio.wait({sharing, reporting}, return_when=asyncio.FIRST_EXCEPTION)
            if sharing.done():
                # What was finished before an error is finished all the same.
                await asyncio.wait({reporting})
            completed = sharing.done() and not (sharing.exception() or reporting.exception())
        finally:
            sharing.cancel()
            reporting.cancel()
            try:
                await _to_the_end(asyncio.wait({sharing, reporting}))
            finally:
                if not completed:
                    await _to_the_end(self.close())
        # An error of one has cancelled the other.
        (reporting if sharing.cancelled() else sharing).result()
        reporting.result()

    async def close(self) -> None:
        """See :class:`ChunkExecutor`."""
        workers = [worker for worker in self._workers if worker is not None]
        self._workers = [None] * len(self._workers)
        await _to_the_end(asyncio.gather(*(worker.stop() for worker in workers)))

    async def _share(self, source: ChunkSource, results: asyncio.Queue[ChunkResult | None]) -> None:
        chunks = _Chunks(source)
        places = [
            asyncio.create_task(self._place(place, chunks, results))
            for place in range(len(self._workers))
        ]
        try:
            await asyncio.wait(places, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in places:
                task.cancel()
            await _to_the_end(asyncio.wait(places))
        await results.put(None)
        for task in places:
            if not task.cancelled():
                task.result()

    async def _place(
        self, place: int, chunks: _Chunks, results: asyncio.Queue[ChunkResult | None]
    ) -> None:
        refused = 0
        while (task := await chunks.take()) is not None:
            try:
                worker = self._workers[place]
                if worker is None:
                    worker = self._workers[place] = await self._start(place)
                result = await worker.copy(task)
            except NoRoomError as error:
                chunks.put_back(task)
                self._without_room(place, error)
                return
            except LoginRefusedError as error:
                refused += 1
                await _await_password(task, error, refused)
                chunks.put_back(task)
                continue
            except (WorkerLostError, SourceError) as error:
                if isinstance(error, SourceError) and not _is_cut_connection(error):
                    raise
                await self._after_loss(place, task, error)
                chunks.put_back(task)
                continue
            chunks.finish()
            if refused:
                refused = 0
                task.source.login.accept()
            self._losses.pop(task.chunk, None)
            self._losses_in_a_row = 0
            await results.put(result)
        await self._rest(place)

    def _without_room(self, place: int, error: NoRoomError) -> None:
        """Leave the chunks to the other workers."""
        if not any(self._workers):
            raise SourceError(
                ErrorKind.SOURCE_UNAVAILABLE,
                f"no copy worker could be started: {error}",
                "Give the cluster free CPUs, or ask for fewer workers (migration.num_workers).",
            ) from error
        log.warning("copy_worker_without_room", place=place, error=str(error))

    async def _after_loss(self, place: int, task: CopyTask, error: Exception) -> None:
        if isinstance(error, WorkerLostError):
            await self._drop(place)
        self._losses[task.chunk] += 1
        self._losses_in_a_row += 1
        times = self._losses[task.chunk]
        if times > MAX_LOSSES or self._losses_in_a_row > MAX_LOSSES * len(self._workers):
            raise SourceError(
                ErrorKind.SOURCE_UNAVAILABLE,
                f"copy workers were lost {self._losses_in_a_row} times in a row; the last time: "
                f"{error}",
                "See the system's log for the reason (out of memory?); fewer workers need less "
                "memory.",
            )
        leaf = task.chunk.leaf
        log.warning(
            "copy_workers_lost",
            leaf=f"{leaf.schema}.{leaf.name}",
            start=task.chunk.start_block,
            error=str(error),
            times=times,
        )
        await asyncio.sleep(_FIRST_PAUSE_SECONDS * 2 ** (times - 1))

    async def _drop(self, place: int) -> None:
        worker, self._workers[place] = self._workers[place], None
        if worker is not None:
            await _to_the_end(worker.stop())

    async def _rest(self, place: int) -> None:
        worker = self._workers[place]
        if worker is not None:
            try:
                await worker.rest()
            except WorkerLostError as error:
                log.info("copy_worker_ended", error=str(error))
                await self._drop(place)


class _Chunks:
    """The chunks of one window. While some are being copied, others may have to wait for one that
    is lost."""

    def __init__(self, source: ChunkSource) -> None:
        self._source = source
        self._in_progress = 0
        self._changed = asyncio.Event()

    async def take(self) -> CopyTask | None:
        while (task := self._source.next()) is None:
            if self._in_progress == 0:
                return None
            await self._changed.wait()
        self._in_progress += 1
        return task

    def put_back(self, task: CopyTask) -> None:
        self._source.put_back(task)
        self.finish()

    def finish(self) -> None:
        self._in_progress -= 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _report(results: asyncio.Queue[ChunkResult | None], done: Done) -> None:
    while (result := await results.get()) is not None:
        await done(result)


async def _await_password(task: CopyTask, error: LoginRefusedError, times: int) -> None:
    """Pass the time before a worker tries again that Postgres did not let in; the snapshot is kept
    meanwhile. How long that may go on is known here: workers are given their settings anew with
    each chunk. Raises :class:`SourceError` when it is over."""
    grace = task.source.credentials_grace_seconds
    refusal = task.source.login.refuse(error.message, grace, None)
    if not refusal.waits:
        message = error.message + refusal.about
        raise SourceError(ErrorKind.SOURCE_AUTH, message, error.remedy) from error
    seconds = min(_FIRST_PAUSE_SECONDS * 2.0 ** (times - 1), _REFUSED_PAUSE_SECONDS)
    log.warning("retrying", kind=error.kind.value, error=error.message, seconds=round(seconds, 2))
    await asyncio.sleep(seconds)


def _is_cut_connection(error: SourceError) -> bool:
    """Whether the snapshot may still be there, so that the chunk is worth another try."""
    return error.kind is ErrorKind.SOURCE_UNAVAILABLE and not isinstance(error, SnapshotGoneError)


async def _to_the_end(work: Awaitable[object]) -> None:
    """Await it to its end, also when cancelled meanwhile; that is raised after."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
