"""The hot path on fixed input, without servers: frames and rows made by code go through what every
row of a stream or a copy goes through, up to finished requests.

:mod:`tests.support.instructions` counts its instructions; ``docs/performance.md`` tells how.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Literal, TypeAlias, TypeVar, cast

import numpy as np
from qdrant_client import grpc as q

from cdc_sync.config import QdrantSettings
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.planner import build_plan
from cdc_sync.mapping.table import Column, PgType, Table, TypeKind
from cdc_sync.pgoutput.messages import Begin, Commit, Insert, Relation, RelationColumn, Update
from cdc_sync.postgres.copy_binary import CopyParser
from cdc_sync.qdrant.rpc import Method, Rpc
from cdc_sync.qdrant.sink import Changes
from cdc_sync.qdrant.writer import ServerWriter
from cdc_sync.rows import UNCHANGED, RawValue, Row
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.routing import Binding, PlannedTable, bind
from tests.support import frames

Response = TypeVar("Response")

Path: TypeAlias = Literal["inserts", "updates", "copy"]
PATHS: Final[tuple[Path, ...]] = ("inserts", "updates", "copy")

DIMENSION: Final = 768
_OID: Final = 16_400
_TEXT: Final = PgType(25, "pg_catalog", "text")
_TYPES: Final = (
    ("id", PgType(20, "pg_catalog", "int8")),
    ("title", _TEXT),
    ("lang", PgType(1043, "pg_catalog", "varchar", typmod=12)),
    ("views", PgType(23, "pg_catalog", "int4")),
    ("score", PgType(701, "pg_catalog", "float8")),
    ("active", PgType(16, "pg_catalog", "bool")),
    ("created", PgType(1184, "pg_catalog", "timestamptz")),
    ("tags", PgType(1009, "pg_catalog", "_text", TypeKind.ARRAY, element=_TEXT)),
    ("meta", PgType(3802, "pg_catalog", "jsonb")),
    ("embedding", PgType(16_390, "public", "vector", extension="vector")),
)
_BATCH_ROWS: Final = 4096
_BATCH_BYTES: Final = 16 << 20
_COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_BATCH: Final = 1024

_COMPLETED: Final = q.UpdateResult(status=q.UpdateStatus.Completed)
_ANSWERS: Final[dict[type[object], object]] = {
    q.PointsOperationResponse: q.PointsOperationResponse(result=_COMPLETED),
    q.UpdateBatchResponse: q.UpdateBatchResponse(result=[_COMPLETED]),
}


def planned_table(dimension: int = DIMENSION) -> PlannedTable:
    """The table of the benchmarks: a key, eight typed columns and a vector."""
    table = Table(
        oid=_OID,
        schema="public",
        name="docs",
        partitioned=False,
        columns=tuple(
            Column(name, position, _declared(type_, dimension), not_null=position == 1)
            for position, (name, type_) in enumerate(_TYPES, 1)
        ),
        primary_key=("id",),
        replica_identity="d",
        identity_columns=("id",),
        indexes=(),
        leaves=(),
    )
    options = PlanOptions()
    return PlannedTable(table, build_plan(table, options).plan, options)


def _declared(type_: PgType, dimension: int) -> PgType:
    return replace(type_, typmod=dimension) if type_.is_pgvector else type_


def row(number: int, *, unchanged: bool = False, dimension: int = DIMENSION) -> Row:
    """One row; ``unchanged``: as an update of its metadata brings it."""
    vector: RawValue = UNCHANGED
    if not unchanged:
        components = np.sin(np.arange(dimension, dtype="<f4") + np.float32(number)).astype(">f4")
        vector = struct.pack(">HH", dimension, 0) + components.tobytes()
    tags = (b"a", b"tag%d" % (number % 10))
    return [
        struct.pack(">q", number),
        b"title of document %d" % number,
        b"en",
        struct.pack(">i", number % 1000),
        struct.pack(">d", number * 0.5),
        bytes([number % 2]),
        struct.pack(">q", 820_454_400_000_000 + number * 1_000_000),
        struct.pack(">iiiii", 1, 0, 25, len(tags), 1)
        + b"".join(struct.pack(">i", len(tag)) + tag for tag in tags),
        b'\x01{"page": %d, "source": "web"}' % number,
        vector,
    ]


def _relation(dimension: int) -> Relation:
    columns = tuple(
        RelationColumn(name, type_.oid, _declared(type_, dimension).typmod, name == "id")
        for name, type_ in _TYPES
    )
    return Relation(_OID, "public", "docs", "d", columns)


def stream_frames(rows: int, *, updates: bool, dimension: int = DIMENSION) -> list[bytes]:
    """One transaction that inserts, or updates, so many rows."""
    lsn = 1 << 24
    end = lsn + 100 * rows + 100
    found = [frames.xlog_data(frames.encode(Begin(end, 0, 700)), lsn)]
    found.append(frames.xlog_data(frames.encode(_relation(dimension)), 0))
    for number in range(1, rows + 1):
        change: Insert | Update
        if updates:
            change = Update(_OID, None, False, row(number, unchanged=True))
        else:
            change = Insert(_OID, row(number, dimension=dimension))
        found.append(frames.xlog_data(frames.encode(change), lsn + 100 * number))
    found.append(frames.xlog_data(frames.encode(Commit(0, end, end + 50, 0)), end + 50))
    return found


def copy_chunks(rows: int, dimension: int = DIMENSION) -> list[bytes]:
    """The rows as CopyData messages of a binary COPY."""
    chunks = []
    for number in range(1, rows + 1):
        values = [value for value in row(number, dimension=dimension) if isinstance(value, bytes)]
        chunk = struct.pack(">h", len(values))
        chunk += b"".join(struct.pack(">i", len(value)) + value for value in values)
        chunks.append(chunk)
    chunks[0] = _COPY_HEADER + chunks[0]
    return [*chunks, b"\xff\xff"]


class Nobody(Rpc):
    """Takes every request as completed, and counts them."""

    def __init__(self) -> None:
        self._observer = None
        self.requests = 0
        self.request_bytes = 0

    async def call(
        self, method: Method[Response], request: bytes, lane: int = 0, *, unlimited: bool = False
    ) -> Response:
        self.requests += 1
        self.request_bytes += len(request)
        return cast("Response", _ANSWERS[method.response])


def make_writer(plan: TablePlan) -> tuple[ServerWriter, Nobody]:
    """A writer that sends to nobody."""
    rpc = Nobody()
    return ServerWriter(rpc, QdrantSettings(), plan), rpc


class Stream:
    """Gathers frames, and writes each batch that is full."""

    def __init__(self, dimension: int) -> None:
        planned = planned_table(dimension)
        declared = [_declared(type_, dimension) for _, type_ in _TYPES]
        types = {(type_.oid, type_.typmod): type_ for type_ in declared}
        self.writer, self.rpc = make_writer(planned.plan)

        def route(relation: Relation) -> Binding:
            return bind(planned, relation, lambda oid, typmod: types[oid, typmod])

        self.gatherer = Gatherer(route, batch_rows=_BATCH_ROWS, batch_bytes=_BATCH_BYTES)

    async def run(self, some: Sequence[bytes]) -> None:
        gatherer = self.gatherer
        for frame in some:
            gatherer.feed(frame)
            if gatherer.full:
                await self._write(gatherer.take())
        while gatherer.ready:
            await self._write(gatherer.take())

    async def _write(self, batch: Batch) -> None:
        for table in batch.tables.values():
            changes, _ = table.split()
            await self.writer.apply(changes)


class Copy:
    """Parses rows, and writes each batch."""

    def __init__(self, dimension: int) -> None:
        self.plan = planned_table(dimension).plan
        self.writer, self.rpc = make_writer(self.plan)

    async def run(self, some: Sequence[bytes]) -> None:
        point_id = compile_point_id(self.plan)
        parser = CopyParser([False] * len(self.plan.columns))
        for start in range(0, len(some), _COPY_BATCH):
            rows = parser.feed(b"".join(some[start : start + _COPY_BATCH]))
            await self.writer.apply(Changes(upserts=[(point_id(row), row) for row in rows]))
        parser.end()


def prepare(path: Path, rows: int, dimension: int = DIMENSION) -> tuple[Callable[[], None], Nobody]:
    """Make the input of one path; return what runs it, and who counts what it sends."""
    if path == "copy":
        copy, chunks = Copy(dimension), copy_chunks(rows, dimension)
        return lambda: asyncio.run(copy.run(chunks)), copy.rpc
    stream = Stream(dimension)
    some = stream_frames(rows, updates=path == "updates", dimension=dimension)
    return lambda: asyncio.run(stream.run(some)), stream.rpc
