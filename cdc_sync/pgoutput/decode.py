"""Decoder of pgoutput messages, protocol 1 to 4.

A frame is checked while it is read: whatever is not exactly one well-formed message raises
:class:`ProtocolError` with the message's name and the offset, and nothing else ever comes out.
Values are slices of the frame, so no size a frame claims can allocate more than the frame itself
has.

Each function below reads one message after its tag, from position ``pos`` of ``frame``, and returns
it with the position after it. Reading past the end shows as ``struct.error`` or ``IndexError`` and
is turned into ProtocolError in one place, which keeps bounds checks out of the hot path.

Source: PostgreSQL documentation, "Logical Replication Message Formats";
src/backend/replication/logical/proto.c. All integers are big endian, strings are UTF-8 and end with
a zero byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, cast

from cdc_sync.errors import ProtocolError
from cdc_sync.pgoutput.messages import (
    Begin,
    BeginPrepare,
    Commit,
    CommitPrepared,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Origin,
    Prepare,
    Relation,
    RelationColumn,
    ReplicaIdentity,
    RollbackPrepared,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    Type,
    Update,
)
from cdc_sync.rows import UNCHANGED, Row, TextValue

#: Postgres's MaxTupleAttributeNumber: no tuple has more columns.
MAX_COLUMNS: Final = 1664

_Result: TypeAlias = tuple[Message, int]
_Decode: TypeAlias = Callable[[bytes, int], _Result]
_DecodeChange: TypeAlias = Callable[[bytes, int, int | None], _Result]

_KIND_BINARY: Final = ord("b")
_KIND_NULL: Final = ord("n")
_KINDS_WITH_BYTES: Final = b"bt"
_KIND_UNCHANGED: Final = ord("u")
_TUPLE_NEW: Final = ord("N")
_TUPLE_KEY: Final = ord("K")
_TUPLE_OLD: Final = ord("O")
_IDENTITIES: Final[Mapping[int, ReplicaIdentity]] = {
    ord("d"): "d",
    ord("n"): "n",
    ord("f"): "f",
    ord("i"): "i",
}
_STREAM_ABORT_BYTES: Final = 8
_COLUMN_IS_KEY: Final = 1
_TRUNCATE_CASCADE: Final = 1
_TRUNCATE_RESTART_IDENTITY: Final = 2
_MESSAGE_TRANSACTIONAL: Final = 1

_U16 = cast("Callable[[bytes, int], tuple[int]]", struct.Struct(">H").unpack_from)
_I32 = cast("Callable[[bytes, int], tuple[int]]", struct.Struct(">i").unpack_from)
_U32 = cast("Callable[[bytes, int], tuple[int]]", struct.Struct(">I").unpack_from)
_U64 = cast("Callable[[bytes, int], tuple[int]]", struct.Struct(">Q").unpack_from)
_U32_U8 = cast("Callable[[bytes, int], tuple[int, int]]", struct.Struct(">IB").unpack_from)
_U32_I32 = cast("Callable[[bytes, int], tuple[int, int]]", struct.Struct(">Ii").unpack_from)
_U32_U32 = cast("Callable[[bytes, int], tuple[int, int]]", struct.Struct(">II").unpack_from)
_I32_U8 = cast("Callable[[bytes, int], tuple[int, int]]", struct.Struct(">iB").unpack_from)
_U8_U64 = cast("Callable[[bytes, int], tuple[int, int]]", struct.Struct(">BQ").unpack_from)
_U64_I64 = cast("Callable[[bytes, int], tuple[int, int]]", struct.Struct(">Qq").unpack_from)
_BEGIN = cast("Callable[[bytes, int], tuple[int, int, int]]", struct.Struct(">QqI").unpack_from)
_COMMIT = cast(
    "Callable[[bytes, int], tuple[int, int, int, int]]", struct.Struct(">BQQq").unpack_from
)
_BEGIN_PREPARE = cast(
    "Callable[[bytes, int], tuple[int, int, int, int]]", struct.Struct(">QQqI").unpack_from
)
_PREPARE = cast(
    "Callable[[bytes, int], tuple[int, int, int, int, int]]", struct.Struct(">BQQqI").unpack_from
)
_ROLLBACK_PREPARED = cast(
    "Callable[[bytes, int], tuple[int, int, int, int, int, int]]",
    struct.Struct(">BQQqqI").unpack_from,
)


class _MalformedError(Exception):
    """What is wrong, and at which position of the frame; never leaves this module."""

    def __init__(self, reason: str, pos: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pos = pos


class Decoder:
    """Decodes the messages of one START_REPLICATION, in order.

    Between StreamStart and StreamStop the changes carry the xid of their (sub)transaction, so the
    decoder remembers where it is; after a reconnect make a new one. A frame that raises leaves that
    state as it was.
    """

    __slots__ = ("_decoders",)

    def __init__(self) -> None:
        self._decoders: Mapping[int, _Decode] = _OUTSIDE_STREAM

    @property
    def in_stream(self) -> bool:
        """Whether the last StreamStart has not been followed by its StreamStop."""
        return self._decoders is _INSIDE_STREAM

    def decode(self, frame: bytes, offset: int = 0) -> Message:
        """Decode the message that fills ``frame`` from ``offset`` to its end.

        ``frame`` must be ``bytes`` (values are slices of it), ``offset`` at least 0: 25 for a whole
        XLogData frame. Raises :class:`ProtocolError` if the bytes are not exactly one message that
        is possible here; offsets in its text count from ``offset``, the tag's.
        """
        try:
            message, pos = self._decoders[frame[offset]](frame, offset + 1)
        except (struct.error, IndexError):
            raise _truncated(frame, offset) from None
        except KeyError:
            raise self._unexpected(frame[offset]) from None
        except _MalformedError as error:
            raise _error(frame, offset, error.pos, error.reason) from None
        if pos != len(frame):
            raise _error(frame, offset, pos, f"{len(frame) - pos} bytes follow the message")
        kind = type(message)
        if kind is StreamStart:
            self._decoders = _INSIDE_STREAM
        elif kind is StreamStop:
            self._decoders = _OUTSIDE_STREAM
        return message

    def _unexpected(self, tag: int) -> ProtocolError:
        name = _NAMES.get(tag)
        if name is None:
            return ProtocolError(f"Unknown pgoutput message 0x{tag:02x} at byte 0.")
        where = "inside a stream block" if self.in_stream else "outside a stream block"
        return ProtocolError(f"{name} message {where} at byte 0, where the protocol has none.")


def _error(frame: bytes, offset: int, pos: int, reason: str) -> ProtocolError:
    name = _NAMES[frame[offset]]
    return ProtocolError(f"Malformed {name} message: {reason} at byte {pos - offset}.")


def _truncated(frame: bytes, offset: int) -> ProtocolError:
    if offset >= len(frame):
        return ProtocolError("Empty pgoutput message: no tag at byte 0.")
    return _error(frame, offset, len(frame), "the frame ends")


# Int16 n, then n times: 'n' | 'u' | ('t' | 'b') Int32 size, bytes
def _tuple(frame: bytes, pos: int) -> tuple[Row, int]:
    (count,) = _U16(frame, pos)
    if count > MAX_COLUMNS:
        raise _MalformedError(f"a tuple of {count} columns", pos)
    pos += 2
    end = len(frame)
    row: Row = []
    append = row.append
    for _ in range(count):
        kind = frame[pos]
        if kind in _KINDS_WITH_BYTES:
            (size,) = _I32(frame, pos + 1)
            start = pos + 5
            stop = start + size
            if size < 0 or stop > end:
                raise _MalformedError(f"a value of {size} bytes where {end - start} remain", pos)
            value = frame[start:stop]
            append(value if kind == _KIND_BINARY else TextValue(value))
            pos = stop
        elif kind == _KIND_NULL:
            append(None)
            pos += 1
        elif kind == _KIND_UNCHANGED:
            append(UNCHANGED)
            pos += 1
        else:
            raise _MalformedError(f"unknown value kind 0x{kind:02x}", pos)
    return row, pos


def read_tuple(frame: bytes, pos: int) -> tuple[Row, int] | None:
    """Read a TupleData: the row and where it ends; None if it is malformed or cut short."""
    try:
        return _tuple(frame, pos)
    except (struct.error, IndexError, _MalformedError):
        return None


def _string(frame: bytes, pos: int, errors: str = "strict") -> tuple[str, int]:
    end = frame.find(0, pos)
    if end < 0:
        raise _MalformedError("a string without end", pos)
    try:
        return frame[pos:end].decode("utf-8", errors), end + 1
    except UnicodeDecodeError:
        raise _MalformedError("a string that is not UTF-8", pos) from None


def _no_flags(flags: int, pos: int) -> None:
    # Reserved. Postgres's own subscriber refuses them too: they would change its meaning.
    if flags:
        raise _MalformedError(f"unknown flags 0x{flags:02x}", pos)


# I: Int32 relation, 'N', tuple
def _insert(frame: bytes, pos: int, xid: int | None = None) -> _Result:
    relation, marker = _U32_U8(frame, pos)
    if marker != _TUPLE_NEW:
        raise _MalformedError(f"unknown tuple kind 0x{marker:02x}", pos + 4)
    new, pos = _tuple(frame, pos + 5)
    return Insert(relation, new, xid), pos


# U: Int32 relation, [('K' | 'O') tuple], 'N', tuple
def _update(frame: bytes, pos: int, xid: int | None = None) -> _Result:
    relation, marker = _U32_U8(frame, pos)
    pos += 5
    old: Row | None = None
    old_is_key = marker == _TUPLE_KEY
    if old_is_key or marker == _TUPLE_OLD:
        old, pos = _tuple(frame, pos)
        marker = frame[pos]
        pos += 1
    if marker != _TUPLE_NEW:
        raise _MalformedError(f"unknown tuple kind 0x{marker:02x}", pos - 1)
    new, pos = _tuple(frame, pos)
    return Update(relation, old, old_is_key, new, xid), pos


# D: Int32 relation, ('K' | 'O') tuple
def _delete(frame: bytes, pos: int, xid: int | None = None) -> _Result:
    relation, marker = _U32_U8(frame, pos)
    old_is_key = marker == _TUPLE_KEY
    if not old_is_key and marker != _TUPLE_OLD:
        raise _MalformedError(f"unknown tuple kind 0x{marker:02x}", pos + 4)
    old, pos = _tuple(frame, pos + 5)
    return Delete(relation, old, old_is_key, xid), pos


# B: Int64 finalLsn, Int64 commitTime, Int32 xid
def _begin(frame: bytes, pos: int) -> _Result:
    final_lsn, commit_time, xid = _BEGIN(frame, pos)
    return Begin(final_lsn, commit_time, xid), pos + 20


# C: Int8 flags, Int64 commitLsn, Int64 endLsn, Int64 commitTime
def _commit(frame: bytes, pos: int) -> _Result:
    flags, commit_lsn, end_lsn, commit_time = _COMMIT(frame, pos)
    _no_flags(flags, pos)
    return Commit(flags, commit_lsn, end_lsn, commit_time), pos + 25


# O: Int64 lsn, String name
def _origin(frame: bytes, pos: int) -> _Result:
    (lsn,) = _U64(frame, pos)
    name, pos = _string(frame, pos + 8)
    return Origin(lsn, name), pos


# R: Int32 oid, String namespace, String name, Int8 identity, Int16 n, then n times:
#    Int8 flags, String name, Int32 typeOid, Int32 typeModifier
def _relation(frame: bytes, pos: int, xid: int | None = None) -> _Result:
    (oid,) = _U32(frame, pos)
    namespace, pos = _string(frame, pos + 4)
    name, pos = _string(frame, pos)
    identity = _IDENTITIES.get(frame[pos])
    if identity is None:
        raise _MalformedError(f"unknown replica identity 0x{frame[pos]:02x}", pos)
    (count,) = _U16(frame, pos + 1)
    if count > MAX_COLUMNS:
        raise _MalformedError(f"a relation of {count} columns", pos + 1)
    pos += 3
    columns: list[RelationColumn] = []
    for _ in range(count):
        key = frame[pos] & _COLUMN_IS_KEY != 0
        column, pos = _string(frame, pos + 1)
        type_oid, type_modifier = _U32_I32(frame, pos)
        columns.append(RelationColumn(column, type_oid, type_modifier, key))
        pos += 8
    return Relation(oid, namespace, name, identity, tuple(columns), xid), pos


# Y: Int32 oid, String namespace, String name
def _type(frame: bytes, pos: int, xid: int | None = None) -> _Result:
    (oid,) = _U32(frame, pos)
    namespace, pos = _string(frame, pos + 4)
    name, pos = _string(frame, pos)
    return Type(oid, namespace, name, xid), pos


# T: Int32 n, Int8 options, then n times: Int32 relation
def _truncate(frame: bytes, pos: int, xid: int | None = None) -> _Result:
    count, options = _I32_U8(frame, pos)
    start = pos + 5
    stop = start + 4 * count
    if count < 0 or stop > len(frame):
        raise _MalformedError(f"{count} relations in {len(frame) - start} bytes", pos)
    relations = cast("tuple[int, ...]", struct.unpack_from(f">{count}I", frame, start))
    cascade = options & _TRUNCATE_CASCADE != 0
    restart_identity = options & _TRUNCATE_RESTART_IDENTITY != 0
    return Truncate(cascade, restart_identity, relations, xid), stop


# M: Int8 flags, Int64 lsn, String prefix, Int32 size, bytes
def _logical_message(frame: bytes, pos: int, xid: int | None = None) -> _Result:
    flags, lsn = _U8_U64(frame, pos)
    # Anybody may write one, in a database without an encoding with any bytes for a prefix.
    prefix, pos = _string(frame, pos + 9, "surrogateescape")
    (size,) = _I32(frame, pos)
    start = pos + 4
    stop = start + size
    if size < 0 or stop > len(frame):
        raise _MalformedError(f"content of {size} bytes where {len(frame) - start} remain", pos)
    transactional = flags & _MESSAGE_TRANSACTIONAL != 0
    return LogicalMessage(transactional, lsn, prefix, frame[start:stop], xid), stop


# S: Int32 xid, Int8 firstSegment
def _stream_start(frame: bytes, pos: int) -> _Result:
    xid, first_segment = _U32_U8(frame, pos)
    return StreamStart(xid, first_segment == 1), pos + 5


# E: nothing
def _stream_stop(frame: bytes, pos: int) -> _Result:
    return StreamStop(), pos


# c: Int32 xid, then as C
def _stream_commit(frame: bytes, pos: int) -> _Result:
    (xid,) = _U32(frame, pos)
    flags, commit_lsn, end_lsn, commit_time = _COMMIT(frame, pos + 4)
    _no_flags(flags, pos + 4)
    return StreamCommit(xid, flags, commit_lsn, end_lsn, commit_time), pos + 29


# A: Int32 xid, Int32 subxid, [Int64 abortLsn, Int64 abortTime]
def _stream_abort(frame: bytes, pos: int) -> _Result:
    xid, subxid = _U32_U32(frame, pos)
    pos += _STREAM_ABORT_BYTES
    # LSN and time are there under streaming 'parallel' only; the message does not say so itself.
    if pos == len(frame):
        return StreamAbort(xid, subxid, None, None), pos
    abort_lsn, abort_time = _U64_I64(frame, pos)
    return StreamAbort(xid, subxid, abort_lsn, abort_time), pos + 16


# b: Int64 prepareLsn, Int64 endLsn, Int64 prepareTime, Int32 xid, String gid
def _begin_prepare(frame: bytes, pos: int) -> _Result:
    prepare_lsn, end_lsn, prepare_time, xid = _BEGIN_PREPARE(frame, pos)
    gid, pos = _string(frame, pos + 28)
    return BeginPrepare(prepare_lsn, end_lsn, prepare_time, xid, gid), pos


# P: Int8 flags, Int64 prepareLsn, Int64 endLsn, Int64 prepareTime, Int32 xid, String gid
def _prepare(frame: bytes, pos: int) -> _Result:
    return _any_prepare(frame, pos, streamed=False)


# p: as P
def _stream_prepare(frame: bytes, pos: int) -> _Result:
    return _any_prepare(frame, pos, streamed=True)


def _any_prepare(frame: bytes, pos: int, streamed: bool) -> _Result:
    flags, prepare_lsn, end_lsn, prepare_time, xid = _PREPARE(frame, pos)
    _no_flags(flags, pos)
    gid, pos = _string(frame, pos + 29)
    return Prepare(flags, prepare_lsn, end_lsn, prepare_time, xid, gid, streamed), pos


# K: Int8 flags, Int64 commitLsn, Int64 endLsn, Int64 commitTime, Int32 xid, String gid
def _commit_prepared(frame: bytes, pos: int) -> _Result:
    flags, commit_lsn, end_lsn, commit_time, xid = _PREPARE(frame, pos)
    _no_flags(flags, pos)
    gid, pos = _string(frame, pos + 29)
    return CommitPrepared(flags, commit_lsn, end_lsn, commit_time, xid, gid), pos


# r: Int8 flags, Int64 prepareEndLsn, Int64 rollbackEndLsn, Int64 prepareTime, Int64 rollbackTime,
#    Int32 xid, String gid
def _rollback_prepared(frame: bytes, pos: int) -> _Result:
    flags, prepare_end, rollback_end, prepared, rolled_back, xid = _ROLLBACK_PREPARED(frame, pos)
    _no_flags(flags, pos)
    gid, pos = _string(frame, pos + 37)
    return (
        RollbackPrepared(flags, prepare_end, rollback_end, prepared, rolled_back, xid, gid),
        pos,
    )


def _streamed(decode_change: _DecodeChange) -> _Decode:
    # Inside a stream block: Int32 xid, then the message as outside.
    def decode(frame: bytes, pos: int) -> _Result:
        (xid,) = _U32(frame, pos)
        return decode_change(frame, pos + 4, xid)

    return decode


_OUTSIDE_STREAM: Final[Mapping[int, _Decode]] = {
    ord("I"): _insert,
    ord("U"): _update,
    ord("D"): _delete,
    ord("T"): _truncate,
    ord("M"): _logical_message,
    ord("R"): _relation,
    ord("Y"): _type,
    ord("O"): _origin,
    ord("B"): _begin,
    ord("C"): _commit,
    ord("S"): _stream_start,
    ord("c"): _stream_commit,
    ord("A"): _stream_abort,
    ord("b"): _begin_prepare,
    ord("P"): _prepare,
    ord("p"): _stream_prepare,
    ord("K"): _commit_prepared,
    ord("r"): _rollback_prepared,
}

_INSIDE_STREAM: Final[Mapping[int, _Decode]] = {
    ord("I"): _streamed(_insert),
    ord("U"): _streamed(_update),
    ord("D"): _streamed(_delete),
    ord("T"): _streamed(_truncate),
    ord("M"): _streamed(_logical_message),
    ord("R"): _streamed(_relation),
    ord("Y"): _streamed(_type),
    ord("O"): _origin,
    ord("E"): _stream_stop,
}

_NAMES: Final[Mapping[int, str]] = {
    ord("I"): "Insert",
    ord("U"): "Update",
    ord("D"): "Delete",
    ord("T"): "Truncate",
    ord("M"): "LogicalMessage",
    ord("R"): "Relation",
    ord("Y"): "Type",
    ord("O"): "Origin",
    ord("B"): "Begin",
    ord("C"): "Commit",
    ord("S"): "StreamStart",
    ord("E"): "StreamStop",
    ord("c"): "StreamCommit",
    ord("A"): "StreamAbort",
    ord("b"): "BeginPrepare",
    ord("P"): "Prepare",
    ord("p"): "StreamPrepare",
    ord("K"): "CommitPrepared",
    ord("r"): "RollbackPrepared",
}
