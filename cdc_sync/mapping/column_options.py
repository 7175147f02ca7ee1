"""The options that say what becomes of single columns: which fields there are in the end, and the
conflicts between them that are refused before anything is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from cdc_sync.errors import ConfigError, MappingError
from cdc_sync.mapping.decoding import INT64_MAX, INT64_MIN, describe
from cdc_sync.mapping.keys import check_columns
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import NAMESPACE_FIELD, SHARD_FIELD, ColumnPlan, Part, TablePlan
from cdc_sync.mapping.table import PgType, Table, TypeKind

_SPARE: Final = "Correct `{}` in the table's configuration."


def selects(setting: bool | Collection[str], column: str) -> bool:
    """Whether an option that is for all columns, none, or those named is for this one."""
    return setting if isinstance(setting, bool) else column in setting


def payload_field(options: PlanOptions, column: str) -> str:
    """The payload field or the vector name that a column becomes."""
    return options.rename.get(column, column)


def column_part(options: PlanOptions, name: str, in_key: bool) -> Part | None:
    """Return what a column that is no vector is to the object that several columns make."""
    if name in options.parts:
        return options.parts[name]
    return None if in_key or name in options.rename else options.other_columns


def reserved_fields(options: PlanOptions) -> dict[str, str]:
    """Payload fields that no column may become, with what they hold."""
    if options.payload_key is not None:
        # Columns are one level below.
        return {}
    return _marks(options)


def _marks(options: PlanOptions) -> dict[str, str]:
    marks = {}
    if options.namespace is not None:
        marks[NAMESPACE_FIELD] = "the namespace"
    if options.shard is not None:
        marks[SHARD_FIELD] = "the shard"
    return marks


def present_options(table: Table, options: PlanOptions) -> PlanOptions:
    """The options without the columns that the table does not have (any more)."""
    there = {column.name for column in table.columns}

    def kept(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in there)

    def some(setting: bool | tuple[str, ...]) -> bool | tuple[str, ...]:
        return setting if isinstance(setting, bool) else kept(setting) or False

    unnamed = options.unnamed_vector
    return dataclasses.replace(
        options,
        columns=None if options.columns is None else kept(options.columns),
        metrics={name: options.metrics[name] for name in kept(options.metrics)},
        dimensions={name: options.dimensions[name] for name in kept(options.dimensions)},
        unnamed_vector=unnamed if unnamed in there else None,
        bit_vectors=kept(options.bit_vectors),
        drop_nulls=some(options.drop_nulls),
        numeric_as_string=some(options.numeric_as_string),
        skip_bytea=some(options.skip_bytea),
        exclude=kept(options.exclude),
        rename={name: options.rename[name] for name in kept(options.rename)},
    )


def check_column_options(table: Table, options: PlanOptions, key: Sequence[str]) -> None:
    """Refuse options that name no column, or contradict each other. Raises :class:`ConfigError`."""
    check_columns(table, options.exclude, "exclude")
    check_columns(table, options.rename, "rename")
    for setting, names in _lists(options).items():
        check_columns(table, names, setting)
    _refuse(
        table,
        [name for name in options.columns or () if name in options.exclude],
        "is named by both `columns` and `exclude`",
        "Take it out of one of them.",
    )
    _refuse(
        table,
        [name for name in key if name in options.exclude],
        "is part of the key and cannot be left out with `exclude`",
        "To keep a key column out of the payload, list the wanted columns in `columns`.",
    )
    _refuse(
        table,
        [name for name, field in options.rename.items() if not field],
        "is given an empty name by `rename`",
        "Name a field; the unnamed vector is set with `unnamed_vector`.",
    )
    _refuse(
        table,
        [name for name in options.rename if name == options.unnamed_vector],
        "is named by both `rename` and `unnamed_vector`",
        "Take it out of one of them.",
    )
    _check_types(table, options)
    _check_constants(table, options)


def _lists(options: PlanOptions) -> dict[str, tuple[str, ...]]:
    settings = {
        "drop_nulls": options.drop_nulls,
        "numeric_as_string": options.numeric_as_string,
        "skip_bytea": options.skip_bytea,
    }
    return {name: () if isinstance(one, bool) else one for name, one in settings.items()}


def _refuse(table: Table, names: Iterable[str], message: str, remedy: str) -> None:
    for name in names:
        raise ConfigError(f"{table.qualified_name}: column {name} {message}", remedy)


def _check_types(table: Table, options: PlanOptions) -> None:
    types = {column.name: column.type for column in table.columns}
    lists = _lists(options)
    for setting, wanted in (("skip_bytea", "bytea"), ("numeric_as_string", "numeric")):
        for name in lists[setting]:
            if not _holds(types[name], wanted):
                raise ConfigError(
                    f"{table.qualified_name}: `{setting}` names column {name} of type "
                    f"{describe(types[name])}, which holds no {wanted}",
                    _SPARE.format(setting),
                )


def _holds(type_: PgType, name: str) -> bool:
    """Whether a type, or one below it, is the built-in type of that name."""
    base = type_.base
    if base.kind is TypeKind.COMPOSITE:
        return any(_holds(field, name) for _, field in base.fields)
    if base.element is not None:
        return _holds(base.element, name)
    return base.schema == "pg_catalog" and base.name == name


def _check_constants(table: Table, options: PlanOptions) -> None:
    where = table.qualified_name
    for name, value in options.constants.items():
        if not name:
            raise ConfigError(f"{where}: a constant has an empty name", _SPARE.format("constants"))
        if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
            raise ConfigError(
                f"{where}: the constant {name} is beyond int64, which Qdrant does not take",
                "Write it as a string.",
            )
        purpose = reserved_fields(options).get(name)
        if purpose is not None:
            raise ConfigError(
                f"{where}: the constant {name} has the name of the payload field that holds "
                f"{purpose}",
                "Name it otherwise.",
            )
    if options.payload_key is not None:
        purpose = _marks(options).get(options.payload_key)
        if purpose is not None:
            raise ConfigError(
                f"{where}: `payload_key` is the name of the payload field that holds {purpose}",
                "Name it otherwise.",
            )


def check_fields(table: Table, columns: Sequence[ColumnPlan], options: PlanOptions) -> None:
    """Refuse a plan in which two things would be one field, or an option that has no effect.

    Raises :class:`ConfigError`. A payload field and a vector may have one name: Qdrant keeps them
    apart.
    """
    fields: dict[str, str] = dict.fromkeys(options.constants, "a constant")
    vectors: dict[str, str] = {}
    for column in columns:
        if column.field is not None and column.part is None:
            _take(table, fields, column.field, column.name, "payload field")
        if column.vector is not None:
            _take(table, vectors, column.vector.name, column.name, "vector")
    used = {column.name: column for column in columns}
    for name in options.rename:
        if name not in used or (used[name].field is None and used[name].vector is None):
            raise ConfigError(
                f"{table.qualified_name}: `rename` names column {name}, which is left out",
                "Take it out of `rename`, or let the column be taken.",
            )
    lists = _lists(options)
    for setting in ("drop_nulls", "numeric_as_string"):
        for name in lists[setting]:
            if name not in used or used[name].field is None:
                raise ConfigError(
                    f"{table.qualified_name}: `{setting}` names column {name}, which does not "
                    "become a payload field",
                    _SPARE.format(setting),
                )


def _take(table: Table, taken: dict[str, str], name: str, column: str, what: str) -> None:
    if name in taken:
        raise ConfigError(
            f"{table.qualified_name}: {taken[name]} and column {column} would both become the "
            f"{what} {name}",
            "Give one of them another name with `rename`, or leave it out with `exclude`.",
        )
    taken[name] = f"column {column}"


def check_parts(plan: TablePlan, columns: Sequence[ColumnPlan]) -> None:
    """Refuse that a column is gone without which the object is another. Raises
    :class:`MappingError`."""
    present = {column.name for column in columns}
    for column in plan.columns:
        if column.part not in (None, Part.MEMBER) and column.name not in present:
            raise MappingError(
                f"{plan.qualified_name}: column {column.name}, which the table's preset reads, is "
                "gone",
                "Take out `preset` and copy the table anew, or bring the column back.",
            )
