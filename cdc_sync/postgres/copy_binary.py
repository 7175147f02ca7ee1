"""COPY … (FORMAT binary) into raw rows.

Source: PostgreSQL documentation, "COPY", Binary Format. The server sends a row a message, which
nothing here relies on.
"""

from __future__ import annotations

import select
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, cast

import psycopg
from psycopg import pq

from cdc_sync.errors import ProtocolError
from cdc_sync.pgoutput.tuple_readers import ObservedReader
from cdc_sync.postgres.connect import (
    CHECKED_TEXT,
    PgConnection,
    result_error,
    translate,
    unchecked_text,
)
from cdc_sync.rows import Row, TextValue

_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0"
_HEADER_BYTES: Final = len(_SIGNATURE) + 8
#: MaxAllocSize of Postgres, which puts a row together in one buffer.
_MAX_ROW_BYTES: Final = 1 << 30
#: No server sends an extension, so what claims a long one is something else.
_MAX_EXTENSION_BYTES: Final = 1 << 16
_TRAILER: Final = -1
_TRAILER_BYTES: Final = 2
_POLL_MILLISECONDS: Final = 1000
#: Bytes a batch of rows, about: the last row of a batch may go beyond it.
BATCH_BYTES: Final = 4 << 20
#: Messages and bytes that are put together to be cut into rows: few, so that they are in the caches
#: still.
_TOGETHER: Final = 32
_TOGETHER_BYTES: Final = 1 << 17

_count_at = cast("Callable[[bytes, int], tuple[int]]", struct.Struct(">h").unpack_from)
_size_at = cast("Callable[[bytes, int], tuple[int]]", struct.Struct(">i").unpack_from)


class RowBatch(list[Row]):
    """Rows, and how many bytes their values have."""

    __slots__ = ("value_bytes",)

    def __init__(self) -> None:
        super().__init__()
        self.value_bytes = 0


class CopyParser:
    """Cuts the bytes of a binary COPY into rows, however they are chunked.

    ``text_columns`` says which columns were selected as text; their values become
    :class:`TextValue`.
    """

    def __init__(self, text_columns: Sequence[bool]) -> None:
        self._columns = len(text_columns)
        self._text = [position for position, text in enumerate(text_columns) if text]
        # What came of a row that is not complete, and how many bytes it must have at the least.
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._wanted = 0
        self._started = False
        self._shapes = ObservedReader()
        self.finished = False
        #: Bytes of the values of all rows so far.
        self.value_bytes = 0

    def feed(self, data: bytes) -> list[Row]:
        """Return the rows that are complete. Raises :class:`ProtocolError` for malformed data."""
        buffer = self._joined(data)
        if buffer is None:
            return []
        position = 0
        if not self._started:
            position = self._header(buffer)
            if position > len(buffer):
                self._keep(buffer, position)
                return []
            self._started = True
        rows, position = self._rows(buffer, position)
        if self.finished and position < len(buffer):
            raise ProtocolError(f"COPY: {len(buffer) - position} bytes after the trailer")
        if self._text:
            self._mark_text(rows)
        return rows

    def end(self) -> None:
        """Say that nothing follows. Raises :class:`ProtocolError` if the trailer is missing."""
        if not self.finished:
            raise ProtocolError(
                f"COPY: ended without a trailer, {self._rest_bytes} bytes into a row"
            )

    def _joined(self, data: bytes) -> bytes | None:
        """Return what was kept with the data behind it; None while that cannot be enough, so that a
        row in many pieces is put together once and not anew with each."""
        if not self._rest:
            return data
        self._rest.append(data)
        self._rest_bytes += len(data)
        if self._rest_bytes < self._wanted:
            return None
        buffer = b"".join(self._rest)
        self._rest = []
        self._rest_bytes = self._wanted = 0
        return buffer

    def _keep(self, rest: bytes, wanted: int) -> None:
        """Keep the bytes of an incomplete row, which is at least so long."""
        if rest:
            self._rest = [rest]
            self._rest_bytes, self._wanted = len(rest), wanted

    def _header(self, buffer: bytes) -> int:
        """Return where the header ends, which may be behind the buffer."""
        if not buffer.startswith(_SIGNATURE[: len(buffer)]):
            raise ProtocolError(
                "COPY: the data does not start with the signature of the binary format"
            )
        if len(buffer) < _HEADER_BYTES:
            return _HEADER_BYTES
        (flags,) = _size_at(buffer, len(_SIGNATURE))
        if flags != 0:
            raise ProtocolError(f"COPY: unknown flags 0x{flags & 0xFFFFFFFF:08x} in the header")
        (extension,) = _size_at(buffer, len(_SIGNATURE) + 4)
        if not 0 <= extension <= _MAX_EXTENSION_BYTES:
            raise ProtocolError(f"COPY: header extension of {extension} bytes")
        return _HEADER_BYTES + extension

    def _rows(self, buffer: bytes, position: int) -> tuple[list[Row], int]:
        rows: list[Row] = []
        append, read = rows.append, self._shapes.read
        start, misses, trailer = position, 0, 0
        while not self.finished:
            found = read(buffer, position)
            if found is None:
                found = self._row(buffer, position)
                if found is None:
                    if self.finished:
                        trailer = _TRAILER_BYTES
                    break
                misses += 1
            row, position = found
            append(row)
        self._shapes.learn(rows, misses)
        # Every row has its number of fields, and every field its size.
        self.value_bytes += position - start - len(rows) * (2 + 4 * self._columns)
        return rows, position + trailer

    # Int16 number of fields (-1: the end), then for each Int32 size (-1: NULL) and that many bytes
    def _row(self, buffer: bytes, start: int) -> tuple[Row, int] | None:
        """Read one row; None for the end, and for a row that is not complete, which is kept."""
        position = start
        try:
            (count,) = _count_at(buffer, position)
            position += 2
            if count != self._columns:
                self._not_a_row(count)
                return None
            row: Row = []
            for _ in range(count):
                (size,) = _size_at(buffer, position)
                position += 4
                if size >= 0:
                    value_end = position + size
                    row.append(buffer[position:value_end])
                    position = value_end
                elif size == -1:
                    row.append(None)
                else:
                    raise ProtocolError(f"COPY: a field of {size} bytes")
        except struct.error:
            position = len(buffer) + 1
        if position > len(buffer):
            self._keep(buffer[start:], self._row_bytes(buffer, start))
            return None
        return row, position

    def _not_a_row(self, count: int) -> None:
        if count != _TRAILER:
            raise ProtocolError(
                f"COPY: a row of {count} fields where {self._columns} were selected"
            )
        self.finished = True

    def _row_bytes(self, buffer: bytes, start: int) -> int:
        """Return how long the incomplete row is at the least; refuse to wait for one that no server
        can send."""
        position = start + 2
        if position > len(buffer):
            return 2  # it may be the trailer
        fields = self._columns
        while fields and position + 4 <= len(buffer):
            (size,) = _size_at(buffer, position)
            position += 4 + max(size, 0)
            fields -= 1
            if position - start > _MAX_ROW_BYTES:
                raise ProtocolError(f"COPY: a row of {position - start} bytes and more")
        # The fields that are not there yet have at least their sizes.
        return position + 4 * fields - start

    def _mark_text(self, rows: list[Row]) -> None:
        for row in rows:
            for position in self._text:
                value = row[position]
                if isinstance(value, bytes):
                    row[position] = TextValue(value)


def copy_rows(
    conn: PgConnection,
    query: str,
    text_columns: Sequence[bool],
    *,
    batch_rows: int = 1024,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[RowBatch]:
    """Run ``COPY (query) TO STDOUT`` and return its rows in batches of about that size, none empty.

    The iterator waits without holding the GIL; it is for one thread at a time. Given up before its
    end it closes the connection, since the server goes on sending. Raises :class:`SourceError`, and
    :class:`ProtocolError` for malformed data.
    """
    pgconn = conn.pgconn
    parser = CopyParser(text_columns)
    unchecked = unchecked_text(conn)
    try:
        if unchecked:
            _set(conn, unchecked)
        result = pgconn.exec_(f"COPY ({query}) TO STDOUT (FORMAT binary)".encode())
    except psycopg.Error as exc:
        raise translate(exc, "copying rows") from exc
    if result.status != pq.ExecStatus.COPY_OUT:
        raise translate(result_error(conn, result), "copying rows")
    done = False
    try:
        gather = _gatherer(pgconn)
        while not done:
            rows, before = RowBatch(), parser.value_bytes
            messages, left = batch_rows, batch_bytes
            while messages > 0 and left > 0 and not done:
                chunks, done = gather(min(messages, _TOGETHER), min(left, _TOGETHER_BYTES))
                data = b"".join(chunks)
                messages -= len(chunks)
                left -= len(data)
                rows += parser.feed(data)
            rows.value_bytes = parser.value_bytes - before
            if done:
                _finish(conn, parser)
                if unchecked:
                    _set(conn, CHECKED_TEXT)
            if rows:
                yield rows
    except psycopg.Error as exc:
        raise translate(exc, "copying rows") from exc
    finally:
        if not done:
            conn.close()


def _set(conn: PgConnection, command: str) -> None:
    result = conn.pgconn.exec_(command.encode())
    if result.status != pq.ExecStatus.COMMAND_OK:
        raise result_error(conn, result)


def _gatherer(pgconn: pq.abc.PGconn) -> Callable[[int, int], tuple[list[memoryview], bool]]:
    """Return what collects so many messages of CopyData and bytes, or until the copy ends
    (True)."""
    get_copy_data, consume_input = pgconn.get_copy_data, pgconn.consume_input
    poller = select.poll()
    poller.register(pgconn.socket, select.POLLIN)

    def gather(max_chunks: int, max_bytes: int) -> tuple[list[memoryview], bool]:
        chunks: list[memoryview] = []
        fresh = False
        while max_chunks > 0 and max_bytes > 0:
            size, data = get_copy_data(1)
            if size > 0:
                chunks.append(data)
                max_chunks -= 1
                max_bytes -= size
                fresh = False
            elif size == 0:
                # Most of the time there is more on the socket: to wait for it would be a system
                # call more, and a turn for another thread each time.
                if fresh:
                    poller.poll(_POLL_MILLISECONDS)
                consume_input()
                fresh = True
            else:
                return chunks, True
        return chunks, False

    return gather


def _finish(conn: PgConnection, parser: CopyParser) -> None:
    failure = None
    while (result := conn.pgconn.get_result()) is not None:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            failure = failure or result_error(conn, result)
    if failure is not None:
        raise failure
    parser.end()
