"""Decodes rows into Python objects, by the same plan and to the same values as
:mod:`cdc_sync.mapping.wire`.

For the embedded engine, which takes objects and not bytes, and for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

from cdc_sync.errors import MappingError
from cdc_sync.mapping.column_options import selects
from cdc_sync.mapping.composed import compile_composed
from cdc_sync.mapping.decoding import (
    MALFORMED,
    DecodeOptions,
    Decoder,
    JsonValue,
    NonFiniteCount,
    describe,
)
from cdc_sync.mapping.plan import ColumnPlan, TablePlan, VectorKind
from cdc_sync.mapping.values import raw_binary_decoder, raw_text_decoder
from cdc_sync.mapping.vectors import (
    SparseArrays,
    SparseValue,
    VectorReader,
    compile_vector,
    is_empty_array,
)
from cdc_sync.rows import UNCHANGED, Row, TextValue

__all__ = ["PythonCodec", "SparseValue", "VectorValue"]

#: A dense vector (a view of float32 components), a sparse one, or the rows of a multivector.
VectorValue: TypeAlias = "memoryview | SparseValue | list[list[float]]"


class _Field(NamedTuple):
    position: int
    column: ColumnPlan
    name: str
    binary: Decoder
    text: Decoder
    drop_null: bool


class _VectorField(NamedTuple):
    position: int
    name: str
    multi: bool
    binary: VectorReader
    text: VectorReader


class PythonCodec:
    """The compiled decoders of one plan. Rows must have the plan's columns, in its order.

    Methods raise :class:`MappingError`, naming table and column, for values that cannot be decoded.
    """

    def __init__(self, plan: TablePlan) -> None:
        self._plan: Final = plan
        self._non_finite = NonFiniteCount()
        self._fields = tuple(
            _payload_field(position, column, column.field, plan, self._non_finite)
            for position, column in enumerate(plan.columns)
            if column.field is not None and column.part is None
        )
        self._composed = compile_composed(plan, self._non_finite)
        self._vectors = tuple(
            _VectorField(
                position,
                column.vector.name,
                column.vector.kind is VectorKind.MULTI,
                *compile_vector(plan.qualified_name, column),
            )
            for position, column in enumerate(plan.columns)
            if column.vector is not None
        )

    @property
    def plan(self) -> TablePlan:
        """The plan it was compiled from."""
        return self._plan

    @property
    def non_finite(self) -> int:
        """How many NaN and infinite numbers of payloads became None so far."""
        return self._non_finite.value

    def payload(
        self, row: Row, kept: Mapping[str, JsonValue] | None = None
    ) -> dict[str, JsonValue]:
        """Return the known payload: every column that is not UNCHANGED, constants and marks.

        ``kept`` are values of fields that the row does not tell, by the names of
        :meth:`unknown_fields`.
        """
        fields = self._columns(row)
        if kept:
            fields.update(kept)
        fields.update(self._plan.constants)
        key = self._plan.payload_key
        payload: dict[str, JsonValue] = fields if key is None else {key: fields}
        payload.update(self._plan.marks)
        return payload

    def unknown_fields(self, row: Row) -> list[str]:
        """Return the columns' payload fields whose value is not in the row; with a ``payload_key``
        they are fields of that object.
        """
        self._check_width(row)
        return [field.name for field in self._fields if row[field.position] is UNCHANGED]

    def has_unknown_object(self, row: Row) -> bool:
        """Tell whether a column of the object that several columns make is not in the row: then the
        object is not in the payload, and can only come from the whole row.
        """
        return self._composed is not None and self._composed.unknown(row)

    def _columns(self, row: Row) -> dict[str, JsonValue]:
        self._check_width(row)
        payload: dict[str, JsonValue] = {}
        for position, column, name, binary, text, drop_null in self._fields:
            value = row[position]
            if value is UNCHANGED:
                continue
            if value is None:
                if not drop_null:
                    payload[name] = None
                continue
            try:
                payload[name] = text(value) if isinstance(value, TextValue) else binary(value)
            except MALFORMED as error:
                raise MappingError(
                    f"{self._plan.qualified_name}: column {column.name} does not hold a value of "
                    f"type {describe(column.type)}"
                ) from error
        if self._composed is not None:
            payload.update(self._composed.fields(row))
        return payload

    def vectors(self, row: Row) -> dict[str, VectorValue]:
        """Return the vectors that are known and not NULL (nor an empty array), by name."""
        self._check_width(row)
        vectors: dict[str, VectorValue] = {}
        for field in self._vectors:
            value = row[field.position]
            if value is None or value is UNCHANGED:
                continue
            data = (field.text if isinstance(value, TextValue) else field.binary)(value)
            if isinstance(data, SparseArrays):
                vectors[field.name] = SparseValue(data.indices.tolist(), data.values.tolist())
            elif data is not None:
                # Whoever copies the components makes numbers of them one at a time, where a list
                # would be made, and held, as a whole: a third of the time.
                vectors[field.name] = data.tolist() if field.multi else data.data
        return vectors

    def null_vectors(self, row: Row) -> list[str]:
        """Return the names of the vectors that the point must not have: NULL, or an empty array."""
        self._check_width(row)
        return [
            name
            for position, name, multi, _, _ in self._vectors
            if (value := row[position]) is None
            or (multi and value is not UNCHANGED and is_empty_array(value))
        ]

    def _check_width(self, row: Row) -> None:
        if len(row) != len(self._plan.columns):
            raise MappingError(
                f"{self._plan.qualified_name}: a row has {len(row)} values, the plan "
                f"{len(self._plan.columns)} columns"
            )


def _payload_field(
    position: int, column: ColumnPlan, name: str, plan: TablePlan, count: NonFiniteCount
) -> _Field:
    options = DecodeOptions(selects(plan.numeric_as_string, column.name), count)
    return _Field(
        position,
        column,
        name,
        raw_binary_decoder(column.type, options),
        raw_text_decoder(column.type, options),
        selects(plan.drop_nulls, column.name),
    )
