"""Encoder of replication frames, for tests: the server's half of the protocol.

Written from the protocol page ("Logical Replication Message Formats", "Streaming Replication
Protocol") and sharing no code with the decoder. :func:`encode` is the inverse of
``Decoder.decode``: a message with ``xid`` set gets the form it has inside a stream block.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

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
    RollbackPrepared,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    Type,
    Update,
)
from cdc_sync.rows import UNCHANGED, RawValue, TextValue, Unchanged


@dataclass(frozen=True, slots=True)
class Status:
    """A standby status update as the server reads it; ``time`` is microseconds since 2000."""

    write: int
    flush: int
    apply: int
    time: int
    reply: bool


def xlog_data(
    payload: bytes, data_start: int = 0, wal_end: int | None = None, send_time: int = 0
) -> bytes:
    """A CopyData frame with a pgoutput message; in logical mode ``wal_end`` is ``data_start``."""
    end = data_start if wal_end is None else wal_end
    return b"w" + _int64(data_start) + _int64(end) + _int64(send_time) + payload


def keepalive(wal_end: int, send_time: int = 0, reply_requested: bool = False) -> bytes:
    """A keepalive frame."""
    return b"k" + _int64(wal_end) + _int64(send_time) + _flag(reply_requested)


def decode_status(frame: bytes) -> Status:
    """Read what a client sent; fails the test if it is not a standby status update."""
    assert frame[:1] == b"r"
    assert len(frame) == 34
    assert frame[33] in (0, 1)
    write, flush, apply = (int.from_bytes(frame[at : at + 8], "big") for at in (1, 9, 17))
    return Status(
        write, flush, apply, int.from_bytes(frame[25:33], "big", signed=True), frame[33] == 1
    )


def encode(message: Message) -> bytes:
    """The message as pgoutput writes it."""
    match message:
        case Insert() | Update() | Delete() | Truncate() | LogicalMessage() | Relation() | Type():
            tag, body = _change(message)
            return tag + (b"" if message.xid is None else _int32(message.xid)) + body
        case StreamStart():
            return b"S" + _int32(message.xid) + _flag(message.first_segment)
        case StreamStop():
            return b"E"
        case StreamCommit():
            return b"c" + _int32(message.xid) + _commit(message)
        case StreamAbort():
            body = b"A" + _int32(message.xid) + _int32(message.subxid)
            if message.abort_lsn is None or message.abort_time is None:
                return body
            return body + _int64(message.abort_lsn) + _int64(message.abort_time)
        case Begin():
            lsn, time = _int64(message.final_lsn), _int64(message.commit_time)
            return b"B" + lsn + time + _int32(message.xid)
        case Commit():
            return b"C" + _commit(message)
        case Origin():
            return b"O" + _int64(message.lsn) + _string(message.name)
        case BeginPrepare() | Prepare() | CommitPrepared() | RollbackPrepared():
            return _two_phase(message)
        case _:
            assert_never(message)


def tuple_data(values: Sequence[RawValue]) -> bytes:
    """TupleData: a TextValue as ``t``, other bytes as ``b``."""
    return _int16(len(values)) + b"".join(_value(value) for value in values)


def _value(value: RawValue) -> bytes:
    match value:
        case None:
            return b"n"
        case Unchanged():
            assert value is UNCHANGED
            return b"u"
        case TextValue():
            return b"t" + _int32(len(value)) + value
        case bytes():
            return b"b" + _int32(len(value)) + value
        case _:
            assert_never(value)


def _change(
    message: Insert | Update | Delete | Truncate | LogicalMessage | Relation | Type,
) -> tuple[bytes, bytes]:
    match message:
        case Insert():
            return b"I", _int32(message.relation) + b"N" + tuple_data(message.new)
        case Update():
            old = b""
            if message.old is not None:
                old = (b"K" if message.old_is_key else b"O") + tuple_data(message.old)
            return b"U", _int32(message.relation) + old + b"N" + tuple_data(message.new)
        case Delete():
            kind = b"K" if message.old_is_key else b"O"
            return b"D", _int32(message.relation) + kind + tuple_data(message.old)
        case Truncate():
            options = (1 if message.cascade else 0) | (2 if message.restart_identity else 0)
            oids = b"".join(_int32(oid) for oid in message.relations)
            return b"T", _int32(len(message.relations)) + bytes([options]) + oids
        case LogicalMessage():
            head = _flag(message.transactional) + _int64(message.lsn) + _string(message.prefix)
            return b"M", head + _int32(len(message.content)) + message.content
        case Relation():
            columns = b"".join(
                _flag(column.key)
                + _string(column.name)
                + _int32(column.type_oid)
                + _int32(column.type_modifier)
                for column in message.columns
            )
            head = _int32(message.oid) + _string(message.namespace) + _string(message.name)
            identity = message.replica_identity.encode()
            return b"R", head + identity + _int16(len(message.columns)) + columns
        case Type():
            return b"Y", _int32(message.oid) + _string(message.namespace) + _string(message.name)
        case _:
            assert_never(message)


def _commit(message: Commit | StreamCommit) -> bytes:
    lsns = _int64(message.commit_lsn) + _int64(message.end_lsn)
    return bytes([message.flags]) + lsns + _int64(message.commit_time)


def _two_phase(message: BeginPrepare | Prepare | CommitPrepared | RollbackPrepared) -> bytes:
    tail = _int32(message.xid) + _string(message.gid)
    match message:
        case BeginPrepare():
            lsns = _int64(message.prepare_lsn) + _int64(message.end_lsn)
            return b"b" + lsns + _int64(message.prepare_time) + tail
        case Prepare():
            tag = b"p" if message.streamed else b"P"
            lsns = _int64(message.prepare_lsn) + _int64(message.end_lsn)
            return tag + bytes([message.flags]) + lsns + _int64(message.prepare_time) + tail
        case CommitPrepared():
            lsns = _int64(message.commit_lsn) + _int64(message.end_lsn)
            return b"K" + bytes([message.flags]) + lsns + _int64(message.commit_time) + tail
        case RollbackPrepared():
            lsns = _int64(message.prepare_end_lsn) + _int64(message.rollback_end_lsn)
            times = _int64(message.prepare_time) + _int64(message.rollback_time)
            return b"r" + bytes([message.flags]) + lsns + times + tail
        case _:
            assert_never(message)


def _flag(value: bool) -> bytes:
    return b"\x01" if value else b"\x00"


def _string(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape") + b"\x00"


def _int16(value: int) -> bytes:
    return struct.pack("!H", value)


def _int32(value: int) -> bytes:
    # OIDs, xids, sizes and (negative) type modifiers are all "Int32" on the wire.
    return (value & 0xFFFFFFFF).to_bytes(4, "big")


def _int64(value: int) -> bytes:
    return (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "big")
