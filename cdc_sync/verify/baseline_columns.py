"""What a baseline says of columns: which can be searched, their indexes, their vectors' lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cdc_sync.errors import ConfigError, MappingError
from cdc_sync.mapping.decoding import describe
from cdc_sync.mapping.ids import PointIdFunction, compile_point_id
from cdc_sync.mapping.index_expressions import IndexUse
from cdc_sync.mapping.plan import ColumnPlan, Metric, TablePlan, VectorKind
from cdc_sync.mapping.vector_indexes import VectorIndex, vector_indexes
from cdc_sync.mapping.vector_settings import find_dimension, find_metric
from cdc_sync.mapping.vectors import vector_base
from cdc_sync.postgres.neighbours import SampledVector, VectorTarget, search_target
from cdc_sync.rows import PointId, Row, TextValue
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.baseline_file import (
    IndexEntry,
    Norms,
    QueryVector,
    SparseQuery,
    TableColumn,
    VectorEntry,
)
from cdc_sync.verify.baseline_queries import parse_vector

#: Rows whose vectors' lengths are looked at.
NORM_ROWS: Final = 200
_DEFAULTS: Final = {"hnsw": {"m": 16, "ef_construction": 64}, "ivfflat": {"lists": 100}}


@dataclass(frozen=True, slots=True)
class SearchedColumn:
    """A vector column that can be searched: ``target`` as it is, ``indexed`` as its index compares
    it, if it has one whose order is that of the metric."""

    planned: PlannedTable
    column: ColumnPlan
    metric: Metric
    bits: bool
    dimension: int | None
    target: VectorTarget
    indexed: VectorTarget | None


def searched_columns(planned: PlannedTable) -> tuple[SearchedColumn, ...]:
    """The vector columns that pgvector can search: not arrays of vectors."""
    found = []
    for column in planned.plan.columns:
        vector = column.vector
        if vector is None or vector.kind is VectorKind.MULTI:
            continue
        indexes = vector_indexes(planned.table, column.name).found
        metric = vector.metric
        if vector.kind is VectorKind.SPARSE:
            metric = Metric(_sparse_metric(planned, column, indexes)[0])
        base = vector_base(column.type)
        index = _usable_index(indexes, metric)
        sparse_size = base.typmod if base.typmod > 0 else None
        found.append(
            SearchedColumn(
                planned=planned,
                column=column,
                metric=metric,
                bits=base.name in ("bit", "varbit"),
                dimension=sparse_size if vector.kind is VectorKind.SPARSE else vector.size,
                target=search_target(planned.table, planned.plan, column.name, metric, None),
                indexed=None
                if index is None
                else search_target(planned.table, planned.plan, column.name, metric, index),
            )
        )
    return tuple(found)


def _usable_index(indexes: Sequence[VectorIndex], metric: Metric) -> VectorIndex | None:
    """The index that gives the column's rows in the metric's order, one of whole vectors first."""
    usable = [
        one
        for one in indexes
        if one.of_values and one.metric is metric and not one.vector.normalized
    ]
    usable.sort(key=lambda one: one.vector.use is not IndexUse.WHOLE)
    return usable[0] if usable else None


def _sparse_metric(
    planned: PlannedTable, column: ColumnPlan, indexes: Sequence[VectorIndex]
) -> tuple[str, str]:
    """The metric of a sparse column's index, which Qdrant's own, Dot, need not be."""
    for one in indexes:
        if one.metric is not None:
            return one.metric.value, f"index {one.name} ({one.index.method}, {one.opclass})"
    return Metric.DOT.value, "the kind of vector"


def table_columns(planned: PlannedTable) -> list[TableColumn]:
    taken = {column.name: column for column in planned.plan.columns}
    entries = []
    for column in planned.table.columns:
        plan = taken.get(column.name)
        if plan is None:
            becomes = "nothing"
        elif plan.vector is not None:
            becomes = f"vector {plan.vector.name}" if plan.vector.name else "the unnamed vector"
        else:
            becomes = "the point id only" if plan.field is None else f"field {plan.field}"
        entries.append(TableColumn(column=column.name, type=describe(column.type), becomes=becomes))
    return entries


def _found_index(one: VectorIndex) -> IndexEntry:
    index = one.index
    return _index_entry(
        one.name,
        index.method,
        one.opclass,
        dict(index.options),
        one.vector.use.value,
        partial=index.predicate,
        partition=index.relation or None,
    )


def _index_entry(
    name: str,
    method: str,
    opclass: str,
    given: dict[str, str],
    holds: str,
    *,
    partial: str | None = None,
    partition: str | None = None,
    valid: bool = True,
) -> IndexEntry:
    options: dict[str, int | str] = {**_DEFAULTS.get(method, {})}
    for option, text in given.items():
        options[option] = int(text) if text.isdecimal() else text
    return IndexEntry(
        name=name,
        method=method,
        operator_class=opclass,
        options=options,
        holds=holds,
        partial=partial,
        partition=partition,
        valid=valid,
    )


def _quantization(type_: str, indexes: Sequence[VectorIndex]) -> str | None:
    uses = {one.vector.use for one in indexes}
    if type_ in ("bit", "varbit"):
        return "the column holds bits"
    if IndexUse.BINARY in uses:
        return "an index holds the signs of the components only"
    if type_ == "halfvec":
        return "the column has half precision"
    halved = any(one.opclass.startswith("halfvec_") for one in indexes)
    return "an index has half precision" if halved else None


def _norms(sample: Sequence[SampledVector]) -> Norms | None:
    lengths = [vector_length(parse_vector(one.vector)) for one in sample[:NORM_ROWS]]
    if not lengths:
        return None
    return Norms(
        rows=len(lengths),
        minimum=min(lengths),
        maximum=max(lengths),
        mean=float(np.mean(lengths)),
    )


def vector_length(vector: QueryVector) -> float:
    """The Euclidean length of a vector."""
    components = vector.values if isinstance(vector, SparseQuery) else vector
    return float(np.linalg.norm(np.asarray(components, dtype=np.float64)))


def checked_vector(where: str, vector: QueryVector, searched: SearchedColumn) -> QueryVector:
    name, sparse = searched.column.name, isinstance(vector, SparseQuery)
    kind = searched.column.vector.kind if searched.column.vector is not None else None
    if sparse is not (kind is VectorKind.SPARSE):
        wanted = "{indices, values}" if kind is VectorKind.SPARSE else "a list of numbers"
        raise ConfigError(
            f"{where} has a vector of the wrong kind for column {name}.", f"It takes {wanted}."
        )
    if isinstance(vector, SparseQuery):
        size = vector.size or searched.dimension or max(vector.indices, default=0) + 1
        given = max(size, max(vector.indices, default=0) + 1)
        vector = vector.model_copy(update={"size": size})
    else:
        given = len(vector)
        if searched.bits and set(vector) - {0.0, 1.0}:
            raise ConfigError(f"{where} has a vector for bits that is not of 0 and 1.")
    if searched.dimension is not None and given != searched.dimension:
        raise ConfigError(
            f"{where} has a vector of {given} dimensions; column {name} has {searched.dimension}.",
            "Make the query's vector by the model that made the column's.",
        )
    return vector


def vector_entry(
    planned: PlannedTable, column: ColumnPlan, sample: Sequence[SampledVector]
) -> VectorEntry:
    """The inventory of a vector column; ``sample`` are rows whose vectors are measured."""
    vector = column.vector
    assert vector is not None
    source = next(one for one in planned.table.columns if one.name == column.name)
    facts = vector_indexes(planned.table, column.name)
    base = vector_base(source.type)
    dimension, dimension_from = vector.size, None
    metric, metric_from = vector.metric.value, "the kind of vector"
    if vector.kind is not VectorKind.SPARSE:
        dimension_from = find_dimension(planned.table, source, facts, planned.options).origin
        metric_from = find_metric(planned.table, source, facts, planned.options).origin
    else:
        dimension = base.typmod if base.typmod > 0 else None
        metric, metric_from = _sparse_metric(planned, column, facts.found)
    unfinished = [
        _index_entry(index.name, index.method, "", {}, "", valid=False)
        for index in planned.table.indexes
        if index.name in facts.invalid
    ]
    return VectorEntry(
        column=column.name,
        vector=vector.name,
        type=describe(source.type),
        kind=vector.kind.value,
        datatype=vector.datatype.value,
        dimension=dimension,
        dimension_from=dimension_from,
        metric=metric,
        metric_from=metric_from,
        indexes=[*map(_found_index, facts.found), *unfinished],
        quantization=_quantization(base.name, facts.found),
        norms=_norms(sample),
    )


def point_ids(plan: TablePlan) -> Callable[[Sequence[str]], PointId]:
    """From a key in a baseline to the point's id. What it gives raises :class:`MappingError` for
    what is no key of the table."""
    compiled: PointIdFunction = compile_point_id(plan)

    def point_id(key: Sequence[str]) -> PointId:
        return compiled(key_row(plan, key))

    return point_id


def key_row(plan: TablePlan, key: Sequence[str]) -> Row:
    """A row with nothing but its key. Raises :class:`MappingError` for a key of other length."""
    if len(key) != len(plan.key):
        raise MappingError(f"{plan.qualified_name}: a key has {len(plan.key)} columns")
    row: Row = [None] * len(plan.columns)
    for position, text in zip(plan.key, key, strict=True):
        row[position] = TextValue(text.encode())
    return row
