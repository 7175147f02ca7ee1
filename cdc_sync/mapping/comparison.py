"""Compares rows with stored points: is a point already what its row maps to?

What counts as equal is what Qdrant makes of equal input, no more:

- Payloads are JSON values. Numbers keep their kind, so ``1`` and ``1.0`` differ; the order of keys
  does not matter; a field that is null differs from one that is absent. Qdrant keeps payloads as
  JSON text and reads doubles back without exact rounding, so they may be a few units in the last
  place off.
- Vectors are stored exactly, rounded to their datatype. Under Cosine they are normalised before, in
  float32, with other rounding than here, unless they are very short or of unit length already.

Sources: Qdrant, ``lib/segment/src/spaces/tools.rs`` (``is_length_zero_or_normalized``) and
``lib/segment/src/spaces/metric_uint/``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import orjson

from cdc_sync.mapping.plan import Datatype, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.vectors import (
    Floats,
    SparseArrays,
    SparseValue,
    VectorData,
    VectorReader,
    compile_vector,
)
from cdc_sync.rows import UNCHANGED, Row, TextValue

#: A vector as Qdrant returns it: float32 components of shape (n,) for dense ones, (rows, n) for
#: multivectors; or a sparse vector, its indices in any order.
StoredArray: TypeAlias = Floats | SparseValue

#: How far a component of a normalised vector may be off: a part of its value, and at least this
#: much. Qdrant's sum of squares is off by up to 2e-6 at 16,000 dimensions, 4e-7 at 4,096.
_COSINE_PART: Final = 4e-6
_COSINE_LEAST: Final = 1e-9
#: How many units in the last place a double of a payload may be off. Measured: 0 to 2.
_DOUBLE_STEPS: Final = 4
#: Vectors whose squared length is below float32's epsilon are stored as they are under Cosine.
_SHORT: Final = float(np.finfo(np.float32).eps)
#: Rounding of the squared length itself, relative: on which side of the bound it is, is open then.
_LENGTH_ROUNDING: Final = 1e-4

_Match: TypeAlias = Callable[[VectorData, StoredArray], bool]
_DenseMatch: TypeAlias = Callable[[Floats, Floats], bool]


class _Vector(NamedTuple):
    position: int
    name: str
    binary: VectorReader
    text: VectorReader
    match: _Match


class PointComparison:
    """Compares rows of one plan with stored points. Compiled once a plan."""

    def __init__(self, plan: TablePlan) -> None:
        self._codec = PythonCodec(plan)
        self._vectors = [
            _Vector(
                position,
                column.vector.name,
                *compile_vector(plan.qualified_name, column),
                _matcher(column.vector),
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

    def _same_vectors(self, row: Row, stored: Mapping[str, StoredArray]) -> bool:
        same = True
        count = 0
        for position, name, binary, text, match in self._vectors:
            value = row[position]
            if value is None:
                continue
            assert value is not UNCHANGED, "only rows known in full can be compared"
            data = text(value) if isinstance(value, TextValue) else binary(value)
            if data is None:
                continue
            count += 1
            found = stored.get(name)
            same = same and found is not None and match(data, found)
        return same and count == len(stored)


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
    return abs(wanted - stored) <= _DOUBLE_STEPS * step


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
