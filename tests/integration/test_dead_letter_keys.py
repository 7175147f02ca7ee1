"""The key of a dead letter finds its row again, whatever the key's type: the texts that are kept
are read by Postgres as the same value, and that gives the same point id."""

from __future__ import annotations

import dataclasses
from typing import Final

import pytest

from cdc_sync.mapping.ids import compile_point_id, id_scheme
from cdc_sync.mapping.key_values import compile_key_values
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.key_texts import parse_keys
from cdc_sync.postgres.refetch import fetch_rows
from tests.support.fix_postgres import Database
from tests.support.source_tables import raw_plan, source_settings

TYPES: Final = (
    "CREATE DOMAIN code AS varchar(8) CHECK (VALUE LIKE 'x%');"
    "CREATE TYPE colour AS ENUM ('deep red', 'blue');"
)
#: Values in SQL by key type.
VALUES: Final = {
    "bool": ["true", "false"],
    "int2": ["-32768", "32767"],
    "int4": ["-2147483648", "0"],
    "int8": ["-9223372036854775808", "9223372036854775807"],
    "oid": ["4294967295"],
    "float4": ["'NaN'", "'-Infinity'", "0.1", "-0.0", "1e-38"],
    "float8": ["'NaN'", "'Infinity'", "0.1", "5e-324", "-1.7976931348623157e308"],
    "numeric": ["'NaN'", "'-Infinity'", "1.500", "-0.00001", "1e40"],
    "numeric(10,2)": ["1.50", "-7"],
    "uuid": ["'A0EEBC99-9c0b-4ef8-bb6d-6bb9bd380a11'"],
    "text": ["''", """E'a,b "c" [d]\\\\ \\'e\\' \u00e9\\n%s'""", "'  '", "'null'"],
    "varchar(5)": ["'ab '"],
    "char(5)": ["'ab'"],
    "name": ["'n\u00e9'"],
    '"char"': ["'x'", "''"],
    "citext": ["'AcMe'"],
    "code": ["'x-1'"],
    "colour": ["'deep red'"],
    "date": ["'2024-02-29'", "'0044-03-15 BC'", "'12345-01-01'", "'infinity'"],
    "timestamp": ["'2024-02-29 12:00:00.000001'", "'0044-03-15 01:02:03 BC'", "'-infinity'"],
    "timestamptz": ["'2024-02-29 12:00+02'", "'12345-01-01 00:00+00'", "'0001-01-01 00:00+00 BC'"],
    "time": ["'24:00:00'", "'12:34:56.789'"],
    "timetz": ["'12:34:56.789-15:59:59'", "'00:00+00'"],
    "interval": ["'1 year -2 days 3.5 seconds'", "'0'", "'-1 month 25:00:00.000001'"],
    "inet": ["'10.1.2.3/8'", "'::1'"],
    "cidr": ["'10.0.0.0/8'"],
    "macaddr": ["'08:00:2b:01:02:03'"],
    "macaddr8": ["'08:00:2b:01:02:03:04:05'"],
    "bit(3)": ["B'101'"],
    "varbit": ["B''", "B'101010101'"],
    "bytea": [r"'\x'", r"'\x00ff5c'", "'abc'"],
    "tsvector": ["""'a:1A,2 fat:3 ''o''''clock''  back\\\\slash'"""],
    "pg_lsn": ["'16/B374D848'"],
    "xid8": ["'18446744073709551615'"],
}


@pytest.mark.parametrize("type_", VALUES)
def test_a_key_finds_its_row_again(type_: str, database18: Database) -> None:
    database18.execute(f"{TYPES} CREATE TABLE t (k {type_} PRIMARY KEY, n int)")
    for number, value in enumerate(VALUES[type_]):
        database18.execute(f"INSERT INTO t VALUES ({value}, {number})".replace("%", "%%"))
    with connect(source_settings(database18.url)) as connection:
        plan = raw_plan(find_table(connection, "t"))
        scheme = id_scheme([plan.columns[i].type for i in plan.key], None)
        plan = dataclasses.replace(plan, id_scheme=scheme)
        point_id, key_values = compile_point_id(plan), compile_key_values(plan)
        columns = [plan.columns[i] for i in plan.key]
        texts = connection.execute("SELECT k::text FROM public.t").fetchall()
        keys = parse_keys(connection, columns, [(str(text),) for (text,) in texts])
        rows = fetch_rows(connection, plan, keys, [])
        assert len(rows) == len(VALUES[type_])
        for row in rows:
            values = key_values(row)
            assert values is not None
            (parsed,) = parse_keys(connection, columns, [values])
            (again,) = fetch_rows(connection, plan, [parsed], [])
            assert again == row
            assert point_id(again) == point_id(row)


def test_a_composite_key_finds_its_row_again(database18: Database) -> None:
    database18.execute(
        "CREATE TABLE t (n int, b bytea, a text, k uuid, PRIMARY KEY (a, b, k));"
        r"INSERT INTO t VALUES (1, '\x00', 'x,[y', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11')"
    )
    with connect(source_settings(database18.url)) as connection:
        plan = raw_plan(find_table(connection, "t"))
        columns = [plan.columns[i] for i in plan.key]
        key = ("x,[y", r"\x00", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")
        (row,) = fetch_rows(connection, plan, parse_keys(connection, columns, [key]), [])
        assert compile_key_values(plan)(row) == key
