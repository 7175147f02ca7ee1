"""A table with a pipeline that keeps it, a rebuild of it in the same event loop, a writer that
never stops, and a reader that knows what it must find."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

import psycopg
from qdrant_client import models

from cdc_sync.config import Settings, TableSettings
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import RebuildState
from cdc_sync.sync.pipeline import Pipeline
from cdc_sync.sync.rebuild import RebuildStand, as_server, worker_settings
from cdc_sync.sync.rebuild_begin import Order, begin
from cdc_sync.sync.rebuild_end import abort, finish
from cdc_sync.verify.rebuild import Conductor, Outcome, Rebuilt
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

TABLE = "public.items"
_PATIENCE_SECONDS = 90.0


def create_items(database: Database, rows: int = 300) -> None:
    database.execute(
        "CREATE TABLE items (id bigint PRIMARY KEY, title text, body text, n int,"
        " embedding vector(4), small vector(3));"
        " CREATE INDEX ON items USING hnsw (embedding vector_cosine_ops);"
        " INSERT INTO items SELECT i, 'title ' || i, repeat(md5(i::text), 10), i,"
        " format('[%s,%s,1,2]', i % 7, i % 5)::vector, format('[%s,1,2]', i % 3)::vector"
        f" FROM generate_series(1, {rows}) i"
    )


def with_table(settings: Settings, **changes: Any) -> Settings:
    """The settings with the first table's changed."""
    first, *rest = settings.tables
    content = first.model_dump(exclude_unset=True) | changes
    return settings.model_copy(update={"tables": [TableSettings.model_validate(content), *rest]})


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it holds; fails after some patience."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.05)


@dataclass
class Rebuilding:
    """A rebuild at work."""

    rebuilt: Rebuilt
    pipeline: Pipeline
    conductor: Conductor
    task: asyncio.Task[None]
    said: list[str]

    async def reached(self, state: str) -> None:
        """Wait until its pipeline is in a state."""

        async def there() -> bool:
            assert not self.task.done()
            return str(self.pipeline.board.snapshot()["state"]) == state

        await until(there)

    async def has_said(self, text: str) -> None:
        """Wait until it has said something with these words."""

        async def there() -> bool:
            return any(text in line for line in self.said)

        await until(there)

    async def ended(self) -> Outcome:
        """Wait until it has ended by itself."""
        await asyncio.wait_for(asyncio.shield(self.task), _PATIENCE_SECONDS)
        if self.conductor.error is not None:
            raise self.conductor.error
        return self.rebuilt.outcome


@contextlib.asynccontextmanager
async def sink_of(settings: Settings) -> AsyncIterator[ServerSink]:
    sink = as_server(await open_sink(settings.qdrant))
    try:
        yield sink
    finally:
        await sink.close()


@contextlib.asynccontextmanager
async def rebuilding(
    settings: Settings, wanted: Settings, alias: str, *, swap: bool = True
) -> AsyncIterator[Rebuilding]:
    """Begin a rebuild of the first table, or go on with it. It is cancelled at the end if it runs
    still."""
    order = Order(settings, wanted, settings.tables[0].name, alias)
    async with sink_of(settings) as sink:
        rebuild = await begin(order, sink)
    said: list[str] = []
    rebuilt = Rebuilt(rebuild)
    worker = worker_settings(settings, rebuild)
    stand = RebuildStand(settings, rebuild)
    pipeline = Pipeline(worker, swaps=stand)
    stand.attach(pipeline)
    conductor = Conductor(settings, rebuilt, said.append, swap)

    async def life() -> None:
        stop = asyncio.Event()
        leading = asyncio.create_task(conductor.run(pipeline))
        try:
            await pipeline.run(stop)
        finally:
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)

    task = asyncio.create_task(life())
    try:
        yield Rebuilding(rebuilt, pipeline, conductor, task, said)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Looping:
    """A thread that does something again and again while it is a context, and raises what ended it
    when it is stopped."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE_SECONDS)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with self._database.connect() as connection:
                while not self._stop.is_set():
                    self._step(connection)
        except BaseException as error:  # noqa: BLE001 - raised by whoever stops the thread
            self._failure = error

    def _step(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        raise NotImplementedError


class Writer(_Looping):
    """Inserts, changes and deletes rows as fast as it can, in a thread. Rows up to ``kept`` and
    those in ``stay`` are never deleted; ``stay`` has the position after each one's commit."""

    def __init__(self, database: Database, kept: int = 200) -> None:
        super().__init__(database)
        self._kept = kept
        self.stay: dict[int, int] = {}
        self.steps = 0

    def _step(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        step = self.steps
        key = 10_000 + step
        vector = f"[{step % 11},{1 + step % 3},1,2]"
        connection.execute(
            "INSERT INTO items VALUES (%s, %s, repeat('x', 300), %s, %s::vector, '[1,2,3]')",
            (key, f"new {step}", step, vector),
        )
        connection.execute(
            "UPDATE items SET n = n + 1, title = %s WHERE id = %s",
            (f"title {step}", 1 + step % self._kept),
        )
        if step % 3 == 0:
            connection.execute("DELETE FROM items WHERE id = %s", (key - 30,))
        # Every third is deleted thirty steps later; the others stay.
        if step % 3 != 0:
            row = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
            assert row is not None
            self.stay[key] = int(str(row[0]))
        self.steps += 1
        time.sleep(0.002)


class Reader(_Looping):
    """Reads by an alias in a loop, in a thread, and notes what it has missed: every row that the
    pipeline had confirmed before the request must be found."""

    def __init__(
        self, database: Database, qdrant: QdrantTarget, alias: str, slot: str, writer: Writer
    ) -> None:
        super().__init__(database)
        self._client = qdrant.new_client(observer=True)
        self._alias = alias
        self._slot = slot
        self._writer = writer
        self.missed: list[tuple[str, list[int]]] = []
        self.reads = 0
        self.expected = 0

    def _step(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        row = connection.execute(
            "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = %s",
            (self._slot,),
        ).fetchone()
        assert row is not None
        confirmed = int(str(row[0]))
        must = {key for key, lsn in list(self._writer.stay.items()) if lsn <= confirmed}
        must |= set(range(1, 201))
        self.expected = max(self.expected, len(must))
        page, _ = self._client.scroll(self._alias, limit=100_000, with_payload=False)
        self._note("scroll", must - {int(point.id) for point in page})
        some = sorted(must)[:: max(1, len(must) // 20)]
        found = self._client.query_points(
            self._alias,
            query=[1.0, 1.0, 1.0, 2.0],
            using="embedding",
            query_filter=models.Filter(must=[models.HasIdCondition(has_id=list(some))]),
            limit=len(some),
            with_payload=False,
        )
        self._note("query", set(some) - {int(point.id) for point in found.points})
        self.reads += 1

    def _note(self, how: str, missing: set[int]) -> None:
        if missing:
            self.missed.append((how, sorted(missing)[:10]))


def contents(qdrant: QdrantTarget, collection: str) -> dict[object, tuple[object, object]]:
    """Payload and vectors of every point."""
    page, following = qdrant.client().scroll(
        collection, limit=100_000, with_payload=True, with_vectors=True
    )
    assert following is None
    return {point.id: (point.payload, point.vector) for point in page}


def left_over(database: Database, settings: Settings) -> list[str]:
    """Slots of this database other than the pipeline's own, and publications beside its own."""
    slots = database.execute(
        "SELECT slot_name FROM pg_replication_slots"
        " WHERE database = current_database() AND slot_name <> %s",
        (settings.source.slot,),
    )
    publications = database.execute(
        "SELECT pubname FROM pg_publication WHERE pubname <> %s", (settings.source.publication,)
    )
    return [str(name) for (name,) in (*slots, *publications)]


async def assert_no_trace(
    database: Database, qdrant: QdrantTarget, settings: Settings, rebuild: RebuildState
) -> None:
    """Nothing is left of a rebuild: slot, publication, records, collection, alias."""
    assert left_over(database, settings) == []
    client = qdrant.client()
    assert not client.collection_exists(rebuild.collection)
    assert rebuild.alias not in {one.alias_name for one in client.get_aliases().aliases}
    async with sink_of(settings) as sink:
        assert await sink.state.rebuilds(rebuild.pipeline) == []
        assert await sink.state.load(rebuild.worker) is None
        assert await sink.state.ledgers(rebuild.worker) == []
        assert await sink.state.mark(rebuild.worker) is None
        assert await sink.state.dead_letters(rebuild.worker) == []


async def finish_rebuild(settings: Settings, rebuild: RebuildState) -> None:
    """What the command does last."""
    async with sink_of(settings) as sink:
        now = await sink.state.rebuild(rebuild.pipeline, rebuild.table)
        assert now is not None
        await finish(settings, sink, now)


async def abort_rebuild(settings: Settings) -> list[str]:
    """What ``--abort`` does; returns what it says."""
    said: list[str] = []
    async with sink_of(settings) as sink:
        (known,) = await sink.state.rebuilds(settings.pipeline.name)
        await abort(settings, sink, known, said.append)
    return said


# -- a small scene


@dataclass
class Scene:
    """A pipeline of one table, and what it shall become."""

    settings: Settings
    wanted: Settings
    alias: str
    qdrant: QdrantTarget

    @property
    def old(self) -> str:
        return str(self.settings.tables[0].collection)

    @property
    def new(self) -> str:
        return str(self.wanted.tables[0].collection)

    def alias_of(self, collection: str) -> list[str]:
        found = self.qdrant.client().get_collection_aliases(collection).aliases
        return [one.alias_name for one in found]

    async def records(self) -> list[RebuildState]:
        async with sink_of(self.settings) as sink:
            return await sink.state.rebuilds(self.settings.pipeline.name)

    async def is_ready(self) -> bool:
        return [one.phase for one in await self.records()] == ["ready"]


def make_scene(
    database: Database, qdrant: QdrantTarget, *, first: dict[str, Any] | None = None, **changes: Any
) -> Scene:
    create_items(database, 60)
    settings = pipeline_settings(database, qdrant, {"name": "items", **(first or {})})
    new, alias = qdrant.new_collection_name(), qdrant.new_collection_name("alias")
    return Scene(settings, with_table(settings, collection=new, **changes), alias, qdrant)


def notices(life: Running) -> list[dict[str, str]]:
    """What ``/status`` says needs attention."""
    found = life.pipeline.board.snapshot()["attention"]
    assert isinstance(found, list)
    return found


@contextlib.asynccontextmanager
async def swapped(scene: Scene, database: Database) -> AsyncIterator[Running]:
    """The pipeline after a rebuild, of which nothing is left."""
    async with running(scene.settings, database, scene.qdrant) as life:
        async with rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild:
            await rebuild.ended()
        await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
        await life.wait(lambda: life.pipeline.settings.tables[0] == scene.wanted.tables[0], "swap")
        yield life
