"""Key values as texts that Postgres reads: what a row is found by again when only its point id,
which may be a hash, would be left of it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Final, TypeAlias

import orjson

from cdc_sync.errors import MappingError
from cdc_sync.mapping.ids import compile_key_text
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, TablePlan
from cdc_sync.rows import Row

KeyValues: TypeAlias = Callable[[Row], tuple[str, ...] | None]

#: How Postgres reads the text of a money value depends on its lc_monetary.
_NOT_READ_BACK: Final = frozenset({"money"})


def compile_key_values(plan: TablePlan) -> KeyValues:
    """Compile the function from a row to its key's values, one text a key column, in key order.

    None where a value is missing or cannot be written so that Postgres reads the same value. Only
    the key columns of a row are looked at.
    """
    columns = [plan.columns[position] for position in plan.key]
    try:
        key_text = compile_key_text(plan)
    except MappingError:
        return lambda row: None
    if any(_base_name(column) in _NOT_READ_BACK for column in columns):
        return lambda row: None
    encoded = [_base_name(column) == "bytea" for column in columns]

    def key_values(row: Row) -> tuple[str, ...] | None:
        try:
            texts = orjson.loads(key_text(row))
        except MappingError:
            return None
        return tuple(
            "\\x" + base64.b64decode(text).hex() if in_base64 else text
            for text, in_base64 in zip(texts, encoded, strict=True)
        )

    return key_values


def key_values_of_id(plan: TablePlan, point_id: str) -> tuple[str, ...] | None:
    """The key's values by the point id alone, where the id says them: a uuid, or an integer that is
    not negative. None elsewhere."""
    if plan.id_scheme is IdScheme.UUID:
        return (point_id,)
    if plan.id_scheme is IdScheme.INTEGER and point_id.isdecimal():
        return (point_id,)
    return None


def _base_name(column: ColumnPlan) -> str:
    base = column.type.base
    return base.name if base.schema == "pg_catalog" else ""
