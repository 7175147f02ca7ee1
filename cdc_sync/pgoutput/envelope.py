"""The CopyData envelope of a replication stream, and the protocol's clock.

The server sends frames whose first byte says what they are: :data:`XLOG_DATA`, with a pgoutput
message from :data:`XLOG_HEADER_BYTES` on, or :data:`KEEPALIVE`. The client sends status updates.

Source: PostgreSQL documentation, "Streaming Replication Protocol", START_REPLICATION;
src/backend/replication/walsender.c. LSNs are plain ``int`` here, times microseconds since
2000-01-01 UTC.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from cdc_sync.errors import ProtocolError
from cdc_sync.pgoutput.lsn import Lsn

#: First byte of a frame that carries a pgoutput message (``w``).
XLOG_DATA: Final = 0x77
#: First byte of a keepalive (``k``).
KEEPALIVE: Final = 0x6B
#: Where the pgoutput message starts in an XLogData frame.
XLOG_HEADER_BYTES: Final = 25

_KEEPALIVE_BYTES: Final = 18
_MAX_LSN: Final = (1 << 64) - 1
_POSTGRES_EPOCH_UNIX_SECONDS: Final = 946_684_800

_unpack_xlog = cast(
    "Callable[[bytes, int], tuple[int, int, int]]", struct.Struct(">QQq").unpack_from
)
_unpack_keepalive = cast(
    "Callable[[bytes, int], tuple[int, int, int]]", struct.Struct(">QqB").unpack_from
)
_pack_status = struct.Struct(">cQQQqB").pack


@dataclass(slots=True)
class Keepalive:
    """``k``: everything before ``wal_end`` has been sent.

    A server that wants a reply and gets none closes the connection after ``wal_sender_timeout``.
    """

    wal_end: int
    send_time: int
    reply_requested: bool


# w: Int64 dataStart, Int64 walEnd, Int64 sendTime, message
def decode_xlog_header(frame: bytes) -> tuple[int, int, int]:
    """Return ``(data_start, wal_end, send_time)`` of an XLogData frame; the message follows.

    ``data_start`` is the LSN of the change (end of the commit record for a Commit), and 0 for
    Relation and Type messages: it is never a position to confirm. Raises :class:`ProtocolError` if
    the frame is another or cut short.
    """
    if len(frame) < XLOG_HEADER_BYTES or frame[0] != XLOG_DATA:
        raise _malformed(frame, XLOG_DATA, "XLogData", f"at least {XLOG_HEADER_BYTES}")
    return _unpack_xlog(frame, 1)


# k: Int64 walEnd, Int64 sendTime, Byte1 replyRequested
def decode_keepalive(frame: bytes) -> Keepalive:
    """Decode a keepalive. Raises :class:`ProtocolError` if it is another, too short or too long."""
    if len(frame) != _KEEPALIVE_BYTES or frame[0] != KEEPALIVE:
        raise _malformed(frame, KEEPALIVE, "Keepalive", str(_KEEPALIVE_BYTES))
    wal_end, send_time, reply_requested = _unpack_keepalive(frame, 1)
    return Keepalive(wal_end, send_time, reply_requested != 0)


# r: Int64 write, Int64 flush, Int64 apply, Int64 time, Byte1 replyRequested
def encode_status(write: int, flush: int, apply: int, now: int, reply: bool = False) -> bytes:
    """Build a standby status update.

    ``write`` is the end of what was received, ``flush`` and ``apply`` of what is durable in the
    sink; the server forgets WAL up to ``flush`` and checks nothing, so a position beyond ``write``
    is refused here with :class:`ProtocolError`. ``now`` is the client's clock in the protocol's
    unit (:func:`postgres_time`); ``reply`` asks the server for a keepalive at once.
    """
    if not (0 <= flush <= write <= _MAX_LSN and 0 <= apply <= write):
        raise ProtocolError(
            "StandbyStatusUpdate would confirm a position that was never received"
            f" (write {_position(write)}, flush {_position(flush)}, apply {_position(apply)})."
        )
    return _pack_status(b"r", write, flush, apply, now, reply)


def postgres_time(unix_seconds: float) -> int:
    """Convert Unix time in seconds (``time.time()``) to the protocol's microseconds since 2000."""
    return round((unix_seconds - _POSTGRES_EPOCH_UNIX_SECONDS) * 1_000_000)


def unix_seconds(postgres_microseconds: int) -> float:
    """Convert the protocol's microseconds since 2000 to Unix time in seconds."""
    return postgres_microseconds / 1_000_000 + _POSTGRES_EPOCH_UNIX_SECONDS


def _position(lsn: int) -> str:
    return str(Lsn(lsn)) if lsn >= 0 else str(lsn)


def _malformed(frame: bytes, tag: int, name: str, size: str) -> ProtocolError:
    if not frame:
        return ProtocolError(f"{name}: the frame is empty.")
    if frame[0] != tag:
        return ProtocolError(
            f"{name}: the frame starts with byte 0x{frame[0]:02x}, not 0x{tag:02x}."
        )
    return ProtocolError(f"{name}: the frame has {len(frame)} bytes, not {size}.")
