"""The sinks that a benchmark writes to: the test server of this repository, a real server, and an
embedded database; each with a loop that sends finished requests to it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol, TypeVar
from urllib.parse import urlsplit

import qdrant_edge as edge
from qdrant_client import QdrantClient

from cdc_sync.config import QdrantSettings
from cdc_sync.qdrant.edge_database import EdgeDatabase
from cdc_sync.qdrant.edge_writer import EdgeWriter
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Changes
from cdc_sync.qdrant.writer import ServerWriter
from cdc_sync.rows import PointId, Row
from cdc_sync.sync.routing import PlannedTable
from tests.bench.engine import Scratch
from tests.bench.limits import RequestLoop, apply_operations
from tests.bench.nulls import NullEdgeDatabase, NullRpc
from tests.bench.usage import Cost, Meter
from tests.support.qdrant_control import QdrantProcess

T = TypeVar("T")

_URL: Final = "CDC_SYNC_TEST_QDRANT_URL"
_API_KEY: Final = "CDC_SYNC_TEST_QDRANT_API_KEY"
_BATCH_ROWS: Final = 1024

Rows = Sequence[tuple[PointId, Row]]


class BenchSink(Protocol):
    """A sink to measure."""

    name: str
    title: str
    embedded: bool

    @property
    def pid(self) -> int | None:
        """Process to measure beside ours; None if it is on another machine, or is this one."""
        ...

    def settings(self) -> dict[str, object]:
        """``qdrant`` settings of a pipeline with a place of its own."""
        ...

    def collection(self) -> str:
        """The name of a collection that does not exist."""
        ...

    def limit(self, planned: PlannedTable, rows: Rows, meter: Meter) -> Cost:
        """Write the rows as finished requests into a new collection."""
        ...

    def drop(self, collection: str) -> None:
        """Remove a collection."""
        ...

    def close(self) -> None: ...


class ServerBench:
    """A Qdrant server by its gRPC address."""

    embedded = False

    def __init__(
        self, name: str, title: str, url: str, api_key: str | None, pid: int | None
    ) -> None:
        self.name, self.title, self._url, self._api_key, self._pid = name, title, url, api_key, pid
        self.address, self._secure = urlsplit(url).netloc, url.startswith("https:")
        self._settings = QdrantSettings.model_validate({"url": url, "api_key": api_key})
        host, _, port = self.address.rpartition(":")
        self.client = QdrantClient(
            host=host,
            grpc_port=int(port),
            prefer_grpc=True,
            https=self._secure,
            api_key=api_key,
            check_compatibility=False,
            timeout=600,
        )
        self._requests: dict[int, list[bytes]] = {}

    @property
    def pid(self) -> int | None:
        return self._pid

    def settings(self) -> dict[str, object]:
        return {"url": self._url, "api_key": self._api_key}

    def collection(self) -> str:
        return f"cdc_sync_bench_{uuid.uuid4().hex[:12]}"

    def make(self, planned: PlannedTable) -> str:
        """A new collection by the plan; returns its name."""
        plan = planned_as(planned, self.collection())

        async def ensure() -> None:
            sink = await open_sink(self._settings)
            try:
                await sink.ensure_collection(plan.plan)
            finally:
                await sink.close()

        asyncio.run(ensure())
        return plan.plan.collection

    def limit(self, planned: PlannedTable, rows: Rows, meter: Meter) -> Cost:
        name = self.make(planned)
        requests = encoded_requests(planned_as(planned, name), rows)
        loop = self.loop()
        try:
            return loop.send(requests, meter)
        finally:
            loop.close()
            self.drop(name)

    def loop(self) -> RequestLoop:
        """A loop that sends as much side by side as the pipeline does."""
        parallel = self._settings.parallel_requests
        return RequestLoop(self.address, self._api_key, parallel, secure=self._secure)

    def drop(self, collection: str) -> None:
        self.client.delete_collection(collection)

    def close(self) -> None:
        self.client.close()


class ProcessBench(ServerBench):
    """The test server of this repository, in a process of its own."""

    def __init__(self, scratch: Scratch) -> None:
        self._process = QdrantProcess(scratch.new())
        pid = self._process.pid
        super().__init__("test-server", "test server", self._process.url, None, pid)

    def close(self) -> None:
        super().close()
        self._process.close()


class EdgeBench:
    """An embedded database, a new one each time."""

    name, title, embedded, pid = "edge", "embedded (edge)", True, None

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch

    def settings(self) -> dict[str, object]:
        return {"url": f"edge:{self._scratch.new()}"}

    def collection(self) -> str:
        return "points"

    def limit(self, planned: PlannedTable, rows: Rows, meter: Meter) -> Cost:
        planned = planned_as(planned, self.collection())
        operations = encoded_operations(planned, rows, self._scratch)
        settings = QdrantSettings.model_validate(self.settings())

        async def ensure() -> None:
            sink = await open_sink(settings)
            await sink.ensure_collection(planned.plan)
            await sink.close()

        asyncio.run(ensure())
        database = EdgeDatabase(Path(settings.url.removeprefix("edge:")))

        async def write() -> Cost:
            try:
                return await database.run(
                    apply_operations,
                    database,
                    planned.plan.collection,
                    operations,
                    meter,
                    database.flush,
                )
            finally:
                await database.close()

        return asyncio.run(write())

    def drop(self, collection: str) -> None:
        """It goes with the scratch directory."""

    def close(self) -> None:
        """Nothing is open."""


def planned_as(planned: PlannedTable, collection: str) -> PlannedTable:
    """The table with another collection."""
    return dataclasses.replace(
        planned, plan=dataclasses.replace(planned.plan, collection=collection)
    )


def encoded_requests(planned: PlannedTable, rows: Rows) -> list[bytes]:
    """The requests that the pipeline's writer would send for the rows."""
    requests: list[bytes] = []
    writer = ServerWriter(NullRpc(requests.append), QdrantSettings(), planned.plan)
    _write(writer.apply, rows)
    return requests


def encoded_operations(
    planned: PlannedTable, rows: Rows, scratch: Scratch
) -> list[edge.UpdateOperation]:
    """The operations that the pipeline's writer would apply to an embedded database."""
    operations: list[edge.UpdateOperation] = []
    database = NullEdgeDatabase(scratch.new(), operations.append)

    async def apply(changes: Changes) -> object:
        return await EdgeWriter(database, planned.plan).apply(changes)

    _write(apply, rows)
    asyncio.run(database.close())
    return operations


class _Apply(Protocol):
    def __call__(self, changes: Changes) -> Coroutine[object, object, object]: ...


def _write(apply: _Apply, rows: Rows) -> None:
    async def write() -> None:
        for start in range(0, len(rows), _BATCH_ROWS):
            await apply(Changes(upserts=list(rows[start : start + _BATCH_ROWS])))

    asyncio.run(write())


@contextmanager
def sinks(scratch: Scratch) -> Iterator[list[BenchSink]]:
    """The test server, an embedded database, and a real server where one is named."""
    opened: list[BenchSink] = [ProcessBench(scratch), EdgeBench(scratch)]
    url = os.environ.get(_URL)
    if url:
        opened.append(
            ServerBench("real-server", "real server", url, os.environ.get(_API_KEY), None)
        )
    try:
        yield opened
    finally:
        for sink in opened:
            sink.close()
