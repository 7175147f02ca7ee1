"""What fuzzing found, and inputs made to break limits: lengths, counts, dimensions and nesting that
claim more than is there, and long texts that could make a parser slow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import pytest

from cdc_sync.errors import MappingError, ProtocolError
from cdc_sync.mapping.decoding import MAX_ZEROS, DecodeOptions
from cdc_sync.mapping.table import PgType
from cdc_sync.mapping.values import binary_decoder, text_decoder
from cdc_sync.pgoutput import messages as m
from cdc_sync.pgoutput.decode import Decoder
from cdc_sync.postgres.copy_binary import CopyParser
from tests.fuzz.golden_values import golden_type, golden_types
from tests.fuzz.limits import FindingError, Limits, Run, check, watched
from tests.fuzz.value_targets import value_runs
from tests.support.mapping_types import array, composite, core, multirange_of, range_of
from tests.unit.test_gather import OID, RELATION, Stream, row
from tests.unit.test_values import array_bytes, int4

HUGE = (1 << 31) - 1
LONG = 20_000
COPY_HEADER = b"PGCOPY\n\xff\r\n\0"


@pytest.fixture(autouse=True)
def measured() -> Iterator[None]:
    with watched():
        yield


# -- the limits themselves


def test_what_breaks_a_limit_is_a_finding() -> None:
    def allocate(data: bytes) -> bool:
        return len(bytearray(1 << 26)) == 0

    def hang(data: bytes) -> bool:
        while True:
            try:
                len(data)
            except LookupError:
                return False

    def crash(data: bytes) -> bool:
        return data[7] == 0

    # Only what hangs gets a small limit: clearing 64 MiB may take a slow machine longer.
    for run, limits, shown in (
        (allocate, Limits(), "allocated 67"),
        (hang, Limits(cpu_seconds=0.1), "took 0.1 s"),
        (crash, Limits(), "IndexError"),
    ):
        with pytest.raises(FindingError, match=shown):
            check("a decoder", run, b"x", limits=limits)
    assert check("a decoder", bool, b"x")
    assert not check("a decoder", bool, b"")


# -- claims


def refused(run: Run, data: bytes) -> bool:
    return not check("a claim", run, data)


def value_run(type_: PgType) -> Run:
    decode = binary_decoder(type_)

    def run(data: bytes) -> bool:
        try:
            decode(data)
        except MappingError:
            return False
        return True

    return run


@pytest.mark.parametrize("size", [HUGE, -HUGE, -(1 << 31), -2, 1 << 30, 1 << 24])
def test_no_length_of_a_frame_allocates_what_it_claims(size: int) -> None:
    def run(data: bytes) -> bool:
        try:
            Decoder().decode(data)
        except ProtocolError:
            return False
        return True

    claim = struct.pack(">i", size)
    assert refused(run, b"I" + bytes(4) + b"N\x00\x01b" + claim + b"abc")
    assert refused(run, b"T" + claim + b"\x00" + bytes(8))
    assert refused(run, b"M" + bytes(9) + b"p\x00" + claim + b"abc")
    assert refused(run, b"R" + bytes(4) + b"s\x00t\x00d\xff\xff")
    assert refused(run, b"I" + bytes(4) + b"N\xff\xffn")


@pytest.mark.parametrize("size", [HUGE, -(1 << 31), -2, 1 << 30, 1 << 24])
def test_no_count_of_a_value_allocates_what_it_claims(size: int) -> None:
    claim = int4(size)
    text = core("text")
    sparse = golden_type("sparsevec").type
    cases = [
        (array(text), int4(1) + bytes(8) + claim + int4(1)),
        (array(text), claim + bytes(100)),
        (array(text), int4(6) + bytes(8) + (claim + int4(1)) * 6),
        (array(text), int4(1) + bytes(8) + int4(1) + int4(1) + claim),
        (composite(("a", text)), claim + bytes(8)),
        (composite(("a", text)), int4(1) + bytes(4) + claim),
        (range_of(text), b"\x00" + claim),
        (multirange_of(text), claim + bytes(8)),
        (golden_type("hstore").type, claim + bytes(8)),
        (golden_type("hstore").type, int4(1) + claim),
        (golden_type("tsvector").type, claim + bytes(8)),
        (golden_type("path").type, b"\x01" + claim),
        (golden_type("polygon").type, claim),
        (core("bit"), claim),
        (golden_type("varbit").type, claim + b"\xff"),
        (sparse, claim + claim + bytes(4)),
        (sparse, int4(HUGE) + claim + bytes(4)),
    ]
    for type_, data in cases:
        assert refused(value_run(type_), data), (type_.name, data)


def test_a_sparse_vector_of_two_thousand_million_dimensions_takes_no_memory() -> None:
    data = int4(HUGE) + int4(1) + int4(0) + int4(HUGE - 1) + struct.pack(">f", 1)
    decode = binary_decoder(golden_type("sparsevec").type)
    assert decode(data) == {"indices": [HUGE - 1], "values": [1.0], "size": HUGE}
    assert check("sparsevec", value_run(golden_type("sparsevec").type), data)


def numeric(digits: int, weight: int, scale: int) -> bytes:
    return struct.pack(">HhHH", digits, weight, 0, scale) + struct.pack(">H", 1) * digits


@pytest.mark.parametrize("as_string", [False, True])
def test_numbers_of_many_digits_do_not_multiply_in_one_value(as_string: bool) -> None:
    """An array of 14 bytes an element could become 147,000 digits an element."""
    one = numeric(1, 32767, 0x3FFF)
    element = core("numeric")
    options = DecodeOptions(numeric_as_string=as_string)
    for type_, data in (
        (array(element), array_bytes(*[one] * 10_000)),
        (array(composite(("n", element))), array_bytes(*[int4(1) + int4(0) + counted(one)] * 9999)),
        (multirange_of(element), int4(9999) + counted(b"\x00" + counted(one) * 2) * 9999),
    ):
        decode = binary_decoder(type_, options)

        def run(data: bytes) -> bool:
            with pytest.raises(MappingError):
                decode(data)  # noqa: B023
            return False

        check(type_.name, run, data)
    # Some are taken, each time anew, and so is whatever sends its digits.
    decode = binary_decoder(array(element), options)
    for _ in range(3):
        assert decode(array_bytes(*[one] * 10)) == [numeric_text(one)] * 10
    long = numeric(30_000, 29_999, 0)
    assert decode(array_bytes(*[long] * 40)) == [numeric_text(long)] * 40
    assert MAX_ZEROS < 40 * 4 * 30_000


def counted(data: bytes) -> bytes:
    return int4(len(data)) + data


def numeric_text(data: bytes) -> object:
    return binary_decoder(core("numeric"), DecodeOptions(numeric_as_string=True))(data)


@pytest.mark.parametrize("nested", [b"[" * LONG, b'{"a":' * LONG, b"[" * 990 + b"]" * 990])
def test_a_document_nested_deep_is_its_text(nested: bytes) -> None:
    decode = text_decoder(core("jsonb"))

    def run(data: bytes) -> bool:
        return decode(data) == data.decode()

    assert check("jsonb", run, nested)


# -- long texts


#: Repeated after and before something else, they lead into every loop of every text parser.
PATTERNS: Final = (
    *(b"9", b"{", b"[", b"(", b"[]", b"[[],", b"{},", b'"', b'""', b"\\", b'\\"', b'"\\a', b"(,"),
    *(b'{"a":', b'"a"=>"b", ', b'"a"=>NULL, ', b"[1,2),", b"[1,2),[", b"{[1,2],", b'{"",', b"1:1,"),
    *(
        b"1Y",
        b"1H",
        b"1,",
        b"1 ",
        b"-",
        b".",
        b"e",
        b":",
        b"0:",
        b"a",
        b"\xff",
        b"'a' ",
        b"((1,2),",
    ),
)
FRAMES: Final = (
    (b"", b""),
    (b"{", b"}x"),
    (b'{"', b""),
    (b"(", b"x"),
    (b"PT", b"."),
    (b"0.", b"x"),
)


def test_no_long_text_makes_a_decoder_slow() -> None:
    for golden, _, text in value_runs():
        for pattern in PATTERNS:
            for before, after in FRAMES:
                data = before + pattern * (LONG // len(pattern)) + after
                check(f"{golden.sql} text", text, data, limits=Limits(cpu_seconds=5), measure=False)


def test_no_long_binary_value_makes_a_decoder_slow() -> None:
    for golden, binary, _ in value_runs():
        for data in golden.binary:
            check(f"{golden.sql} binary", binary, data + bytes(LONG), measure=False)
            check(f"{golden.sql} binary", binary, data * (LONG // (len(data) or 1)), measure=False)


# -- what was found


def test_an_object_identifier_beyond_32_bits_is_none() -> None:
    """It was taken, and its lowest 64 bits written."""
    for name in ("regclass", "regproc", "oid"):
        for text in (b"99999999999999999999", b"4294967296", b"-1"):
            with pytest.raises(MappingError):
                text_decoder(core(name))(text)
        assert text_decoder(core(name))(b"4294967295") == 4294967295
    assert text_decoder(core("regclass"))(b"-") == 0


def test_an_int2vector_without_elements_has_one_dimension_of_size_zero() -> None:
    """Arrays have none then; it was refused as malformed."""
    for sql in ("int2vector", "oidvector"):
        type_ = golden_type(sql).type
        empty = int4(1) + int4(0) + int4(21) + int4(0) + int4(0)
        assert binary_decoder(type_)(empty) == []
        for data in (empty + b"x", empty[:-1], int4(2) + empty[4:] + int4(0) + int4(1)):
            with pytest.raises(MappingError):
                binary_decoder(type_)(data)


def test_golden_values_are_the_same_in_both_formats() -> None:
    by_name = {"regclass", "regtype"}  # their text is a name
    for golden in golden_types():
        if golden.sql not in by_name:
            binary, text = binary_decoder(golden.type), text_decoder(golden.type)
            assert list(map(binary, golden.binary)) == list(map(text, golden.text)), golden.sql


@pytest.mark.parametrize("size", [1 << 17, HUGE])
def test_a_copy_does_not_wait_for_a_header_of_gigabytes(size: int) -> None:
    """It kept everything that came until there were so many bytes."""
    with pytest.raises(ProtocolError, match="header extension"):
        CopyParser([False]).feed(COPY_HEADER + int4(0) + int4(size))


def test_a_copy_does_not_wait_for_a_row_of_gigabytes() -> None:
    """Only single fields of more than one were refused."""
    parser = CopyParser([False] * 3)
    parser.feed(COPY_HEADER + bytes(8))
    with pytest.raises(ProtocolError, match="a row of"):
        parser.feed(struct.pack(">hi", 3, 1 << 30))
    parser = CopyParser([False] * 1000)
    # No field is too long by itself.
    parser.feed(COPY_HEADER + bytes(8) + struct.pack(">hi", 1000, 1 << 29) + bytes(100))


def test_a_row_of_a_copy_in_many_pieces_is_put_together_once() -> None:
    """Each piece had what came before copied, and the row cut up again: quadratic."""
    value = bytes(range(256)) * 4096
    row = struct.pack(">h", 2) + counted(b"7") + counted(value)
    stream = COPY_HEADER + bytes(8) + row + struct.pack(">h", -1)

    def run(data: bytes) -> bool:
        parser = CopyParser([False, False])
        pieces = (data[at : at + 16] for at in range(0, len(data), 16))
        rows = [row for piece in pieces for row in parser.feed(piece)]
        parser.end()
        return rows == [[b"7", value]]

    assert check("copy", run, stream, measure=False)


@pytest.mark.parametrize("values", [1, 2])
def test_a_tuple_of_other_width_than_its_relation_is_a_protocol_error(values: int) -> None:
    stream = Stream()
    new = row(1)
    turned = m.Relation(OID, "public", "t", "d", tuple(reversed(RELATION.columns)))
    with pytest.raises(ProtocolError):
        stream.transaction(100, turned, m.Insert(OID, new[:values]))
