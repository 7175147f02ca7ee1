"""What Postgres sends and what our part of it costs, with no Qdrant in it.

The copy limit and our own reading take turns over ranges of the table that lie evenly spread, so
that neither profits from what the other has brought into memory. The stream is made of the rows
that were read: nothing is written to the table to have changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cdc_sync.errors import MappingError, SourceError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.pgoutput.encode import (
    encode_begin,
    encode_commit,
    encode_insert,
    encode_relation,
    encode_update,
    frame,
)
from cdc_sync.pgoutput.messages import Relation, RelationColumn
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.measuring import (
    PageRange,
    PageRanges,
    discard_rows,
    is_timeout,
    limit_statements,
)
from cdc_sync.postgres.snapshot import copy_query, copy_rows
from cdc_sync.qdrant.sink import Changes
from cdc_sync.rows import UNCHANGED, PointId, Row
from cdc_sync.sync.bench_figures import Bounds, Clock, Figure, Measured, row_bytes
from cdc_sync.sync.gather import Gatherer
from cdc_sync.sync.routing import Binding, PlannedTable, bind

#: Rows of one range, about.
_RANGE_ROWS: Final = 1000
#: Bytes of rows that are kept to be sent, at most; they are held a few times over.
_KEPT_BYTES: Final = 48 << 20
#: Where the stream that we make begins; any position will do.
_FIRST_LSN: Final = 1 << 32

Points = Sequence[tuple[PointId, Row]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of the table with their ids, no id twice, of which points can be made; ``unmappable``
    were left out."""

    points: list[tuple[PointId, Row]]
    bytes: int
    unmappable: int

    @property
    def row_bytes(self) -> float:
        """Bytes of the values of a row, on average."""
        return self.bytes / len(self.points) if self.points else 0.0


class Encoder(Protocol):
    """Turns rows into what a sink is given, and drops it."""

    def upsert(self, point_id: PointId, row: Row) -> None:
        """Encode a whole point. Raises :class:`MappingError`."""
        ...

    def partial(self, point_id: PointId, row: Row) -> None:
        """Encode a row whose vectors are not known."""
        ...


class _ForServer:
    def __init__(self, plan: TablePlan) -> None:
        self._codec = WireCodec(plan)

    def upsert(self, point_id: PointId, row: Row) -> None:
        self._codec.point(point_id, row)

    def partial(self, point_id: PointId, row: Row) -> None:
        self._codec.point_id(point_id)
        self._codec.payload_entries(row, 1)


class _ForEdge:
    def __init__(self, plan: TablePlan) -> None:
        self._codec = PythonCodec(plan)

    def upsert(self, point_id: PointId, row: Row) -> None:
        self._codec.vectors(row)
        self._codec.payload(row)

    def partial(self, point_id: PointId, row: Row) -> None:
        self._codec.payload(row)


def encoder(plan: TablePlan, url: str) -> Encoder:
    """The encoder that the sink of this URL needs."""
    return _ForEdge(plan) if url.startswith("edge:") else _ForServer(plan)


# -- the copy


def ranges_of(planned: PlannedTable, bounds: Bounds) -> PageRanges:
    """Ranges to read one after the other until the bounds are reached."""
    return PageRanges(planned.table, min(_RANGE_ROWS, bounds.rows))


def range_query(planned: PlannedTable, one: PageRange) -> tuple[str, tuple[bool, ...]]:
    """The query that reads the rows of a range which the pipeline would read, and which of its
    columns come as text."""
    return copy_query(planned.plan, one.leaf, one.start, one.end, planned.selection)


def measure_copy(
    connection: PgConnection, planned: PlannedTable, bounds: Bounds, encode: Encoder
) -> tuple[Figure, Figure, Sample]:
    """Measure the copy limit and our own part of the copy; the rows that were read.

    Raises :class:`SourceError`.
    """
    ranges = ranges_of(planned, bounds)
    limit, ours = Clock(bounds), Clock(bounds)
    reader = _Reader(connection, planned, encode)
    count = len(ranges)
    for number in range(count):
        # Of a small table, which both read as a whole, each is the first to read one half.
        if not limit.over:
            _drop(connection, planned, ranges[number], limit)
        if not ours.over:
            reader.read(ranges[(number + count // 2) % count], ours)
        if limit.over and ours.over:
            break
    with within_time():
        limit_statements(connection, None)
    return (
        limit.figure(Measured.COPY_LIMIT),
        ours.figure(Measured.COPY_UNSENT),
        reader.sample(),
    )


def _drop(connection: PgConnection, planned: PlannedTable, one: PageRange, clock: Clock) -> None:
    query, _ = range_query(planned, one)
    with clock, within_time():
        limit_statements(connection, clock.left_seconds)
        clock.count(*discard_rows(connection, query))


@contextlib.contextmanager
def within_time() -> Iterator[None]:
    """End the block without an error where the server ended its statement for taking too long."""
    try:
        yield
    except SourceError as error:
        if not is_timeout(error):
            raise


class _Reader:
    """Reads and encodes ranges, and keeps rows."""

    def __init__(self, connection: PgConnection, planned: PlannedTable, encode: Encoder) -> None:
        self._connection = connection
        self._planned = planned
        self._encode = encode
        self._point_id = compile_point_id(planned.plan)
        self._kept: dict[PointId, Row] = {}
        self._kept_bytes = 0
        self._unmappable = 0

    def read(self, one: PageRange, clock: Clock) -> None:
        query, text = range_query(self._planned, one)
        with within_time():
            limit_statements(self._connection, clock.left_seconds)
            batches = copy_rows(self._connection, query, text)
            while True:
                with clock:
                    batch = next(batches, None)
                    encoded = self._encoded(batch or [])
                if batch is None:
                    return
                clock.count(len(batch), sum(map(row_bytes, batch)))
                self._keep(encoded)

    def _encoded(self, rows: list[Row]) -> list[tuple[PointId, Row]]:
        encoded = []
        for row in rows:
            try:
                point_id = self._point_id(row)
                self._encode.upsert(point_id, row)
            except MappingError:
                self._unmappable += 1
            else:
                encoded.append((point_id, row))
        return encoded

    def _keep(self, points: Points) -> None:
        for point_id, row in points:
            if self._kept_bytes >= _KEPT_BYTES:
                return
            if point_id not in self._kept:
                self._kept[point_id] = row
                self._kept_bytes += row_bytes(row)

    def sample(self) -> Sample:
        return Sample(list(self._kept.items()), self._kept_bytes, self._unmappable)


# -- the stream


class MadeStream:
    """A stream of rows that were read, as pgoutput would send them, and its way to changes.

    ``metadata_only``: updates that leave all vectors as they are, instead of new rows.
    """

    def __init__(
        self, planned: PlannedTable, *, batch_rows: int, batch_bytes: int, metadata_only: bool
    ) -> None:
        self._relation = _relation(planned)
        self._batch_rows = batch_rows
        self._lsn = _FIRST_LSN
        self._xid = 1
        plan = planned.plan
        self._vectors = [i for i, c in enumerate(plan.columns) if c.vector is not None]
        self.metadata_only = metadata_only
        types = {(c.type.oid, c.type.typmod): c.type for c in plan.columns}

        def route(relation: Relation) -> Binding:
            return bind(planned, relation, lambda oid, modifier: types[oid, modifier])

        self._gatherer = Gatherer(route, batch_rows=batch_rows, batch_bytes=batch_bytes)
        self.feed([frame(encode_relation(self._relation), 0)])

    @property
    def empty(self) -> bool:
        """Whether the changes that it makes would say nothing: updates without vectors to keep."""
        return self.metadata_only and not self._vectors

    def transactions(self, points: Points) -> Iterator[list[bytes]]:
        """The frames of transactions, each of a batch of rows."""
        for start in range(0, len(points), self._batch_rows):
            yield self._transaction([row for _, row in points[start : start + self._batch_rows]])

    def _transaction(self, rows: list[Row]) -> list[bytes]:
        oid, encode = self._relation.oid, encode_insert
        if self.metadata_only:
            encode = encode_update
            rows = [self._without_vectors(row) for row in rows]
        begin, self._lsn, self._xid = self._lsn, self._lsn + 2 * len(rows) + 16, self._xid + 1
        return [
            frame(encode_begin(self._lsn, 0, self._xid), begin),
            *(frame(encode(oid, row), begin + number) for number, row in enumerate(rows)),
            frame(encode_commit(self._lsn, self._lsn + 8, 0), self._lsn),
        ]

    def _without_vectors(self, row: Row) -> Row:
        row = list(row)
        for position in self._vectors:
            row[position] = UNCHANGED
        return row

    def feed(self, frames: list[bytes]) -> None:
        """Decode frames."""
        feed = self._gatherer.feed
        for one in frames:
            feed(one)

    def take(self) -> Changes:
        """The changes of all that was fed, coalesced."""
        changes = Changes()
        while self._gatherer.ready:
            batch = self._gatherer.take()
            for table in batch.tables.values():
                some, _ = table.split()
                changes.upserts += some.upserts
                changes.partials += some.partials
            changes.large |= batch.large
        return changes


def _relation(planned: PlannedTable) -> Relation:
    """As pgoutput would describe the columns that are read."""
    plan, table = planned.plan, planned.table
    key = {plan.columns[position].name for position in plan.key}
    columns = tuple(
        RelationColumn(c.name, c.type.oid, c.type.typmod, c.name in key) for c in plan.columns
    )
    return Relation(plan.oid, table.schema, table.name, "d", columns, None)


def measure_stream(
    make: Callable[[bool], MadeStream], sample: Sample, bounds: Bounds, encode: Encoder
) -> list[Figure]:
    """Measure decoding, coalescing and encoding of new rows, and of updates that leave vectors as
    they are; ``make`` makes a stream of the one (False) or the other."""
    figures = []
    for measured in (Measured.STREAM_UNSENT, Measured.UPDATES_UNSENT):
        stream = make(measured is Measured.UPDATES_UNSENT)
        if stream.empty or not sample.points:
            continue
        clock = Clock(bounds)
        for frames in stream.transactions(sample.points):
            with clock:
                stream.feed(frames)
                changes = stream.take()
                for point_id, row in changes.upserts:
                    encode.upsert(point_id, row)
                for point_id, row in changes.partials:
                    encode.partial(point_id, row)
            clock.count(len(changes), sum(map(len, frames)))
            if clock.over:
                break
        figures.append(clock.figure(measured))
    return figures
