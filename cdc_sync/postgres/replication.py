"""The replication stream: START_REPLICATION and COPY_BOTH through psycopg's libpq binding.

psycopg has no replication API of its own. Version 3.3 reaches COPY_BOTH through ``psycopg.pq``,
which is not a documented interface: this is the only module that does, and its tests hold what it
relies on.

Source: PostgreSQL documentation, "Streaming Replication Protocol", "Logical Streaming Replication
Parameters"; libpq "Functions Associated with the COPY Command".
"""

from __future__ import annotations

import select
import time
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import psycopg
from psycopg import pq

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ErrorKind, ProtocolError, SourceError
from cdc_sync.pgoutput.envelope import encode_status, postgres_time
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import (
    PgConnection,
    answering,
    closed_on_error,
    connect,
    pooler_suspected,
    result_error,
    translate,
    unchecked_text,
)
from cdc_sync.postgres.identifiers import quote_ident, quote_literal
from cdc_sync.postgres.slot import BLOCKERS, slot_active, validate_slot_name

_COPY_BOTH: Final = pq.ExecStatus.COPY_BOTH
_FATAL_ERROR: Final = pq.ExecStatus.FATAL_ERROR
#: Linux says so while something is left to be read; poll reports the rest without being asked.
_HUNG_UP: Final = getattr(select, "POLLRDHUP", 0)
_ENDED_WELL: Final = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.COPY_IN)

#: Highest protocol version of pgoutput by the server's major version.
_PROTOCOL_VERSIONS: Final = {14: 2, 15: 3}
_NEWEST_PROTOCOL_VERSION: Final = 4
_FAILOVER_SINCE: Final = 170000


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    """Answer to IDENTIFY_SYSTEM. ``xlog_position`` is the server's flushed WAL position."""

    system_identifier: str
    timeline: int
    xlog_position: Lsn
    database: str


@dataclass(frozen=True, slots=True)
class CreatedSlot:
    """A slot just made.

    Everything committed before ``consistent_point`` is visible in ``snapshot``, everything after
    comes by the stream. The snapshot can be imported until the connection's next command.
    """

    name: str
    consistent_point: Lsn
    snapshot: str


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Options of pgoutput. What a server version does not know is never sent to it (R11)."""

    protocol_version: int = 1
    binary: bool = True
    messages: bool = True
    streaming: Literal["off", "on", "parallel"] = "off"


class BinaryRefusedError(SourceError):
    """The server cannot send a value in binary format; the slot can be read as text. Its kind is
    PROTOCOL."""


class ConnectionClosedError(SourceError):
    """The stream has ended; the slot may be another's. Its kind is SOURCE_UNAVAILABLE."""


class ReplicationConnection:
    """A connection that makes a slot or streams from one.

    Nothing in it waits for the network once :meth:`start` has returned: wait for :meth:`fileno` to
    become readable, at most a second (R4), then :meth:`read` until it returns nothing. Not for
    several threads at once.
    """

    def __init__(self, conn: PgConnection) -> None:
        self._conn = conn
        self._pgconn = conn.pgconn
        self._slot = ""
        self._publication = ""
        self._binary = False
        self._streaming = False
        self._unsent = False
        self._error: SourceError | None = None
        # Highest LSN in the header of any frame, as its eight big-endian bytes: they compare as the
        # numbers do, and cutting them out costs less than unpacking every header.
        self._received = bytes(8)
        self._last_write = 0
        self._last_flush = 0
        #: The server's ``wal_sender_timeout`` in seconds; 0 means none.
        self.wal_sender_timeout_seconds = self._read_wal_sender_timeout()
        conn.add_notice_handler(self._on_notice)

    @classmethod
    def open(cls, source: SourceSettings, *, application_name: str = "cdc_sync") -> Self:
        """Connect in replication mode to the database. Raises :class:`SourceError`."""
        conn = connect(source, application_name=application_name, replication=True)
        with closed_on_error(conn):
            return cls(conn)

    def _read_wal_sender_timeout(self) -> float:
        rows = self._query(
            "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'",
            "reading wal_sender_timeout",
        )
        return int(rows[0][0]) / 1000

    def _query(self, command: str, doing: str) -> list[tuple[Any, ...]]:
        try:
            with answering(self._conn):
                cursor = self._conn.execute(command.encode())
                return cursor.fetchall() if cursor.description else []
        except psycopg.errors.SyntaxError as exc:
            raise pooler_suspected(doing) from exc
        except psycopg.Error as exc:
            raise translate(exc, doing) from exc

    @property
    def backend_pid(self) -> int:
        """Process id of the walsender."""
        return self._conn.info.backend_pid

    @property
    def server_version(self) -> int:
        """``server_version_num``."""
        return self._conn.info.server_version

    @property
    def received_lsn(self) -> Lsn:
        """The highest position received, which a status may not exceed."""
        return Lsn.from_bytes(self._received)

    def identify(self) -> SystemIdentity:
        """Run IDENTIFY_SYSTEM. Raises :class:`SourceError` CONFIG behind a pooler (R66)."""
        doing = "identifying the server"
        rows = self._query("IDENTIFY_SYSTEM", doing)
        if not rows or len(rows[0]) != 4 or rows[0][3] is None:
            raise pooler_suspected(doing)
        system_identifier, timeline, position, database = rows[0]
        return SystemIdentity(system_identifier, timeline, Lsn.parse(position), database)

    def timeline_left_at(self, timeline: int, current: int) -> Lsn | None:
        """Where the history of the current timeline left an earlier one; None if that is no part
        of it. Raises :class:`SourceError`.

        A history file has a line for each: timeline, position, and why it was left, with tabs in
        between.
        """
        rows = self._query(f"TIMELINE_HISTORY {current:d}", "reading the timeline's history")
        content = rows[0][1]
        text = content.decode() if isinstance(content, bytes) else str(content)
        for line in text.splitlines():
            fields = line.split()
            if len(fields) >= 2 and fields[0] == str(timeline):
                return Lsn.parse(fields[1])
        return None

    def is_committed(self, xid: int) -> bool:
        """Whether a transaction (64 bit) is committed, or too old to tell."""
        try:
            row = self._conn.execute(
                f"SELECT pg_catalog.pg_xact_status('{xid:d}'::xid8)".encode()
            ).fetchone()
        except psycopg.errors.InvalidParameterValue:
            # It has not begun yet.
            return False
        except psycopg.Error as exc:
            raise translate(exc, "looking at a transaction") from exc
        return row is not None and row[0] in ("committed", None)

    def create_slot(
        self,
        name: str,
        *,
        failover: bool = False,
        temporary: bool = False,
        lock_timeout_seconds: float,
    ) -> CreatedSlot:
        """Make a logical slot and export its snapshot. The server drops a ``temporary`` one with
        this connection.

        Creation waits for every write transaction open at that moment; ``lock_timeout`` is the only
        setting that bounds it. Raises :class:`SourceError`: SLOT_BUSY naming them after the time is
        up (no slot is left behind), SLOT_ACTIVE when the slot exists, SOURCE_SETTING when there is
        no room or ``wal_level`` is not logical, SOURCE_PERMISSION.
        """
        validate_slot_name(name)
        self._query(f"SET lock_timeout = {max(1, round(lock_timeout_seconds * 1000))}", "SET")
        try:
            command = self._create_command(name, failover, temporary)
            row = self._conn.execute(command.encode()).fetchone()
        except psycopg.errors.LockNotAvailable as exc:
            raise self._slot_busy(name, lock_timeout_seconds) from exc
        except psycopg.errors.DuplicateObject as exc:
            raise SourceError(
                ErrorKind.SLOT_ACTIVE,
                f"slot {name} exists already; another process may just have made it",
            ) from exc
        except psycopg.Error as exc:
            raise self._creation_error(exc, name) from exc
        assert row is not None
        return CreatedSlot(row[0], Lsn.parse(row[1]), row[2])

    def _create_command(self, name: str, failover: bool, temporary: bool) -> str:
        kind = "TEMPORARY LOGICAL" if temporary else "LOGICAL"
        command = f"CREATE_REPLICATION_SLOT {quote_ident(name)} {kind} pgoutput"
        if failover and self.server_version >= _FAILOVER_SINCE:
            return f"{command} (SNAPSHOT 'export', FAILOVER)"
        # The form with parentheses is a syntax error on 14; this one works everywhere.
        return f"{command} EXPORT_SNAPSHOT"

    def _slot_busy(self, name: str, seconds: float) -> SourceError:
        blockers = [str(row[0]) for row in self._query(BLOCKERS, "looking for open transactions")]
        shown = "; ".join(blockers[:10]) or "none is open any more"
        if len(blockers) > 10:
            shown += f"; and {len(blockers) - 10} more"
        return SourceError(
            ErrorKind.SLOT_BUSY,
            f"slot {name} could not be made within {seconds:g} s: its creation waits for the write"
            f" transactions that are open: {shown}",
            "End them (SELECT pg_terminate_backend(pid); ROLLBACK PREPARED 'gid';), or wait: it is"
            " tried again.",
        )

    def _creation_error(self, exc: psycopg.Error, name: str) -> SourceError:
        error = translate(exc, f"creating slot {name}")
        remedy = None
        if exc.sqlstate == "53400":
            remedy = (
                "Drop a slot that nobody uses (see pg_replication_slots), or"
                " ALTER SYSTEM SET max_replication_slots = 20; and restart Postgres."
            )
        elif exc.sqlstate == "55000":
            error.kind = ErrorKind.SOURCE_SETTING
            remedy = "ALTER SYSTEM SET wal_level = logical; then restart Postgres."
        elif exc.sqlstate == "42501":
            remedy = f"ALTER ROLE {quote_ident(self._conn.info.user)} REPLICATION;"
        elif exc.sqlstate == "42601":
            return pooler_suspected(f"creating slot {name}")
        return SourceError(error.kind, error.message, remedy)

    def start(
        self,
        slot: str,
        publication: str,
        options: StreamOptions | None = None,
        *,
        server_version: int | None = None,
    ) -> None:
        """Start streaming where the slot stands (R46: from 0/0, since the server knows better).

        Raises :class:`SourceError`: SLOT_ACTIVE, SLOT_LOST (gone, invalidated, or its WAL removed),
        PUBLICATION_UNUSABLE, SOURCE_SETTING (the slot belongs to another database).
        """
        validate_slot_name(slot)
        self._slot, self._publication = slot, publication
        options = options or StreamOptions()
        self._binary = options.binary
        version = server_version if server_version is not None else self.server_version
        command = start_command(slot, publication, options, version)
        if unchecked := unchecked_text(self._conn):
            self._query(unchecked, f"starting to stream from slot {slot}")
        try:
            result = self._pgconn.exec_(command.encode())
        except psycopg.Error as exc:
            raise translate(exc, f"starting to stream from slot {slot}") from exc
        if result.status != _COPY_BOTH:
            raise self._stream_error(result_error(self._conn, result))
        self._streaming = True
        self._pgconn.nonblocking = 1

    def fileno(self) -> int:
        """The socket, to wait on. Raises :class:`SourceError` once the stream has failed."""
        if self._error is not None:
            raise self._error
        try:
            return self._pgconn.socket
        except psycopg.Error as exc:
            raise translate(exc, "waiting for changes") from exc

    @property
    def error(self) -> SourceError | None:
        """What has ended the stream, as far as that was read."""
        return self._error

    def check(self) -> None:
        """Make sure that the stream has not ended, be there something to read still or not. A
        system call, and no more. Raises :class:`ConnectionClosedError`."""
        poller = select.poll()
        try:
            poller.register(self._pgconn.socket, _HUNG_UP)
            ended = self._error is not None or bool(poller.poll(0))
        except psycopg.Error:
            ended = True
        if ended:
            raise ConnectionClosedError(
                ErrorKind.SOURCE_UNAVAILABLE, f"the stream of slot {self._slot} has ended"
            )

    def read(self, max_frames: int = 1000, max_bytes: int = 4 << 20) -> list[bytes]:
        """Return the frames that are there now, without waiting; none when there are none.

        A frame is the payload of one CopyData: ``w`` or ``k`` with their headers
        (:mod:`cdc_sync.pgoutput.envelope`). Call again until it returns nothing before waiting on
        the socket: libpq may hold frames that the socket does not signal. Frames in front of the
        end of the stream are returned first, the error is raised by the next call:

        - SOURCE_UNAVAILABLE: shutdown, lost connection, or terminated by an administrator, which is
          also what the active consumer of a slot gets when the slot is invalidated: look at it
        - PUBLICATION_UNUSABLE: the publication does not exist at this point of the WAL. Postgres 18
          only warns and skips the changes; that is an error here, and the frames of that read are
          withheld (R9)
        - PROTOCOL and others: the server fails to decode (R8); :class:`BinaryRefusedError` where it
          would not as text (R12)
        """
        if self._error is not None:
            raise self._error
        frames: list[bytes] = []
        append = frames.append
        get_copy_data, consume_input = self._pgconn.get_copy_data, self._pgconn.consume_input
        budget = max_bytes
        fresh = False
        try:
            while max_frames > 0 and budget > 0:
                size, data = get_copy_data(1)
                if size > 0:
                    append(bytes(data))
                    budget -= size
                    max_frames -= 1
                    fresh = False
                elif size == 0:
                    if fresh:
                        break
                    consume_input()
                    fresh = True
                else:
                    self._error = self._ended()
                    break
        except psycopg.Error as exc:
            self._error = translate(exc, "streaming")
        if self._unsent:
            self._flush()
        if frames and self._error is None:
            self._received = max(self._received, max([frame[1:9] for frame in frames]))
            return frames
        return self._last_frames(frames)

    def _last_frames(self, frames: list[bytes]) -> list[bytes]:
        if self._error is None:
            return frames
        withheld = self._error.kind is ErrorKind.PUBLICATION_UNUSABLE
        if not frames or withheld:
            raise self._error
        self._received = max(self._received, max([frame[1:9] for frame in frames]))
        return frames

    def _ended(self) -> SourceError:
        """Make the error of a stream that the server has ended."""
        self._streaming = False
        result = self._pgconn.get_result()
        if result is not None and result.status == _FATAL_ERROR:
            return self._stream_error(result_error(self._conn, result))
        status = "no result" if result is None else pq.ExecStatus(result.status).name
        if result is None or result.status in _ENDED_WELL:
            return SourceError(
                ErrorKind.SOURCE_UNAVAILABLE,
                f"Postgres ended the stream of slot {self._slot}: the server is shutting down",
            )
        return ProtocolError(f"the stream of slot {self._slot} ended with {status}")

    def _stream_error(self, exc: psycopg.Error) -> SourceError:
        sqlstate, reason = exc.sqlstate, exc.diag.message_primary or str(exc)
        slot = self._slot
        if sqlstate == "55006":
            return self._active_error(slot)
        # The function that reports is never translated, the message may be.
        where = exc.diag.source_function or ""
        if sqlstate == "42704":
            if "ublication" in where or "publication" in reason:
                return self._publication_missing(reason)
            return SourceError(ErrorKind.SLOT_LOST, f"slot {slot} does not exist: {reason}")
        if sqlstate == "55000":
            if "database" in reason:
                return SourceError(
                    ErrorKind.SOURCE_SETTING,
                    f"slot {slot} cannot be used: {reason}",
                    "Choose another name for source.slot, or drop that slot.",
                )
            return SourceError(ErrorKind.SLOT_LOST, f"slot {slot} can no longer be read: {reason}")
        if sqlstate == "42601":
            return pooler_suspected("START_REPLICATION")
        error = translate(exc, f"streaming from slot {slot}")
        if sqlstate == "42883" and self._binary:
            return BinaryRefusedError(error.kind, error.message, error.remedy)
        if sqlstate == "57P01":
            error.remedy = "Look at the slot: an invalidated one ends its consumer like this."
        return error

    def _active_error(self, slot: str) -> SourceError:
        rows = self._query(
            "SELECT a.pid, a.application_name FROM pg_catalog.pg_replication_slots s"
            " JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid"
            f" WHERE s.slot_name = {quote_literal(slot)}",
            f"looking who uses slot {slot}",
        )
        pid, application = rows[0] if rows else (None, None)
        return slot_active(slot, pid, application)

    def _publication_missing(self, reason: str) -> SourceError:
        return SourceError(
            ErrorKind.PUBLICATION_UNUSABLE,
            f"publication {self._publication} does not exist where slot {self._slot} stands in the"
            f" WAL: {reason}",
            "Changes older than a publication do not see it, so a new one does not help the slot:"
            f" drop slot {self._slot} and copy anew with --migration.restart.",
        )

    def _on_notice(self, diag: psycopg.errors.Diagnostic) -> None:
        reason = diag.message_primary or ""
        if "skipped loading publication" in reason or diag.source_function == "LoadPublications":
            self._error = self._publication_missing(reason)

    def send_status(self, write: int, flush: int, reply: bool = False) -> None:
        """Report positions: ``write`` received, ``flush`` (and apply) durable in the sink.

        Never waits. The server checks nothing and would forget changes, so what it hears never
        exceeds what this connection has received: positions known from an earlier one are cut to
        that (R45). Raises :class:`ProtocolError` for ``flush`` beyond ``write`` and for positions
        that go back, :class:`SourceError` once the stream has failed.
        """
        if self._error is not None:
            raise self._error
        received = self.received_lsn
        if flush > write or min(write, received) < self._last_write or flush < self._last_flush:
            raise ProtocolError(
                f"refused to report write {Lsn(write)}, flush {Lsn(flush)} after write"
                f" {Lsn(self._last_write)}, flush {Lsn(self._last_flush)}"
            )
        write, flush = min(write, received), min(flush, received)
        status = encode_status(write, flush, flush, postgres_time(time.time()), reply)
        try:
            self._pgconn.put_copy_data(status)
        except psycopg.Error as exc:
            raise translate(exc, "reporting the position") from exc
        self._last_write, self._last_flush = write, flush
        self._flush()

    def _flush(self) -> None:
        try:
            self._unsent = self._pgconn.flush() != 0
        except psycopg.Error as exc:
            # Reading may still find why the server hung up; if not, reading fails as well.
            self._unsent = False
            if not self._streaming:
                raise translate(exc, "reporting the position") from exc

    def stop(self, timeout_seconds: float = 5.0) -> bool:
        """End the stream: send CopyDone, discard what still comes, wait for the server's answer.

        Returns whether it answered in time. Frames discarded are not confirmed, so they come again.
        Open another connection for that: a walsender does not stream logically twice.
        """
        if not self._streaming or self._error is not None:
            return False
        deadline = time.monotonic() + timeout_seconds
        try:
            self._pgconn.put_copy_end()
            while True:
                size, _ = self._pgconn.get_copy_data(1)
                if size < 0:
                    break
                if size == 0:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        return False
                    self._flush()
                    select.select([self._pgconn.socket], [], [], min(remaining, 1.0))
                    self._pgconn.consume_input()
            self._streaming = False
            while self._pgconn.get_result() is not None:
                pass
        except psycopg.Error:
            # The connection is being given up in any case; the slot stands where it was confirmed.
            self._streaming = False
            return False
        return True

    def close(self) -> None:
        """Close the connection; does not wait, and may be called twice."""
        self._streaming = False
        self._conn.close()


def start_command(slot: str, publication: str, options: StreamOptions, server_version: int) -> str:
    """Return the START_REPLICATION command for a server version."""
    newest = _PROTOCOL_VERSIONS.get(server_version // 10000, _NEWEST_PROTOCOL_VERSION)
    # publication_names is a list of identifiers inside of a literal.
    settings = {
        "proto_version": str(min(options.protocol_version, newest)),
        "publication_names": quote_ident(publication),
        "binary": "true" if options.binary else "false",
        "messages": "true" if options.messages else "false",
    }
    if options.streaming != "off" and options.protocol_version >= 2:
        parallel = options.streaming == "parallel" and newest >= 4 <= options.protocol_version
        settings["streaming"] = "parallel" if parallel else "on"
    listed = ", ".join(f"{name} {quote_literal(value)}" for name, value in settings.items())
    return f"START_REPLICATION SLOT {quote_ident(slot)} LOGICAL 0/0 ({listed})"
