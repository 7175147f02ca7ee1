"""The demo's verdict: its own rules, and that no damage to a point escapes it."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from io import StringIO

import pytest
from rich.console import Console

from cdc_sync.demo.screen import Screen
from cdc_sync.demo.verdict import (
    SHOWN,
    ExpectedPoint,
    Verdict,
    compare,
    json_value,
    same_direction,
    same_json,
)
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.qdrant.sink import StoredPoint

PAYLOAD = {
    "id": 7,
    "name": "seven",
    "essential": True,
    "ratio": 4.06,
    "size": 1,
    "homepage": None,
    "tags": ["a", None, "b"],
    "relations": {"depends": [{"name": "x", "version": "1"}], "empty": {}},
}
VECTOR = [3.0, 0.0, 4.0]


def expected() -> dict[int, ExpectedPoint]:
    return {
        7: ExpectedPoint(json.loads(json.dumps(PAYLOAD)), list(VECTOR)),
        8: ExpectedPoint({"id": 8}, None),
    }


def stored() -> list[StoredPoint]:
    """The points of :func:`expected`, as Qdrant returns them: Cosine vectors have unit length."""
    return [
        StoredPoint(7, copy.deepcopy(dict(PAYLOAD)), {"embedding": [0.6, 0.0, 0.8]}),
        StoredPoint(8, {"id": 8}, {}),
    ]


async def pages(points: Sequence[StoredPoint]) -> AsyncIterator[list[StoredPoint]]:
    """The points in pages of one, after an empty page."""
    yield []
    for point in points:
        yield [point]


@pytest.mark.parametrize(
    ("value", "json_text"),
    [
        (None, "null"),
        (True, "true"),
        (2**63 - 1, "9223372036854775807"),
        (2**63, '"9223372036854775808"'),
        (-(2**63), "-9223372036854775808"),
        (Decimal("4.060"), "4.06"),
        (Decimal("4.000"), "4.0"),
        (Decimal("4"), "4"),
        (Decimal("9223372036854775808"), '"9223372036854775808"'),
        (Decimal("0.1234567890123456789"), '"0.1234567890123456789"'),
        (Decimal("NaN"), "null"),
        (datetime(2026, 1, 31, 10, 20, 30, tzinfo=UTC), '"2026-01-31T10:20:30Z"'),
        (datetime(2026, 1, 31, 10, 20, 30, 123, tzinfo=UTC), '"2026-01-31T10:20:30.000123Z"'),
        (
            datetime(2026, 1, 31, 1, 0, tzinfo=timezone(timedelta(hours=2))),
            '"2026-01-30T23:00:00Z"',
        ),
        (datetime(987, 1, 2, tzinfo=UTC), '"0987-01-02T00:00:00Z"'),
        (["a", None, ["b"]], '["a", null, ["b"]]'),
        ({"a": [1, 2**64, 1.5, None, {}]}, '{"a": [1, "18446744073709551616", 1.5, null, {}]}'),
    ],
)
def test_values_become_what_the_specification_says(value: object, json_text: str) -> None:
    assert json.dumps(json_value(value)) == json_text


def test_a_type_without_a_rule_is_an_error() -> None:
    with pytest.raises(TypeError, match="bytes"):
        json_value(b"x")


async def test_equal_points_are_equal() -> None:
    verdict = await compare(expected(), pages(stored()[::-1]))
    assert verdict == Verdict(rows=2, points=2, different=0, differences=())
    assert verdict.equal


def _lose_field(points: list[StoredPoint]) -> None:
    del points[0].payload["homepage"]


def _add_field(points: list[StoredPoint]) -> None:
    points[1].payload["more"] = None


def _integer_to_float(points: list[StoredPoint]) -> None:
    points[0].payload["size"] = 1.0


def _integer_to_boolean(points: list[StoredPoint]) -> None:
    points[0].payload["size"] = True


def _boolean_to_integer(points: list[StoredPoint]) -> None:
    points[0].payload["essential"] = 1


def _null_to_text(points: list[StoredPoint]) -> None:
    points[0].payload["homepage"] = ""


def _lose_null_element(points: list[StoredPoint]) -> None:
    points[0].payload["tags"] = ["a", "b"]


def _swap_elements(points: list[StoredPoint]) -> None:
    points[0].payload["tags"] = ["b", None, "a"]


def _change_deep(points: list[StoredPoint]) -> None:
    points[0].payload["relations"] = {"depends": [{"name": "x", "version": 1}], "empty": {}}


def _number_to_text(points: list[StoredPoint]) -> None:
    points[0].payload["ratio"] = "4.06"


def _turn_vector(points: list[StoredPoint]) -> None:
    points[0].vectors["embedding"] = [0.6, 0.0, 0.80001]


def _negate_vector(points: list[StoredPoint]) -> None:
    points[0].vectors["embedding"] = [-0.6, 0.0, -0.8]


def _shorten_vector(points: list[StoredPoint]) -> None:
    points[0].vectors["embedding"] = [0.6, 0.8]


def _vector_not_a_number(points: list[StoredPoint]) -> None:
    points[0].vectors["embedding"] = [float("nan"), 0.0, 0.8]


def _zero_vector(points: list[StoredPoint]) -> None:
    points[0].vectors["embedding"] = [0.0, 0.0, 0.0]


def _sparse_vector(points: list[StoredPoint]) -> None:
    points[0].vectors["embedding"] = SparseValue([0, 2], [0.6, 0.8])


def _nest_vector(points: list[StoredPoint]) -> None:
    points[0].vectors["embedding"] = [[0.6, 0.0, 0.8]]


def _lose_vector(points: list[StoredPoint]) -> None:
    points[0].vectors.clear()


def _add_vector(points: list[StoredPoint]) -> None:
    points[1].vectors["embedding"] = [1.0, 0.0, 0.0]


def _add_other_vector(points: list[StoredPoint]) -> None:
    points[0].vectors[""] = [0.6, 0.0, 0.8]


def _lose_point(points: list[StoredPoint]) -> None:
    del points[0]


def _add_point(points: list[StoredPoint]) -> None:
    points.append(StoredPoint(9, {"id": 9}))


def _twice(points: list[StoredPoint]) -> None:
    points.append(points[1])


def _other_id(points: list[StoredPoint]) -> None:
    points[1] = StoredPoint("7f3e9d52-3a41-5d0b-9a53-0c8f6a2f4b11", {"id": 8})


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("_") and
           callable(value) and getattr(value, "__module__", None) == __name__]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
async def test_every_damage_is_found(damage: Callable[[list[StoredPoint]], None]) -> None:
    points = stored()
    damage(points)
    verdict = await compare(expected(), pages(points))
    assert not verdict.equal
    assert verdict.different >= 1
    assert verdict.differences


async def test_an_empty_collection_is_not_equal() -> None:
    verdict = await compare(expected(), pages([]))
    assert not verdict.equal
    assert (verdict.rows, verdict.points, verdict.different) == (2, 0, 2)


async def test_only_the_first_differences_are_kept_but_all_are_counted() -> None:
    rows = {key: ExpectedPoint({"id": key}, None) for key in range(50)}
    points = [StoredPoint(key, {"id": -1, "more": 1}) for key in range(40)]
    verdict = await compare(rows, pages(points))
    assert (verdict.rows, verdict.points, verdict.different) == (50, 40, 50)
    assert len(verdict.differences) == SHOWN


def test_vectors_compare_by_direction() -> None:
    assert same_direction([1e-30, 2e-30], [1.0, 2.0])
    assert same_direction([0.0, 0.0], [0.0, 0.0])
    assert not same_direction([0.0, 0.0], [1.0, 0.0])
    assert not same_direction([1.0, 2.0], [2.0, 1.0])
    assert not same_direction([1.0], [1.0, 0.0])


def test_json_equality_is_strict() -> None:
    assert same_json({"a": [1, None, {"b": 1.5}]}, {"a": [1, None, {"b": 1.5}]})
    assert not same_json([1], [True])
    assert not same_json(0, False)
    assert not same_json({}, [])
    assert not same_json(None, {})


@pytest.mark.parametrize("equal", [True, False])
def test_the_screen_says_which_it_is(equal: bool) -> None:
    output = StringIO()
    lines = () if equal else ("point 7: name is '[bold]a' in Postgres and 'b' in Qdrant",)
    Screen(Console(file=output, width=110), live=False).verdict(Verdict(5, 5, len(lines), lines))
    text = output.getvalue()
    assert ("EQUAL" in text, "DIFFERENT" in text) == (equal, not equal)
    assert "5 rows, 5 points" in text
    assert all(line in text for line in lines)
