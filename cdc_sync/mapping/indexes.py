"""Which payload fields get indexes, by the table's own indexes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from cdc_sync.mapping.column_options import selects
from cdc_sync.mapping.plan import (
    NAMESPACE_FIELD,
    ColumnPlan,
    IdScheme,
    PayloadIndex,
    PayloadIndexType,
)
from cdc_sync.mapping.table import Index, IndexColumn, PgType, Table, TypeKind

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


def payload_indexes(
    table: Table,
    columns: Sequence[ColumnPlan],
    key: Sequence[str],
    scheme: IdScheme,
    namespace: str | None,
    numeric_as_string: bool | tuple[str, ...],
    payload_key: str | None = None,
    object_field: str | None = None,
) -> tuple[PayloadIndex, ...]:
    """Derive payload indexes from the table's indexes, one a field at most, in column order.

    The namespace field gets one, since tables that share a collection are told apart by it.
    """
    # A key that is the id itself is found by id.
    is_id = scheme in (IdScheme.INTEGER, IdScheme.UUID, IdScheme.TEXT_UUID)
    own_id = set(key) if is_id else set()
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
        PayloadIndex(
            column.field, found[column.name], payload_key if column.part is None else object_field
        )
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
    part: IndexColumn,
    index: Index,
    columns: Sequence[ColumnPlan],
    numeric_as_string: bool | tuple[str, ...],
) -> PayloadIndexType | None:
    column = next((column for column in columns if column.name == part.column), None)
    if column is None or column.field is None:
        return None
    opclass = part.opclass.rpartition(".")[2].strip('"')
    if index.method in ("gin", "gist") and opclass.endswith("_trgm_ops"):
        return PayloadIndexType.TEXT
    return _field_type(column.type, selects(numeric_as_string, column.name))


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
