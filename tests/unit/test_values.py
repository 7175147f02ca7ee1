"""Value decoders on hostile input; values from a real server are in
tests/integration/test_mapping_live.py.
"""

from __future__ import annotations

import json
import struct
import time

import pytest
from qdrant_client import grpc

from cdc_sync.errors import MappingError
from cdc_sync.mapping.protobuf import encode_value, map_entry
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.mapping.values import (
    DecodeOptions,
    JsonValue,
    binary_decoder,
    describe,
    needs_text,
    text_decoder,
)
from tests.support.mapping_types import (
    array,
    composite,
    core,
    domain,
    multirange_of,
    pgvector,
    range_of,
)


def extension(owner: str, name: str) -> PgType:
    return PgType(0, "public", name, extension=owner)


def array_bytes(*items: bytes | None, sizes: tuple[int, ...] | None = None) -> bytes:
    sizes = sizes if sizes is not None else (len(items),)
    header = struct.pack(">iii", len(sizes), None in items, 0)
    header += b"".join(struct.pack(">ii", size, 1) for size in sizes)
    return header + b"".join(
        struct.pack(">i", -1) if item is None else struct.pack(">i", len(item)) + item
        for item in items
    )


def int4(value: int) -> bytes:
    return struct.pack(">i", value)


SAMPLES: list[tuple[PgType, bytes]] = [
    (core("bool"), b"\x01"),
    (core("int8"), struct.pack(">q", 5)),
    (core("float4"), struct.pack(">f", 0.5)),
    (core("numeric"), struct.pack(">HhHHHH", 2, 0, 0x4000, 3, 12, 3450)),
    (core("money"), struct.pack(">q", -50)),
    (core("uuid"), bytes(range(16))),
    (core("char"), b"x"),
    (core("date"), int4(-(10**6))),
    (core("timestamptz"), struct.pack(">q", -(2**62))),
    (core("time"), struct.pack(">q", 86_400_000_000)),
    (core("timetz"), struct.pack(">qi", 1, -3600)),
    (core("interval"), struct.pack(">qii", -1, 2, -3)),
    (core("inet"), bytes([2, 24, 0, 4, 10, 0, 0, 1])),
    (core("macaddr8"), bytes(8)),
    (core("varbit"), int4(9) + b"\x80\x80"),
    (core("tsvector"), int4(1) + b"ab\0\x00\x01\xc0\x01"),
    (core("pg_lsn"), bytes(8)),
    (core("tid"), bytes(6)),
    (core("point"), struct.pack(">dd", 1, 2)),
    (core("path"), b"\x01" + int4(1) + struct.pack(">dd", 1, 2)),
    (core("polygon"), int4(1) + struct.pack(">dd", 1, 2)),
    (core("jsonb"), b'\x01{"a":[1]}'),
    (core("jsonpath"), b"\x01$"),
    (extension("hstore", "hstore"), int4(1) + int4(1) + b"a" + int4(-1)),
    (extension("ltree", "ltree"), b"\x01a.b"),
    (extension("postgis", "geometry"), bytes.fromhex("0101000000") + struct.pack("<dd", 1, 2)),
    (pgvector("vector"), struct.pack(">hhff", 2, 0, 1, 2)),
    (pgvector("halfvec"), struct.pack(">hhee", 2, 0, 1, 2)),
    (pgvector("sparsevec"), struct.pack(">iiiif", 5, 1, 0, 4, 2)),
    (array(core("int4")), array_bytes(int4(1), None)),
    (composite(("a", core("int4"))), int4(1) + bytes(4) + int4(4) + int4(7)),
    (range_of(core("int4")), b"\x02" + int4(4) + int4(1) + int4(4) + int4(2)),
    (multirange_of(core("int4")), int4(1) + int4(1) + b"\x01"),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: describe(sample[0]))
def test_truncated_and_extended_bytes_are_refused(sample: tuple[PgType, bytes]) -> None:
    type_, data = sample
    decode = binary_decoder(type_)
    decode(data)
    for cut in range(len(data)):
        # A text inside may be cut and still be a text, and a document a shorter document.
        if type_.name not in ("ltree", "jsonpath", "jsonb") or cut == 0:
            with pytest.raises(MappingError):
                decode(data[:cut])
    if type_.name not in ("ltree", "jsonpath"):
        with pytest.raises(MappingError):
            decode(data + b"\0")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "euc_jis_2004", "gb18030", "utf-16-le"])
def test_hstore_of_other_encodings(encoding: str) -> None:
    """Lengths are of the bytes in the database's encoding, texts are in UTF-8; some take more bytes
    there, some less."""
    texts = ["é", "", "a", "日本", "\u00e9x", "x" * 300, "\u00fc" * 130]
    kept = [one for one in texts if one.encode(encoding, "ignore").decode(encoding) == one]
    assert len(kept) >= 5

    def counted(value: str) -> bytes:
        return int4(len(value.encode(encoding))) + value.encode()

    pairs = {key + str(n): None if n == 3 else kept[-n] for n, key in enumerate(kept, 1)}
    data = int4(len(pairs)) + b"".join(
        counted(key) + (int4(-1) if value is None else counted(value))
        for key, value in pairs.items()
    )
    decode = binary_decoder(extension("hstore", "hstore"))
    assert decode(data) == pairs
    for cut in range(4, len(data), 7):
        with pytest.raises(MappingError):
            decode(data[:-cut])


@pytest.mark.parametrize(
    ("type_", "data"),
    [
        (core("bool"), b"\x02"),
        (core("numeric"), struct.pack(">HhHH", 0, 0, 0x1234, 0)),
        (core("numeric"), struct.pack(">HhHHH", 1, 0, 0, 0, 10000)),
        (core("numeric"), struct.pack(">HhHH", 0, 0, 0, 0x4000)),
        (core("numeric"), struct.pack(">HhHHH", 1, 0, 0xC000, 0, 1)),
        (core("time"), struct.pack(">q", -1)),
        (core("time"), struct.pack(">q", 86_400_000_001)),
        (core("timetz"), struct.pack(">qi", 0, -(2**31))),
        (core("inet"), bytes([2, 33, 0, 4, 10, 0, 0, 1])),
        (core("inet"), bytes([9, 8, 0, 4, 10, 0, 0, 1])),
        (core("varbit"), int4(-1)),
        (core("varbit"), int4(2**31 - 1)),
        (core("tsvector"), int4(2**31 - 1)),
        (core("tsvector"), int4(1) + b"ab\0\xff\xff"),
        (core("path"), b"\x02" + int4(0)),
        (core("polygon"), int4(2**31 - 1)),
        (core("polygon"), int4(-1)),
        (core("jsonb"), b'\x02{"a":1}'),
        (core("json"), b'{"a":NaN}'),
        (core("json"), b"[1,"),
        (core("json"), b'"a" "b"'),
        (extension("hstore", "hstore"), int4(2**31 - 1)),
        (extension("hstore", "hstore"), int4(1) + int4(-1) + int4(-1)),
        (extension("postgis", "geometry"), b"\x07\x01\x00\x00\x00"),
        (array(core("int4")), struct.pack(">iii", 7, 0, 0) + bytes(64)),
        (array(core("int4")), struct.pack(">iii", -1, 0, 0)),
        (array(core("int4")), struct.pack(">iiiii", 1, 0, 0, 2**31 - 1, 1)),
        (array(core("int4")), struct.pack(">iii", 6, 0, 0) + struct.pack(">ii", 2**31 - 1, 1) * 6),
        (array(core("int4")), array_bytes(sizes=(0,))),
        (array(core("text")), array_bytes(sizes=(1,)) + int4(-2)),
        (array(core("text")), array_bytes(sizes=(1,)) + int4(100)),
        (composite(("a", core("int4"))), int4(2) + bytes(4) + int4(-1)),
        (range_of(core("int4")), b"\x80"),
        (multirange_of(core("int4")), int4(2**31 - 1)),
        (multirange_of(core("int4")), int4(1) + int4(-1)),
        (pgvector("vector"), struct.pack(">hhf", 2, 0, 1)),
        (pgvector("sparsevec"), struct.pack(">iiiiiff", 5, 2, 0, 3, 1, 1, 2)),
        (pgvector("sparsevec"), struct.pack(">iiiif", 5, 1, 0, 5, 2)),
        (pgvector("sparsevec"), struct.pack(">iii", 2**31 - 1, 2**31 - 1, 0)),
    ],
)
def test_malformed_binary_is_refused_at_once(type_: PgType, data: bytes) -> None:
    began = time.perf_counter()
    with pytest.raises(MappingError) as caught:
        binary_decoder(type_)(data)
    assert time.perf_counter() - began < 1
    assert str(len(data)) in caught.value.message


@pytest.mark.parametrize(
    ("type_", "data"),
    [
        (core("bool"), b"true"),
        (core("int4"), b"1_000"),
        (core("int4"), b" 1"),
        (core("int4"), b"2147483648"),
        (core("oid"), b"-1"),
        (core("xid8"), b"99999999999999999999"),
        (core("float8"), b"1_0"),
        (core("float8"), b"infinity"),
        (core("float4"), b"1e300"),
        (core("numeric"), b"1e5"),
        (core("numeric"), b""),
        (core("money"), b"$"),
        (core("uuid"), b"00000000000000000000000000000000"),
        (core("bytea"), b"\\x0"),
        (core("bytea"), b"abc"),
        (core("varbit"), b"012"),
        (core("date"), b"31/01/2026"),
        (core("timestamptz"), b"2026-01-31 10:20:30"),
        (core("timestamptz"), b"2026-01-31 10:20:30+02"),
        (core("timestamp"), b"2026-01-31 10:20:30+00"),
        (core("interval"), b"1 day"),
        (core("time"), b"10:20"),
        (core("point"), b"(1)"),
        (core("point"), b"hello"),
        (core("polygon"), b"((1,2),(3))"),
        (core("pg_lsn"), b"1/G"),
        (extension("hstore", "hstore"), b'"a"=>"1",'),
        (extension("hstore", "hstore"), b'"a"=>1'),
        (extension("postgis", "geometry"), b"zz"),
        (array(core("int4")), b""),
        (array(core("int4")), b"{1,}"),
        (array(core("int4")), b"{1"),
        (array(core("int4")), b"{1}}"),
        (array(core("int4")), b"{" * 5000),
        (array(core("int4")), b"{1;2}"),
        (composite(("a", core("text"))), b"(a,b)"),
        (composite(("a", core("text"))), b'("a)'),
        (composite(("a", core("text"))), b"a"),
        (range_of(core("int4")), b"[1]"),
        (range_of(core("int4")), b"[1,2"),
        (range_of(core("int4")), b"[1,2)x"),
        (multirange_of(core("int4")), b"{[1,2)"),
        (multirange_of(core("int4")), b"{[1,2)[3,4)}"),
        (multirange_of(core("int4")), b""),
        (pgvector("vector"), b"[1,,2]"),
        (pgvector("vector"), b"[nan]"),
        (pgvector("sparsevec"), b"{0:1}/5"),
        (pgvector("sparsevec"), b"{2:1,1:1}/5"),
        (pgvector("sparsevec"), b"{6:1}/5"),
    ],
)
def test_malformed_text_is_refused(type_: PgType, data: bytes) -> None:
    with pytest.raises(MappingError):
        text_decoder(type_)(data)


@pytest.mark.parametrize(
    "type_",
    [
        core("tsquery"),
        core("aclitem"),
        PgType(0, "app", "int4"),
        PgType(0, "public", "vector"),
        PgType(0, "public", "int4", extension="other"),
        PgType(0, "pg_catalog", "record", TypeKind.PSEUDO),
        array(core("tsquery")),
        composite(("a", array(core("tsquery")))),
        domain(core("tsquery")),
        PgType(0, "public", "_x", TypeKind.ARRAY),
    ],
)
def test_unknown_types_are_refused_when_compiled(type_: PgType) -> None:
    for compile_decoder in (binary_decoder, text_decoder):
        with pytest.raises(MappingError) as caught:
            compile_decoder(type_)
        assert caught.value.remedy


@pytest.mark.requirement("R18")
def test_text_that_is_not_utf8_becomes_replacement_characters() -> None:
    assert binary_decoder(core("text"))(b"a\xffb") == "a\ufffdb"
    assert text_decoder(array(core("text")))(b'{"a\xff,",b}') == ["a\ufffd,", "b"]
    assert binary_decoder(core("json"))(b'{"k\xff":"\xfe"}') == {"k\ufffd": "\ufffd"}
    assert binary_decoder(core("char"))(b"\xc8") == text_decoder(core("char"))(b"\\310") == "\ufffd"


def test_a_numeric_with_the_most_digits_there_can_be() -> None:
    data = struct.pack(">HhHHH", 1, 32767, 0, 0, 1)
    assert binary_decoder(core("numeric"))(data) == "1" + "0" * 131068
    data = struct.pack(">HhHHH", 1, -4096, 0, 16383, 9000)
    assert binary_decoder(core("numeric"))(data) == "0." + "0" * 16380 + "900"
    assert text_decoder(core("numeric"))(b"9" * 5000 + b".5") == "9" * 5000 + ".5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1", 0.1),
        ("123456789.123456", 123456789.123456),
        ("0.30000000000000004", 0.30000000000000004),
        ("0.300000000000000041", "0.300000000000000041"),
        ("9007199254740993.0", "9007199254740993.0"),
        ("9007199254740992.0", 9007199254740992.0),
        ("-0.00", -0.0),
        ("-9223372036854775809", "-9223372036854775809"),
    ],
)
def test_numerics_are_numbers_only_if_nothing_is_lost(text: str, expected: JsonValue) -> None:
    assert text_decoder(core("numeric"))(text.encode()) == expected


def test_the_last_dimension_of_an_array_runs_fastest() -> None:
    items = [int4(number) for number in range(24)]
    nested = binary_decoder(array(core("int4")))(array_bytes(*items, sizes=(2, 3, 4)))
    text = json.dumps(nested).replace("[", "{").replace("]", "}").replace(" ", "")
    assert nested == [[[12 * i + 4 * j + k for k in range(4)] for j in range(3)] for i in range(2)]
    assert text_decoder(array(core("int4")))(text.encode()) == nested


def test_money_has_the_digits_of_its_locale() -> None:
    data = struct.pack(">q", -5)
    for digits, expected in ((0, "-5"), (2, "-0.05"), (3, "-0.005"), (-1, "-0.05")):
        assert binary_decoder(core("money", digits))(data) == expected
    assert text_decoder(core("money", 2))("-1.234,56 €".encode()) == "-1234.56"
    assert text_decoder(core("money", 0))("(¥1,234)".encode()) == "-1234"


def test_points_of_postgis() -> None:
    geometry = extension("postgis", "geometry")
    point = struct.pack("<BI2d", 1, 1, 13.4, 52.5)
    assert binary_decoder(geometry)(point) == {"lon": 13.4, "lat": 52.5}
    assert text_decoder(geometry)(point.hex().upper().encode()) == {"lon": 13.4, "lat": 52.5}
    big_endian = struct.pack(">BII3d", 0, 0xA0000001, 4326, 13.4, 52.5, 7)
    assert binary_decoder(geometry)(big_endian) == {"lon": 13.4, "lat": 52.5}
    empty = struct.pack("<BI2d", 1, 1, float("nan"), float("nan"))
    assert binary_decoder(geometry)(empty) is None
    # Metres are no degrees: a point in another reference system stays what it is.
    web_mercator = struct.pack("<BII2d", 1, 0x20000001, 3857, 1e6, 2e6)
    assert binary_decoder(geometry)(web_mercator) == web_mercator.hex().upper()
    line = struct.pack("<BII4d", 1, 2, 2, 0, 0, 1, 1)
    assert binary_decoder(geometry)(line) == line.hex().upper()


def test_json_numbers_and_depth() -> None:
    decode = binary_decoder(core("json"))
    assert decode(b"18446744073709551616") == "18446744073709551616"
    assert decode(b"-9223372036854775808") == -(2**63)
    assert decode(b"9223372036854775807") == 2**63 - 1
    assert decode(b"-1e999") == "-1e999"
    assert decode(b"1" + b"0" * 5000) == "1" + "0" * 5000
    assert decode(b"1e-999") == 0.0
    flat: JsonValue = [[[[]]]] * 50
    assert decode(json.dumps(flat).encode()) == flat
    for depth in (100, 5000, 200_000):
        deep = b"[" * depth + b"]" * depth
        assert decode(deep) == deep.decode()


def test_the_deepest_value_that_is_kept_nested_can_be_parsed() -> None:
    """Protobuf parsers refuse more than 100 messages in each other; ours must stay below in any
    request.
    """
    inner: PgType = core("json")
    for _ in range(10):
        inner = composite(("f", inner))
    with pytest.raises(MappingError):
        binary_decoder(composite(("f", inner)))
    document = b'{"a":' * 20 + b"1" + b"}" * 20
    assert isinstance(binary_decoder(core("json"))(document), dict)
    assert isinstance(binary_decoder(core("json"))(b'{"a":' + document + b"}"), str)
    data = document
    for _ in range(10):
        data = int4(1) + bytes(4) + int4(len(data)) + data
    value = encode_value(binary_decoder(inner)(data))
    entry = map_entry(b"field", value)
    payload = grpc.SetPayloadPoints()
    payload.payload["field"].CopyFrom(grpc.Value.FromString(value))
    operation = grpc.PointsUpdateOperation()
    point = operation.upsert.points.add()
    point.payload["field"].CopyFrom(payload.payload["field"])
    batch = grpc.UpdateBatchPoints(operations=[operation])
    assert grpc.UpdateBatchPoints.FromString(batch.SerializeToString()) == batch
    assert entry in batch.SerializeToString()


def test_non_finite_numbers_are_counted() -> None:
    options = DecodeOptions()
    nan, infinity = struct.pack(">d", float("nan")), struct.pack(">d", float("inf"))
    assert binary_decoder(core("float8"), options)(nan) is None
    assert binary_decoder(core("point"), options)(nan + infinity) == {"x": None, "y": None}
    assert text_decoder(core("numeric"), options)(b"NaN") is None
    vector = struct.pack(">hhff", 2, 0, 1, float("inf"))
    assert binary_decoder(pgvector("vector"), options)(vector) == [1.0, None]
    assert options.non_finite.value == 5


@pytest.mark.requirement("R12")
def test_needs_text() -> None:
    silent = PgType(0, "pg_catalog", "aclitem", has_binary_output=False)
    assert not needs_text(silent)
    assert not needs_text(domain(silent))
    assert not needs_text(array(core("int4")))
    for type_ in (array(silent), array(domain(silent)), composite(("a", silent)), range_of(silent)):
        assert needs_text(type_)
        assert needs_text(domain(array(type_)))
