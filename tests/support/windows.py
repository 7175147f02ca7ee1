"""A copy in windows that a test can hold: between two windows, or right before a snapshot is taken.

For pipelines in the test's own process (:mod:`tests.support.pipeline_task`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import pytest

from cdc_sync.config import Settings, SourceSettings
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.snapshot import SnapshotHolder
from cdc_sync.postgres.watch import SourcePosition
from cdc_sync.sync import resync, stream
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.resync import Resync
from cdc_sync.sync.routing import PlannedTable
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

#: Wide enough that the vector is TOASTed, so updates come without it.
DIM: Final = 640
ROWS_A_PAGE: Final = 8
#: Blocks a chunk, at the least, and here.
CHUNK_PAGES: Final = 16
#: One chunk a window.
ONE_CHUNK: Final = {"window_seconds": 0.001, "chunk_rows": 100}
#: The metric tells vectors of other lengths apart, too.
EUCLID: Final = {"metrics": {"emb": "euclid"}}
ROWS: Final = 1_000
#: A row of the first chunk of so many, and one of a chunk far from it.
DONE, LEFT = 20, 700


def vector(first: str, dim: int = DIM) -> str:
    """An SQL expression: a vector with that expression as its first component."""
    return f"('[' || ({first})::text || repeat(',1', {dim - 1}) || ']')::vector"


def create_paged(
    database: Database, rows: int, table: str = "docs", *, dim: int = DIM, partition: str = ""
) -> None:
    """Create a table whose rows lie 8 a page in the order of ``id``, from 1, and stay where they
    are until they are updated: an update moves its row to the end, or to where there is space.

    With ``partition`` (``PARTITION BY ...``) it has no partitions yet."""
    database.execute(
        f"CREATE TABLE {table} (id bigint PRIMARY KEY, note text, n bigint,"
        f" pad text DEFAULT repeat('x', 900), emb vector({dim})) {partition};"
    )
    if not partition:
        database.execute(
            f"ALTER TABLE {table} SET (autovacuum_enabled = false);"
            f"ALTER TABLE {table} ALTER pad SET STORAGE PLAIN"
        )
    if rows:
        database.execute(
            f"INSERT INTO {table} (id, note, n, emb)"
            f" SELECT i, 'note ' || i, i, {vector('i', dim)} FROM generate_series(1, {rows}) i"
        )
    database.execute(f"ANALYZE {table}")


def block_of(database: Database, id_: int, table: str = "docs") -> int:
    """The block in which a row lies."""
    ((block,),) = database.execute(
        f"SELECT (ctid::text::point)[0]::int FROM {table} WHERE id = %s", (id_,)
    )
    assert isinstance(block, int)
    return block


class Windows:
    """Lets windows be opened up to a number; begins with that of the first copy alone.

    With the stream between them: while no window may be opened, changes are applied as usual.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        #: Windows that have been closed, the first copy's among them.
        self.closed = 0
        #: Windows that may be opened, in sum.
        self.limit = 1
        #: Called, each once, right before the tables are locked for a window and its snapshot is
        #: taken. Nothing that they commit has been applied by then.
        self.before_snapshot: list[Callable[[], None]] = []
        self._looks = 0
        monkeypatch.setattr(Resync, "run", self._gated(Resync.run))
        monkeypatch.setattr(Backfill, "window", self._counted(Backfill.window))
        monkeypatch.setattr(SnapshotHolder, "fresh", self._announced(SnapshotHolder.fresh))
        monkeypatch.setattr(Resync, "observe", self._looked(Resync.observe))
        # Nothing to wait for where nothing happens.
        monkeypatch.setattr(stream, "_IDLE_SECONDS", 0.05)
        monkeypatch.setattr(resync, "_RETRY_SECONDS", 0.1)

    def _gated(self, run: Callable[..., object]) -> object:
        async def gated(resync: Resync, applied: int) -> None:
            if self.closed < self.limit:
                await run(resync, applied)  # type: ignore[misc]

        return gated

    def _counted(self, window: Callable[..., object]) -> object:
        async def counted(
            backfill: Backfill, tables: Sequence[PlannedTable], holder: SnapshotHolder
        ) -> object:
            try:
                return await window(backfill, tables, holder)  # type: ignore[misc]
            finally:
                self.closed += 1

        return counted

    def _announced(self, fresh: Callable[..., object]) -> object:
        def announced(
            source: SourceSettings, tables: Sequence[Table], *, lock_timeout_seconds: float
        ) -> object:
            while self.before_snapshot:
                self.before_snapshot.pop()()
            return fresh(source, tables, lock_timeout_seconds=lock_timeout_seconds)

        return announced

    def _looked(self, observe: Callable[..., None]) -> object:
        def looked(resync: Resync, position: SourcePosition, found: dict[int, str]) -> None:
            observe(resync, position, found)
            self._looks += 1

        return looked

    def look_away(self, position: SourcePosition, found: dict[int, str]) -> None:
        """A look that sees nothing."""
        self._looks += 1

    async def open(self, life: Running, windows: int) -> None:
        """Let so many more be opened, and wait until they are closed, or nothing is left."""
        self.limit = self.closed + windows
        await life.wait(
            lambda: self.closed >= self.limit or life.state == "streaming", "the window"
        )

    async def finish(self, life: Running) -> None:
        """Copy the rest in windows without an end, until everything is copied."""
        backfill = life.pipeline._together.backfill
        migration = backfill._settings.migration.model_copy(update={"window_seconds": 60.0})
        backfill._settings = backfill._settings.model_copy(update={"migration": migration})
        self.limit = 1_000_000
        await self.wait_settled(life)

    async def begin_resync(self, life: Running) -> None:
        """Ask for the first table to be read again, and copy one chunk of it."""
        backfill = life.pipeline._together.backfill
        backfill._settings = life.pipeline.settings
        self.limit = self.closed + 1
        body = {
            "pipeline": life.pipeline.settings.pipeline.name,
            "table": life.pipeline.tables[0].name,
        }
        life.database.execute(
            "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (json.dumps({"resync": body}),)
        )
        await life.wait(lambda: self.closed >= self.limit, "the first window")

    async def wait_settled(self, life: Running) -> None:
        """Until nothing is being copied, and the catalog was then looked at and gave no cause to
        copy anything again."""
        relations = life.pipeline._relations
        assert relations is not None
        since: int | None = None

        def settled() -> bool:
            nonlocal since
            if life.state != "streaming" or relations.wanted:
                since = None
            elif since is None:
                since = self._looks
            # A look may be under way already, so it is the one after the next that tells.
            return since is not None and self._looks >= since + 2

        await life.wait(settled, "the end of the copy")


# -- the table docs


def docs_settings(database: Database, qdrant: QdrantTarget, **table: object) -> Settings:
    """The table ``docs``, one chunk a window."""
    return pipeline_settings(
        database, qdrant, {"name": "docs", **EUCLID, **table}, migration=ONE_CHUNK
    )


@contextlib.asynccontextmanager
async def first_window(
    database: Database, qdrant: QdrantTarget, settings: Settings | None = None
) -> AsyncIterator[Running]:
    """A pipeline that has copied the first chunk of ``docs``, streams, and opens no window."""
    settings = settings or docs_settings(database, qdrant)
    async with running(settings, database, qdrant, wait=False) as life:
        await life.wait(
            lambda: life.pipeline._streaming is not None and life.state == "snapshotting",
            "the stream",
        )
        await life.caught_up()
        yield life


def make_space(database: Database) -> None:
    """Free some of the first blocks, so that what is updated moves there."""
    database.execute("DELETE FROM docs WHERE id <= 8")
    # Else so few dead rows are left in their blocks.
    database.execute("VACUUM (INDEX_CLEANUP ON) docs")


def move(database: Database, id_: int) -> tuple[int, int]:
    """Update a row without its vector; returns the block where it was, and where it is."""
    before = block_of(database, id_)
    database.execute("UPDATE docs SET note = 'moved' WHERE id = %s", (id_,))
    return before, block_of(database, id_)


def is_copied(life: Running, id_: int) -> bool:
    found = life.qdrant.client().retrieve(str(life.pipeline.settings.tables[0].collection), [id_])
    return bool(found)


def write_some(database: Database, first: int = LEFT) -> None:
    """Changes of rows of which some are copied and some are not, without their vectors."""
    database.execute(
        f"UPDATE docs SET note = 'later' WHERE id IN ({DONE}, {first});"
        f"UPDATE docs SET id = {first + 1000} WHERE id = {first + 1};"
        f"DELETE FROM docs WHERE id IN ({DONE + 1}, {first + 2});"
        f"INSERT INTO docs (id, note) VALUES ({first + 1001}, 'inserted')"
    )
