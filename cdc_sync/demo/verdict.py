"""The demo's verdict: compares every row with its point, without any code of the pipeline.

What a point must hold is worked out here a second time, from the values that psycopg gives and the
rules of ``docs/mapping.md`` for the types of the demo's table. Were it taken from the pipeline's
own encoders, a mistake in them would compare equal to itself.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

from psycopg import Connection, sql

from cdc_sync.demo.dataset import VALUE_COLUMNS, Json
from cdc_sync.demo.table import TABLE, VECTOR
from cdc_sync.qdrant.sink import StoredPoint, StoredVector
from cdc_sync.rows import PointId

#: How far a component of two unit vectors may differ: float32 rounding on either side.
TOLERANCE: Final = 1e-6
#: How many differences are kept for printing.
SHOWN: Final = 10

_INT64: Final = range(-(2**63), 2**63)
_VALUE_LENGTH: Final = 60


@dataclass(frozen=True, slots=True)
class ExpectedPoint:
    """What the point of a row must be; ``vector`` is None where it must have none."""

    payload: Mapping[str, Json]
    vector: Sequence[float] | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome.

    ``different`` counts the points that differ, are missing, or should not be there;
    ``differences`` says what is wrong with the first few.
    """

    rows: int
    points: int
    different: int
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether rows and points pair up and each pair agrees in everything."""
        return self.different == 0 and self.rows == self.points


def read_rows(connection: Connection) -> dict[int, ExpectedPoint]:
    """Read the whole table in one statement and work out the point of each row, by id."""
    names = sql.SQL(", ").join(map(sql.Identifier, ("id", *VALUE_COLUMNS)))
    statement = sql.SQL("SELECT {}, {}::real[] FROM {}").format(
        names, sql.Identifier(VECTOR), sql.Identifier(TABLE)
    )
    expected: dict[int, ExpectedPoint] = {}
    with connection.cursor() as cursor:
        cursor.execute(statement)
        for *values, vector in cursor:
            payload = {
                name: json_value(value)
                for name, value in zip(("id", *VALUE_COLUMNS), values, strict=True)
            }
            expected[int(values[0])] = ExpectedPoint(payload, vector)
    return expected


def json_value(value: object) -> Json:
    """What a value of psycopg becomes in a payload.

    Raises TypeError for a type that the demo's table does not have.
    """
    match value:
        case None | bool() | float() | str():
            return value
        case int():
            return value if value in _INT64 else str(value)
        case Decimal():
            return _number(value)
        case datetime():
            return value.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
        case list():
            return [json_value(each) for each in value]
        case dict():
            return {str(key): json_value(each) for key, each in value.items()}
    raise TypeError(f"no rule for a value of type {type(value).__name__}")


def _number(value: Decimal) -> Json:
    """A numeric: integer at scale 0, else a double that reads back equal, else its text."""
    if not value.is_finite():
        return None
    if value.as_tuple().exponent == 0:
        return int(value) if int(value) in _INT64 else str(value)
    double = float(value)
    return double if Decimal(repr(double)) == value else str(value)


async def compare(
    expected: Mapping[int, ExpectedPoint], pages: AsyncIterator[Sequence[StoredPoint]]
) -> Verdict:
    """Compare rows with points, whatever order the points come in."""
    seen: set[PointId] = set()
    different = 0
    lines: list[str] = []
    count = 0
    async for page in pages:
        for point in page:
            count += 1
            wanted = expected.get(point.id) if isinstance(point.id, int) else None
            if point.id in seen:
                found = ["came twice"]
            elif wanted is None:
                found = ["has no row"]
            else:
                found = differences(wanted, point)
            seen.add(point.id)
            different += bool(found)
            lines.extend(f"point {point.id}: {each}" for each in found[: SHOWN - len(lines)])
    lacking = sorted(key for key in expected if key not in seen)
    lines.extend(f"row {key}: has no point" for key in lacking[: max(0, SHOWN - len(lines))])
    return Verdict(len(expected), count, different + len(lacking), tuple(lines))


def differences(expected: ExpectedPoint, point: StoredPoint) -> list[str]:
    """Say in what a point differs from its row; empty when in nothing."""
    found = []
    for name in sorted(expected.payload.keys() | point.payload.keys()):
        if name not in point.payload:
            found.append(f"payload lacks {name}")
        elif name not in expected.payload:
            found.append(f"payload has {name}, which is no column")
        elif not same_json(expected.payload[name], point.payload[name]):
            row, stored = _short(expected.payload[name]), _short(point.payload[name])
            found.append(f"{name} is {row} in Postgres and {stored} in Qdrant")
    found.extend(
        f"has a vector {name!r}, which is no column"
        for name in sorted(point.vectors)
        if name != VECTOR
    )
    stored_vector = point.vectors.get(VECTOR)
    if expected.vector is None or stored_vector is None:
        if expected.vector is not stored_vector:
            side = (
                "no vector in Postgres, one"
                if expected.vector is None
                else "a vector in Postgres, none"
            )
            found.append(f"{VECTOR} is {side} in Qdrant")
    elif not same_direction(expected.vector, _components(stored_vector)):
        found.append(f"{VECTOR} differs")
    return found


def same_json(one: object, other: object) -> bool:
    """Whether two JSON values are equal in type and value: 1, 1.0 and true are three values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    return one == other


def same_direction(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two vectors point the same way: Qdrant stores Cosine vectors at unit length."""
    lengths = math.sqrt(sum(x * x for x in one)), math.sqrt(sum(x * x for x in other))
    if len(one) != len(other) or not all(math.isfinite(length) for length in lengths):
        return False
    if 0.0 in lengths:
        return lengths[0] == lengths[1]
    return all(
        abs(x / lengths[0] - y / lengths[1]) <= TOLERANCE for x, y in zip(one, other, strict=True)
    )


def _components(vector: StoredVector) -> list[float]:
    """The components of a dense vector; none for one of another shape, which therefore differs."""
    return [each for each in vector if isinstance(each, float)] if isinstance(vector, list) else []


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 3] + "..."
