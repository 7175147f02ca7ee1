"""The pgoutput decoder: frames of a real server, and frames no server should send."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from cdc_sync.errors import ErrorKind, ProtocolError
from cdc_sync.pgoutput.decode import MAX_COLUMNS, Decoder
from cdc_sync.pgoutput.envelope import XLOG_HEADER_BYTES
from cdc_sync.pgoutput.messages import (
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Origin,
    Relation,
    RelationColumn,
    StreamAbort,
    StreamStart,
    StreamStop,
    Truncate,
    Type,
    Update,
)
from cdc_sync.rows import UNCHANGED, TextValue
from tests.support import frames, golden_frames

TRANSCRIPTS = {
    "plain": golden_frames.PLAIN,
    "streamed_parallel": golden_frames.STREAMED_PARALLEL,
    "streamed": golden_frames.STREAMED,
    "two_phase": golden_frames.TWO_PHASE,
    "streamed_two_phase": golden_frames.STREAMED_TWO_PHASE,
}

INSERT = b"I" + struct.pack("!I", 16400) + b"N"


def decode(payload: bytes) -> Message:
    return Decoder().decode(payload)


def refused(payload: bytes, *words: str, decoder: Decoder | None = None) -> None:
    with pytest.raises(ProtocolError) as caught:
        (decoder or Decoder()).decode(payload)
    assert caught.value.kind is ErrorKind.PROTOCOL
    assert caught.value.__cause__ is None
    for word in words:
        assert word in caught.value.message


# --- frames of a real server ------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_real_frames(name: str) -> None:
    decoder = Decoder()
    for frame, message in TRANSCRIPTS[name]:
        assert decoder.decode(frame, XLOG_HEADER_BYTES) == message
    assert not decoder.in_stream


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_real_frames_encode_back_to_the_same_bytes(name: str) -> None:
    for frame, message in TRANSCRIPTS[name]:
        assert frames.encode(message) == frame[XLOG_HEADER_BYTES:]


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_real_frames_cut_at_every_byte(name: str) -> None:
    decoder = Decoder()
    for frame, message in TRANSCRIPTS[name]:
        for size in range(XLOG_HEADER_BYTES, len(frame)):
            if isinstance(message, StreamAbort) and size == XLOG_HEADER_BYTES + 9:
                continue  # without LSN and time it is the other form of the message
            with pytest.raises(ProtocolError) as caught:
                decoder.decode(frame[:size], XLOG_HEADER_BYTES)
            assert "at byte " in caught.value.message
        decoder.decode(frame, XLOG_HEADER_BYTES)


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_real_frames_with_something_after_them(name: str) -> None:
    decoder = Decoder()
    for frame, _ in TRANSCRIPTS[name]:
        with pytest.raises(ProtocolError, match=r"Malformed \w+ message: .* at byte \d+\.$"):
            decoder.decode(frame + b"\x00", XLOG_HEADER_BYTES)
        decoder.decode(frame, XLOG_HEADER_BYTES)


def test_kinds_of_values_have_their_types() -> None:
    message = decode(frames.encode(Insert(1, [b"x", TextValue(b"y"), None, UNCHANGED, b""])))
    assert isinstance(message, Insert)
    assert [type(value) for value in message.new] == [
        bytes,
        TextValue,
        type(None),
        type(UNCHANGED),
        bytes,
    ]


# --- tuples -----------------------------------------------------------------------------------


@pytest.mark.requirement("R14")
def test_text_and_binary_mix_in_one_tuple() -> None:
    payload = INSERT + bytes.fromhex("0006 6200000001ff 740000000131 6e 75 7400000000 6200000000")
    message = decode(payload)
    assert isinstance(message, Insert)
    assert message.new == [b"\xff", TextValue(b"1"), None, UNCHANGED, TextValue(b""), b""]
    assert [isinstance(value, TextValue) for value in message.new] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.requirement("R27")
def test_a_key_tuple_is_told_apart_from_a_whole_old_row() -> None:
    old = [b"\x00\x00\x00\x01", None, None]
    for as_key in (True, False):
        delete = decode(frames.encode(Delete(7, list(old), as_key)))
        assert isinstance(delete, Delete)
        assert delete.old_is_key is as_key
        update = decode(frames.encode(Update(7, list(old), as_key, [b"a", b"b", b"c"])))
        assert isinstance(update, Update)
        assert update.old_is_key is as_key
        assert update.old == old
        assert update.new == [b"a", b"b", b"c"]
    plain = decode(frames.encode(Update(7, None, False, [b"a"])))
    assert isinstance(plain, Update)
    assert plain.old is None
    assert not plain.old_is_key


def test_a_table_without_columns() -> None:
    assert decode(INSERT + b"\x00\x00") == Insert(16400, [])


def test_as_many_columns_as_postgres_allows() -> None:
    message = Insert(1, [None] * MAX_COLUMNS)
    assert decode(frames.encode(message)) == message


@pytest.mark.parametrize("count", [MAX_COLUMNS + 1, 0x7FFF, 0x8000, 0xFFFF])
def test_absurd_column_counts(count: int) -> None:
    payload = INSERT + struct.pack("!H", count) + b"n" * count
    refused(payload, "Insert", f"a tuple of {count} columns", "at byte 6")


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(b"btnu")))
def test_unknown_value_kind(kind: int) -> None:
    payload = INSERT + b"\x00\x02n" + bytes([kind]) + b"\x00\x00\x00\x00"
    refused(payload, "Insert", f"unknown value kind 0x{kind:02x}", "at byte 9")


@pytest.mark.parametrize("kind", [b"b", b"t"])
@pytest.mark.parametrize("size", [-1, -2, -(1 << 31), 4, 5, 1 << 16, (1 << 31) - 1])
def test_lengths_that_do_not_fit(kind: bytes, size: int) -> None:
    payload = INSERT + b"\x00\x01" + kind + struct.pack("!i", size) + b"abc"
    refused(payload, "Insert", f"a value of {size} bytes where 3 remain", "at byte 8")


def test_a_length_cannot_make_the_decoder_allocate() -> None:
    payload = INSERT + b"\x00\x01b" + struct.pack("!i", (1 << 31) - 1)
    truncate = b"T" + struct.pack("!iB", (1 << 31) - 1, 0) + bytes(8)
    content = b"M\x00" + bytes(8) + b"x\x00" + struct.pack("!i", (1 << 31) - 1)
    tracemalloc.start()
    try:
        for hostile in (payload, truncate, content):
            refused(hostile, "at byte ")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("kind", [b"K", b"O", b"U", b"n", b"\x00"])
def test_insert_needs_a_new_tuple(kind: bytes) -> None:
    payload = b"I" + bytes(4) + kind + b"\x00\x00"
    refused(payload, "Insert", f"unknown tuple kind 0x{kind[0]:02x}", "at byte 5")


@pytest.mark.parametrize("kind", [b"N", b"U", b"\xff"])
def test_delete_needs_an_old_tuple(kind: bytes) -> None:
    refused(b"D" + bytes(4) + kind + b"\x00\x00", "Delete", "unknown tuple kind", "at byte 5")


def test_update_needs_a_new_tuple() -> None:
    refused(b"U" + bytes(4) + b"X\x00\x00", "Update", "unknown tuple kind 0x58", "at byte 5")
    for old in (b"K", b"O"):
        for second in (b"K", b"O", b"X"):
            payload = b"U" + bytes(4) + old + b"\x00\x01n" + second + b"\x00\x00"
            refused(payload, "Update", f"unknown tuple kind 0x{second[0]:02x}", "at byte 9")
        refused(b"U" + bytes(4) + old + b"\x00\x01n", "Update", "the frame ends", "at byte 9")


# --- names, counts, flags ---------------------------------------------------------------------


def test_names_in_other_scripts() -> None:
    relation = Relation(
        1, "схема", 'таб"лица', "i", (RelationColumn("列,1", 4294967295, -1, True),)
    )
    assert decode(frames.encode(relation)) == relation
    assert decode(frames.encode(Type(4294967295, "", "日付"))) == Type(4294967295, "", "日付")


@pytest.mark.parametrize("name", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"a\xc0\xaf"])
def test_names_that_are_not_utf_8(name: bytes) -> None:
    refused(b"Y" + bytes(4) + name + b"\x00t\x00", "Type", "not UTF-8", "at byte 5")
    refused(b"O" + bytes(8) + name + b"\x00", "Origin", "not UTF-8", "at byte 9")
    column = b"\x00" + name + b"\x00" + bytes(8)
    refused(b"R" + bytes(4) + b"s\x00t\x00d\x00\x01" + column, "Relation", "at byte 13")


def test_names_without_end() -> None:
    refused(b"O" + bytes(8) + b"abc", "Origin", "a string without end", "at byte 9")
    refused(b"Y" + bytes(4) + b"pg\x00abc", "Type", "a string without end", "at byte 8")


@pytest.mark.parametrize("identity", [b"x", b"D", b"\x00"])
def test_unknown_replica_identity(identity: bytes) -> None:
    payload = b"R" + bytes(4) + b"s\x00t\x00" + identity + b"\x00\x00"
    refused(payload, "Relation", "unknown replica identity", "at byte 9")


def test_relation_with_an_absurd_column_count() -> None:
    payload = b"R" + bytes(4) + b"s\x00t\x00d\xff\xff" + bytes(10000)
    refused(payload, "Relation", "a relation of 65535 columns", "at byte 10")


@pytest.mark.parametrize("count", [-1, -(1 << 31), 3, 1 << 30, (1 << 31) - 1])
def test_truncate_of_more_or_less_relations_than_follow(count: int) -> None:
    payload = b"T" + struct.pack("!iBII", count, 0, 1, 2)
    refused(payload, "Truncate", f"{count} relations in 8 bytes", "at byte 1")


@pytest.mark.parametrize(
    ("options", "cascade", "restart"), [(0, False, False), (1, True, False), (2, False, True)]
)
def test_truncate_options(options: int, cascade: bool, restart: bool) -> None:
    payload = b"T" + struct.pack("!iBII", 2, options, 5, 4294967295)
    assert decode(payload) == Truncate(cascade, restart, (5, 4294967295))


@pytest.mark.parametrize("size", [-1, 2, (1 << 31) - 1])
def test_logical_message_of_a_wrong_length(size: int) -> None:
    payload = b"M\x01" + bytes(8) + b"cdc\x00" + struct.pack("!i", size) + b"x"
    refused(payload, "LogicalMessage", f"content of {size} bytes where 1 remain", "at byte 14")


def test_logical_message_content_may_be_anything() -> None:
    message = LogicalMessage(False, (1 << 64) - 1, "p", bytes(range(256)))
    assert decode(frames.encode(message)) == message


@pytest.mark.parametrize("tag", [b"C", b"P", b"p", b"K", b"r"])
def test_reserved_flags(tag: bytes) -> None:
    refused(tag + b"\x01" + bytes(60), "unknown flags 0x01", "at byte 1")


def test_reserved_flags_of_stream_commit() -> None:
    refused(b"c" + bytes(4) + b"\x80" + bytes(24), "StreamCommit", "flags 0x80", "at byte 5")


def test_integers_are_unsigned_where_the_protocol_says_so() -> None:
    begin = Begin((1 << 64) - 1, -(1 << 63), (1 << 32) - 1)
    assert decode(frames.encode(begin)) == begin


# --- frames as such ---------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 25])
def test_nothing(offset: int) -> None:
    with pytest.raises(ProtocolError, match="no tag"):
        Decoder().decode(b"", offset)


def test_an_xlog_data_frame_without_message() -> None:
    with pytest.raises(ProtocolError, match="no tag"):
        Decoder().decode(frames.xlog_data(b""), XLOG_HEADER_BYTES)


@pytest.mark.parametrize("tag", sorted(set(range(256)) - set(b"IUDTMRYOBCSEcAbPpKr")))
def test_unknown_tag(tag: int) -> None:
    refused(bytes([tag]) + bytes(40), f"Unknown pgoutput message 0x{tag:02x}", "at byte 0")


def test_offsets_in_errors_count_from_the_tag() -> None:
    payload = INSERT + b"\x00\x01q"
    refused(payload, "at byte 8")
    with pytest.raises(ProtocolError, match=r"at byte 8\."):
        Decoder().decode(frames.xlog_data(payload), XLOG_HEADER_BYTES)


def test_errors_never_show_values() -> None:
    secret = b"hunter2-hunter2"
    payload = INSERT + b"\x00\x02b" + struct.pack("!i", len(secret)) + secret
    for broken in (payload, payload + b"q", payload + b"nn", payload + b"b\x00\x00\xff\xffx"):
        with pytest.raises(ProtocolError) as caught:
            decode(broken)
        assert "hunter" not in str(caught.value) + repr(caught.value.args)


# --- stream blocks ----------------------------------------------------------------------------


def test_changes_carry_their_xid_only_inside_a_block() -> None:
    decoder = Decoder()
    outside = Insert(1, [b"x"])
    inside = Insert(1, [b"x"], xid=4294967295)
    assert decoder.decode(frames.encode(outside)) == outside
    decoder.decode(frames.encode(StreamStart(9, True)))
    assert decoder.in_stream
    assert decoder.decode(frames.encode(inside)) == inside
    decoder.decode(frames.encode(StreamStop()))
    assert not decoder.in_stream
    assert decoder.decode(frames.encode(outside)) == outside


def test_an_origin_inside_a_block_has_no_xid() -> None:
    decoder = Decoder()
    decoder.decode(frames.encode(StreamStart(9, True)))
    assert decoder.decode(frames.encode(Origin(5, "o"))) == Origin(5, "o")


@pytest.mark.parametrize("tag", [b"B", b"C", b"S", b"c", b"A", b"b", b"P", b"p", b"K", b"r"])
def test_transactions_do_not_begin_or_end_inside_a_block(tag: bytes) -> None:
    decoder = Decoder()
    decoder.decode(frames.encode(StreamStart(9, True)))
    refused(tag + bytes(60), "inside a stream block", decoder=decoder)
    assert decoder.in_stream


def test_a_block_does_not_end_twice() -> None:
    refused(b"E", "StreamStop", "outside a stream block")


@pytest.mark.parametrize("payload", [b"", b"S\x00", b"S" + bytes(6), b"E", b"Z"])
def test_a_refused_frame_does_not_change_the_state(payload: bytes) -> None:
    decoder = Decoder()
    refused(payload, decoder=decoder)
    assert not decoder.in_stream
    decoder.decode(frames.encode(StreamStart(9, True)))
    refused(b"E\x00", "StreamStop", "1 bytes follow", decoder=decoder)
    assert decoder.in_stream


@pytest.mark.parametrize("size", [9, 25])
def test_stream_abort_with_and_without_position(size: int) -> None:
    payload = (b"A" + struct.pack("!IIQq", 7, 8, 9, 10))[:size]
    expected = StreamAbort(7, 8, 9, 10) if size == 25 else StreamAbort(7, 8, None, None)
    assert decode(payload) == expected


@pytest.mark.parametrize("size", [*range(1, 9), *range(10, 25), 26, 41])
def test_stream_abort_of_another_size(size: int) -> None:
    refused((b"A" + bytes(40))[:size], "StreamAbort", "at byte ")


def test_commit_is_not_affected_by_earlier_blocks() -> None:
    decoder = Decoder()
    for message in (StreamStart(9, True), StreamStop(), Commit(0, 1, 2, 3)):
        assert decoder.decode(frames.encode(message)) == message
