"""Targets of what comes over the connections: pgoutput frames, their envelope, COPY, and sequences
of frames through the gatherer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cdc_sync.errors import CdcSyncError, ErrorKind, MappingError, ProtocolError, SourceError
from cdc_sync.mapping.table import PgType
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.ops.metrics import Metrics
from cdc_sync.pgoutput import messages as m
from cdc_sync.pgoutput.decode import Decoder
from cdc_sync.pgoutput.envelope import (
    XLOG_HEADER_BYTES,
    decode_keepalive,
    decode_xlog_header,
)
from cdc_sync.postgres.copy_binary import CopyParser
from cdc_sync.rows import UNCHANGED, Row, TextValue
from cdc_sync.sync.control import PREFIX, ControlChannel, Request, request_content
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.routing import Binding, bind
from tests.fuzz.target import Target
from tests.support import frames, golden_frames
from tests.support.mapping_types import core
from tests.unit.test_gather import INT8, OID, RELATION, TEXT, planned_table

# -- frames


def _frame_seeds() -> tuple[bytes, ...]:
    """Every golden message, after a byte that says whether it stands inside of a stream block."""
    seeds = []
    for transcript in golden_frames.TRANSCRIPTS:
        decoder = Decoder()
        for frame, _ in transcript:
            seeds.append(bytes([decoder.in_stream]) + frame[XLOG_HEADER_BYTES:])
            decoder.decode(frame, XLOG_HEADER_BYTES)
    return tuple(seeds)


def run_frame(data: bytes) -> bool:
    """A pgoutput message; the first byte says whether inside of a stream block."""
    if not data:
        return False
    decoder = _decoder(data[0] & 1 == 1)
    before = decoder.in_stream
    try:
        message = decoder.decode(data, 1)
    except ProtocolError:
        assert decoder.in_stream is before
        return False
    # It says all there is: written anew it is as long, and reads the same.
    written = frames.encode(message)
    assert len(written) == len(data) - 1
    assert _decoder(before).decode(written) == message
    return True


def _decoder(in_stream: bool) -> Decoder:
    decoder = Decoder()
    if in_stream:
        decoder.decode(frames.encode(m.StreamStart(1, True)))
    return decoder


def run_envelope(data: bytes) -> bool:
    """A frame with its header: XLogData or keepalive."""
    try:
        start, end, sent = decode_xlog_header(data)
    except ProtocolError:
        pass
    else:
        assert data[:25] == frames.xlog_data(b"", start, end, sent)
        return True
    try:
        keepalive = decode_keepalive(data)
    except ProtocolError:
        return False
    written = frames.keepalive(keepalive.wal_end, keepalive.send_time, keepalive.reply_requested)
    assert data[:17] == written[:17]
    return True


# -- COPY

_COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
#: Columns but one, bytes a piece but one, and the stream.
_COPY_SEEDS: Final = (
    b"\x01\x05" + _COPY_HEADER + b"\xff\xff",
    b"\x01\x07" + _COPY_HEADER + b"\x00\x02\x00\x00\x00\x01a\xff\xff\xff\xff\xff\xff",
    b"\x00\x13" + _COPY_HEADER + (b"\x00\x01\x00\x00\x00\x03abc" * 9) + b"\xff\xff",
    b"\x02\x40"
    + _COPY_HEADER[:-1]
    + b"\x04abcd"
    + (b"\x00\x03" + b"\x00\x00\x00\x08abcdefgh" * 2 + bytes(4)) * 3
    + b"\xff\xff",
)


def run_copy(data: bytes) -> bool:
    """The bytes of a COPY. Two bytes say how many columns, and in what pieces it comes: however it
    does, the rows are the same."""
    if len(data) < 2:
        return False
    columns, size, stream = 1 + data[0] % 8, 1 + data[1], data[2:]
    whole = _copied(columns, [stream])
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert _copied(columns, pieces or [b""]) == whole
    return whole is not None


def _copied(columns: int, pieces: Sequence[bytes]) -> list[Row] | None:
    parser = CopyParser([column % 3 == 2 for column in range(columns)])
    rows: list[Row] = []
    try:
        for piece in pieces:
            rows += parser.feed(piece)
        parser.end()
    except ProtocolError:
        return None
    assert all(len(row) == columns for row in rows)
    return rows


# -- the gatherer

_METRICS: Final = Metrics()
_PLANNED: Final = planned_table()
_TYPES: Final = {20: INT8, 25: TEXT, 23: core("int4"), 1700: core("numeric")}
_CODEC: Final = WireCodec(_PLANNED.plan)


def frame_sequence(stream: Sequence[bytes]) -> bytes:
    """Frames as one input: each after its length, in two bytes."""
    return b"".join(len(frame).to_bytes(2, "big") + frame for frame in stream)


def _frames_of(data: bytes) -> list[bytes]:
    found = []
    at = 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2], "big")
        found.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return found


def _requests(table: str, keys: tuple[tuple[str, ...], ...] | None = None) -> m.LogicalMessage:
    return m.LogicalMessage(True, 0, PREFIX, request_content(Request("default", table, keys)))


def gather_seeds() -> tuple[bytes, ...]:
    """Streams of transactions with everything that can be in them."""
    key = (7).to_bytes(8, "big")
    old: Row = [key, None, None]
    whole: Row = [key, b"a", TextValue(b"b")]
    kept: Row = [key, b"a", UNCHANGED]
    changes: tuple[tuple[m.Message, ...], ...] = (
        (
            RELATION,
            m.Insert(OID, whole),
            m.Update(OID, None, False, kept),
            m.Delete(OID, old, True),
        ),
        (RELATION, m.Update(OID, old, True, kept), m.Update(OID, whole, False, kept)),
        (RELATION, m.Insert(OID, kept), m.Truncate(True, False, (OID, 9)), m.Insert(OID, whole)),
        (RELATION, _requests("public.t"), _requests("public.t", (("1",), ("2",)))),
        (m.Type(25, "public", "x"), m.Origin(9, "other"), RELATION, m.Insert(OID, whole)),
    )
    seeds = []
    for number, inner in enumerate(changes):
        lsn = 1000 * (number + 1)
        stream = (m.Begin(lsn, 0, 7), *inner, m.Commit(0, lsn, lsn + 8, 0))
        sent = [frames.xlog_data(frames.encode(message), lsn) for message in stream]
        seeds.append(frame_sequence([*sent, frames.keepalive(lsn + 9)]))
    golden = [frame for frame, _ in golden_frames.PLAIN]
    return (*seeds, b"".join(seeds), frame_sequence([*golden, golden_frames.KEEPALIVE_FRAME]))


def run_gather(data: bytes) -> bool:
    """Frames through the gatherer, and what it gathers through the codec."""
    channel = ControlChannel("default", lambda: (_PLANNED,), _METRICS, clock=lambda: 0.0)
    gatherer = Gatherer(
        _route, batch_rows=3, batch_bytes=1 << 16, applied=500, on_message=channel.accept
    )
    try:
        for frame in _frames_of(data):
            gatherer.feed(frame)
            assert gatherer.buffered_bytes <= len(data)
            while gatherer.full:
                _write(gatherer.take())
    except CdcSyncError:
        return False
    _write(gatherer.take())
    return True


def _route(relation: m.Relation) -> Binding | None:
    return bind(_PLANNED, relation, _resolve) if relation.oid == OID else None


def _resolve(oid: int, typmod: int) -> PgType:
    if oid not in _TYPES:
        raise SourceError(ErrorKind.TABLE_UNUSABLE, "there is no such type")
    return _TYPES[oid]


def _write(batch: Batch) -> None:
    for oid, table in batch.tables.items():
        plan = batch.bindings[oid].planned.plan
        writer = _CODEC if plan is _PLANNED.plan else WireCodec(plan)
        changes, _ = table.split()
        for point_id, row in (*changes.upserts, *changes.partials):
            try:
                writer.payload_entries(row, 3)
                writer.vectors(row)
                writer.point_id(point_id)
            except MappingError:
                continue


def frames_target() -> Target:
    """Single pgoutput messages of protocol 1 to 4."""
    return Target("frames", run_frame, _frame_seeds(), share=6)


def envelope_target() -> Target:
    """Frames with their headers."""
    golden = tuple(frame for frame, _ in golden_frames.PLAIN[:3])
    return Target("envelope", run_envelope, (*golden, golden_frames.KEEPALIVE_FRAME))


def copy_target() -> Target:
    """COPY in pieces."""
    return Target("copy", run_copy, _COPY_SEEDS, share=2)


def gather_target() -> Target:
    """Sequences of frames."""
    return Target("gather", run_gather, gather_seeds(), share=3)
