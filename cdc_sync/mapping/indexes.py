"""What a table's indexes say: metric and HNSW parameters of vector columns, and which payload
fields get indexes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cdc_sync.mapping.plan import (
    NAMESPACE_FIELD,
    ColumnPlan,
    IdScheme,
    Metric,
    PayloadIndex,
    PayloadIndexType,
)
from cdc_sync.mapping.table import Index, IndexColumn, PgType, Table, TypeKind

_METRICS: Final = {
    "cosine_ops": Metric.COSINE,
    "l2_ops": Metric.EUCLID,
    "ip_ops": Metric.DOT,
    "l1_ops": Metric.MANHATTAN,
    "hamming_ops": Metric.MANHATTAN,
}
_VECTOR_METHODS: Final = frozenset({"hnsw", "ivfflat"})
#: pgvector's own defaults of hnsw (src/hnsw.h).
_DEFAULT_M: Final = 16
_DEFAULT_EF_CONSTRUCTION: Final = 64
#: ``(embedding)::halfvec(3072)``, the usual index of vectors over 2000 dimensions, as the server
#: prints it.
_HALFVEC_CAST: Final = re.compile(
    r'\(*(?P<column>"(?:[^"]|"")+"|[^\s"():]+)\)*::(?:(?:"[^"]+"|\w+)\.)?halfvec\([0-9]+\)\)*'
)

_FIELD_TYPES: Final = {
    PayloadIndexType.INTEGER: {"int2", "int4", "int8", "oid", "xid8"},
    PayloadIndexType.FLOAT: {"float4", "float8", "numeric"},
    PayloadIndexType.BOOL: {"bool"},
    PayloadIndexType.DATETIME: {"date", "timestamp", "timestamptz"},
    PayloadIndexType.UUID: {"uuid"},
    PayloadIndexType.KEYWORD: {
        *("text", "varchar", "bpchar", "name", "char", "inet", "cidr", "macaddr", "macaddr8"),
        *("time", "timetz", "interval", "money", "bit", "varbit", "pg_lsn"),
    },
    PayloadIndexType.TEXT: {"tsvector"},
}
_TYPE_OF_NAME: Final = {name: type_ for type_, names in _FIELD_TYPES.items() for name in names}


@dataclass(frozen=True, slots=True)
class VectorIndexes:
    """What the valid indexes of a vector column say.

    ``metrics`` by index name, in the table's order; ``unsupported`` names indexes of an operator
    class that no metric of Qdrant matches. ``hnsw_m`` and ``hnsw_ef_construct`` are the largest of
    its HNSW indexes, None for the defaults.
    """

    metrics: dict[str, Metric]
    unsupported: tuple[str, ...]
    hnsw_m: int | None
    hnsw_ef_construct: int | None


def vector_indexes(table: Table, column: str) -> VectorIndexes:
    """Collect what the HNSW and IVFFlat indexes of a column say, partial ones and casts to halfvec
    included.
    """
    metrics: dict[str, Metric] = {}
    unsupported: list[str] = []
    m: list[int] = []
    ef_construction: list[int] = []
    for index in table.indexes:
        if index.method not in _VECTOR_METHODS or not index.valid or not index.columns:
            continue
        if _indexed_column(index.columns[0]) != column:
            continue
        metric = _metric(index.columns[0].opclass)
        if metric is None:
            unsupported.append(index.name)
        else:
            metrics[index.name] = metric
        if index.method == "hnsw":
            m.append(_option(index, "m", _DEFAULT_M))
            ef_construction.append(_option(index, "ef_construction", _DEFAULT_EF_CONSTRUCTION))
    return VectorIndexes(
        metrics,
        tuple(unsupported),
        _unless_default(m, _DEFAULT_M),
        _unless_default(ef_construction, _DEFAULT_EF_CONSTRUCTION),
    )


def _indexed_column(column: IndexColumn) -> str | None:
    if column.column is not None:
        return column.column
    match = _HALFVEC_CAST.fullmatch(column.expression or "")
    if match is None:
        return None
    name = match["column"]
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def _metric(opclass: str) -> Metric | None:
    name = opclass.rpartition(".")[2].strip('"')
    return _METRICS.get(name.partition("_")[2])


def _option(index: Index, name: str, default: int) -> int:
    value = index.options.get(name, "")
    return int(value) if value.isdecimal() else default


def _unless_default(values: Sequence[int], default: int) -> int | None:
    largest = max(values, default=default)
    return None if largest == default else largest


def payload_indexes(
    table: Table,
    columns: Sequence[ColumnPlan],
    key: Sequence[str],
    scheme: IdScheme,
    namespace: str | None,
    numeric_as_string: bool,
) -> tuple[PayloadIndex, ...]:
    """Derive payload indexes from the table's indexes, one a field at most, in column order.

    The namespace field gets one, since tables that share a collection are told apart by it.
    """
    # A key that is the id itself is found by id.
    own_id = set(key) if scheme is not IdScheme.HASHED else set()
    found: dict[str, PayloadIndexType] = {}
    for index in table.indexes:
        if not index.valid or index.predicate is not None:
            continue
        for part in _payload_columns(index):
            type_ = _column_index_type(part, index, columns, numeric_as_string)
            if type_ is None or part.column is None or part.column in own_id:
                continue
            # Exact matches need the field's own type; full text only where nothing else is indexed.
            if found.get(part.column, PayloadIndexType.TEXT) is PayloadIndexType.TEXT:
                found[part.column] = type_
    indexes = [
        PayloadIndex(column.field, found[column.name])
        for column in columns
        if column.field is not None and column.name in found
    ]
    if namespace is not None:
        indexes.append(PayloadIndex(NAMESPACE_FIELD, PayloadIndexType.KEYWORD))
    return tuple(indexes)


def _payload_columns(index: Index) -> Iterable[IndexColumn]:
    if index.method == "btree" or (
        index.method in ("hash", "gin", "gist") and len(index.columns) == 1
    ):
        return (column for column in index.columns if column.column is not None)
    return ()


def _column_index_type(
    part: IndexColumn, index: Index, columns: Sequence[ColumnPlan], numeric_as_string: bool
) -> PayloadIndexType | None:
    column = next((column for column in columns if column.name == part.column), None)
    if column is None or column.field is None:
        return None
    opclass = part.opclass.rpartition(".")[2].strip('"')
    if index.method in ("gin", "gist") and opclass.endswith("_trgm_ops"):
        return PayloadIndexType.TEXT
    return _field_type(column.type, numeric_as_string)


def _field_type(type_: PgType, numeric_as_string: bool) -> PayloadIndexType | None:
    base = type_.base
    if base.kind is TypeKind.ARRAY and base.element is not None:
        base = base.element.base
    if base.kind is TypeKind.ENUM or (base.extension, base.name) in (
        ("citext", "citext"),
        ("ltree", "ltree"),
    ):
        return PayloadIndexType.KEYWORD
    if base.extension == "postgis":
        return PayloadIndexType.GEO
    if base.kind is not TypeKind.BASE or base.schema != "pg_catalog":
        return None
    if base.name == "numeric" and numeric_as_string:
        return PayloadIndexType.KEYWORD
    return _TYPE_OF_NAME.get(base.name)
