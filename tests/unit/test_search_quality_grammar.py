"""Filters that are refused, and why: what is accepted must mean the same to both sides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.errors import ConfigError
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.verify.filters import translate_filter
from cdc_sync.verify.filters_grammar import parse_filter
from cdc_sync.verify.filters_sql import as_sql


def column(name: str, type_: str, **more: object) -> ColumnPlan:
    plan: dict[str, object] = {"field": name, **more}
    return ColumnPlan(name, PgType(1, "pg_catalog", type_), **plan)  # type: ignore[arg-type]


TEXT = PgType(25, "pg_catalog", "text")
PLAN = TablePlan(
    oid=1,
    schema="public",
    table="docs",
    collection="docs",
    columns=(
        column("id", "int8"),
        column("t", "text"),
        column("n", "int4"),
        column("f", "float8"),
        column("d", "numeric"),
        column("at", "timestamptz"),
        column("naive", "timestamp"),
        column("day", "date"),
        column("b", "bool"),
        column("j", "jsonb"),
        column("js", "json"),
        column("u", "uuid"),
        column("bin", "bytea"),
        column("ip", "inet"),
        column("c", "bpchar"),
        column("hidden", "text", field=None),
        column('q"', "text"),
        ColumnPlan("ci", PgType(9, "public", "citext", extension="citext"), field="ci"),
        ColumnPlan("tags", PgType(8, "pg_catalog", "_text", TypeKind.ARRAY, TEXT), field="tags"),
        ColumnPlan(
            "v",
            PgType(7, "public", "vector", extension="vector"),
            vector=VectorPlan("v", VectorKind.DENSE, 2, Metric.COSINE),
        ),
    ),
    key=(0,),
    id_scheme=IdScheme.INTEGER,
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("   ", "it is empty"),
        ("t = 'a' AND", "a literal|its end"),
        ("t = ", "a literal is expected"),
        ("(t = 'a'", "its end is not understood"),
        ("t = 'a')", "is not understood"),
        ("t = 'a'; SELECT 1", "is not understood"),
        ("t = 'a' -- more", "is not understood"),
        ("t = 'a' /* more */", "is not understood"),
        ("t = 'open", "is not understood"),
        ("t = E'a'", "string of this form"),
        ("t = $$a$$", "is not understood"),
        ("t = $1", "is not understood"),
        ("t = t", "a literal is expected"),
        ("t = lower('A')", "a literal is expected"),
        ("lower(t) = 'a'", "columns stand by themselves"),
        ("docs.t = 'a'", "columns stand by themselves"),
        ("t::int = 5", "columns stand by themselves"),
        ("n + 1 = 5", "columns stand by themselves"),
        ("tags[1] = 'a'", "columns stand by themselves"),
        ("n = (SELECT 1)", "a literal is expected"),
        ("n IN (SELECT 1)", "a literal is expected"),
        ("n IN ()", "a literal is expected"),
        ("n = ANY (ARRAY[])", "an empty array"),
        ("n = ANY ('5')", "array is expected in braces"),
        ("n = ANY ('{{1},{2}}')", "not a one-dimensional"),
        ("n < ANY (ARRAY[1])", "ANY is understood after = only"),
        ("n = ALL (ARRAY[1])", "a literal is expected"),
        ("n BETWEEN SYMMETRIC 5 AND 1", "is not understood"),
        ("t ILIKE 'a'", "is not understood"),
        ("t SIMILAR TO 'a'", "is not understood"),
        ("t ~ 'a'", "is not understood"),
        ("t LIKE 'a%'", "has wildcards"),
        ("t LIKE '_'", "has wildcards"),
        ("t LIKE 'a\\'", "ends with a backslash"),
        ("c LIKE 'a'", "LIKE is for text"),
        ("n LIKE '1'", "LIKE is for text"),
        ("t COLLATE \"C\" = 'a'", "is not understood"),
        ("1 = 1", "is not understood"),
        ("true", "is not understood"),
        ("NOT", "is not understood"),
        ("unknown_column = 1", "no column unknown_column"),
        ("T2 = 1", "no column t2"),
        ("hidden = 'a'", "no field of the payload"),
        ("v = '[1,2]'", "no field of the payload"),
        ("v IS NULL", "no field of the payload"),
        ('"q""" = \'a\'', "a quote or a backslash"),
        ("t > 'a'", "a collation"),
        ("t BETWEEN 'a' AND 'b'", "a collation"),
        ("t = 5", "literal is no string"),
        ("ci = 'a'", "cannot compare"),
        ("ip = '10.0.0.1'", "cannot compare"),
        ("bin = '\\x00'", "cannot compare"),
        ("js ->> 'k' = 'a'", "of jsonb only"),
        ("t ->> 'k' = 'a'", "of jsonb only"),
        ("j = '{}'", "cannot compare"),
        ("j IS NULL", "cannot be told"),
        ("tags IS NULL", "cannot be told"),
        ("tags = '{a}'", "cannot compare"),
        ("'a' = ANY (t)", "ANY wants an array"),
        ("NULL = ANY (tags)", "NULL is looked for"),
        ("j -> 'k' = 'a'", "ends with ->>"),
        ("j -> 0 ->> 'k' = 'a'", "keys of JSON objects are strings"),
        ("j ->> 'k' > 'a'", "has no order"),
        ("j ->> 'k' = 5", "literal is no string"),
        ("j ->> 'k' = '1.5'", "looks like a number"),
        ("j ->> 'k' = '{\"a\": 1}'", "looks like a number, object or list"),
        ("j ->> 'k\"' = 'a'", "a quote or a backslash"),
        ("n = 'five'", "literal is no finite number"),
        ("n = '5.0'", "literal is no integer"),
        ("n = true", "literal is no finite number"),
        ("n < 9007199254740992", "beyond 2\\^53"),
        ("f < 1e400", "too large for a double"),
        ("f = 'NaN'", "literal is no finite number"),
        ("d = 0.12345678901234567890", "not exact as a double"),
        ("b > false", "by = with true or false"),
        ("b = 1", "by = with true or false"),
        ("b = 'maybe'", "by = with true or false"),
        ("u = 'zzz'", "not a hyphenated UUID"),
        ("at > '2024-13-01'", "no date"),
        ("at > 'now'", "not written as"),
        ("at > 'infinity'", "not written as"),
        ("at > '31.01.2024'", "not written as"),
        ("naive > '2024-01-01 10:00+02'", "has a zone"),
        ("day = '2024-01-01 10:00'", "time of day"),
        ("day = 5", "literal is no string"),
        ("t = 'a'::int", "literal of type int4"),
        ("n = 5::text", "literal of type text"),
        ("t = 'a'::public.mood", "the type of a literal"),
        ("c = 'a'", "trailing blanks"),
        ("(" * 60 + "n = 1" + ")" * 60, "nested more than"),
        ("NOT " * 60 + "n = 1", "nested more than"),
        ("n IN (" + "1," * 11_000 + "1)", "more than 20000 characters"),
        ("t = 'a\0b'", "is not understood"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        translate_filter(text, PLAN)
    assert raised.value.remedy
    assert "five" not in raised.value.message


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("T = 'it''s'", "(\"t\" = 'it''s')"),
        ('"Odd ""x" <> 5', '("Odd ""x" <> 5)'),
        ("-5 < n", '("n" > -5)'),
        ("n != +5", '("n" <> 5)'),
        ("day >= DATE '2024-01-01'", "(\"day\" >= '2024-01-01'::pg_catalog.date)"),
        (
            "at < timestamp with time zone '2024-01-01'",
            "(\"at\" < '2024-01-01'::pg_catalog.timestamptz)",
        ),
        ("j->'a'->>'b' = 'c'", "(\"j\" -> 'a' ->> 'b' = 'c')"),
        ("n = ANY('{1, \"2\",NULL}')", "(\"n\" IN ('1', '2', NULL))"),
        ("a OR b AND NOT c", '("a" OR ("b" AND (NOT "c")))'),
        ("NOT n IS NULL", '(NOT ("n" IS NULL))'),
        ("n = 1 IS NOT TRUE", '(NOT (("n" = 1) IS TRUE))'),
        ("date = 'x'", "(\"date\" = 'x')"),
        ("user = 'x'", "(\"user\" = 'x')"),
        ("n NOT BETWEEN 1 AND 2 AND b", '((NOT (("n" >= 1) AND ("n" <= 2))) AND "b")'),
    ],
)
def test_what_is_understood(text: str, sql: str) -> None:
    assert as_sql(parse_filter(text)) == sql
    # The SQL is of the same grammar, and means the same again.
    assert as_sql(parse_filter(sql.replace("::pg_catalog.", "::"))) == sql


@given(st.text(alphabet=st.sampled_from("tnb =<>()'\"-ANDORTISUL,[]{}:.\\0159 "), max_size=40))
def test_nothing_breaks_the_parser(text: str) -> None:
    try:
        translated = translate_filter(text, PLAN)
    except ConfigError:
        return
    assert translated.sql


def test_rows_that_both_sides_may_see_differently_are_told() -> None:
    assert translate_filter("d > 5", PLAN).notes
    assert translate_filter("j ->> 'k' = 'a'", PLAN).notes
    assert not translate_filter("n > 5 AND t = 'a'", PLAN).notes
    assert translate_filter("n = 1 OR n IS NOT DISTINCT FROM NULL OR n <> 1", PLAN).condition
    assert translate_filter("n = NULL", PLAN).nothing
