"""Properties of the pgoutput decoder: what is encoded comes back, and nothing else gets through."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_sync.errors import ProtocolError
from cdc_sync.pgoutput.decode import Decoder
from cdc_sync.pgoutput.envelope import (
    KEEPALIVE,
    XLOG_DATA,
    XLOG_HEADER_BYTES,
    decode_keepalive,
    decode_xlog_header,
    encode_status,
)
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
from cdc_sync.rows import UNCHANGED, RawValue, Row, TextValue
from tests.support import frames, golden_frames

u32 = st.integers(0, (1 << 32) - 1)
lsns = st.integers(0, (1 << 64) - 1)
times = st.integers(-(1 << 63), (1 << 63) - 1)
names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
values: st.SearchStrategy[RawValue] = st.one_of(
    st.none(),
    st.just(UNCHANGED),
    st.binary(max_size=20),
    st.binary(max_size=20).map(TextValue),
)
rows: st.SearchStrategy[Row] = st.lists(values, max_size=8)
identities: st.SearchStrategy[ReplicaIdentity] = st.sampled_from(["d", "n", "f", "i"])
columns = st.lists(
    st.builds(RelationColumn, names, u32, st.integers(-(1 << 31), (1 << 31) - 1), st.booleans()),
    max_size=5,
).map(tuple)


def changes(xids: st.SearchStrategy[int | None]) -> st.SearchStrategy[Message]:
    """Messages that carry an xid inside a stream block."""
    return st.one_of(
        st.builds(Insert, u32, rows, xids),
        st.builds(Update, u32, rows, st.booleans(), rows, xids),
        st.builds(Update, u32, st.none(), st.just(False), rows, xids),
        st.builds(Delete, u32, rows, st.booleans(), xids),
        st.builds(
            Truncate, st.booleans(), st.booleans(), st.lists(u32, max_size=5).map(tuple), xids
        ),
        st.builds(LogicalMessage, st.booleans(), lsns, names, st.binary(max_size=20), xids),
        st.builds(Relation, u32, names, names, identities, columns, xids),
        st.builds(Type, u32, names, names, xids),
    )


none = st.just(0)
controls: st.SearchStrategy[Message] = st.one_of(
    st.builds(Begin, lsns, times, u32),
    st.builds(Commit, none, lsns, lsns, times),
    st.builds(StreamCommit, u32, none, lsns, lsns, times),
    st.builds(StreamAbort, u32, u32, lsns, times),
    st.builds(StreamAbort, u32, u32, st.none(), st.none()),
    st.builds(BeginPrepare, lsns, lsns, times, u32, names),
    st.builds(Prepare, none, lsns, lsns, times, u32, names, st.booleans()),
    st.builds(CommitPrepared, none, lsns, lsns, times, u32, names),
    st.builds(RollbackPrepared, none, lsns, lsns, times, times, u32, names),
)
origins: st.SearchStrategy[Message] = st.builds(Origin, lsns, names)
outside: st.SearchStrategy[Message] = changes(st.none()) | controls | origins
inside: st.SearchStrategy[Message] = changes(u32) | origins


@st.composite
def sessions(draw: st.DrawFn) -> list[Message]:
    """Messages in an order a server may send them."""
    messages: list[Message] = []
    for _ in range(draw(st.integers(1, 3))):
        messages += draw(st.lists(outside, max_size=3))
        messages.append(StreamStart(draw(u32), draw(st.booleans())))
        messages += draw(st.lists(inside, max_size=3))
        messages.append(StreamStop())
    return messages


def shape(row: Row | None) -> list[type] | None:
    return None if row is None else [type(value) for value in row]


@pytest.mark.requirement("R14")
@given(sessions(), st.integers(0, 40))
def test_round_trip(session: list[Message], offset: int) -> None:
    decoder = Decoder()
    for message in session:
        decoded = decoder.decode(bytes(offset) + frames.encode(message), offset)
        assert decoded == message
        # bytes and TextValue compare equal: the kind must survive as well
        if isinstance(message, Insert | Update) and isinstance(decoded, Insert | Update):
            assert shape(decoded.new) == shape(message.new)
        if isinstance(message, Update | Delete) and isinstance(decoded, Update | Delete):
            assert shape(decoded.old) == shape(message.old)
            assert decoded.old_is_key == message.old_is_key


@pytest.mark.requirement("R14")
@given(rows, st.binary(min_size=1, max_size=8))
def test_mixed_tuples_end_where_the_message_ends(row: Row, rest: bytes) -> None:
    payload = frames.encode(Insert(1, row))
    decoded = Decoder().decode(payload)
    assert isinstance(decoded, Insert)
    assert shape(decoded.new) == shape(row)
    with pytest.raises(ProtocolError, match=f"{len(rest)} bytes follow the message at byte"):
        Decoder().decode(payload + rest)


@given(sessions())
def test_truncation_at_every_byte(session: list[Message]) -> None:
    decoder = Decoder()
    for message in session:
        payload = frames.encode(message)
        for size in range(len(payload)):
            if isinstance(message, StreamAbort) and size == 9:
                continue  # the form without LSN and time
            with pytest.raises(ProtocolError):
                decoder.decode(payload[:size])
        decoder.decode(payload)


@given(sessions(), st.binary(min_size=1, max_size=8))
def test_trailing_bytes(session: list[Message], rest: bytes) -> None:
    decoder = Decoder()
    for message in session:
        payload = frames.encode(message)
        if not (isinstance(message, StreamAbort) and message.abort_lsn is None):
            with pytest.raises(ProtocolError):
                decoder.decode(payload + rest)
        decoder.decode(payload)


def only_protocol_error(payload: bytes, offset: int, in_stream: bool) -> None:
    decoder = Decoder()
    if in_stream:
        decoder.decode(frames.encode(StreamStart(1, True)))
    try:
        message = decoder.decode(payload, offset)
    except ProtocolError:
        assert decoder.in_stream == in_stream
    else:
        # What gets through is a message: encoding it gives as many bytes as there were.
        assert len(frames.encode(message)) == len(payload) - offset


@given(st.binary(max_size=64), st.integers(0, 70), st.booleans())
def test_random_bytes(payload: bytes, offset: int, in_stream: bool) -> None:
    only_protocol_error(payload, offset, in_stream)


@given(st.sampled_from(b"IUDTMRYOBCSEcAbPpKr"), st.binary(max_size=64), st.booleans())
@example(ord("T"), b"\x00\x00\x00\x00\x00", False)
@example(ord("I"), b"\x00\x00\x00\x00N\x00\x00", False)
def test_random_bytes_after_a_known_tag(tag: int, body: bytes, in_stream: bool) -> None:
    only_protocol_error(bytes([tag]) + body, 0, in_stream)


real_frames = st.sampled_from(
    [frame[25:] for transcript in golden_frames.TRANSCRIPTS for frame, _ in transcript]
)


@given(real_frames, st.data(), st.booleans())
def test_real_frames_with_one_byte_changed(
    payload: bytes, data: st.DataObject, in_stream: bool
) -> None:
    at = data.draw(st.integers(0, len(payload) - 1))
    byte = data.draw(st.binary(min_size=1, max_size=1))
    only_protocol_error(payload[:at] + byte + payload[at + 1 :], 0, in_stream)


@given(st.binary(max_size=40))
def test_random_envelopes(frame: bytes) -> None:
    if len(frame) >= XLOG_HEADER_BYTES and frame[0] == XLOG_DATA:
        decode_xlog_header(frame)
    else:
        with pytest.raises(ProtocolError):
            decode_xlog_header(frame)
    if len(frame) == 18 and frame[0] == KEEPALIVE:
        decode_keepalive(frame)
    else:
        with pytest.raises(ProtocolError):
            decode_keepalive(frame)


@given(lsns, lsns, times, st.binary(max_size=16))
def test_xlog_header_round_trip(start: int, end: int, sent: int, payload: bytes) -> None:
    frame = frames.xlog_data(payload, start, end, sent)
    assert decode_xlog_header(frame) == (start, end, sent)
    assert frame[XLOG_HEADER_BYTES:] == payload


@pytest.mark.requirement("R45")
@given(lsns, lsns, lsns, times, st.booleans())
def test_a_status_confirms_nothing_that_was_not_received(
    write: int, flush: int, apply: int, now: int, reply: bool
) -> None:
    if flush > write or apply > write:
        with pytest.raises(ProtocolError):
            encode_status(write, flush, apply, now, reply)
    else:
        status = frames.decode_status(encode_status(write, flush, apply, now, reply))
        assert status == frames.Status(write, flush, apply, now, reply)
        assert max(status.flush, status.apply) <= status.write
