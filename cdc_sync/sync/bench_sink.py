"""What Qdrant takes, into a scratch collection: by itself, and with all of our part before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator, Iterator
from typing import Final

from cdc_sync.errors import MappingError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.postgres.connect import PgConnection, interrupt
from cdc_sync.postgres.measuring import limit_statements
from cdc_sync.postgres.snapshot import copy_rows
from cdc_sync.qdrant.scratch import Scratch
from cdc_sync.qdrant.settle import settle
from cdc_sync.qdrant.sink import Applied, Changes, PreparedRequest
from cdc_sync.rows import Row
from cdc_sync.sync.bench_figures import Bounds, Clock, Figure, Measured, row_bytes
from cdc_sync.sync.bench_source import MadeStream, Sample, range_query, ranges_of, within_time
from cdc_sync.sync.routing import PlannedTable

#: Frames that are decoded before the event loop gets its turn.
_FRAMES: Final = 256


class SinkBench:
    """Measures one table's way into a scratch collection. ``refused``: points that Qdrant would not
    take. Methods raise :class:`SinkError`.
    """

    def __init__(self, scratch: Scratch, sample: Sample, bounds: Bounds) -> None:
        self._scratch = scratch
        self._sample = sample
        self._bounds = bounds
        self.refused = 0

    async def limit(self, lanes: int) -> Figure:
        """Send encoded requests, so many together, and do nothing else."""
        writer = await self._scratch.fresh()
        points = self._sample.points[: self._bounds.rows]
        waiting = deque(await asyncio.to_thread(writer.prepare, points))
        clock = Clock(self._bounds)
        with clock:
            tasks = [
                asyncio.create_task(self._send(lane, waiting, clock))
                for lane in range(min(lanes, len(waiting)))
            ]
            await settle(tasks)
        return clock.figure(Measured.SINK_LIMIT)

    async def _send(self, lane: int, waiting: deque[PreparedRequest], clock: Clock) -> None:
        while waiting and not clock.over:
            request = waiting.popleft()
            await request.send(lane)
            clock.count(request.points, round(request.points * self._sample.row_bytes))

    async def copy(
        self, connection: PgConnection, planned: PlannedTable, batch_rows: int
    ) -> Figure:
        """Copy rows as one worker does: the next are read while the last are written. Closes the
        connection. Raises :class:`SourceError` too."""
        writer = await self._scratch.fresh()
        point_id = compile_point_id(planned.plan)
        clock = Clock(self._bounds)
        batches = _batches(connection, planned, batch_rows, clock)
        reading = _read(batches)
        try:
            with clock:
                while rows := await asyncio.shield(reading):
                    reading = _read(batches)
                    changes = Changes()
                    for row in rows:
                        try:
                            changes.upserts.append((point_id(row), row))
                        except MappingError:
                            self.refused += 1
                    self._taken(await writer.apply(changes))
                    clock.count(len(rows), sum(map(row_bytes, rows)))
                    if clock.over:
                        break
        finally:
            if not reading.done():
                # The thread cannot be cancelled, and uses the connection until it ends.
                interrupt(connection)
            await asyncio.gather(reading, return_exceptions=True)
            batches.close()
            connection.close()
        return clock.figure(Measured.COPY)

    async def stream(self, stream: MadeStream) -> Figure:
        """Decode and write batch after batch, the next being gathered while the last is written.

        A stream of updates goes over the points that one of new rows has written before it.
        """
        writer = self._scratch.writer() if stream.metadata_only else await self._scratch.fresh()
        transactions = list(stream.transactions(self._sample.points))
        clock = Clock(self._bounds)
        writing: asyncio.Task[Applied] | None = None
        try:
            with clock:
                for frames in transactions:
                    for start in range(0, len(frames), _FRAMES):
                        stream.feed(frames[start : start + _FRAMES])
                        await asyncio.sleep(0)
                    changes = stream.take()
                    if writing is not None:
                        self._taken(await writing)
                    if clock.over:
                        break
                    writing = asyncio.create_task(writer.apply(changes))
                    clock.count(len(changes), sum(map(len, frames)))
                if writing is not None:
                    self._taken(await writing)
        finally:
            if writing is not None and not writing.done():
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
        return clock.figure(Measured.UPDATES if stream.metadata_only else Measured.STREAM)

    def _taken(self, applied: Applied) -> None:
        self.refused += len(applied.refused)


def _read(batches: Iterator[list[Row]]) -> asyncio.Task[list[Row]]:
    return asyncio.create_task(asyncio.to_thread(next, batches, []))


def _batches(
    connection: PgConnection, planned: PlannedTable, batch_rows: int, clock: Clock
) -> Generator[list[Row], None, None]:
    """Rows of ranges of the table until the clock is over."""
    for one in ranges_of(planned, clock.bounds):
        if clock.over:
            return
        query, text = range_query(planned, one)
        with within_time():
            limit_statements(connection, clock.left_seconds)
            yield from copy_rows(connection, query, text, batch_rows=batch_rows)
