"""What a verification makes of two values or vectors that differ."""

from __future__ import annotations

import math
import random
from typing import Final, TypeAlias

import numpy as np
import pytest

from cdc_sync.mapping.plan import ColumnPlan, IdScheme, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.table import PgType
from cdc_sync.qdrant.sink import RetrievedPoint
from cdc_sync.rows import Row
from cdc_sync.verify.causes import is_mojibake, time_shift, value_cause
from cdc_sync.verify.comparing import Comparer, compare_payloads
from cdc_sync.verify.kinds import Deviation, Kind
from cdc_sync.verify.report import TableReport, upper_bound
from cdc_sync.verify.swaps import WrongVector, recognise_swaps

Json: TypeAlias = dict[str, object]
CASES: Final[dict[str, tuple[Json, Json, tuple[Kind, str, str | None] | None]]] = {
    "equal": ({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}, None),
    "missing": ({"a": 1}, {}, (Kind.FIELD_MISSING, "a", None)),
    "unexpected": ({}, {"a": 1}, (Kind.FIELD_UNEXPECTED, "a", None)),
    "null absent": ({"a": None}, {}, (Kind.NULL_ABSENT, "a", None)),
    "absent null": ({}, {"a": None}, (Kind.FIELD_UNEXPECTED, "a", "absent field turned null")),
    "null value": ({"a": None}, {"a": 0}, (Kind.VALUE, "a", None)),
    "float": ({"a": 1}, {"a": 1.0}, (Kind.FIELD_TYPE, "a", "integer was stored as a float")),
    "float off": ({"a": 2**60 + 1}, {"a": 2.0**60}, (Kind.FIELD_TYPE, "a", "value changed")),
    "integer": ({"a": 1.5}, {"a": 1}, (Kind.FIELD_TYPE, "a", "as an integer, cut off")),
    "bool text": ({"a": True}, {"a": "true"}, (Kind.FIELD_TYPE, "a", "a bool was stored as text")),
    "bool number": ({"a": True}, {"a": 1}, (Kind.FIELD_TYPE, "a", "bool was stored as a number")),
    "number text": ({"a": 5}, {"a": "5"}, (Kind.FIELD_TYPE, "a", "integer was stored as text")),
    "text number": ({"a": "5"}, {"a": 5}, (Kind.FIELD_TYPE, "a", "parsed as another type")),
    "json text": ({"a": {"b": 1}}, {"a": '{"b":1}'}, (Kind.FIELD_TYPE, "a", "stored as text")),
    "single": ({"a": [7, 8]}, {"a": 7}, (Kind.FIELD_TYPE, "a", "array was stored as a single")),
    "array": ({"a": 7}, {"a": [7]}, (Kind.FIELD_TYPE, "a", "single value was stored as an array")),
    "flat": ({"a": {"b": 1}}, {"a.b": 1}, (Kind.FIELD_TYPE, "a", "nested to flattened")),
    "flat, other sign": ({"a": {"b": 1}}, {"a_b": 1}, (Kind.FIELD_TYPE, "a", "flattened")),
    "nested": ({"a": {"b": {"c": 1}}}, {"a": {"b": {}}}, (Kind.FIELD_MISSING, "a.b.c", None)),
    "element": ({"a": [1, 2]}, {"a": [1, 2.0]}, (Kind.FIELD_TYPE, "a[]", "stored as a float")),
    "element value": ({"a": [1, 2]}, {"a": [1, 3]}, (Kind.VALUE, "a[]", None)),
    "order": ({"a": [1, 2]}, {"a": [2, 1]}, (Kind.VALUE, "a", "another order")),
    "shorter": ({"a": [1, 2]}, {"a": [1]}, (Kind.VALUE, "a", "truncated")),
    "large": ({"a": 2**53 + 1}, {"a": 2**53}, (Kind.VALUE, "a", "through a float")),
    "single precision": ({"a": 0.1}, {"a": float(np.float32(0.1))}, (Kind.VALUE, "a", "single")),
    "cut": ({"a": "abcdef"}, {"a": "abc"}, (Kind.VALUE, "a", "truncated text")),
    "cut, dots": ({"a": "abcdef"}, {"a": "abc..."}, (Kind.VALUE, "a", "truncated text")),
    "empty": ({"a": "abcdef"}, {"a": ""}, (Kind.VALUE, "a", "truncated text")),
    "longer": ({"a": "abc"}, {"a": "abcdef"}, (Kind.VALUE, "a", None)),
    "question marks": ({"a": "café"}, {"a": "caf?"}, (Kind.VALUE, "a", "outside of ASCII")),
    "replaced": ({"a": "café"}, {"a": "caf\ufffd"}, (Kind.VALUE, "a", "lost in decoding")),
    "case": ({"a": "Abc"}, {"a": "aBC"}, (Kind.VALUE, "a", "upper and lower case")),
    "spaces": ({"a": "a  b\n"}, {"a": "a b"}, (Kind.VALUE, "a", "white space")),
    "zone": (
        {"a": "2026-01-02T10:00:00Z"},
        {"a": "2026-01-02T08:00:00Z"},
        (Kind.VALUE, "a", "off by -02:00"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_payload_differences_are_named(case: str) -> None:
    wanted, stored, expected = CASES[case]
    found = list(compare_payloads(wanted, stored))
    if expected is None:
        assert not found
        return
    assert len(found) == 1, found
    kind, field, cause = expected
    assert (found[0].kind, found[0].field) == (kind, field)
    assert (found[0].cause is None) if cause is None else cause in (found[0].cause or "")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_mojibake_once_and_twice(encoding: str) -> None:
    wanted = "Grüße, Ñandú – “fin”"
    once = wanted.encode().decode(encoding, "replace")
    assert is_mojibake(wanted, once)
    assert is_mojibake(wanted, once.encode().decode(encoding, "replace"))
    assert not is_mojibake(wanted, wanted)
    assert not is_mojibake("plain", "plain")


@pytest.mark.parametrize(
    ("wanted", "stored", "shift"),
    [
        ("2026-03-01T00:30:00Z", "2026-02-28T23:30:00Z", "-01:00"),
        ("2026-03-01T00:30:00.25Z", "2026-03-01T06:15:00.25Z", "+05:45"),
        ("2026-03-01T00:30:00", "2026-03-01T10:30:00", "+10:00"),
        ("2026-03-01T00:30:00Z", "2026-03-01T02:30:00", "+02:00"),
        ("2026-03-01T00:30:00Z", "2026-03-01T00:30:00Z", None),
        ("2026-03-01T00:30:00Z", "2026-03-01T00:30:01Z", None),
        ("2026-03-01T00:30:00Z", "2026-03-08T00:30:00Z", None),
        ("2026-03-01", "2026-03-02", None),
        ("2026-99-01T00:30:00Z", "2026-03-01T00:30:00Z", None),
        ("no time", "2026-03-01T00:30:00Z", None),
    ],
)
def test_time_zones(wanted: str, stored: str, shift: str | None) -> None:
    assert time_shift(wanted, stored) == shift


def test_causes_say_nothing_of_values() -> None:
    secret = "the-secret-value-of-a-row"
    for stored in ("", "other", secret[:4], secret.upper(), secret + "!"):
        assert secret[:4] not in (value_cause(secret, stored) or "")
        for deviation in compare_payloads({"a": secret}, {"a": stored}):
            assert "secret" not in f"{deviation.text} {deviation.cause}"


# -- vectors

_SIZE = 6


def plan(metric: Metric) -> TablePlan:
    vector = VectorPlan("emb", VectorKind.DENSE, _SIZE, metric)
    int8 = PgType(20, "pg_catalog", "int8")
    type_ = PgType(99_999, "public", "vector", extension="vector", typmod=_SIZE)
    columns = (ColumnPlan("id", int8, "id"), ColumnPlan("emb", type_, vector=vector))
    return TablePlan(1, "public", "t", "t", columns, (0,), IdScheme.INTEGER)


def row(id_: int, vector: np.ndarray[tuple[int], np.dtype[np.float32]] | None) -> Row:
    head = len(vector).to_bytes(2, "big") + b"\0\0" if vector is not None else b""
    data = None if vector is None else head + vector.astype(">f4").tobytes()
    return [id_.to_bytes(8, "big"), data]


def random_vector(generator: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return generator.standard_normal(_SIZE).astype(np.float32)


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.EUCLID])
def test_vectors_that_differ(metric: Metric) -> None:
    comparer = Comparer(plan(metric))
    wanted = random_vector(np.random.default_rng(1))
    unit = (wanted / np.linalg.norm(wanted.astype(np.float64))).astype(np.float32)
    right = unit if metric is Metric.COSINE else wanted

    def deviations(**vectors: np.ndarray[tuple[int], np.dtype[np.float32]]) -> list[Deviation]:
        point = RetrievedPoint(1, {"id": 1}, dict(vectors))
        found = comparer.details(row(1, wanted), point).deviations
        assert comparer.equal(row(1, wanted), point) == (not found)
        assert comparer.equal_all([row(1, wanted)], [point]) == [not found]
        return found

    assert deviations(emb=right) == []
    shifted = right.copy()
    shifted[2] += 1e-3
    (found,) = deviations(emb=shifted)
    assert found.kind is Kind.VECTOR
    assert "0.001" in found.text
    (found,) = deviations(emb=-right)
    assert found.cause == "stored with the opposite sign"
    (found,) = deviations(emb=np.zeros(_SIZE, np.float32))
    assert found.cause == "stored is the zero vector"
    (found,) = deviations()
    assert found.kind is Kind.VECTOR_MISSING
    if metric is Metric.EUCLID:
        (found,) = deviations(emb=unit)
        assert found.cause == "stored is the normalised vector"
    point = RetrievedPoint(1, {"id": 1}, {"emb": right})
    (found,) = comparer.details(row(1, None), point).deviations
    assert found.kind is Kind.VECTOR_UNEXPECTED


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.DOT])
def test_many_rows_are_compared_as_each_is(metric: Metric) -> None:
    generator = np.random.default_rng(2)
    comparer = Comparer(plan(metric))
    rows, points = [], []
    for number in range(200):
        wanted = random_vector(generator) * np.float32(generator.choice([1.0, 1e-6, 1e6]))
        length = float(np.linalg.norm(wanted.astype(np.float64)))
        cosine = metric is Metric.COSINE and length**2 > 1.2e-7
        stored = (wanted / length).astype(np.float32) if cosine else wanted.copy()
        if number % 3 == 1:
            stored[number % _SIZE] *= np.float32(1 + generator.choice([1e-5, 1e-3, 1.0]))
        payload: dict[str, object] = {"id": number if number % 7 else float(number)}
        rows.append(row(number, wanted if number % 11 else None))
        points.append(RetrievedPoint(number, payload, {"emb": stored}))
    each = [comparer.equal(one, point) for one, point in zip(rows, points, strict=True)]
    assert comparer.equal_all(rows, points) == each
    assert 0 < sum(each) < len(each)
    # Also in portions, some of which can be compared together and some not.
    portions = [rows[i : i + 3] for i in range(0, 198, 3)]
    together = [
        same
        for i, portion in enumerate(portions)
        for same in comparer.equal_all(portion, points[3 * i : 3 * i + 3])
    ]
    assert together == each[:198]


def test_swapped_and_rotated_vectors() -> None:
    generator = np.random.default_rng(3)
    vectors = [random_vector(generator) for _ in range(40)]
    stored = list(vectors)
    stored[3], stored[9] = stored[9], stored[3]
    stored[10], stored[11], stored[12] = stored[11], stored[12], stored[10]
    stored[20] = random_vector(generator)
    wrong = [
        WrongVector(i, None, Deviation(Kind.VECTOR, "emb", "far"), vectors[i], stored[i])
        for i in range(40)
        if stored[i] is not vectors[i]
    ]
    random.Random(4).shuffle(wrong)
    judged = recognise_swaps(Comparer(plan(Metric.EUCLID)), wrong)
    by_id = {one.id: deviation for one, deviation in zip(wrong, judged, strict=True)}
    assert by_id[3] == Deviation(Kind.VECTORS_SWAPPED, "emb", "with point 9")
    assert by_id[9] == Deviation(Kind.VECTORS_SWAPPED, "emb", "with point 3")
    assert by_id[10].text == "it is the vector of point 11"
    assert by_id[12].text == "it is the vector of point 10"
    assert by_id[20] == Deviation(Kind.VECTOR, "emb", "far")


# -- the report


def test_confidence_of_a_sample() -> None:
    assert upper_bound(0, 1000, 0.95) == pytest.approx(3 / 1000, rel=0.01)
    assert upper_bound(0, 1, 0.95) == pytest.approx(0.95)
    assert upper_bound(5, 100, 0.95) == pytest.approx(0.1023, abs=1e-3)
    assert upper_bound(7, 7, 0.95) == 1.0
    # What is found in so many samples of the bound's part: rarely so few.
    generator = random.Random(5)
    bound = upper_bound(2, 50, 0.95)
    rare = sum(sum(generator.random() < bound for _ in range(50)) <= 2 for _ in range(4000))
    assert 0.03 < rare / 4000 < 0.07


def test_all_differences_count_and_few_are_kept() -> None:
    report = TableReport("t", "t", 3)
    for number in range(10):
        report.add(Deviation(Kind.MISSING), number)
    report.add(Deviation(Kind.MISSING), count=5, example=False)
    (finding,) = report.findings.values()
    assert finding.count == 15
    assert [example.id for example in finding.examples] == [0, 1, 2]
    assert not report.equal
    assert math.isclose(upper_bound(1, 1, 0.5), 1.0)
