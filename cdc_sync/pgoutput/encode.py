"""Encoder of the pgoutput messages that describe rows: the server's half of the protocol.

``cdc-sync bench`` makes a stream of rows that it has read, to measure what the stream costs where
nothing may be written to the table. The types' binary format is the same in COPY and in pgoutput,
so values go in as they are.

Source: PostgreSQL documentation, "Logical Replication Message Formats", "Streaming Replication
Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from cdc_sync.pgoutput.messages import Relation
from cdc_sync.rows import UNCHANGED, RawValue, TextValue

_XLOG_DATA: Final = struct.Struct(">cQQq")
_SIZE: Final = struct.Struct(">cI")
_COUNT: Final = struct.Struct(">H")
_CHANGE: Final = struct.Struct(">cIc")
_BEGIN: Final = struct.Struct(">cQqI")
_COMMIT: Final = struct.Struct(">cBQQq")


def frame(message: bytes, lsn: int) -> bytes:
    """Wrap a message in XLogData as it arrives in a CopyData, with this position."""
    return _XLOG_DATA.pack(b"w", lsn, lsn, 0) + message


def encode_begin(final_lsn: int, commit_time: int, xid: int) -> bytes:
    """Begin; ``commit_time`` in microseconds since 2000."""
    return _BEGIN.pack(b"B", final_lsn, commit_time, xid)


def encode_commit(commit_lsn: int, end_lsn: int, commit_time: int) -> bytes:
    """Commit; ``end_lsn`` is the byte after the commit record."""
    return _COMMIT.pack(b"C", 0, commit_lsn, end_lsn, commit_time)


def encode_relation(relation: Relation) -> bytes:
    """Relation, outside of a stream block."""
    head = b"R" + relation.oid.to_bytes(4, "big") + _string(relation.namespace)
    head += _string(relation.name) + relation.replica_identity.encode("ascii")
    columns = b"".join(
        (b"\1" if column.key else b"\0")
        + _string(column.name)
        + struct.pack(">Ii", column.type_oid, column.type_modifier)
        for column in relation.columns
    )
    return head + _COUNT.pack(len(relation.columns)) + columns


def encode_insert(relation_oid: int, row: Sequence[RawValue]) -> bytes:
    """Insert of a row in the order of its Relation message."""
    return _CHANGE.pack(b"I", relation_oid, b"N") + _tuple(row)


def encode_update(relation_oid: int, row: Sequence[RawValue]) -> bytes:
    """Update in place, without an old tuple; values may be UNCHANGED."""
    return _CHANGE.pack(b"U", relation_oid, b"N") + _tuple(row)


def _tuple(row: Sequence[RawValue]) -> bytes:
    return _COUNT.pack(len(row)) + b"".join(map(_value, row))


def _value(value: RawValue) -> bytes:
    if value is None:
        return b"n"
    if value is UNCHANGED:
        return b"u"
    assert isinstance(value, bytes)
    return _SIZE.pack(b"t" if isinstance(value, TextValue) else b"b", len(value)) + value


def _string(text: str) -> bytes:
    return text.encode() + b"\0"
