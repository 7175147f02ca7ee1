"""How updates of metadata are best written, of rows whose vectors the stream does not carry:

- batch: the payloads as ``overwrite_payload`` operations of one UpdateBatch that is not waited for,
  and a barrier after it (what :mod:`cdc_sync.qdrant.partials` does)
- waited batch: the same, with ``wait=true`` and no barrier
- read back: the stored vectors are read, and whole points upserted (under Cosine these are the
  normalised vectors, no longer the source's)

An embedded database has the first and the last. Each is measured on the test server, an embedded
database, and the server that CDC_SYNC_TEST_QDRANT_URL names, in rounds in which they take turns::

    python -m tests.bench.partials --rows 8000 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import struct
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import qdrant_edge as edge
from qdrant_client import grpc as q

from cdc_sync.config import QdrantSettings
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.qdrant import messages
from cdc_sync.qdrant.edge_database import EdgeDatabase
from cdc_sync.qdrant.edge_writer import EdgeWriter
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.rpc import GET, UPDATE_BATCH, UPSERT, Rpc
from cdc_sync.qdrant.sink import Changes
from cdc_sync.qdrant.writer import ServerWriter
from cdc_sync.rows import PointId, Row
from tests.bench.engine import Scratch
from tests.bench.rounds import Median, take_turns
from tests.bench.sinks import BenchSink, ServerBench, planned_as, sinks
from tests.bench.usage import Cost, Meter
from tests.support import hot_path

#: Points a request: what the writer sends of a full batch.
_REQUEST_POINTS: Final = 512
_BATCH_ROWS: Final = 4096
_VECTOR: Final = len(hot_path.row(1)) - 1

Rows: TypeAlias = Sequence[tuple[PointId, Row]]
Write: TypeAlias = Callable[[Rows], Awaitable[object]]


class Server:
    """The ways of writing to a server."""

    def __init__(self, rpc: Rpc, settings: QdrantSettings, plan: TablePlan) -> None:
        self._rpc, self._plan = rpc, plan
        self._lanes = settings.parallel_requests
        self._codec = WireCodec(plan)
        self._writer = ServerWriter(rpc, settings, plan)

    async def load(self, rows: Rows) -> None:
        """Write the points that are updated then."""
        await self._writer.apply(Changes(upserts=list(rows)))

    def ways(self) -> dict[str, Write]:
        """By name."""
        return {
            "batch": lambda rows: self._writer.apply(Changes(partials=list(rows))),
            "waited batch": lambda rows: self._side_by_side(rows, self._waited),
            "read back": lambda rows: self._side_by_side(rows, self._read_back),
        }

    async def _side_by_side(
        self, rows: Rows, write: Callable[[Rows, int], Awaitable[None]]
    ) -> None:
        left = deque(_slices(rows))

        async def lane(number: int) -> None:
            while left:
                await write(left.popleft(), number)

        await asyncio.gather(*(lane(number) for number in range(self._lanes)))

    async def _waited(self, rows: Rows, lane: int) -> None:
        codec = self._codec
        todo = [
            messages.overwrite_payload(codec.point_id(id_), codec.payload_entries(row, 1))
            for id_, row in rows
        ]
        request = messages.update_batch(self._plan.collection, todo, wait=True)
        answer = await self._rpc.call(UPDATE_BATCH, request, lane)
        assert all(result.status == q.UpdateStatus.Completed for result in answer.result)

    async def _read_back(self, rows: Rows, lane: int) -> None:
        codec, collection = self._codec, self._plan.collection
        ids = [codec.point_id(id_) for id_, _ in rows]
        request = messages.get(collection, ids, with_payload=False, with_vectors=True)
        stored: dict[PointId, bytes] = {}
        for point in (await self._rpc.call(GET, request, lane)).result:
            (vector,) = messages.retrieved_vectors(point.vectors).values()
            assert isinstance(vector, np.ndarray)
            stored[messages.point_id_value(point.id)] = (
                struct.pack(">HH", len(vector), 0) + vector.astype(">f4").tobytes()
            )
        points = [codec.point(id_, [*row[:_VECTOR], stored[id_]]) for id_, row in rows]
        answer = await self._rpc.call(UPSERT, messages.upsert(collection, points), lane)
        assert answer.result.status == q.UpdateStatus.Completed


class Embedded:
    """The ways of writing to an embedded database."""

    def __init__(self, database: EdgeDatabase, plan: TablePlan) -> None:
        self._database, self._plan = database, plan
        self._codec = PythonCodec(plan)
        self._writer = EdgeWriter(database, plan)

    async def load(self, rows: Rows) -> None:
        """Write the points that are updated then."""
        await self._writer.apply(Changes(upserts=list(rows)))

    def ways(self) -> dict[str, Write]:
        """By name."""
        return {
            "batch": lambda rows: self._writer.apply(Changes(partials=list(rows))),
            "read back": lambda rows: self._database.run(self._read_back, rows),
        }

    def _read_back(self, rows: Rows) -> None:
        collection = self._plan.collection
        for some in _slices(rows):
            found = self._database.shard(collection).retrieve(
                [id_ for id_, _ in some], with_payload=False, with_vector=True
            )
            vectors = {record.id: record.vector for record in found}
            points = [
                edge.Point(id_, vectors[id_], self._codec.payload(row))  # type: ignore[arg-type]
                for id_, row in some
            ]
            self._database.update(collection, edge.UpdateOperation.upsert_points(points))


def _slices(rows: Rows) -> Iterator[Rows]:
    return (rows[at : at + _REQUEST_POINTS] for at in range(0, len(rows), _REQUEST_POINTS))


@asynccontextmanager
async def _opened(sink: BenchSink, plan: TablePlan) -> AsyncIterator[Server | Embedded]:
    settings = QdrantSettings.model_validate(sink.settings())
    made = await open_sink(settings)
    await made.ensure_collection(plan)
    await made.close()
    if isinstance(sink, ServerBench):
        host, _, port = sink.address.rpartition(":")
        rpc = Rpc(settings, host, int(port), secure=settings.url.startswith("https:"))
        try:
            yield Server(rpc, settings, plan)
        finally:
            rpc.close()
            sink.drop(plan.collection)
    else:
        database = EdgeDatabase(Path(settings.url.removeprefix("edge:")))
        try:
            yield Embedded(database, plan)
        finally:
            await database.close()


def measure(sink: BenchSink, rows: int, rounds: int) -> dict[str, list[Cost]]:
    """The costs of the ways, round by round."""
    plan = planned_as(hot_path.planned_table(), sink.collection()).plan
    meter = Meter(sink=sink.pid)
    whole = [(number, hot_path.row(number)) for number in range(1, rows + 1)]
    updated = [(number, hot_path.row(number, unchanged=True)) for number in range(1, rows + 1)]

    async def write(run: Write) -> Cost:
        began = meter.begin()
        for start in range(0, rows, _BATCH_ROWS):
            await run(updated[start : start + _BATCH_ROWS])
        return began.until(meter.end())

    with asyncio.Runner() as loop:
        context = _opened(sink, plan)
        target = loop.run(context.__aenter__())
        try:
            loop.run(target.load(whole))
            ways = target.ways()
            turns = [partial(_run, loop, write, way) for way in ways.values()]
            costs = take_turns(rounds, *turns)
        finally:
            loop.run(context.__aexit__(None, None, None))
    return dict(zip(ways, costs, strict=True))


def _run(
    loop: asyncio.Runner, write: Callable[[Write], Coroutine[None, None, Cost]], way: Write
) -> Cost:
    return loop.run(write(way))


def report(sink: BenchSink, rows: int, costs: dict[str, list[Cost]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    for name, found in costs.items():
        rate = Median.of([cost.rate(rows) for cost in found]).value
        ours = Median.of([cost.per_row(rows) for cost in found]).value
        theirs = Median.of([cost.other_per_row("sink", rows) for cost in found]).value
        shown = f"{theirs:.1f}" if sink.pid is not None else ""
        yield f"| {sink.title} | {name} | {rate:,.0f} | {ours:.1f} | {shown} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.partials")
    parser.add_argument("--rows", type=int, default=8_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    scratch = Scratch()
    sys.stdout.write("| sink | way | rows/s | our CPU, µs/row | the server's |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    try:
        with sinks(scratch) as opened:
            for sink in opened:
                costs = measure(sink, options.rows, options.rounds)
                sys.stdout.writelines(report(sink, options.rows, costs))
                sys.stdout.flush()
    finally:
        scratch.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
