"""What Postgres itself allows: a COPY that is read and dropped, and a stream that is.

Nothing is written. The slot of :func:`drain_new_slot` is temporary: the server drops it with the
session, whatever becomes of this process.
"""

from __future__ import annotations

import math
import secrets
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, overload

import psycopg
from psycopg import pq

from cdc_sync.config import SourceSettings
from cdc_sync.errors import SourceError
from cdc_sync.mapping.table import Leaf, Table
from cdc_sync.postgres.connect import (
    PgConnection,
    closed_on_error,
    connect,
    result_error,
    set_lock_timeout,
    translate,
)
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.slot import current_wal_lsn

_NAME: Final = "cdc_sync bench"
_SLOT_PREFIX: Final = "cdc_sync_bench_"
_POLL_MILLISECONDS: Final = 1000
#: No statement is given less: even the shortest could not be sure to end in time.
_LEAST_MILLISECONDS: Final = 50
_READING: Final = "measuring COPY"
#: Where a frame's message begins, and the messages that are changes of rows.
_TAG: Final = 25
_CHANGES: Final = (b"I", b"U", b"D")
#: Blocks of a range where rows were never counted.
_DEFAULT_PAGES: Final = 32
_MAX_PAGES: Final = 8192
_GOLDEN: Final = 0.6180339887


@dataclass(frozen=True, slots=True)
class PageRange:
    """Blocks of a leaf: from ``start``, up to but not including ``end`` (None: to the end)."""

    leaf: Leaf
    start: int
    end: int | None


@dataclass(frozen=True, slots=True)
class Drained:
    """What came through a temporary slot, and how long it took to read.

    ``rows`` are changes of the publication's tables, ``updates`` how many of them are no new rows;
    ``bytes`` are those of their frames, ``wal_bytes`` what the whole server wrote meanwhile.
    """

    rows: int
    updates: int
    bytes: int
    wal_bytes: int
    seconds: float
    cpu_seconds: float


def connect_for_bench(source: SourceSettings, patience_seconds: float) -> PgConnection:
    """Connect for reading, with locks waited for so long at the most. Raises
    :class:`SourceError`."""
    connection = connect(source, application_name=_NAME)
    with closed_on_error(connection):
        set_lock_timeout(connection, patience_seconds)
        try:
            connection.execute("SET default_transaction_read_only = on")
        except psycopg.Error as exc:
            raise translate(exc, "setting up the session") from exc
    return connection


def limit_statements(connection: PgConnection, seconds: float | None) -> None:
    """Have the server end statements that take longer (None: no longer); see :func:`is_timeout`
    for the error that comes of it. Raises :class:`SourceError`."""
    milliseconds = 0 if seconds is None else max(_LEAST_MILLISECONDS, round(seconds * 1000))
    try:
        connection.execute(f"SET statement_timeout = {milliseconds}")
    except psycopg.Error as exc:
        raise translate(exc, "setting statement_timeout") from exc


def is_timeout(error: SourceError) -> bool:
    """Whether the error is that of a statement that took too long."""
    return isinstance(error.__cause__, psycopg.errors.QueryCanceled)


class PageRanges(Sequence[PageRange]):
    """A table cut into ranges of about ``rows`` rows, in an order in which any number of them lie
    spread over the whole table."""

    def __init__(self, table: Table, rows: int) -> None:
        self._leaves = [(leaf, _pages(leaf, rows)) for leaf in table.leaves]
        self._counts = [-(-max(leaf.pages, 1) // pages) for leaf, pages in self._leaves]
        self._length = sum(self._counts)
        # Coprime steps of about the golden section visit every place once, and no region twice
        # before the others.
        self._step = max(1, round(self._length * _GOLDEN))
        while math.gcd(self._step, self._length) != 1:
            self._step += 1

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> PageRange: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PageRange]: ...
    def __getitem__(self, index: int | slice) -> PageRange | Sequence[PageRange]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        place = index * self._step % self._length
        for (leaf, pages), count in zip(self._leaves, self._counts, strict=True):
            if place < count:
                # The last one is open: what was added since the catalog was read belongs to it.
                end = None if place == count - 1 else (place + 1) * pages
                return PageRange(leaf, place * pages, end)
            place -= count
        raise AssertionError("unreachable: every place is in a leaf")


def _pages(leaf: Leaf, rows: int) -> int:
    if leaf.estimated_rows > 0 and leaf.pages > 0:
        return min(max(1, round(rows * leaf.pages / leaf.estimated_rows)), _MAX_PAGES)
    return _DEFAULT_PAGES


def discard_rows(connection: PgConnection, query: str) -> tuple[int, int]:
    """Run ``COPY (query) TO STDOUT (FORMAT binary)`` and drop what comes; rows and bytes.

    Raises :class:`SourceError`.
    """
    pgconn = connection.pgconn
    size = 0
    try:
        result = pgconn.exec_(f"COPY ({query}) TO STDOUT (FORMAT binary)".encode())
        if result.status != pq.ExecStatus.COPY_OUT:
            raise result_error(connection, result)
        size = _discard(pgconn)
        rows, failure = 0, None
        while (ended := pgconn.get_result()) is not None:
            if ended.status == pq.ExecStatus.FATAL_ERROR:
                failure = failure or result_error(connection, ended)
            rows = ended.command_tuples or 0
        if failure is not None:
            raise failure
    except psycopg.Error as exc:
        raise translate(exc, _READING) from exc
    except BaseException:
        # The server goes on sending.
        connection.close()
        raise
    return rows, size


def _discard(pgconn: pq.abc.PGconn) -> int:
    get_copy_data = pgconn.get_copy_data
    poller = select.poll()
    poller.register(pgconn.socket, select.POLLIN)
    total = 0
    while True:
        size, _ = get_copy_data(1)
        if size > 0:
            total += size
        elif size == 0:
            poller.poll(_POLL_MILLISECONDS)
            pgconn.consume_input()
        else:
            return total


def wal_position(connection: PgConnection) -> int | None:
    """The server's WAL position; None where it does not say (on a standby)."""
    try:
        return current_wal_lsn(connection)
    except SourceError:
        return None


def drain_new_slot(
    source: SourceSettings,
    publication: str,
    seconds: float,
    wait: Callable[[float], None] = time.sleep,
) -> Drained:
    """Make a temporary slot, let WAL gather behind it for so long, then read it without stopping.

    Reading takes so long again at the most; ``wait`` passes the time. Raises
    :class:`SourceError`, SLOT_BUSY where open write transactions keep the slot from being made in
    that time.
    """
    connection = ReplicationConnection.open(source, application_name=_NAME)
    try:
        name = f"{_SLOT_PREFIX}{secrets.token_hex(4)}"
        created = connection.create_slot(name, temporary=True, lock_timeout_seconds=seconds)
        wait(seconds)
        end = int(connection.identify().xlog_position)
        cpu, wall = time.process_time(), time.perf_counter()
        connection.start(name, publication)
        sizes, inserts = _read_to(connection, end, wall + seconds)
        reached = min(max(int(connection.received_lsn), int(created.consistent_point)), end)
        return Drained(
            rows=len(sizes),
            updates=len(sizes) - inserts,
            bytes=sum(sizes),
            wal_bytes=reached - int(created.consistent_point),
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
        )
    finally:
        connection.close()


def _read_to(connection: ReplicationConnection, end: int, deadline: float) -> tuple[list[int], int]:
    """The sizes of the changes up to that position, and how many of them are new rows."""
    sizes: list[int] = []
    inserts = 0
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    while connection.received_lsn < end and time.perf_counter() < deadline:
        frames = connection.read()
        if not frames:
            poller.poll(_POLL_MILLISECONDS // 10)
        for frame in frames:
            tag = frame[_TAG : _TAG + 1]
            if tag in _CHANGES:
                sizes.append(len(frame))
                inserts += tag == b"I"
    return sizes, inserts
