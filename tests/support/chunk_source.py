"""A table with its chunks, to be copied by an executor without a pipeline around it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest

from cdc_sync.config import Settings
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.snapshot import SnapshotHolder
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.copying import Chunk, ChunkResult, CopyTask
from cdc_sync.sync.planning import plan_pipeline
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.worker_pool import ChunkExecutor
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.qdrant_control import Faults, QdrantTarget


@dataclass
class Chunks:
    """A source of chunks that keeps a record. ``give``: how many there are until time is up."""

    tasks: deque[CopyTask]
    give: int = 1 << 30
    taken: int = 0
    put_back_tasks: list[CopyTask] = field(default_factory=list)
    results: list[ChunkResult] = field(default_factory=list)

    @classmethod
    def of(cls, tasks: Iterable[CopyTask]) -> Chunks:
        """Those tasks."""
        return cls(deque(tasks))

    def next(self) -> CopyTask | None:
        """Take a chunk."""
        if not self.tasks or self.taken >= self.give:
            return None
        self.taken += 1
        return self.tasks.popleft()

    def put_back(self, task: CopyTask) -> None:
        """Give back a chunk."""
        self.put_back_tasks.append(task)
        self.tasks.appendleft(task)
        self.taken -= 1

    async def done(self, result: ChunkResult) -> None:
        """Note a result."""
        self.results.append(result)

    @property
    def copied(self) -> list[int]:
        """First blocks of the chunks that are done."""
        return sorted(result.chunk.start_block for result in self.results)


@dataclass(frozen=True)
class CopyCase:
    """A table, its settings and its plan."""

    database: Database
    settings: Settings
    planned: PlannedTable

    def tasks(self, snapshot: str, chunks: int, **options: object) -> list[CopyTask]:
        """Cut the table into so many chunks."""
        (leaf,) = self.planned.table.leaves
        assert leaf.pages >= chunks, "the table is too small"
        starts = [leaf.pages * i // chunks for i in range(chunks)]
        return [
            CopyTask(
                source=self.settings.source,
                qdrant=self.settings.qdrant,
                snapshot=snapshot,
                plan=self.planned.plan,
                row_filter=None,
                chunk=Chunk(self.planned.plan.oid, leaf, start, end),
                **options,  # type: ignore[arg-type]
            )
            for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[str]:
        """Hold a snapshot."""
        holder = SnapshotHolder.fresh(self.settings.source, [self.planned.table])
        try:
            yield holder.snapshot_id
        finally:
            holder.close()

    def assert_equal(self, qdrant: QdrantTarget) -> None:
        """The table and its collection have the same content."""
        (table,) = self.settings.tables
        assert table.collection is not None
        assert_equal(
            self.database.url,
            table.name,
            qdrant_url=qdrant.url,
            collection=table.collection,
            api_key=qdrant.api_key,
        )

    def copy_transactions(self) -> int:
        """Number of workers' connections that are in a transaction."""
        ((count,),) = self.database.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'cdc_sync copy' AND xact_start IS NOT NULL"
        )
        assert isinstance(count, int)
        return count


def create_copied(database: Database) -> None:
    """Create ``docs`` with 2,000 rows, large enough for several chunks."""
    database.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(4));"
        "INSERT INTO docs SELECT i, repeat('x', 300), ARRAY[i, 1, 2, 3]::vector(4)"
        " FROM generate_series(0, 1999) i; ANALYZE docs"
    )


@contextlib.asynccontextmanager
async def ready_sink(case: CopyCase) -> AsyncIterator[Sink]:
    """The case's sink, with the collection of its table."""
    sink = await open_sink(case.settings.qdrant)
    try:
        await sink.ensure_collection(case.planned.plan)
        yield sink
    finally:
        await sink.close()


async def wait_until(condition: Callable[[], bool], what: str, seconds: float = 150.0) -> None:
    """Wait while the event loop goes on."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        await asyncio.sleep(0.02)


async def begin_held_copy(
    executor: ChunkExecutor, source: Chunks, faults: Faults, requests: int
) -> asyncio.Task[None]:
    """Copy, and wait until so many requests are in flight; ``faults.release`` lets them end."""
    faults.hold("write", times=requests)
    copying = asyncio.create_task(executor.copy(source, source.done))
    await wait_until(lambda: faults.held() == requests, "requests in flight")
    return copying


async def cancel_held_copy(copying: asyncio.Task[None], faults: Faults) -> None:
    """Cancel it: it ends after its requests in flight, and begins no other."""
    faults.clear_log()
    copying.cancel()
    await asyncio.sleep(0.5)
    assert not copying.done()
    faults.release()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(copying, 60)
    assert [op for op in faults.operations() if "psert" in op] == []


def plan_case(database: Database, settings: Settings) -> CopyCase:
    """Read and plan the table of the settings."""
    with connect(settings.source) as connection:
        (planned,) = plan_pipeline(connection, settings).tables
    return CopyCase(database, settings, planned)
