"""A table with a column of every type that docs/mapping.md maps, and values for it.

Values are SQL expressions over ``s.n``, a bigint: the same ``n`` gives the same value on every
server and in every version, because ``hashint8extended`` is stable. Each type lists its ordinary
values, its extremes and NULL; large random ones are computed. So a row costs no round trip and no
text built in Python, except for its vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import psycopg

KeyKind = Literal["bigint", "uuid", "text", "composite"]
Connection = psycopg.Connection[tuple[object, ...]]

#: Columns that hold vectors; all others but the key's are payload.
VECTOR_COLUMNS: Final = ("embedding", "second", "half", "sparse", "multi")
_CONTRIB: Final = ("hstore", "ltree", "citext")
_HALF_DIM: Final = 8
_MULTI_DIM: Final = 4

_TYPES: Final = """
DO $$
BEGIN
  IF to_regtype('every_mood') IS NULL THEN
    CREATE TYPE every_mood AS ENUM ('glad', 'sad', 'très triste', 'it''s "so" so');
    CREATE TYPE every_place AS (name text, at point, tags text[], depth numeric(10, 2));
    CREATE TYPE every_trip AS (start every_place, days int4range, mood every_mood);
    CREATE DOMAIN every_percent AS int4 CHECK (VALUE BETWEEN 0 AND 100);
    CREATE DOMAIN every_words AS text[] CHECK (cardinality(VALUE) < 1000);
    CREATE TYPE every_span AS RANGE (subtype = float8, multirange_type_name = every_spans);
  END IF;
END $$
"""

#: column -> (type, literals as Postgres reads them); NULL is added to each.
_LITERALS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "flag": ("bool", ("t", "f")),
    "small": ("int2", ("0", "-32768", "32767", "7")),
    "whole": ("int4", ("0", "-2147483648", "2147483647", "42", "-1")),
    "oid_value": ("oid", ("0", "4294967295", "1259")),
    "xid_value": ("xid", ("3", "4294967295")),
    "cid_value": ("cid", ("0", "4294967295")),
    "xid8_value": (
        "xid8",
        ("0", "9223372036854775807", "9223372036854775808", "18446744073709551615"),
    ),
    "class_value": ("regclass", ("pg_class", "pg_type", "0")),
    "type_value": ("regtype", ("int4", "text")),
    "real_value": (
        "float4",
        ("0", "-0", "0.1", "3.4028235e38", "1e-45", "NaN", "Infinity", "-Infinity", "16777217"),
    ),
    "double_value": (
        "float8",
        (
            "0",
            "-0",
            "0.1",
            "1.7976931348623157e308",
            "5e-324",
            "NaN",
            "Infinity",
            "-Infinity",
            "9007199254740993",
        ),
    ),
    "decimal_value": (
        "numeric",
        (
            "0",
            "1",
            "0.1",
            "-12.50",
            "1e30",
            "123456789012345678901234567890.123456789",
            "NaN",
            "Infinity",
            "-Infinity",
        ),
    ),
    "price": ("numeric(20, 4)", ("0", "19.99", "-0.0001", "9999999999999999.9999")),
    "big_whole": (
        "numeric(40, 0)",
        ("0", "9223372036854775807", "9223372036854775808", "-9223372036854775809"),
    ),
    "short_text": (
        "varchar(40)",
        (
            "",
            "plain",
            "Ünïcödé",
            "日本語テキスト",
            "👩‍👩‍👧 emoji",
            'quote " back \\ slash',
            "null",
            "\t",
        ),
    ),
    "padded": ("char(8)", ("a", "", "eight ch", "ü")),
    "name_value": ("name", ("pg_catalog", "x")),
    "letter": ('"char"', ("a", "Z")),
    "path_query": ("jsonpath", ("$.a[*]", "strict $.b ? (@ > 1)")),
    "mood": ("every_mood", ("glad", "sad", "très triste", 'it\'s "so" so')),
    "uuid_value": (
        "uuid",
        ("00000000-0000-0000-0000-000000000000", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF"),
    ),
    "day": (
        "date",
        (
            "2026-01-31",
            "1970-01-01",
            "0044-03-15 BC",
            "4714-11-24 BC",
            "5874897-12-31",
            "infinity",
            "-infinity",
        ),
    ),
    "local_time": (
        "timestamp",
        (
            "2026-01-31 10:20:30",
            "2026-01-31 10:20:30.000123",
            "0044-03-15 00:00:00 BC",
            "294276-12-31 23:59:59.999999",
            "infinity",
            "-infinity",
        ),
    ),
    "clock": ("time", ("00:00:00", "10:20:30.000123", "24:00:00", "23:59:59.999999")),
    "zoned_clock": ("timetz", ("10:20:30+05:30", "00:00:00-15:59:59", "23:59:59.999999+00")),
    "lapse": (
        "interval",
        (
            "0",
            "1 year 2 mons 3 days 04:05:06.7",
            "-1 mon 1 day -00:00:00.000001",
            "178000000 years",
            "-178000000 years",
        ),
    ),
    "cash": ("money", ("0", "1234.56", "-0.50", "92233720368547758.07", "-92233720368547758.08")),
    "address": ("inet", ("127.0.0.1", "10.1.2.3/8", "::1", "2001:db8::ff00:42:8329/64")),
    "network": ("cidr", ("10.0.0.0/8", "2001:db8::/32", "0.0.0.0/0")),
    "mac": ("macaddr", ("08:00:2b:01:02:03", "ff:ff:ff:ff:ff:ff")),
    "mac8": ("macaddr8", ("08:00:2b:01:02:03:04:05", "00:00:00:00:00:00:00:00")),
    "bits": ("bit(8)", ("00000000", "10101010", "11111111")),
    "many_bits": ("varbit", ("", "1", "010101010101010101")),
    "raw": ("bytea", ("\\x", "\\x00", "\\x00ff10deadbeef")),
    "old_json": (
        "json",
        (
            '{"a": 1, "a": 2}',
            "null",
            "[]",
            "12345678901234567890",
            ' { "spaced" : [ 1.0 , 1e400 ] } ',
            '"\\u00e9\\ud83d\\ude00"',
        ),
    ),
    "words": ("tsvector", ("", "'a':1A,2 'fat':3B 'cat''s':4", "plain words")),
    "lsn": ("pg_lsn", ("0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF")),
    "tuple_id": ("tid", ("(0,1)", "(4294967295,65535)")),
    "numbers": ("int4[]", ("{}", "{1,2,3}", "{NULL,1}", "[5:6]={7,8}")),
    "grid": ("int8[]", ("{{1,2},{3,4}}", "{{{1},{NULL}},{{3},{4}}}", "{}")),
    "labels": ("text[]", ("{}", '{a,"b c","",NULL,"NULL","q\\"uote",ü}', '{{"x","y"},{"z",NULL}}')),
    "moments": ("timestamptz[]", ('{"2026-01-31 10:20:30+02",infinity}', "{}")),
    "decimals": ("numeric[]", ("{0.1,NaN,1e30}", "{}")),
    "documents": ("jsonb[]", ('{"{\\"a\\": 1}",NULL,"[1, 2]"}', "{}")),
    "uuids": ("uuid[]", ("{00000000-0000-0000-0000-000000000001,NULL}",)),
    "flags": ("bool[]", ("{t,f,NULL}", "{}")),
    "moods": ("every_mood[]", ('{glad,"très triste"}', "{}")),
    "blobs": ("bytea[]", ('{"\\\\x00ff"}', "{}")),
    "place": ("every_place", ('(Berlin,"(13.4,52.5)","{a,b}",12.50)', "(,,,)", '("quo""te",,{},)')),
    "trip": ("every_trip", ('("(Rom,,,1)","[1,5)",glad)', "(,empty,)")),
    "places": ("every_place[]", ('{"(a,,,)",NULL,"(b,\\"(0,-0)\\",{},-1)"}', "{}")),
    "percent": ("every_percent", ("0", "100", "55")),
    "checked_words": ("every_words", ("{}", "{one,two}")),
    "int_range": ("int4range", ("empty", "[1,10)", "(,5]", "(,)", "[-2147483648,2147483647)")),
    "big_range": ("int8range", ("[1,2)", "empty")),
    "number_range": ("numrange", ("(0.1,2.50]", "[1,1]", "[-Infinity,NaN]", "empty")),
    "local_range": ("tsrange", ("[2026-01-01,2026-02-01)", "(,infinity]")),
    "zoned_range": ("tstzrange", ('["2026-01-01 00:00:00+01",)', "empty")),
    "day_range": ("daterange", ("[2026-01-01,2026-01-31]", "(,)")),
    "span": ("every_span", ("[0.5,1.5)", "empty")),
    "int_ranges": ("int4multirange", ("{}", "{[1,3),[5,8)}", "{(,)}")),
    "zoned_ranges": (
        "tstzmultirange",
        ('{["2026-01-01 00:00:00+01","2026-01-02 00:00:00+01")}', "{}"),
    ),
    "number_ranges": ("nummultirange", ("{[0.1,0.2],(3,)}",)),
    "day_ranges": ("datemultirange", ("{[2026-01-01,2026-01-03)}",)),
    "spans": ("every_spans", ("{[0.5,1.5)}", "{}")),
    "spot": ("point", ("(0,0)", "(-1.5,2.25)", "(1e300,NaN)")),
    "line_value": ("line", ("{1,-1,0}", "{0,1,2.5}")),
    "segment": ("lseg", ("[(0,0),(1,1)]",)),
    "box_value": ("box", ("(2,2),(0,0)",)),
    "track": ("path", ("[(0,0),(1,1),(2,0)]", "((0,0),(1,1))")),
    "area": ("polygon", ("((0,0),(1,1),(2,0))", "((0,0))")),
    "disc": ("circle", ("<(1,2),3.5>",)),
}

_CONTRIB_LITERALS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "pairs": ("hstore", ("", "a=>1,b=>NULL", '"k\\"ey"=>"välue"')),
    "tree": ("ltree", ("Top.Science.Astronomy", "a")),
    "tree_query": ("lquery", ("*.Science.*{1,2}",)),
    "tree_text": ("ltxtquery", ("Science & !Art",)),
    "folded": ("citext", ("MiXeD", "ÄÖÜ", "")),
    "folded_list": ("citext[]", ("{A,b}", "{}")),
}

#: column -> (type, expression): values with more variety than a list gives.
_COMPUTED: Final[dict[str, tuple[str, str]]] = {
    "revision": ("int8", "s.n"),
    "big": ("int8", "hashint8extended(s.n, 901)"),
    "title": (
        "text",
        "'title ' || s.n || ' – №' || chr(945 + abs(mod(hashint8extended(s.n, 902), 24))::int)",
    ),
    # 3.2 kB of hex in every 20th row: too long and too random to stay in the row.
    "body": (
        "text",
        (
            "CASE WHEN mod(hashint8extended(s.n, 903), 20) = 0"
            " THEN (SELECT string_agg(md5((s.n * 101 + g)::text), '')"
            " FROM generate_series(1, 100) g)"
            " WHEN mod(hashint8extended(s.n, 903), 20) = 1 THEN NULL"
            " ELSE repeat('lorem ipsum ', abs(mod(hashint8extended(s.n, 904), 9))::int) END"
        ),
    ),
    "score": ("float8", "hashint8extended(s.n, 905) / 9223372036854775808.0::float8"),
    "amount": ("numeric(12, 2)", "mod(hashint8extended(s.n, 906), 999999999) / 100.0"),
    "guid": ("uuid", "md5('guid' || s.n)::uuid"),
    "created_at": (
        "timestamptz",
        (
            "CASE abs(mod(hashint8extended(s.n, 907), 17)) WHEN 0 THEN NULL"
            " WHEN 1 THEN 'infinity'::timestamptz"
            " ELSE to_timestamp(abs(mod(hashint8extended(s.n, 908), 4000000000)) + 0.000123) END"
        ),
    ),
    "attributes": (
        "jsonb",
        (
            "CASE WHEN mod(hashint8extended(s.n, 909), 13) = 0 THEN NULL ELSE jsonb_build_object("
            "'n', s.n, 'half', s.n / 2.0,"
            " 'nested', jsonb_build_object('list', jsonb_build_array(1, 'zwei', NULL, true)),"
            " 'ключ', chr(128512), 'big', 12345678901234567890, 'huge', 1e400) END"
        ),
    ),
}
_XML: Final = ("xml", ("<a/>", '<a b="c">ü &amp; x</a>'))


@dataclass(frozen=True, slots=True)
class EverythingTable:
    """A table made by :func:`create_everything_table`: its name, key, vector dimension and payload
    expressions.
    """

    name: str
    key: KeyKind
    dim: int
    second_dim: int
    payload: tuple[tuple[str, str], ...]

    @property
    def key_columns(self) -> tuple[str, ...]:
        """The columns of the primary key."""
        return ("tenant", "seq") if self.key == "composite" else ("id",)

    @property
    def key_expressions(self) -> tuple[str, ...]:
        """The key's values as expressions over ``s.k``, a bigint >= 0; one to one."""
        match self.key:
            case "bigint":
                return ("s.k",)
            case "uuid":
                return ("md5('key' || s.k)::uuid",)
            case "text":
                return ("'schlüssel \"' || s.k || '\" / a''b'",)
            case "composite":
                return ("'tenant ' || mod(s.k, 7)", "(s.k / 7)::int4")

    @property
    def vector_expressions(self) -> dict[str, str]:
        """The vector columns as expressions over ``s.embedding`` and ``s.n``, NULL now and then but
        for the first.
        """
        # pgvector counts from 1 in text: the first and the last index are always there.
        sparse = (
            "('{1:' || (abs(mod(hashint8extended(s.n, 912), 100)) + 1) || ',37:-0.25,1000:'"
            " || (abs(mod(hashint8extended(s.n, 913), 7)) + 0.5) || '}/1000')::sparsevec"
        )
        part = f"subvector(s.embedding, 1, {min(_MULTI_DIM, self.dim)})"
        multi_dim = min(_MULTI_DIM, self.dim)
        multi = f"ARRAY[{part}::vector({multi_dim}), ({part} * {part})::vector({multi_dim})]"
        second = f"subvector(s.embedding, 1, {self.second_dim})"
        half = f"subvector(s.embedding, 1, {min(_HALF_DIM, self.dim)})::halfvec"
        return {
            "embedding": "s.embedding",
            "second": f"CASE WHEN mod(hashint8extended(s.n, 910), 5) <> 0 THEN {second} END",
            "half": f"CASE WHEN mod(hashint8extended(s.n, 911), 7) <> 0 THEN {half} END",
            "sparse": f"CASE WHEN mod(hashint8extended(s.n, 914), 6) <> 0 THEN {sparse} END",
            "multi": f"CASE WHEN mod(hashint8extended(s.n, 915), 8) <> 0 THEN {multi} END",
        }

    def insert_columns(self) -> dict[str, str]:
        """Every column with its expression over ``s.k``, ``s.n`` and ``s.embedding``."""
        keys = dict(zip(self.key_columns, self.key_expressions, strict=True))
        return keys | self.vector_expressions | dict(self.payload)


def create_everything_table(
    connection: Connection,
    name: str = "everything",
    *,
    dim: int = 768,
    second_dim: int = 8,
    contrib: bool = True,
    key: KeyKind = "bigint",
) -> EverythingTable:
    """Create the table (and its types, when they are not there) in the first schema of the search
    path.

    Columns: the key; ``embedding vector(dim) NOT NULL``, ``second vector(second_dim)``, ``half
    halfvec``, ``sparse sparsevec(1000)``, ``multi vector[]``; ``revision`` (the ``n`` of the row's
    payload); one payload column of each type. Columns of contrib types exist where the extension
    does and ``contrib`` is true, ``xml`` where the server knows it. ``second_dim`` is at most
    ``dim``.
    """
    connection.execute(_TYPES)
    columns = dict(_COMPUTED)
    literals = dict(_LITERALS)
    if contrib and _has_contrib(connection):
        literals |= _CONTRIB_LITERALS
    if _has_xml(connection):
        literals["markup"] = _XML
    salts = itertools.count(1)
    for column, (type_, values) in literals.items():
        columns[column] = (type_, _pick(type_, values, next(salts)))
    table = EverythingTable(
        name,
        key,
        dim,
        min(second_dim, dim),
        tuple((column, text) for column, (_, text) in columns.items()),
    )
    lines = [
        *_key_definition(key),
        f"embedding vector({dim}) NOT NULL",
        f"second vector({table.second_dim})",
        f"half halfvec({min(_HALF_DIM, dim)})",
        "sparse sparsevec(1000)",
        f"multi vector({min(_MULTI_DIM, dim)})[]",
        *(f"{column} {type_}" for column, (type_, _) in columns.items()),
        f"PRIMARY KEY ({', '.join(table.key_columns)})",
    ]
    connection.execute(f"CREATE TABLE {name} (\n  " + ",\n  ".join(lines) + "\n)")
    return table


def _key_definition(key: KeyKind) -> Iterator[str]:
    match key:
        case "composite":
            yield "tenant text"
            yield "seq int4"
        case _:
            yield f"id {key}"


def _pick(type_: str, values: tuple[str, ...], salt: int) -> str:
    """Return an expression that takes one of the values, or NULL, by the hash of ``s.n``."""
    branches = " ".join(
        f"WHEN {number} THEN {_literal(value)}::{type_}" for number, value in enumerate(values)
    )
    return f"CASE abs(mod(hashint8extended(s.n, {salt}), {len(values) + 1})) {branches} END"


def _literal(value: str) -> str:
    # E'' whatever standard_conforming_strings says; no value holds a percent sign, which psycopg
    # would read.
    return "E'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _has_contrib(connection: Connection) -> bool:
    found = connection.execute(
        "SELECT count(*) FROM pg_extension WHERE extname = ANY(%s)", (list(_CONTRIB),)
    ).fetchone()
    return found == (len(_CONTRIB),)


def _has_xml(connection: Connection) -> bool:
    """Whether the server was built with libxml; without it the type exists but reads nothing."""
    try:
        with connection.transaction():
            connection.execute("SELECT '<a/>'::xml")
    except psycopg.errors.FeatureNotSupported:
        return False
    return True
