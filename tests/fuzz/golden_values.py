"""Values of every mapped type as a PostgreSQL 18 server sent them, in both formats: what mutations
start from.

They stand in ``golden_values.json``, which ``python -m tests.fuzz.golden_values`` writes anew from
an embedded server.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NotRequired, TypedDict

import psycopg
from psycopg import pq

from cdc_sync.demo.binaries import find_binaries
from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.mapping.table import PgType, TypeKind
from tests.support.everything import (
    _CONTRIB,
    _CONTRIB_LITERALS,
    _LITERALS,
    _TYPES,
)
from tests.support.mapping_types import SESSION_SETTINGS, Connection, look_up

_FILE: Final = Path(__file__).with_name("golden_values.json")

#: PostGIS is not on that server: points in EWKB with and without SRID, empty, with Z and M, and a
#: line.
_EWKB: Final = (
    "0101000000000000000000f03f0000000000000040",
    "0101000020e6100000000000000000f03f0000000000000040",
    "0101000000000000000000f87f000000000000f87f",
    "01010000c0000000000000f03f000000000000004000000000000008400000000000001040",
    "00000000013ff00000000000004000000000000000",
    "010200000002000000" + "00" * 32,
)

#: type -> literals, beside those of the table with every type.
_MORE: Final[dict[str, tuple[str, ...]]] = {
    "vector": ("[1,2.5,-3]", "[0,0,0,0,0,0,0,1e-30]", "[3.4e38]"),
    "halfvec": ("[1,2.5,-3]", "[65504,6e-8]"),
    "sparsevec": ("{1:1.5,3:2}/5", "{}/7", "{1000000000:1}/1000000000"),
    "vector[]": ("{}", '{"[1,2]","[3,4]"}', '{{"[1]"},{NULL}}'),
    "halfvec[]": ('{"[1,2]","[3,4]","[5,6]"}',),
    "sparsevec[]": ('{"{1:1}/2",NULL}',),
    "bit(3)[]": ("{101,010}",),
    "xml": (),
    "numeric[]": ("{1e20,-1e-20,123456789.123456789,NaN,-Infinity,NULL}",),
    "jsonb": (
        '{"a": [1, {"b": null}], "c": 1e400, "d": 12345678901234567890, "e": "\\u00e9"}',
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",
        '"x"',
    ),
    "json": ('{"\\ud83d": "\\udc00", "nul": "\\u0000"}',),
    "json[]": ('{"[1]","{\\"a\\":{}}"}',),
    "hstore[]": ('{"\\"a\\"=>\\"1\\", \\"b\\"=>NULL"}', "{}"),
    "box[]": ("{(2,2),(0,0);(1,1),(-1,-1)}",),
    "point[]": ('{"(1,2)","(3,4)"}',),
    "path[]": ('{"[(0,0),(1,1)]"}',),
    "circle[]": ('{"<(1,2),3>"}',),
    "int2vector": ("1 2 3", ""),
    "oidvector": ("1 4294967295",),
    "inet[]": ('{127.0.0.1,"::1"}',),
    "interval[]": ("{P1Y2M3DT4H5M6.7S,PT0S}",),
    "timetz[]": ("{10:20:30+05:30}",),
    "date[]": ("{2026-01-31,infinity}",),
    '"char"[]': ("{a,b}",),
    "numrange[]": ('{"[1,2)",empty}',),
    "int4multirange[]": ('{"{[1,2)}"}',),
    "tsvector[]": ("{\"'a':1A\"}",),
    "text[]": ("{{{{{{a,b}}}}}}", '[0:1][-5:-5]={{a},{"b,{}\\"\\\\"}}'),
    "every_trip[]": ('{"(\\"(Rom,,,1)\\",\\"[1,5)\\",glad)",NULL}',),
}


class _Type(TypedDict):
    schema: str
    name: str
    kind: str
    typmod: int
    extension: NotRequired[str]
    element: NotRequired[_Type]
    fields: NotRequired[list[tuple[str, _Type]]]


class _Entry(TypedDict):
    sql: str
    type: _Type
    #: Binary format in hexadecimal digits, and text format.
    values: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class GoldenType:
    """A type with values: ``binary`` and ``text`` hold the same ones in the same order. ``sql`` is
    the name that SQL knows it by."""

    sql: str
    type: PgType
    binary: tuple[bytes, ...]
    text: tuple[bytes, ...]


@functools.cache
def golden_types() -> tuple[GoldenType, ...]:
    """Every mapped type of the core, the contrib types, those of pgvector and of PostGIS, and types
    made of them."""
    entries: list[_Entry] = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(
        GoldenType(
            entry["sql"],
            _read_type(entry["type"]),
            tuple(bytes.fromhex(binary) for binary, _ in entry["values"]),
            tuple(text.encode() for _, text in entry["values"]),
        )
        for entry in entries
    )


def golden_type(sql: str) -> GoldenType:
    """The type of that name."""
    return next(golden for golden in golden_types() if golden.sql == sql)


def _read_type(type_: _Type) -> PgType:
    return PgType(
        0,
        type_["schema"],
        type_["name"],
        TypeKind(type_["kind"]),
        element=_read_type(type_["element"]) if "element" in type_ else None,
        fields=tuple((name, _read_type(field)) for name, field in type_.get("fields", ())),
        extension=type_.get("extension"),
        typmod=type_["typmod"],
    )


def _write_type(type_: PgType) -> _Type:
    written: _Type = {
        "schema": type_.schema,
        "name": type_.name,
        "kind": type_.kind.value,
        "typmod": type_.typmod,
    }
    if type_.extension is not None:
        written["extension"] = type_.extension
    if type_.element is not None:
        written["element"] = _write_type(type_.element)
    if type_.fields:
        written["fields"] = [(name, _write_type(field)) for name, field in type_.fields]
    return written


def _literals() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for sql, values in (*_LITERALS.values(), *_CONTRIB_LITERALS.values(), *_MORE.items()):
        found.setdefault(sql, []).extend(values)
    return found


def _entry(connection: Connection, sql: str, literals: list[str]) -> _Entry:
    values = []
    oid = 0
    for literal in literals:
        forms = []
        for form in (pq.Format.BINARY, pq.Format.TEXT):
            result = connection.pgconn.exec_params(
                f"SELECT $1::{sql}".encode(), [literal.encode()], result_format=form
            )
            value = result.get_value(0, 0)
            assert value is not None, f"{sql} {literal}: {result.get_error_message()}"
            forms.append(value)
            oid = result.ftype(0)
        values.append((forms[0].hex(), forms[1].decode()))
    return {"sql": sql, "type": _write_type(look_up(connection, oid)), "values": values}


def main() -> None:
    """Write the file anew."""
    with PostgresServer(find_binaries(18)) as server:
        url = server.url()
        with psycopg.connect(url, autocommit=True, options=SESSION_SETTINGS) as connection:
            for extension in (*_CONTRIB, "vector"):
                connection.execute(f"CREATE EXTENSION {extension}".encode())
            connection.execute(_TYPES.encode())
            entries = [
                _entry(connection, sql, found) for sql, found in _literals().items() if found
            ]
    point: _Type = {
        "schema": "public",
        "name": "geometry",
        "kind": "base",
        "typmod": -1,
        "extension": "postgis",
    }
    values = [(digits, digits.upper()) for digits in _EWKB]
    entries.append({"sql": "geometry", "type": point, "values": values})
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    _FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
