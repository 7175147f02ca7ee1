"""Every type of docs/mapping.md, taken from a real server: binary decodes to what text decodes to,
and to what the page says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import psycopg
import pytest
from qdrant_client import grpc

from cdc_sync.errors import MappingError
from cdc_sync.mapping.ids import compile_key_text, compile_point_id
from cdc_sync.mapping.plan import ColumnPlan, Metric, VectorKind, VectorPlan
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.table import PgType
from cdc_sync.mapping.values import (
    DecodeOptions,
    JsonValue,
    binary_decoder,
    needs_text,
    text_decoder,
)
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.rows import RawValue, Row, TextValue
from tests.support.fix_postgres import Database
from tests.support.mapping_types import SESSION_SETTINGS, Connection, look_up, table_plan
from tests.support.points import numbers_of, payload_of

pytestmark = pytest.mark.requirement("R18")

INT64 = 2**63

CASES: Final[list[tuple[str, JsonValue]]] = [
    ("true", True),
    ("false", False),
    ("(-32768)::int2", -32768),
    ("(-2147483648)::int4", -(2**31)),
    ("9223372036854775807::int8", INT64 - 1),
    ("(-9223372036854775808)::int8", -INT64),
    ("4294967295::oid", 4294967295),
    ("'4294967295'::xid", 4294967295),
    ("'7'::cid", 7),
    ("'18446744073709551615'::xid8", "18446744073709551615"),
    ("'12'::xid8", 12),
    ("1.1::float4", struct.unpack("f", struct.pack("f", 1.1))[0]),
    ("'3.4028235e38'::float4", 3.4028234663852886e38),
    ("'1e-45'::float4", 1.401298464324817e-45),
    ("'NaN'::float4", None),
    ("0.1::float8", 0.1),
    ("'1.7976931348623157e308'::float8", 1.7976931348623157e308),
    ("'5e-324'::float8", 5e-324),
    ("'-0'::float8", -0.0),
    ("'Infinity'::float8", None),
    ("'-Infinity'::float8", None),
    ("0::numeric", 0),
    ("12.50::numeric", 12.5),
    ("(-0.00010)::numeric", -0.0001),
    ("10000::numeric", 10000),
    ("9223372036854775807::numeric", INT64 - 1),
    ("9223372036854775808::numeric", "9223372036854775808"),
    ("(-9223372036854775808)::numeric", -INT64),
    ("0.1234567890123456789::numeric", "0.1234567890123456789"),
    ("1.0000000000000000::numeric", 1.0),
    ("1e-20::numeric", 1e-20),
    ("1e999::numeric", "1" + "0" * 999),
    ("(-1e-500)::numeric", "-0." + "0" * 499 + "1"),
    ("repeat('123456789', 111)::numeric", "123456789" * 111),
    ("'NaN'::numeric", None),
    ("'Infinity'::numeric", None),
    ("'-Infinity'::numeric", None),
    ("1234.56::money", "1234.56"),
    ("(-0.5)::numeric::money", "-0.50"),
    ("'-92233720368547758.08'::money", "-92233720368547758.08"),
    ("'a\U0001f600é\"\\'::text", 'a\U0001f600é"\\'),
    ("''::text", ""),
    ("'x '::char(4)", "x   "),
    ("'abc'::varchar(5)", "abc"),
    ("'relname'::name", "relname"),
    ("'x'::\"char\"", "x"),
    ("''::\"char\"", ""),
    ("'\\377'::\"char\"", "\ufffd"),
    ("'$.a[*]'::jsonpath", '$."a"[*]'),
    ("'6BA7B810-9DAD-11D1-80B4-00C04FD430C8'::uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
    ("'2026-01-31'::date", "2026-01-31"),
    ("'0044-03-15 BC'::date", "0044-03-15 BC"),
    ("'0001-01-01'::date", "0001-01-01"),
    ("'0001-12-31 BC'::date", "0001-12-31 BC"),
    ("'4713-01-01 BC'::date", "4713-01-01 BC"),
    ("'9999-12-31'::date", "9999-12-31"),
    ("'10000-01-01'::date", "10000-01-01"),
    ("'5874897-12-31'::date", "5874897-12-31"),
    ("'infinity'::date", "infinity"),
    ("'-infinity'::date", "-infinity"),
    ("'2026-01-31 10:20:30'::timestamp", "2026-01-31T10:20:30Z"),
    ("'2026-01-31 10:20:30.5'::timestamp", "2026-01-31T10:20:30.500000Z"),
    ("'2026-01-31 10:20:30.000123+02'::timestamptz", "2026-01-31T08:20:30.000123Z"),
    ("'1999-12-31 23:59:59.999999+00'::timestamptz", "1999-12-31T23:59:59.999999Z"),
    ("'0044-03-15 00:00:00+00 BC'::timestamptz", "0044-03-15T00:00:00Z BC"),
    ("'4713-01-01 00:00:00.1 BC'::timestamp", "4713-01-01T00:00:00.100000Z BC"),
    ("'294276-12-31 23:59:59.999999'::timestamp", "294276-12-31T23:59:59.999999Z"),
    ("'10000-01-01'::timestamptz", "10000-01-01T00:00:00Z"),
    ("'infinity'::timestamptz", "infinity"),
    ("'-infinity'::timestamp", "-infinity"),
    ("'00:00'::time", "00:00:00"),
    ("'24:00'::time", "24:00:00"),
    ("'10:20:30.000120'::time", "10:20:30.000120"),
    ("'10:20:30+05:30'::timetz", "10:20:30+05:30"),
    ("'10:20:30-00:30:15'::timetz", "10:20:30-00:30:15"),
    ("'10:20:30.5-08'::timetz", "10:20:30.500000-08:00"),
    ("'24:00:00+15:59:59'::timetz", "24:00:00+15:59:59"),
    ("'0'::interval", "PT0S"),
    ("'1 year 2 mons 3 days 4 hours 5 mins 6.7 secs'::interval", "P1Y2M3DT4H5M6.7S"),
    ("'-14 mons 3 days -00:00:00.000001'::interval", "P-1Y-2M3DT-0.000001S"),
    ("'-1:02:03.5'::interval", "PT-1H-2M-3.5S"),
    ("'2562047788:00:54.775807'::interval", "PT2562047788H54.775807S"),
    ("make_interval(months => -2147483647, days => -2147483647)", "P-178956970Y-7M-2147483647D"),
    ("'192.168.1.5'::inet", "192.168.1.5"),
    ("'192.168.1.5/24'::inet", "192.168.1.5/24"),
    ("'10.0.0.0/8'::cidr", "10.0.0.0/8"),
    ("'10.1.2.3'::cidr", "10.1.2.3/32"),
    ("'::'::inet", "::"),
    ("'::1'::inet", "::1"),
    ("'::5'::inet", "::5"),
    ("'::1.2.3.4'::inet", "::1.2.3.4"),
    ("'::ffff:1.2.3.4'::inet", "::ffff:1.2.3.4"),
    ("'::ffff:0:0:1'::inet", "::ffff:0:0:1"),
    ("'2001:db8::1:0:0:1/64'::inet", "2001:db8::1:0:0:1/64"),
    ("'2001:0:0:1::'::inet", "2001:0:0:1::"),
    ("'1:2:3:4:5:6:7:0'::inet", "1:2:3:4:5:6:7:0"),
    ("'fe80::/10'::cidr", "fe80::/10"),
    ("'08:00:2b:01:02:03'::macaddr", "08:00:2b:01:02:03"),
    ("'08:00:2b:01:02:03:04:05'::macaddr8", "08:00:2b:01:02:03:04:05"),
    ("B'0101'", "0101"),
    ("B''::varbit", ""),
    ("B'1000000001'::bit(10)", "1000000001"),
    ("'\\x00ff80'::bytea", "AP+A"),
    ("''::bytea", ""),
    ("'null'::jsonb", None),
    (
        '\'{"a": [1, 2.5, null, {"b": "\\u00e9"}], "n": 9223372036854775808}\'::jsonb',
        {"a": [1, 2.5, None, {"b": "é"}], "n": "9223372036854775808"},
    ),
    ("'1e400'::jsonb", "1" + "0" * 400),
    ("'[1e400, -1E+400, 1e5, -9223372036854775808]'::json", ["1e400", "-1E+400", 1e5, -INT64]),
    (
        '\'{"a": 1, "a": 2, "s": "\\ud800x", "z": "\\u0000"}\'::json',
        {"a": 2, "s": "\ufffdx", "z": "\x00"},
    ),
    ("'\"\\ud83d\\ude00\"'::json", "\U0001f600"),
    ("'{}'::json", {}),
    ("$$'it''s':3A,1 b:2 'c\\\\d':4B$$::tsvector", "'b':2 'c\\\\d':4B 'it''s':1,3A"),
    ("''::tsvector", ""),
    ("'16/B374D848'::pg_lsn", "16/B374D848"),
    ("'FFFFFFFF/1'::pg_lsn", "FFFFFFFF/1"),
    ("'(7,65535)'::tid", "(7,65535)"),
    ("'{}'::int4[]", []),
    ("'{1,NULL,3}'::int4[]", [1, None, 3]),
    ("'[0:1][-1:0]={{1,2},{3,4}}'::int8[]", [[1, 2], [3, 4]]),
    ("'{{{a},{b}},{{c},{NULL}}}'::text[]", [[["a"], ["b"]], [["c"], [None]]]),
    (
        "ARRAY['a,b', 'NULL', '', 'q\"\\', ' x ', '{y}', NULL, E'n\\nl']",
        ["a,b", "NULL", "", 'q"\\', " x ", "{y}", None, "n\nl"],
    ),
    ("ARRAY['$1,234.56'::money, (-1)::int4::money]", ["1234.56", "-1.00"]),
    (
        "ARRAY[box '(2,2),(1,1)', box '(4,4),(3,3)']",
        [
            {"high": {"x": 2.0, "y": 2.0}, "low": {"x": 1.0, "y": 1.0}},
            {"high": {"x": 4.0, "y": 4.0}, "low": {"x": 3.0, "y": 3.0}},
        ],
    ),
    ("'1 2 3'::int2vector", [1, 2, 3]),
    ("'26 25'::oidvector", [26, 25]),
    ("'[1,10]'::int4range", {"lower": 1, "upper": 11, "bounds": "[)"}),
    ("'empty'::int8range", {"empty": True}),
    ("'(,)'::numrange", {"lower": None, "upper": None, "bounds": "()"}),
    ("'[1.5,]'::numrange", {"lower": 1.5, "upper": None, "bounds": "[)"}),
    (
        "'[2026-01-01,infinity)'::daterange",
        {"lower": "2026-01-01", "upper": "infinity", "bounds": "[)"},
    ),
    (
        "tstzrange('2026-01-01 00:00+00', '2026-01-02 00:00:00.5+00', '(]')",
        {"lower": "2026-01-01T00:00:00Z", "upper": "2026-01-02T00:00:00.500000Z", "bounds": "(]"},
    ),
    ("textrange('a\"b', 'c\\,)', '[]')", {"lower": 'a"b', "upper": "c\\,)", "bounds": "[]"}),
    ("textrange('', 'x')", {"lower": "", "upper": "x", "bounds": "[)"}),
    ("'{}'::int4multirange", []),
    (
        "'{[1,3),[5,8)}'::int4multirange",
        [
            {"lower": 1, "upper": 3, "bounds": "[)"},
            {"lower": 5, "upper": 8, "bounds": "[)"},
        ],
    ),
    (
        "textmultirange(textrange('a,', 'b}'), textrange('c', NULL))",
        [
            {"lower": "a,", "upper": "b}", "bounds": "[)"},
            {"lower": "c", "upper": None, "bounds": "[)"},
        ],
    ),
    (
        "ARRAY[int4range(1,2), int4range 'empty']",
        [{"lower": 1, "upper": 2, "bounds": "[)"}, {"empty": True}],
    ),
    ("'happy \"x\"'::mood", 'happy "x"'),
    ("ARRAY['sad'::mood, NULL]", ["sad", None]),
    ("5::positive", 5),
    ("'{1,2}'::positives", [1, 2]),
    ("ARRAY['{1,2}'::positives, '{3}'::positives]", [[1, 2], [3]]),
    ("ROW('a,(\"\\', NULL, 7)::inner_type", {"t": 'a,("\\', "e": None, "n": 7}),
    ("ROW('', 'sad', NULL)::inner_type", {"t": "", "e": "sad", "n": None}),
    (
        """ROW(ROW('x y', 'sad', 1)::inner_type, ARRAY['a', NULL, 'b"c'], '[1,2)',
            '2026-01-01 00:00+00', '[1,2.5]')::outer_type""",
        {
            "i": {"t": "x y", "e": "sad", "n": 1},
            "a": ["a", None, 'b"c'],
            "r": {"lower": 1, "upper": 2, "bounds": "[)"},
            "at": "2026-01-01T00:00:00Z",
            "v": [1.0, 2.5],
        },
    ),
    ("ARRAY[ROW('x', 'sad', 1)::inner_type, NULL]", [{"t": "x", "e": "sad", "n": 1}, None]),
    ("ROW(NULL)::single_type", {"one": None}),
    ("ROW('')::single_type", {"one": ""}),
    ("'(1.5,-2)'::point", {"x": 1.5, "y": -2.0}),
    ("'(Infinity,1e300)'::point", {"x": None, "y": 1e300}),
    ("'{1,2,3}'::line", {"a": 1.0, "b": 2.0, "c": 3.0}),
    ("'[(1,2),(3,4)]'::lseg", {"points": [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}]}),
    ("'(1,2),(3,4)'::box", {"high": {"x": 3.0, "y": 4.0}, "low": {"x": 1.0, "y": 2.0}}),
    (
        "'[(1,2),(3,4)]'::path",
        {"open": True, "points": [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}]},
    ),
    (
        "'((1,2),(3,4))'::path",
        {"open": False, "points": [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}]},
    ),
    (
        "'((1,2),(3,4),(5,6))'::polygon",
        {"points": [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}, {"x": 5.0, "y": 6.0}]},
    ),
    ("'<(1,2),3>'::circle", {"center": {"x": 1.0, "y": 2.0}, "radius": 3.0}),
    ("ARRAY['[1,2]'::halfvec, '[0.333,65504]'::halfvec]", [[1.0, 2.0], [0.3330078125, 65504.0]]),
    (
        "ARRAY['{1:1.5,3:2}/5'::sparsevec, '{}/3'::sparsevec]",
        [
            {"indices": [0, 2], "values": [1.5, 2.0], "size": 5},
            {"indices": [], "values": [], "size": 3},
        ],
    ),
]

CONTRIB_CASES: Final[list[tuple[str, str, JsonValue]]] = [
    ("hstore", '\'a=>1, "b \\" c"=>NULL, ""=>"=>"\'::hstore', {"a": "1", 'b " c': None, "": "=>"}),
    ("hstore", "''::hstore", {}),
    ("hstore", "ARRAY['a=>\"x,y\\\\\\\\\"'::hstore]", [{"a": "x,y\\\\"}]),
    ("citext", "'Abc'::citext", "Abc"),
    ("ltree", "'Top.Science'::ltree", "Top.Science"),
    ("ltree", "'Top.*{1,2}.x'::lquery", "Top.*{1,2}.x"),
    ("ltree", "'a & b'::ltxtquery", "a & b"),
]

SETUP: Final = """
CREATE TYPE mood AS ENUM ('sad', 'happy "x"');
CREATE DOMAIN positive AS int4 CHECK (VALUE > 0);
CREATE DOMAIN positives AS positive[];
CREATE TYPE textrange AS RANGE (subtype = text, multirange_type_name = textmultirange);
CREATE TYPE inner_type AS (t text, e mood, n positive);
CREATE TYPE outer_type AS (i inner_type, a text[], r int4range, at timestamptz, v vector(2));
CREATE TYPE single_type AS (one text);
"""


VECTOR_TABLE: Final = """
CREATE TABLE vectors (
    id int8 PRIMARY KEY,
    dense vector(3),
    half halfvec(3),
    sparse sparsevec(70000),
    multi vector(2)[],
    bits bit(11)
);
INSERT INTO vectors VALUES
    (1, '[1,-2.5,3e38]', '[0.1,65504,-6e-8]', '{1:1.5,3:2,70000:-0.25}/70000',
     ARRAY['[1,2]', '[3,4.5]']::vector(2)[], B'10000000001'),
    (2, '[0,0,0]', '[0,0,0]', '{}/70000', '{}', B'00000000000');
"""


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with psycopg.connect(
        database.url, autocommit=True, options=SESSION_SETTINGS, client_encoding="utf8"
    ) as connection:
        connection.execute(SETUP)
        yield connection


def fetch(connection: Connection, query: str, *, binary: bool) -> tuple[list[int], list[RawValue]]:
    """Return type OIDs and raw values of a query's only row."""
    cursor = connection.cursor(binary=binary)
    cursor.execute(query)
    result = cursor.pgresult
    assert result is not None
    oids = [result.ftype(column) for column in range(result.nfields)]
    row: list[RawValue] = []
    for column in range(result.nfields):
        value = result.get_value(0, column)
        row.append(None if value is None else value if binary else TextValue(value))
    return oids, row


def both_forms(connection: Connection, expression: str) -> tuple[PgType, bytes, bytes]:
    """Return type, binary and text form of an SQL expression."""
    query = f"SELECT {expression}"
    oids, (binary,) = fetch(connection, query, binary=True)
    _, (text,) = fetch(connection, query, binary=False)
    assert isinstance(binary, bytes)
    assert isinstance(text, bytes)
    return look_up(connection, oids[0]), binary, text


def same(left: JsonValue, right: JsonValue) -> bool:
    """Tell whether two JSON values are equal, types and signs of zero included."""
    return repr(left) == repr(right) if not isinstance(left, dict) else left == right


def failures(connection: Connection, cases: list[tuple[str, JsonValue]]) -> list[str]:
    wrong = []
    for expression, expected in cases:
        type_, binary, text = both_forms(connection, expression)
        by_binary, by_text = binary_decoder(type_)(binary), text_decoder(type_)(text)
        if not same(by_binary, expected) or not same(by_text, expected):
            wrong.append(f"{expression}: {expected!r}; binary {by_binary!r}, text {by_text!r}")
    return wrong


@pytest.mark.requirement("R14", "R18")
def test_every_type_decodes_to_the_documented_value_in_both_formats(
    connection: Connection,
) -> None:
    assert failures(connection, CASES) == []


def test_contrib_types_decode_to_the_documented_value(connection: Connection) -> None:
    installed = {str(row[0]) for row in connection.execute("SELECT extname FROM pg_extension")}
    cases = [(sql, value) for name, sql, value in CONTRIB_CASES if name in installed]
    if not cases:
        pytest.skip("this server has no contrib modules")
    assert failures(connection, cases) == []


def test_interval_infinity(connection: Connection) -> None:
    if connection.info.server_version < 170000:
        pytest.skip("interval has infinities from Postgres 17 on")
    cases: list[tuple[str, JsonValue]] = [
        ("'infinity'::interval", "infinity"),
        ("'-infinity'::interval", "-infinity"),
    ]
    assert failures(connection, cases) == []


def test_numeric_as_string(connection: Connection) -> None:
    options = DecodeOptions(numeric_as_string=True)
    for number in ("12.50", "NaN", "-Infinity", "0", "-0.000"):
        type_, binary, text = both_forms(connection, f"'{number}'::numeric")
        expected = "0.000" if number == "-0.000" else number
        assert binary_decoder(type_, options)(binary) == expected
        assert text_decoder(type_, options)(text) == expected


def test_registered_names_are_numbers_and_their_text_is_refused(connection: Connection) -> None:
    type_, binary, text = both_forms(connection, "'pg_class'::regclass")
    assert binary_decoder(type_)(binary) == 1259
    with pytest.raises(MappingError, match="regclass"):
        text_decoder(type_)(text)
    type_, binary, text = both_forms(connection, "4000000000::regclass")
    assert binary_decoder(type_)(binary) == text_decoder(type_)(text) == 4000000000


def test_non_finite_numbers_are_counted_in_both_formats(connection: Connection) -> None:
    type_, binary, text = both_forms(
        connection, "ARRAY['NaN', 1, 'Infinity', '-Infinity']::float8[]"
    )
    options = DecodeOptions()
    assert binary_decoder(type_, options)(binary) == [None, 1.0, None, None]
    assert text_decoder(type_, options)(text) == [None, 1.0, None, None]
    assert options.non_finite.value == 6


@pytest.mark.requirement("R13")
def test_vector_types_are_known_by_name_after_their_extension_was_recreated(
    connection: Connection,
) -> None:
    before, _, _ = both_forms(connection, "'[1,2]'::vector")
    connection.execute("DROP EXTENSION vector CASCADE; CREATE SCHEMA extensions")
    connection.execute("CREATE EXTENSION vector SCHEMA extensions")
    type_, binary, text = both_forms(connection, "'[1,2]'::extensions.vector")
    assert type_.oid != before.oid
    assert type_.schema == "extensions"
    assert binary_decoder(type_)(binary) == text_decoder(type_)(text) == [1.0, 2.0]


def vector_columns(connection: Connection) -> list[ColumnPlan]:
    def vector(name: str, kind: VectorKind, size: int | None) -> ColumnPlan:
        oid, typmod = connection.execute(
            "SELECT atttypid::int8, atttypmod FROM pg_attribute"
            " WHERE attrelid = 'vectors'::regclass AND attname = %s",
            (name,),
        ).fetchall()[0]
        type_ = look_up(connection, int(str(oid)), int(str(typmod)))
        return ColumnPlan(name, type_, None, VectorPlan(name, kind, size, Metric.DOT))

    return [
        ColumnPlan("id", look_up(connection, 20), "id"),
        vector("dense", VectorKind.DENSE, 3),
        vector("half", VectorKind.DENSE, 3),
        vector("sparse", VectorKind.SPARSE, None),
        vector("multi", VectorKind.MULTI, 2),
        vector("bits", VectorKind.DENSE, 11),
    ]


@pytest.mark.requirement("R16")
def test_vectors_are_the_same_from_both_formats(connection: Connection) -> None:
    connection.execute(VECTOR_TABLE)
    plan = table_plan(*vector_columns(connection))
    codec, python = WireCodec(plan), PythonCodec(plan)
    for key in (1, 2):
        query = f"SELECT * FROM vectors WHERE id = {key}"
        _, binary = fetch(connection, query, binary=True)
        _, text = fetch(connection, query, binary=False)
        assert codec.point(key, binary) == codec.point(key, text)
        assert codec.null_vectors(binary) == codec.null_vectors(text)
    _, row = fetch(connection, "SELECT * FROM vectors WHERE id = 1", binary=True)
    vectors = numbers_of(python.vectors(row))
    assert vectors["sparse"] == SparseValue([0, 2, 69999], [1.5, 2.0, -0.25])
    assert vectors["multi"] == [[1.0, 2.0], [3.0, 4.5]]
    assert vectors["bits"] == [1.0] + [0.0] * 9 + [1.0]
    _, row = fetch(connection, "SELECT * FROM vectors WHERE id = 2", binary=True)
    assert codec.null_vectors(row) == ["multi"]


def copied_row(connection: Connection, query: str) -> Row:
    """Return the raw values of a query's only row, as COPY BINARY carries them."""
    with connection.cursor().copy(f"COPY ({query}) TO STDOUT (FORMAT binary)") as copy:
        data = b"".join(bytes(block) for block in copy)
    assert data.startswith(b"PGCOPY\n\xff\r\n\0")
    (extension,) = struct.unpack_from(">i", data, 15)
    offset = 19 + extension
    (count,) = struct.unpack_from(">h", data, offset)
    offset += 2
    row: Row = []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", data, offset)
        offset += 4
        row.append(None if length < 0 else data[offset : offset + length])
        offset += max(length, 0)
    assert data[offset:] == b"\xff\xff"
    return row


@pytest.mark.requirement("R83")
def test_copied_and_sent_bytes_give_byte_equal_points(connection: Connection) -> None:
    """The stream carries what the send functions give, as an ordinary binary result does."""
    connection.execute(VECTOR_TABLE)
    names = ", ".join(f"{sql} AS c{number}" for number, (sql, _) in enumerate(CASES))
    query = f"SELECT v.*, {names} FROM vectors v WHERE id = 1"
    oids, sent = fetch(connection, query, binary=True)
    columns = vector_columns(connection)
    for number, oid in enumerate(oids[len(columns) :]):
        columns.append(ColumnPlan(f"c{number}", look_up(connection, oid), f"c{number}"))
    plan = table_plan(*columns)
    codec, point_id = WireCodec(plan), compile_point_id(plan)
    copied = copied_row(connection, query)
    point = codec.point(point_id(copied), copied)
    assert point == codec.point(point_id(sent), sent)
    assert point_id(copied) == 1
    parsed = payload_of(grpc.PointStruct.FromString(point))
    assert parsed == PythonCodec(plan).payload(sent)
    for number, (sql, expected) in enumerate(CASES):
        assert parsed[f"c{number}"] == expected, sql


@pytest.mark.requirement("R14")
def test_binary_and_text_may_mix_in_one_row(connection: Connection) -> None:
    connection.execute(VECTOR_TABLE)
    plan = table_plan(*vector_columns(connection))
    codec = WireCodec(plan)
    query = "SELECT * FROM vectors WHERE id = 1"
    _, binary = fetch(connection, query, binary=True)
    _, text = fetch(connection, query, binary=False)
    mixed = [text[i] if i % 2 else binary[i] for i in range(len(binary))]
    assert codec.point(1, mixed) == codec.point(1, binary)


def test_keys_hash_alike_from_both_formats(connection: Connection) -> None:
    expressions = [
        *("'é\"'::text", "(-5)::int8", "1.500::numeric", "1.5::float4", "'-0'::float8", "true"),
        *("'\\x00ff'::bytea", "'happy \"x\"'::mood", "'2026-01-01'::date", "5::positive"),
        *("'NaN'::float8", "'2026-01-01 00:00:00.5+00'::timestamptz", "B'01'", "'1 day'::interval"),
        "'00000000-0000-0000-0000-00000000000a'::uuid",
    ]
    query = "SELECT " + ", ".join(f"{sql} AS k{i}" for i, sql in enumerate(expressions))
    oids, binary = fetch(connection, query, binary=True)
    _, text = fetch(connection, query, binary=False)
    columns = [ColumnPlan(f"k{i}", look_up(connection, oid)) for i, oid in enumerate(oids)]
    plan = table_plan(*columns, key=tuple(range(len(columns))))
    key_text = compile_key_text(plan)
    assert key_text(binary) == key_text(text)
    assert key_text(binary) == (
        '["é\\"","-5","1.5","1.5","0","true","AP8=","happy \\"x\\"","2026-01-01","5","NaN",'
        '"2026-01-01T00:00:00.500000Z","01","P1D","00000000-0000-0000-0000-00000000000a"]'
    )
    assert compile_point_id(plan)(binary) == compile_point_id(plan)(text)


def test_arrays_below_a_type_without_binary_output_need_text(connection: Connection) -> None:
    oids = connection.execute(
        "SELECT 'aclitem'::regtype::oid::int8, 'aclitem[]'::regtype::oid::int8"
    )
    single, array = oids.fetchall()[0]
    assert not needs_text(look_up(connection, int(str(single))))
    assert needs_text(look_up(connection, int(str(array))))
    assert not needs_text(look_up(connection, 1007))
