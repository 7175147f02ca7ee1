"""Encoders of payload columns: those that go from Postgres's bytes to wire bytes directly, or keep
what they have made, give what the way by the JSON value gives."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from qdrant_client import grpc

from cdc_sync.errors import MappingError
from cdc_sync.mapping.decoding import JsonValue
from cdc_sync.mapping.documents import _CAREFUL, _valid_text, document
from cdc_sync.mapping.plan import ColumnPlan
from cdc_sync.mapping.protobuf import encode_value, varint
from cdc_sync.mapping.table import PgType
from cdc_sync.mapping.times import timestamp_ascii, timestamp_binary
from cdc_sync.mapping.values import binary_decoder
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.rows import Row
from tests.support.mapping_types import array, core, table_plan
from tests.support.points import value_of
from tests.unit.test_values import array_bytes

KEY = ColumnPlan("id", core("int8"))


def codec(type_: PgType) -> WireCodec:
    return WireCodec(table_plan(KEY, ColumnPlan("c", type_, "c")))


def encoded(by: WireCodec, data: bytes) -> JsonValue:
    """What a point's payload says."""
    row: Row = [bytes(8), data]
    entries = grpc.SetPayloadPoints.FromString(by.payload_entries(row, 3)).payload
    value: JsonValue = value_of(entries["c"])
    return value


@given(st.integers(-(1 << 63), (1 << 63) - 1))
@example(0)
@example(-1)
@example((1 << 63) - 1)
@example(-(1 << 63))
@example(-63_082_281_600_000_000)  # 0001-01-01
@example(-63_082_281_600_000_001)
@example(252_455_615_999_999_999)  # the end of 9999
@example(252_455_616_000_000_000)
@example(820_454_400_000_001)
def test_timestamps(microseconds: int) -> None:
    data = struct.pack(">q", microseconds)
    assert timestamp_ascii(data).decode() == timestamp_binary(data)


@given(st.integers(-(10**15), 10**16))
def test_timestamps_of_this_age(microseconds: int) -> None:
    data = struct.pack(">q", microseconds)
    assert timestamp_ascii(data).decode() == timestamp_binary(data)


texts = st.one_of(
    st.binary(max_size=5), st.text(max_size=80).map(lambda text: text.encode()), st.just(None)
)


@given(st.lists(texts, min_size=1, max_size=6), st.data())
def test_arrays_of_texts(items: list[bytes | None], data: st.DataObject) -> None:
    by, decode = codec(array(core("text"))), binary_decoder(array(core("text")))
    whole = array_bytes(*items)
    for _ in range(2):  # made, and then kept
        assert encoded(by, whole) == decode(whole)
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] = data.draw(st.integers(0, 255))
    for bad in (bytes(damaged), whole[:place], whole + b"x"):
        try:
            expected = decode(bad)
        except MappingError:
            with pytest.raises(MappingError, match="column c does not hold"):
                encoded(by, bad)
        else:
            assert encoded(by, bad) == expected


def test_an_array_that_says_it_has_billions_of_items() -> None:
    by = codec(array(core("text")))
    for count in (0, -1, 0x7FFFFFFF):
        with pytest.raises(MappingError):
            encoded(by, struct.pack(">iiIii", 1, 0, 25, count, 1))


@pytest.mark.parametrize("items", [(None, b"x"), (b"x", None), (None,), (None, None, b"")])
def test_an_array_with_nulls_that_says_it_has_none(items: tuple[bytes | None, ...]) -> None:
    by, decode = codec(array(core("text"))), binary_decoder(array(core("text")))
    data = bytearray(array_bytes(*items))
    data[4:8] = bytes(4)
    assert encoded(by, bytes(data)) == decode(bytes(data)) is not None


def test_what_is_kept_still_counts_nan() -> None:
    by = codec(array(core("float8")))
    data = array_bytes(struct.pack(">d", float("nan")), struct.pack(">d", 1.5))
    for times in range(1, 4):
        assert encoded(by, data) == [None, 1.5]
        assert by.non_finite == times


def test_what_is_kept_is_bounded() -> None:
    by = codec(core("numeric"))
    encoder = by._fields[0][1]
    for number in range(5000):
        data = struct.pack(">HhHHH", 1, 0, 0, 0, number % 9999 + 1)
        assert encoded(by, data) == number % 9999 + 1
    kept = encoder.__self__  # type: ignore[attr-defined]
    assert 0 < len(kept) <= 256
    with pytest.raises(MappingError):
        encoded(by, b"not a number")
    assert b"not a number" not in kept


def test_varints() -> None:
    for bits in range(65):
        for number in {max(0, (1 << bits) + by) for by in (-1, 0, 1)}:
            if number < 1 << 64:
                read = grpc.PointId.FromString(b"\x08" + varint(number)).num
                assert (read, len(varint(number))) == (number, max(1, -(-number.bit_length() // 7)))


@given(st.text('0123456789eE+-.\\ud8DfF "[]{}:,', max_size=60))
@example("[12345678901234567890]")
@example("[1e999, 1E+308, -1e-400, 12e5]")
@example('["\\ud83d\\ude00", "\\ud83d", "\\\\ud83d"]')
@example('{"0e": "00e000"}')
@example("[" * 21 + "]" * 21)
def test_the_fast_parser_reads_what_the_careful_one_does(text: str) -> None:
    def result(parse: object) -> object:
        try:
            return parse(text.encode())  # type: ignore[operator]
        except (ValueError, RecursionError):
            return "refused"

    careful = result(lambda data: _valid_text(_CAREFUL.decode(data.decode())))
    fast = result(document)
    # JSON is what Postgres has let through; of the rest only that nothing else comes out.
    if careful != "refused" and text.strip(" ") == text:
        assert fast == careful


json_values: st.SearchStrategy[JsonValue] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 63) - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=200),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=70), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(json_values)
def test_json_values(value: JsonValue) -> None:
    message = grpc.Value.FromString(encode_value(value))
    assert value_of(message) == value
    assert message.ByteSize() == len(encode_value(value))


@pytest.mark.parametrize("size", [100, 127, 128, 200, 16_383, 16_384, 3_000_000])
def test_long_texts_in_documents(size: int) -> None:
    value: JsonValue = {"k" * size: ["v" * size, {"n": "w" * size}]}
    assert value_of(grpc.Value.FromString(encode_value(value))) == value
