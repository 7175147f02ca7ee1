"""The CopyData envelope: headers, keepalives, status updates, the protocol's clock."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cdc_sync.errors import ErrorKind, ProtocolError
from cdc_sync.pgoutput.decode import Decoder
from cdc_sync.pgoutput.envelope import (
    KEEPALIVE,
    XLOG_DATA,
    XLOG_HEADER_BYTES,
    Keepalive,
    decode_keepalive,
    decode_xlog_header,
    encode_status,
    postgres_time,
    unix_seconds,
)
from cdc_sync.pgoutput.messages import Relation, Type
from tests.support import frames, golden_frames

MAX_LSN = (1 << 64) - 1


def test_xlog_header_of_a_real_commit() -> None:
    frame = next(frame for frame, _ in golden_frames.PLAIN if frame[25:26] == b"C")
    assert frame[0] == XLOG_DATA
    start, end, sent = decode_xlog_header(frame)
    assert (start, end) == (24352808, 24352808)
    assert datetime.fromtimestamp(unix_seconds(sent), UTC).year == 2026


@pytest.mark.requirement("R47")
def test_header_lsn_of_relation_and_type_is_zero_and_of_changes_is_not() -> None:
    decoder = Decoder()
    starts: dict[bool, set[int]] = {True: set(), False: set()}
    for transcript in golden_frames.TRANSCRIPTS:
        for frame, _ in transcript:
            message = decoder.decode(frame, XLOG_HEADER_BYTES)
            starts[isinstance(message, Relation | Type)].add(decode_xlog_header(frame)[0])
    assert starts[True] == {0}
    # Begin of a transaction with an origin carries 0 as well: no header is a position to confirm.
    assert len(starts[False]) > 10


def test_header_is_unsigned() -> None:
    frame = frames.xlog_data(b"", MAX_LSN, MAX_LSN - 1, -1)
    assert decode_xlog_header(frame) == (MAX_LSN, MAX_LSN - 1, -1)


@pytest.mark.parametrize("size", range(XLOG_HEADER_BYTES))
def test_short_xlog_data(size: int) -> None:
    with pytest.raises(ProtocolError, match="XLogData"):
        decode_xlog_header(frames.xlog_data(b"E")[:size])


@pytest.mark.parametrize("tag", [b"k", b"r", b"W", b"\x00", b"\xff"])
def test_other_frame_where_xlog_data_is_expected(tag: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"0x{tag[0]:02x}, not 0x77"):
        decode_xlog_header(tag + bytes(24))


def test_real_keepalive() -> None:
    frame = golden_frames.KEEPALIVE_FRAME
    assert frame[0] == KEEPALIVE
    message = decode_keepalive(frame)
    assert message.wal_end == 0x17396C8
    assert not message.reply_requested


@pytest.mark.parametrize("reply_requested", [False, True])
def test_keepalive_round_trip(reply_requested: bool) -> None:
    frame = frames.keepalive(MAX_LSN, 42, reply_requested)
    assert decode_keepalive(frame) == Keepalive(MAX_LSN, 42, reply_requested)


@pytest.mark.parametrize("size", [*range(18), 19, 25])
def test_keepalive_of_a_wrong_size(size: int) -> None:
    with pytest.raises(ProtocolError, match="Keepalive"):
        decode_keepalive((frames.keepalive(1) + bytes(10))[:size])


def test_xlog_data_is_no_keepalive() -> None:
    with pytest.raises(ProtocolError, match="0x77, not 0x6b"):
        decode_keepalive(b"w" + bytes(17))


@pytest.mark.requirement("R3")
def test_status_as_the_server_reads_it() -> None:
    frame = encode_status(0x0102030405060708, 0x11, 0x10, 0x2021222324252627)
    assert frame == bytes.fromhex(
        "72 0102030405060708 0000000000000011 0000000000000010 2021222324252627 00"
    )
    assert frames.decode_status(frame) == frames.Status(
        write=0x0102030405060708, flush=0x11, apply=0x10, time=0x2021222324252627, reply=False
    )


def test_status_can_ask_for_a_reply() -> None:
    assert frames.decode_status(encode_status(3, 2, 2, -5, reply=True)) == frames.Status(
        3, 2, 2, -5, True
    )


@pytest.mark.requirement("R45")
@pytest.mark.parametrize(
    ("write", "flush", "apply"),
    [
        (10, 11, 10),
        (10, 10, 11),
        (0, 1, 0),
        (10, -1, 0),
        (10, 0, -1),
        (-1, -1, -1),
        (MAX_LSN + 1, 0, 0),
        (MAX_LSN + 1, MAX_LSN + 1, MAX_LSN + 1),
    ],
)
def test_status_never_confirms_what_was_not_received(write: int, flush: int, apply: int) -> None:
    with pytest.raises(ProtocolError, match="never received") as caught:
        encode_status(write, flush, apply, 0)
    assert caught.value.kind is ErrorKind.PROTOCOL


@pytest.mark.requirement("R45")
@pytest.mark.parametrize("lsn", [0, 1, MAX_LSN])
def test_status_may_confirm_all_that_was_received(lsn: int) -> None:
    status = frames.decode_status(encode_status(lsn, lsn, lsn, 0))
    assert (status.write, status.flush, status.apply) == (lsn, lsn, lsn)


def test_clock() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    microseconds = postgres_time(moment.timestamp())
    assert microseconds == 820_638_245_678_901
    assert unix_seconds(microseconds) == pytest.approx(moment.timestamp(), abs=1e-6)
    assert postgres_time(946_684_800.0) == 0
    assert unix_seconds(-946_684_800_000_000) == 0.0
