"""A table with its chunks, to be copied by an executor without a pipeline around it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cdc_sync.config import Settings
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.snapshot import SnapshotHolder
from cdc_sync.sync.copying import Chunk, ChunkResult, CopyTask
from cdc_sync.sync.planning import plan_pipeline
from cdc_sync.sync.routing import PlannedTable
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.qdrant_control import QdrantTarget


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


def plan_case(database: Database, settings: Settings) -> CopyCase:
    """Read and plan the table of the settings."""
    with connect(settings.source) as connection:
        (planned,) = plan_pipeline(connection, settings).tables
    return CopyCase(database, settings, planned)
