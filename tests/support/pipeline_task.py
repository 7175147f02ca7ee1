"""A pipeline as a task of the test's own event loop: no process to start, and its parts can be
watched, slowed or broken.

What it polls and how long it backs off is short here, so that tests need not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

from cdc_sync.config import Settings
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.sync import monitor, retry
from cdc_sync.sync.pipeline import Pipeline
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.qdrant_control import QdrantTarget

_PATIENCE_SECONDS = 90.0
_numbers = itertools.count(1)


def pipeline_settings(
    database: Database,
    qdrant: QdrantTarget,
    *tables: Mapping[str, object] | str,
    pg_url: str | None = None,
    pipeline: Mapping[str, object] | None = None,
    target: Mapping[str, object] | None = None,
    migration: Mapping[str, object] | None = None,
) -> Settings:
    """Settings for tables (by name, or as in the configuration); slot and publication have one name
    of their own, a collection without a name gets one."""
    name = f"p{next(_numbers)}_{database.name}"[:60]
    sections = [{"name": t} if isinstance(t, str) else dict(t) for t in tables]
    for section in sections:
        section.setdefault("collection", qdrant.new_collection_name())
    return Settings.model_validate(
        {
            "source": {"url": pg_url or database.url, "slot": name, "publication": name},
            "qdrant": {"url": qdrant.url, "api_key": qdrant.api_key, **(target or {})},
            "tables": sections,
            "pipeline": {"name": name, **(pipeline or {})},
            "migration": {"num_workers": 1, **(migration or {})},
            "http": {"enabled": False},
        }
    )


@dataclass
class Running:
    """One life of a pipeline."""

    pipeline: Pipeline
    database: Database
    qdrant: QdrantTarget
    stopping: asyncio.Event
    task: asyncio.Task[None]
    patience_seconds: float = _PATIENCE_SECONDS

    @property
    def slot(self) -> str:
        return self.pipeline.settings.source.slot

    @property
    def state(self) -> str:
        return str(self.pipeline.board.snapshot()["state"])

    def metric(self, name: str, **labels: str) -> float:
        """A sample of ours; 0 when it is not there."""
        value = self.pipeline.metrics.registry.get_sample_value(f"cdc_sync_{name}", labels)
        return value or 0.0

    async def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until it holds; fails when the pipeline ends first, or after some patience."""
        end = asyncio.get_running_loop().time() + self.patience_seconds
        while not condition():
            if self.task.done():
                self.task.result()
                raise AssertionError(f"the pipeline stopped while {what} was waited for")
            assert asyncio.get_running_loop().time() < end, f"{what} did not come"
            await asyncio.sleep(0.01)

    async def wait_streaming(self) -> None:
        await self.wait(lambda: self.state == "streaming", "streaming")

    def confirmed(self) -> int:
        """What Postgres remembers as confirmed."""
        return slot_position(self.database, self.slot, "confirmed_flush_lsn")

    async def caught_up(self) -> None:
        """Until everything committed before now is confirmed to Postgres."""
        target = wal_position(self.database)

        def reached() -> bool:
            if self.confirmed() >= target:
                return True
            # A sign of life in the WAL, so that the server has something to report.
            self.database.execute("SELECT pg_logical_emit_message(false, 'tests', '')")
            return False

        await self.wait(reached, "the last position")

    async def stop(self) -> None:
        """Stop in good order, as SIGTERM does."""
        self.stopping.set()
        await asyncio.wait_for(asyncio.shield(self.task), self.patience_seconds)

    async def assert_equal(self, **options: object) -> None:
        """Once caught up, every table and its collection have the same content."""
        await self.caught_up()
        for table in self.pipeline.settings.tables:
            assert table.collection is not None
            more = {"namespace": table.namespace, **options}
            await asyncio.to_thread(
                assert_equal,
                self.database.url,
                table.name,
                qdrant_url=self.qdrant.url,
                collection=table.collection,
                api_key=self.qdrant.api_key,
                **more,  # type: ignore[arg-type]
            )
        assert self.qdrant.violations() == []


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    database: Database,
    qdrant: QdrantTarget,
    *,
    wait: bool = True,
    restart: bool = False,
) -> AsyncIterator[Running]:
    """Run a pipeline; waits until it streams unless told not to. It is cancelled at the end if it
    runs still, which is as abrupt as a task can be ended: nothing more is confirmed."""
    with _impatient():
        pipeline, stopping = Pipeline(settings), asyncio.Event()
        task = asyncio.create_task(pipeline.run(stopping, restart=restart))
        life = Running(pipeline, database, qdrant, stopping, task)
        try:
            if wait:
                await life.wait_streaming()
            yield life
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    with (
        mock.patch.object(monitor, "INTERVAL_SECONDS", 0.1),
        mock.patch.object(retry, "MAX_BACKOFF_SECONDS", 0.2),
    ):
        yield


def wal_position(database: Database) -> int:
    """Where the next record goes (``pg_current_wal_insert_lsn``)."""
    return _lsn(database, "SELECT pg_current_wal_insert_lsn()::text")


def slot_position(database: Database, slot: str, column: str) -> int:
    """``restart_lsn`` or ``confirmed_flush_lsn`` of a slot."""
    query = f"SELECT {column}::text FROM pg_replication_slots WHERE slot_name = %s"
    return _lsn(database, query, (slot,))


def _lsn(database: Database, query: str, parameters: Sequence[object] = ()) -> int:
    ((text,),) = database.execute(query, parameters)
    return int(Lsn.parse(str(text)))
