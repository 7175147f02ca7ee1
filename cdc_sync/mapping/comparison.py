"""Compares rows with stored points: is a point already what its row maps to?

What counts as equal is what Qdrant makes of equal input, no more:

- Payloads are JSON values. Numbers keep their kind, so ``1`` and ``1.0`` differ; the order of keys
  does not matter; a field that is null differs from one that is absent. Qdrant keeps payloads as
  JSON text and reads doubles back without exact rounding, so they may be a few units in the last
  place off, and some of them further with each time that it writes them again.
- Vectors are stored exactly, rounded to their datatype. Under Cosine they are normalised before, in
  float32, with other rounding than here, unless they are very short or of unit length already.

Sources: Qdrant, ``lib/segment/src/spaces/tools.rs`` (``is_length_zero_or_normalized``) and
``lib/segment/src/spaces/metric_uint/``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from cdc_sync.errors import MappingError
from cdc_sync.mapping.decoding import JsonValue
from cdc_sync.mapping.plan import ColumnPlan, Datatype, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.stored_doubles import read_back
from cdc_sync.mapping.vectors import (
    Floats,
    SparseArrays,
    SparseValue,
    VectorData,
    VectorReader,
    compile_vector,
)
from cdc_sync.rows import UNCHANGED, RawValue, Row, TextValue

#: A vector as Qdrant returns it: float32 components of shape (n,) for dense ones, (rows, n) for
#: multivectors; or a sparse vector, its indices in any order.
StoredArray: TypeAlias = Floats | SparseValue

#: How far a component of a normalised vector may be off: a part of its value, and at least this
#: much. Qdrant's sum of squares is off by up to 2e-6 at 16,000 dimensions, 4e-7 at 4,096.
_COSINE_PART: Final = 4e-6
_COSINE_LEAST: Final = 1e-9
#: How many units in the last place a double of a payload may be off. Measured: 0 to 2.
_DOUBLE_STEPS: Final = 4
#: How often Qdrant may have written a payload anew, as it does when it moves points between its
#: segments; a few doubles go a step further each time.
_REWRITES: Final = 256
#: Vectors whose squared length is below float32's epsilon are stored as they are under Cosine.
_SHORT: Final = float(np.finfo(np.float32).eps)
#: Rounding of the squared length itself, relative: on which side of the bound it is, is open then.
_LENGTH_ROUNDING: Final = 1e-4

_Match: TypeAlias = Callable[[VectorData, StoredArray], bool]
_DenseMatch: TypeAlias = Callable[[Floats, Floats], bool]
#: Many raw values beside as many stored vectors: where it is certain that they are the same.
_Together: TypeAlias = Callable[
    [Sequence[RawValue], Sequence[StoredArray | None]], npt.NDArray[np.bool_]
]


class ComparedVector(NamedTuple):
    """A vector of a row (None: the row has none) beside the stored one (None: the point has
    none)."""

    plan: VectorPlan
    wanted: VectorData | None
    stored: StoredArray | None
    equal: bool


class _Vector(NamedTuple):
    position: int
    plan: VectorPlan
    name: str
    binary: VectorReader
    text: VectorReader
    match: _Match
    together: _Together | None


class PointComparison:
    """Compares rows of one plan with stored points. Compiled once a plan."""

    def __init__(self, plan: TablePlan) -> None:
        self._codec = PythonCodec(plan)
        self._vectors = [
            _Vector(
                position,
                column.vector,
                column.vector.name,
                *compile_vector(plan.qualified_name, column),
                _matcher(column.vector),
                _together(column),
            )
            for position, column in enumerate(plan.columns)
            if column.vector is not None
        ]

    def equal(
        self, row: Row, payload: Mapping[str, object], vectors: Mapping[str, StoredArray]
    ) -> bool:
        """Whether the stored payload and vectors (all the point has, by name) are the row's.

        The row must be known in full. Raises :class:`MappingError` for a row that has no point.
        """
        # The codec first: a row that cannot be mapped is an error, whatever is stored.
        wanted = self._codec.payload(row)
        return self._same_vectors(row, vectors) and same_json(wanted, payload)

    def equal_all(
        self,
        rows: Sequence[Row],
        points: Sequence[tuple[Mapping[str, object], Mapping[str, StoredArray]]],
    ) -> list[bool]:
        """As :meth:`equal` for many rows with their points' payload and vectors, which is faster;
        but False for a row that has no point."""
        close = self._close(rows, [vectors for _, vectors in points])
        equal = []
        for row, (payload, vectors), is_close in zip(rows, points, close, strict=True):
            try:
                if is_close:
                    equal.append(same_json(self._codec.payload(row), payload))
                else:
                    equal.append(self.equal(row, payload, vectors))
            except MappingError:
                equal.append(False)
        return equal

    def _close(
        self, rows: Sequence[Row], stored: Sequence[Mapping[str, StoredArray]]
    ) -> npt.NDArray[np.bool_]:
        """For which rows it is certain at a glance that all vectors are as stored."""
        close = np.array([len(vectors) == len(self._vectors) for vectors in stored], dtype=np.bool_)
        for vector in self._vectors:
            if vector.together is None or not close.any():
                return np.zeros(len(rows), dtype=np.bool_)
            places = np.flatnonzero(close).tolist()
            values = [rows[place][vector.position] for place in places]
            found = [stored[place].get(vector.name) for place in places]
            close[places] = vector.together(values, found)
        return close

    def payload(self, row: Row) -> dict[str, JsonValue]:
        """The payload that the row's point must have. Errors as of :meth:`equal`."""
        return self._codec.payload(row)

    def vectors(self, row: Row, stored: Mapping[str, StoredArray]) -> list[ComparedVector]:
        """Compare each vector of the plan; stored ones that the plan does not know are left out.
        Errors as of :meth:`equal`."""
        compared = []
        for vector in self._vectors:
            wanted, found = _wanted(vector, row), stored.get(vector.name)
            equal = wanted is None and found is None
            if wanted is not None and found is not None:
                equal = vector.match(wanted, found)
            compared.append(ComparedVector(vector.plan, wanted, found, equal))
        return compared

    def matches(self, plan: VectorPlan, wanted: VectorData, stored: StoredArray) -> bool:
        """Whether a vector of the plan is stored as ``stored`` where it is ``wanted``."""
        return next(one.match for one in self._vectors if one.plan == plan)(wanted, stored)

    def _same_vectors(self, row: Row, stored: Mapping[str, StoredArray]) -> bool:
        same = True
        count = 0
        for vector in self._vectors:
            data = _wanted(vector, row)
            if data is None:
                continue
            count += 1
            found = stored.get(vector.name)
            same = same and found is not None and vector.match(data, found)
        return same and count == len(stored)


def _wanted(vector: _Vector, row: Row) -> VectorData | None:
    value = row[vector.position]
    if value is None:
        return None
    assert value is not UNCHANGED, "only rows known in full can be compared"
    return vector.text(value) if isinstance(value, TextValue) else vector.binary(value)


# -- payloads


def same_json(wanted: object, stored: object) -> bool:
    """Whether two JSON values are the same, but for the rounding of doubles."""
    # Serialised they are compared at once; integers and floats are written differently.
    if _serialised(wanted) == _serialised(stored):
        return True
    return _same_value(wanted, stored)


def _serialised(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _same_value(wanted: object, stored: object) -> bool:
    if isinstance(wanted, dict):
        return (
            isinstance(stored, dict)
            and wanted.keys() == stored.keys()
            and all(_same_value(value, stored[name]) for name, value in wanted.items())
        )
    if isinstance(wanted, list):
        return (
            isinstance(stored, list)
            and len(wanted) == len(stored)
            and all(map(_same_value, wanted, stored))
        )
    if isinstance(wanted, float) and isinstance(stored, float):
        return _same_double(wanted, stored)
    return type(wanted) is type(stored) and wanted == stored


def _same_double(wanted: float, stored: float) -> bool:
    if wanted == stored:
        return True
    step = math.ulp(max(abs(wanted), abs(stored)))
    if abs(wanted - stored) <= _DOUBLE_STEPS * step:
        return True
    if abs(wanted - stored) > _REWRITES * _DOUBLE_STEPS * step:
        return False
    for _ in range(_REWRITES):
        before, wanted = wanted, read_back(wanted)
        if wanted in (before, stored):
            break
    return wanted == stored


# -- vectors


def _matcher(plan: VectorPlan) -> _Match:
    if plan.kind is VectorKind.SPARSE:
        return _same_sparse
    match = _dense_matcher(plan)
    if plan.kind is VectorKind.MULTI:
        return lambda wanted, stored: _same_rows(match, wanted, stored)
    return lambda wanted, stored: _same_dense(match, wanted, stored)


def _same_sparse(wanted: VectorData, stored: StoredArray) -> bool:
    if not isinstance(wanted, SparseArrays) or not isinstance(stored, SparseValue):
        return False
    if len(wanted.indices) != len(stored.indices):
        return False
    indices = np.array(stored.indices, dtype=np.int64)
    order = np.argsort(indices)
    values = np.array(stored.values, dtype=np.float32)
    return bool(
        np.array_equal(wanted.indices, indices[order])
        and np.array_equal(wanted.values, values[order])
    )


def _same_dense(match: _DenseMatch, wanted: VectorData, stored: StoredArray) -> bool:
    if not isinstance(wanted, np.ndarray) or not isinstance(stored, np.ndarray):
        return False
    return wanted.shape == stored.shape and match(wanted, stored)


def _same_rows(match: _DenseMatch, wanted: VectorData, stored: StoredArray) -> bool:
    if not isinstance(wanted, np.ndarray) or not isinstance(stored, np.ndarray):
        return False
    return wanted.shape == stored.shape and all(map(match, wanted, stored))


def _dense_matcher(plan: VectorPlan) -> _DenseMatch:
    if plan.datatype is Datatype.UINT8:
        # Cut off and saturated; Cosine does not normalise these.
        return lambda wanted, stored: bool(
            np.array_equal(np.clip(np.trunc(wanted), 0, 255), stored)
        )
    if plan.datatype not in (Datatype.FLOAT32, Datatype.FLOAT16):
        # What the quantising datatypes give back does not tell what was put in.
        return lambda wanted, stored: False
    match = _same_direction if plan.metric is Metric.COSINE else _same_components
    return functools.partial(match, half=plan.datatype is Datatype.FLOAT16)


def _within(low: Floats, high: Floats, stored: Floats) -> bool:
    # Written so that NaN among the stored ones is no match.
    return bool(((low <= stored) & (stored <= high)).all())


@np.errstate(over="ignore")
def _rounded(components: Floats) -> Floats:
    return components.astype(np.float16).astype(np.float32)


def _same_direction(wanted: Floats, stored: Floats, *, half: bool) -> bool:
    wide = wanted.astype(np.float64)
    length = float(wide.dot(wide))
    if length < _SHORT * (1 + _LENGTH_ROUNDING) and _same_components(wanted, stored, half=half):
        return True
    if length < _SHORT * (1 - _LENGTH_ROUNDING):
        return False
    wide /= math.sqrt(length)
    margin = np.abs(wide) * _COSINE_PART + _COSINE_LEAST
    low, high = (wide - margin).astype(np.float32), (wide + margin).astype(np.float32)
    if half:
        low, high = _rounded(low), _rounded(high)
    return _within(low, high, stored)


def _same_components(wanted: Floats, stored: Floats, *, half: bool) -> bool:
    return bool(np.array_equal(_rounded(wanted) if half else wanted, stored))


# -- many vectors at once

#: How components stand in the binary format, behind a header of two 16-bit integers.
_COMPONENTS: Final = {"vector": ">f4", "halfvec": ">f2"}
_HEADER_BYTES: Final = 4


def _together(column: ColumnPlan) -> _Together | None:
    """The comparison of many dense vectors of one dimension; None for other columns."""
    plan, type_ = column.vector, column.type.base
    if (
        plan is None
        or plan.kind is not VectorKind.DENSE
        or plan.size is None
        or plan.datatype not in (Datatype.FLOAT32, Datatype.FLOAT16)
        or not type_.is_pgvector
        or type_.name not in _COMPONENTS
    ):
        return None
    components = np.dtype(_COMPONENTS[type_.name])
    return functools.partial(_same_together, plan=plan, components=components, size=plan.size)


def _same_together(
    values: Sequence[RawValue],
    stored: Sequence[StoredArray | None],
    *,
    plan: VectorPlan,
    components: np.dtype[np.floating],
    size: int,
) -> npt.NDArray[np.bool_]:
    width = _HEADER_BYTES + size * components.itemsize
    whole = all(
        type(value) is bytes
        and len(value) == width
        and isinstance(found, np.ndarray)
        and found.shape == (size,)
        for value, found in zip(values, stored, strict=True)
    )
    if not whole:
        return np.zeros(len(values), dtype=np.bool_)
    raw = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), width)  # type: ignore[arg-type]
    wanted = raw[:, _HEADER_BYTES:].copy().view(components).astype(np.float32)
    found = np.stack(stored)  # type: ignore[arg-type]
    half = plan.datatype is Datatype.FLOAT16
    if plan.metric is not Metric.COSINE:
        same = (_rounded(wanted) if half else wanted) == found
        return np.asarray(same.all(axis=1))
    wide = wanted.astype(np.float64)
    lengths = np.einsum("ij,ij->i", wide, wide)
    # Short ones are looked at one by one.
    long = lengths > _SHORT * (1 + _LENGTH_ROUNDING)
    wide /= np.sqrt(np.where(long, lengths, 1.0))[:, np.newaxis]
    margin = np.abs(wide) * _COSINE_PART + _COSINE_LEAST
    low, high = (wide - margin).astype(np.float32), (wide + margin).astype(np.float32)
    if half:
        low, high = _rounded(low), _rounded(high)
    return np.asarray(long & ((low <= found) & (found <= high)).all(axis=1))
