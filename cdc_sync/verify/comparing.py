"""What exactly is wrong with a point: the details, once :class:`PointComparison` has found it not
to be what its row maps to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cdc_sync.errors import MappingError
from cdc_sync.mapping.comparison import (
    ComparedVector,
    PointComparison,
    StoredArray,
    same_json,
)
from cdc_sync.mapping.plan import Datatype, Metric, TablePlan, VectorPlan
from cdc_sync.mapping.vectors import Floats, SparseArrays, SparseValue, VectorData
from cdc_sync.qdrant.sink import RetrievedPoint
from cdc_sync.rows import Row
from cdc_sync.verify.causes import flattened, type_cause, type_name, value_cause
from cdc_sync.verify.kinds import Deviation, Kind

#: Datatypes whose stored components say what was put in.
_COMPARABLE = (Datatype.FLOAT32, Datatype.FLOAT16, Datatype.UINT8)


@dataclass(slots=True)
class Details:
    """What is wrong with a point, and its vectors that differ: as wanted and as stored."""

    deviations: list[Deviation] = field(default_factory=list)
    vectors: dict[str, tuple[VectorData, StoredArray]] = field(default_factory=dict)


class Comparer:
    """Compares rows of one plan with points of a collection whose vectors may be other than
    planned.

    ``found`` are the collection's vectors by name, where they differ from the plan's: with what
    metric and datatype to read them (None: they cannot be compared).
    """

    def __init__(self, plan: TablePlan, found: Mapping[str, VectorPlan | None] | None = None):
        self.plan = plan
        changed = dict(found or {})
        #: Names of vectors whose components are not compared, since they tell nothing.
        self.opaque = frozenset(
            [name for name, vector in changed.items() if vector is None]
            + [
                vector.name
                for vector in plan.vectors
                if (changed.get(vector.name) or vector).datatype not in _COMPARABLE
            ]
        )
        readable = {name: one for name, one in changed.items() if one is not None}
        self._wanted = PointComparison(plan)
        self._as_found = PointComparison(_with_vectors(plan, readable)) if readable else None
        self._plain = not changed and not self.opaque

    def equal(self, row: Row, point: RetrievedPoint) -> bool:
        """Whether the point is the row's. False for a row of which no point can be made."""
        if self._plain:
            try:
                return self._wanted.equal(row, point.payload, point.vectors)
            except MappingError:
                return False
        return not self.details(row, point).deviations

    def equal_all(self, rows: Sequence[Row], points: Sequence[RetrievedPoint]) -> list[bool]:
        """As :meth:`equal` for many rows, each with its point."""
        if self._plain:
            return self._wanted.equal_all(rows, [(p.payload, p.vectors) for p in points])
        return [self.equal(row, point) for row, point in zip(rows, points, strict=True)]

    def details(self, row: Row, point: RetrievedPoint) -> Details:
        """What is wrong with the point; nothing, if it is the row's."""
        details = Details()
        try:
            wanted: Mapping[str, object] = self._wanted.payload(row)
            vectors = list(self._vectors(row, point))
        except MappingError as error:
            details.deviations.append(Deviation(Kind.UNMAPPABLE, text=error.message))
            return details
        details.deviations += compare_payloads(wanted, point.payload)
        for vector in vectors:
            deviation = self._vector_deviation(vector)
            if deviation is None:
                continue
            details.deviations.append(deviation)
            if vector.wanted is not None and vector.stored is not None:
                details.vectors[vector.plan.name] = (vector.wanted, vector.stored)
        return details

    def check(self, row: Row) -> None:
        """Raise :class:`MappingError` for a row of which no point can be made."""
        self._wanted.payload(row)
        self._wanted.vectors(row, {})

    def matches(self, name: str, wanted: VectorData, stored: StoredArray) -> bool:
        """Whether a vector is stored as that where it is wanted as this."""
        plan = next(vector for vector in self.plan.vectors if vector.name == name)
        return self._wanted.matches(plan, wanted, stored)

    def _vectors(self, row: Row, point: RetrievedPoint) -> Iterator[ComparedVector]:
        wanted = self._wanted.vectors(row, point.vectors)
        as_found = self._as_found.vectors(row, point.vectors) if self._as_found else wanted
        for one, other in zip(wanted, as_found, strict=True):
            # A collection of another metric may have been filled from one of the right metric.
            yield one if one.equal else other

    def _vector_deviation(self, vector: ComparedVector) -> Deviation | None:
        name = vector.plan.name
        if vector.equal:
            return None
        if vector.stored is None:
            # A collection that lacks the vector has said so already.
            return None if name in self.opaque else Deviation(Kind.VECTOR_MISSING, name)
        if vector.wanted is None:
            return Deviation(Kind.VECTOR_UNEXPECTED, name)
        if name in self.opaque:
            return None
        return Deviation(Kind.VECTOR, name, *describe_vector(vector))


def _with_vectors(plan: TablePlan, found: Mapping[str, VectorPlan]) -> TablePlan:
    columns = tuple(
        column
        if column.vector is None
        else dataclasses.replace(column, vector=found.get(column.vector.name, column.vector))
        for column in plan.columns
    )
    return dataclasses.replace(plan, columns=columns)


# -- payloads


def compare_payloads(
    wanted: Mapping[str, object], stored: Mapping[str, object], below: str = ""
) -> Iterator[Deviation]:
    """Yield what differs between two JSON objects, by path from ``below``."""
    explained: set[str] = set()
    for name, value in wanted.items():
        path = f"{below}.{name}" if below else name
        if name in stored:
            yield from _compare_values(value, stored[name], path)
            continue
        flat = flattened(wanted, stored, name)
        if flat:
            explained.update(flat)
            yield Deviation(
                Kind.FIELD_TYPE, path, "object, its members stored beside it", "nested to flattened"
            )
        elif value is None:
            yield Deviation(Kind.NULL_ABSENT, path)
        else:
            yield Deviation(Kind.FIELD_MISSING, path)
    for name in stored:
        if name not in wanted and name not in explained:
            path = f"{below}.{name}" if below else name
            cause = "an absent field turned null" if stored[name] is None else None
            yield Deviation(Kind.FIELD_UNEXPECTED, path, cause=cause)


def _compare_values(wanted: object, stored: object, path: str) -> Iterator[Deviation]:
    if same_json(wanted, stored):
        return
    if isinstance(wanted, dict) and isinstance(stored, dict):
        yield from compare_payloads(wanted, stored, path)
        return
    kinds = type_name(wanted), type_name(stored)
    if kinds[0] != kinds[1]:
        text = f"{kinds[0]}, stored as {kinds[1]}"
        if "null" in kinds:
            yield Deviation(Kind.VALUE, path, text)
        else:
            yield Deviation(Kind.FIELD_TYPE, path, text, type_cause(wanted, stored))
        return
    if isinstance(wanted, list) and isinstance(stored, list) and len(wanted) == len(stored):
        deviations = [
            deviation
            for one, other in zip(wanted, stored, strict=True)
            for deviation in _compare_values(one, other, f"{path}[]")
        ]
        if value_cause(wanted, stored) is None and deviations:
            yield deviations[0]
            return
    yield Deviation(Kind.VALUE, path, _extent(wanted, stored), value_cause(wanted, stored))


def _extent(wanted: object, stored: object) -> str:
    """How large the values are, where that says something."""
    if isinstance(wanted, str) and isinstance(stored, str):
        return f"text of {len(wanted)} characters, stored are {len(stored)}"
    if isinstance(wanted, list) and isinstance(stored, list):
        return f"array of {len(wanted)} elements, stored are {len(stored)}"
    return type_name(wanted)


# -- vectors


def describe_vector(vector: ComparedVector) -> tuple[str, str | None]:
    """In which way a vector differs, and what that looks like."""
    wanted, stored = vector.wanted, vector.stored
    if isinstance(wanted, SparseArrays) or isinstance(stored, SparseValue):
        return _describe_sparse(wanted, stored)
    assert isinstance(wanted, np.ndarray)
    assert isinstance(stored, np.ndarray)
    if wanted.shape != stored.shape:
        return f"shape {_shape(wanted)}, stored is {_shape(stored)}", None
    distance = component_distance(vector.plan, wanted, stored)
    size = f"largest difference of a component {distance:.3g}"
    return size, _vector_cause(wanted, stored)


def component_distance(plan: VectorPlan, wanted: Floats, stored: Floats) -> float:
    """The largest difference of a component between two vectors of the same shape, normalised
    where Qdrant normalises; infinite if one of them is not finite."""
    first, second = wanted.astype(np.float64), stored.astype(np.float64)
    if plan.metric is Metric.COSINE and plan.datatype is not Datatype.UINT8:
        first = normalised(first)
    with np.errstate(invalid="ignore"):
        distance = float(np.abs(first - second).max(initial=0.0))
    return math.inf if math.isnan(distance) else distance


def normalised(
    vectors: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Vectors along the last axis in unit length; those of length zero as they are."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths == 0.0, 1.0, lengths)


def _vector_cause(wanted: Floats, stored: Floats) -> str | None:
    if not stored.any() and wanted.any():
        return "stored is the zero vector"
    if not np.isfinite(stored).all():
        return "stored are components that are not finite"
    unit = normalised(wanted.astype(np.float64))
    if np.allclose(unit, stored, rtol=1e-5, atol=1e-6):
        return "stored is the normalised vector"
    if np.array_equal(wanted.astype(np.float16).astype(np.float32), stored):
        return "rounded to half precision"
    if np.allclose(-unit, stored, rtol=1e-5, atol=1e-6) or np.array_equal(-wanted, stored):
        return "stored with the opposite sign"
    return None


def _describe_sparse(
    wanted: VectorData | None, stored: StoredArray | None
) -> tuple[str, str | None]:
    if not isinstance(wanted, SparseArrays) or not isinstance(stored, SparseValue):
        return "sparse on one side only", None
    indices = wanted.indices.tolist()
    if sorted(indices) == sorted(stored.indices):
        return "other values at the same indices", None
    if sorted(index + 1 for index in indices) == sorted(stored.indices):
        return "other indices", "indices counted from 1"
    return f"{len(indices)} indices, stored are {len(stored.indices)}, or others", None


def _shape(vector: Floats) -> str:
    return " x ".join(map(str, vector.shape))
