"""Readers made for tuples of one shape: the same rows as the loop reads, or nothing at all."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.errors import ProtocolError
from cdc_sync.pgoutput.decode import Decoder, read_tuple
from cdc_sync.pgoutput.messages import Insert
from cdc_sync.pgoutput.tuple_readers import (
    ANY_SIZE,
    NULL,
    UNCHANGED_VALUE,
    AdaptiveReader,
    ObservedReader,
    compile_reader,
)
from cdc_sync.postgres.copy_binary import CopyParser
from cdc_sync.rows import UNCHANGED, Row, TextValue
from tests.support import frames

INT8, TEXT, BOOL = 20, 25, 16
#: Where the tuple of an Insert begins.
AT = 6

values = st.one_of(st.none(), st.just(UNCHANGED), st.binary(max_size=20))
rows = st.lists(values, min_size=1, max_size=8)


def tuple_bytes(row: Row) -> bytes:
    return frames.encode(Insert(1, row))[AT:]


def shape_of(row: Row, fixed: bool) -> list[int]:
    kinds = []
    for value in row:
        if isinstance(value, bytes):
            kinds.append(len(value) if fixed else ANY_SIZE)
        else:
            kinds.append(NULL if value is None else UNCHANGED_VALUE)
    return kinds


@given(rows, st.booleans(), st.binary(max_size=3), st.binary(max_size=5))
def test_a_tuple_of_the_shape_is_read_as_the_loop_reads_it(
    row: Row, fixed: bool, before: bytes, after: bytes
) -> None:
    read = compile_reader(shape_of(row, fixed), kinds=True)
    assert read is not None
    data = before + tuple_bytes(row)
    assert read(data + after, len(before)) == read_tuple(data, len(before)) == (row, len(data))


@given(rows, rows, st.booleans())
def test_what_a_reader_reads_is_what_the_loop_reads(row: Row, other: Row, fixed: bool) -> None:
    read = compile_reader(shape_of(other, fixed), kinds=True)
    assert read is not None
    data = tuple_bytes(row)
    assert read(data, 0) in (None, read_tuple(data, 0))


@given(rows, st.booleans())
def test_a_tuple_cut_short_is_not_read(row: Row, fixed: bool) -> None:
    read = compile_reader(shape_of(row, fixed), kinds=True)
    assert read is not None
    data = tuple_bytes(row)
    for end in range(len(data)):
        assert read(data[:end], 0) is None


@pytest.mark.parametrize("kinds", [True, False])
def test_sizes_that_lie(kinds: bool) -> None:
    read = compile_reader([ANY_SIZE, ANY_SIZE], kinds=kinds)
    assert read is not None
    kind = b"b" if kinds else b""
    for size in (5, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        first = b"\x00\x02" + kind + struct.pack(">I", size)
        assert read(first + b"abcd" + kind + bytes(4), 0) is None
        second = b"\x00\x02" + kind + bytes(4) + kind + struct.pack(">I", size)
        assert read(second + b"abcd", 0) is None


@pytest.mark.requirement("R14")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_text_is_not_read_as_binary(place: int) -> None:
    read = compile_reader([ANY_SIZE, 2, ANY_SIZE], kinds=True)
    assert read is not None
    row: Row = [b"one", b"22", b"three"]
    assert read(tuple_bytes(row), 0) is not None
    value = row[place]
    assert isinstance(value, bytes)
    row[place] = TextValue(value)
    assert read(tuple_bytes(row), 0) is None


def test_too_many_columns_are_left_to_the_loop() -> None:
    assert compile_reader([ANY_SIZE] * 1664, kinds=True) is None
    assert compile_reader([], kinds=True) is None


def test_a_reader_follows_what_most_rows_look_like() -> None:
    reader = AdaptiveReader([INT8, TEXT, BOOL])
    full: Row = [bytes(8), b"a", b"\x01"]
    partial: Row = [bytes(8), UNCHANGED, None]
    assert reader.read(tuple_bytes(full), 0) is None
    assert reader.learn(full)
    assert reader.read(tuple_bytes(full), 0) == (full, len(tuple_bytes(full)))
    for _ in range(7):
        assert reader.learn(partial)
        assert reader.read(tuple_bytes(partial), 0) is None
    assert reader.learn(partial)
    assert reader.read(tuple_bytes(partial), 0) == (partial, len(tuple_bytes(partial)))


def test_rows_of_another_table_are_not_learnt() -> None:
    reader = AdaptiveReader([INT8, TEXT])
    assert not reader.learn([bytes(8)])
    assert reader.learn([bytes(8), TextValue(b"t")])
    assert reader.read(tuple_bytes([bytes(8), b"t"]), 0) is None


def test_a_fixed_size_that_is_not_is_read_all_the_same() -> None:
    reader = AdaptiveReader([INT8])
    row: Row = [b"123"]
    reader.learn(row)
    assert reader.read(tuple_bytes(row), 0) == (row, len(tuple_bytes(row)))


def test_no_more_than_a_few_shapes_are_made() -> None:
    reader = AdaptiveReader([TEXT] * 5)
    for number in range(32):
        row: Row = [b"a" if number >> bit & 1 else None for bit in range(5)]
        for _ in range(8):
            reader.learn(row)
    assert len(reader._known) == 8


def copy_row(row: list[bytes | None]) -> bytes:
    parts = [b"\xff\xff\xff\xff" if v is None else struct.pack(">i", len(v)) + v for v in row]
    return struct.pack(">h", len(row)) + b"".join(parts)


HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)


@given(
    st.lists(
        st.lists(st.one_of(st.none(), st.binary(max_size=4)), min_size=3, max_size=3), max_size=60
    ),
    st.integers(1, 200),
)
def test_a_copy_is_read_the_same_in_whatever_pieces(
    given_rows: list[list[bytes | None]], size: int
) -> None:
    data = HEADER + b"".join(map(copy_row, given_rows)) + b"\xff\xff"
    parser = CopyParser([False] * 3)
    found: list[Row] = []
    for start in range(0, len(data), size):
        found += parser.feed(data[start : start + size])
    parser.end()
    assert found == given_rows
    assert parser.value_bytes == sum(len(value or b"") for row in given_rows for value in row)


@pytest.mark.parametrize("behind", [b"\xff", b"\xff\xff", b"\x00\x03more"])
def test_nothing_comes_after_the_trailer(behind: bytes) -> None:
    parser = CopyParser([False])
    parser.feed(HEADER + b"\xff\xff")
    parser.feed(b"")
    with pytest.raises(ProtocolError, match=f"{len(behind)} bytes after the trailer"):
        parser.feed(behind)


def test_rows_after_many_of_one_shape_may_have_another() -> None:
    alike: list[list[bytes | None]] = [[bytes(8), b"en", None]] * 100
    others: list[list[bytes | None]] = [
        [bytes(8), b"deu", b"x"],
        [None, None, None],
        [b"", b"", b""],
    ]
    parser = CopyParser([False] * 3)
    assert parser.feed(HEADER + b"".join(map(copy_row, alike))) == alike
    assert parser.feed(b"".join(map(copy_row, others * 30 + alike))) == others * 30 + alike
    assert parser.feed(b"".join(map(copy_row, alike))) == alike
    with pytest.raises(ProtocolError, match="2 fields where 3"):
        parser.feed(copy_row([b"", b""]))


def test_a_copy_without_a_common_shape_is_left_to_the_loop() -> None:
    reader = ObservedReader()
    for number in range(20):
        row: Row = [bytes(number + 1)]
        reader.learn([row] * 64, 64)
    assert reader.read(copy_row([bytes(20)]), 0) is None


def test_the_readers_of_a_stream_leave_errors_to_the_decoder() -> None:
    message = frames.encode(Insert(1, [b"abc", None]))
    assert read_tuple(message[:-1], AT) is None
    assert read_tuple(b"\x00\x01x", 0) is None
    with pytest.raises(ProtocolError, match="the frame ends"):
        Decoder().decode(message[:-1])
