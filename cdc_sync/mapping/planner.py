"""Makes the plan of a table from catalog facts and options, and the plan of a changed table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cdc_sync.errors import ConfigError, MappingError
from cdc_sync.mapping.column_options import (
    check_column_options,
    check_fields,
    check_parts,
    column_part,
    payload_field,
    reserved_fields,
    selects,
)
from cdc_sync.mapping.decoding import describe
from cdc_sync.mapping.ids import id_scheme
from cdc_sync.mapping.indexes import payload_indexes
from cdc_sync.mapping.keys import check_columns, choose_key, quoted, sql_name, unusable
from cdc_sync.mapping.migration_ids import NATIVE_IDS, migration_scheme
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import (
    ColumnPlan,
    Datatype,
    IdScheme,
    Metric,
    Part,
    PayloadIndex,
    TablePlan,
    VectorKind,
    VectorPlan,
)
from cdc_sync.mapping.table import Column, PgType, Table, TypeKind
from cdc_sync.mapping.values import binary_decoder
from cdc_sync.mapping.vector_indexes import VectorIndexes, vector_indexes
from cdc_sync.mapping.vector_settings import (
    DEFAULT,
    find_datatype,
    find_dimension,
    find_metric,
    without_vectors,
)
from cdc_sync.mapping.vectors import declared_dimension, vector_base

#: Qdrant takes vectors of up to this many dimensions.
MAX_DIMENSION: Final = 65_536
_BIT_TYPES: Final = frozenset({"bit", "varbit"})
_FORBIDDEN_IN_COLLECTION: Final = frozenset('<>:"/\\|?*\0\x1f')
_MAX_COLLECTION_NAME: Final = 255


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A plan, and sentences about what the operator may not expect of it."""

    plan: TablePlan
    warnings: tuple[str, ...]


def build_plan(
    table: Table, options: PlanOptions, published_columns: Sequence[str] | None = None
) -> PlanResult:
    """Make the plan of a table.

    ``published_columns`` are the columns that the publication sends (None: every one that is not
    generated). Raises :class:`SourceError` TABLE_UNUSABLE for a table that cannot be kept in step,
    with the SQL or setting that helps, and :class:`ConfigError` for options that do not fit the
    table.
    """
    _check_options(table, options)
    key = choose_key(table, options.key)
    check_column_options(table, options, key)
    warnings: list[str] = []
    selected = _select_columns(table, key, options, published_columns, warnings)
    columns = []
    for column in selected:
        planned = _plan_column(table, column, key, options, warnings)
        if planned is not None:
            columns.append(planned)
    _check_vector_options(table, columns, options)
    check_fields(table, columns, options)
    if not any(column.vector for column in columns):
        warnings.append(
            f"{table.qualified_name}: no vector column; its points have a payload only and cannot "
            "be "
            "searched by similarity"
        )
    positions = {column.name: position for position, column in enumerate(columns)}
    scheme = _id_scheme(table, [columns[positions[name]] for name in key], options)
    plan = TablePlan(
        oid=table.oid,
        inherited=bool(table.children),
        schema=table.schema,
        table=table.name,
        collection=options.collection or table.name,
        columns=tuple(columns),
        key=tuple(positions[name] for name in key),
        id_scheme=scheme,
        namespace=options.namespace,
        payload_indexes=payload_indexes(
            table,
            columns,
            key,
            scheme,
            options.namespace,
            options.numeric_as_string,
            options.payload_key,
            options.object_field,
        )
        + tuple(PayloadIndex(name, type_) for name, type_ in options.indexes.items()),
        drop_nulls=options.drop_nulls,
        numeric_as_string=options.numeric_as_string,
        payload_key=options.payload_key,
        object_field=options.object_field,
        constants=tuple(options.constants.items()),
        shard=options.shard,
        collection_config=options.collection_config,
    )
    return PlanResult(plan, tuple(warnings))


def _id_scheme(table: Table, key: Sequence[ColumnPlan], options: PlanOptions) -> IdScheme:
    if options.ids == NATIVE_IDS:
        return id_scheme([column.type for column in key], options.namespace, options.text_uuids)
    columns = [(column.name, column.type) for column in key]
    return migration_scheme(table.qualified_name, columns, options.namespace, options.ids)


def _check_options(table: Table, options: PlanOptions) -> None:
    check_columns(table, options.columns or (), "columns")
    check_columns(table, options.metrics, "metrics")
    check_columns(table, options.dimensions, "dimensions")
    check_columns(table, options.bit_vectors, "bit_vectors")
    if options.unnamed_vector is not None:
        check_columns(table, [options.unnamed_vector], "unnamed_vector")
    for name, metric in options.metrics.items():
        if metric.upper() not in Metric.__members__:
            raise ConfigError(
                f"{table.qualified_name}: `metrics` gives column {name} an unknown metric",
                "Take one of: cosine, euclid, dot, manhattan.",
            )
    for name, size in options.dimensions.items():
        if not 1 <= size <= MAX_DIMENSION:
            raise ConfigError(
                f"{table.qualified_name}: `dimensions` of column {name} is {size}",
                f"It must be from 1 to {MAX_DIMENSION}.",
            )
    by_name = {column.name: column for column in table.columns}
    for name in options.bit_vectors:
        if not _is_bits(by_name[name].type):
            raise ConfigError(
                f"{table.qualified_name}: `bit_vectors` names column {name} of type "
                f"{describe(by_name[name].type)}",
                "Only columns of type bit(n) or varbit(n) become vectors that way.",
            )
    _check_collection_name(table, options.collection or table.name)


def _check_collection_name(table: Table, name: str) -> None:
    if _FORBIDDEN_IN_COLLECTION & set(name) or not 1 <= len(name) <= _MAX_COLLECTION_NAME:
        raise ConfigError(
            f"{table.qualified_name}: Qdrant takes no collection of the name {name!r}",
            'Name another with `collection`: up to 255 characters, none of < > : " / \\ | ? *',
        )


def _select_columns(
    table: Table,
    key: Sequence[str],
    options: PlanOptions,
    published: Sequence[str] | None,
    warnings: list[str],
) -> list[Column]:
    """Return the columns that are wanted (or in the key) and that the stream carries, in table
    order.
    """
    wanted = None if options.columns is None else {*options.columns, *key}
    selected = []
    left_out = []
    for column in table.columns:
        if column.name in options.exclude or (wanted is not None and column.name not in wanted):
            continue
        sent = not column.generated if published is None else column.name in published
        if sent:
            selected.append(column)
        elif wanted is not None or column.name in key:
            raise _not_sent(table, column)
        else:
            left_out.append(column)
    for column in left_out:
        reason = "generated and not published" if column.generated else "not published"
        warnings.append(f"{table.qualified_name}: column {column.name} is left out: {reason}")
    return selected


def _not_sent(table: Table, column: Column) -> Exception:
    if column.generated == "v":
        return unusable(
            table,
            f"column {column.name} is a virtual generated column, which Postgres never publishes",
            "Leave it out of `columns` and `key`, or make it a stored one.",
        )
    if column.generated:
        return unusable(
            table,
            f"column {column.name} is a generated column that is not published",
            "Leave it out of `columns` and `key`, or, on Postgres 18 and later: "
            "ALTER PUBLICATION <publication> SET (publish_generated_columns = stored);",
        )
    return unusable(
        table,
        f"column {column.name} is not in the publication's column list",
        f"ALTER PUBLICATION <publication> DROP TABLE {sql_name(table)}; "
        f"ALTER PUBLICATION <publication> ADD TABLE {sql_name(table)} "
        f"(<columns, with {quoted(column.name)}>) <and the WHERE it has, if any>;",
    )


def _plan_column(
    table: Table, column: Column, key: Sequence[str], options: PlanOptions, warnings: list[str]
) -> ColumnPlan | None:
    """Return what becomes of a column; None if it is left out."""
    kind = vector_kind(column.type, column.name in options.bit_vectors)
    if kind is not None:
        vector = _plan_vector(table, column, kind, options, warnings)
        return ColumnPlan(column.name, column.type, None, vector)
    in_key = column.name in key
    unwanted = options.columns is not None and column.name not in options.columns
    if unwanted or (selects(options.skip_bytea, column.name) and _is_bytea(column.type)):
        return ColumnPlan(column.name, column.type) if in_key else None
    part = column_part(options, column.name, in_key)
    if part is Part.HIDDEN:
        return ColumnPlan(column.name, column.type, part=part)
    name = payload_field(options, column.name)
    if part is None and (purpose := reserved_fields(options).get(name)) is not None:
        raise unusable(
            table,
            f"column {column.name} has the name of the payload field that holds {purpose}",
            "Leave it out with `exclude`, or `rename` it.",
        )
    try:
        binary_decoder(column.type)
    except MappingError as error:
        raise unusable(
            table,
            f"column {column.name}: {error.message}",
            _leave_out(table, column.name),
        ) from error
    if _is_bits(column.type) and vector_indexes(table, column.name).metrics:
        warnings.append(
            f"{table.qualified_name}: column {column.name} has a vector index but becomes a "
            "payload "
            "string; name it in `bit_vectors` to make it a vector"
        )
    field_name = name if part in (None, Part.MEMBER) else None
    return ColumnPlan(column.name, column.type, field_name, None, part)


def _leave_out(table: Table, name: str) -> str:
    rest = ", ".join(f'"{column.name}"' for column in table.columns if column.name != name)
    return f"Leave it out: columns = [{rest}]"


def _is_bits(type_: PgType) -> bool:
    base = type_.base
    return base.kind is TypeKind.BASE and base.schema == "pg_catalog" and base.name in _BIT_TYPES


def _is_bytea(type_: PgType) -> bool:
    base = vector_base(type_)
    return base.schema == "pg_catalog" and base.name == "bytea"


def vector_kind(type_: PgType, bits_too: bool = False) -> VectorKind | None:
    """Return the kind of vector that a column of this type becomes, None for payload columns."""
    base = type_.base
    if base.kind is TypeKind.ARRAY:
        element = vector_base(type_)
        dense = element.is_pgvector and element.name in ("vector", "halfvec")
        return VectorKind.MULTI if dense else None
    if base.is_pgvector and base.name == "sparsevec":
        return VectorKind.SPARSE
    if base.is_pgvector and base.name in ("vector", "halfvec"):
        return VectorKind.DENSE
    return VectorKind.DENSE if bits_too and _is_bits(type_) else None


def _plan_vector(
    table: Table, column: Column, kind: VectorKind, options: PlanOptions, warnings: list[str]
) -> VectorPlan:
    facts = vector_indexes(table, column.name)
    warnings += [
        f"{table.qualified_name}: index {index} of column {column.name} has a metric that "
        "Qdrant does "
        "not know; it is not used"
        for index in facts.unsupported
    ]
    unnamed = column.name == options.unnamed_vector
    name = "" if unnamed else payload_field(options, column.name)
    if kind is VectorKind.SPARSE:
        if not name:
            raise ConfigError(
                f"{table.qualified_name}: `unnamed_vector` names column {column.name}, but sparse "
                "vectors must have a name in Qdrant",
                "Name another column, or leave `unnamed_vector` out.",
            )
        _check_sparse(table, column, facts, options, warnings)
        return VectorPlan(name, kind, None, Metric.DOT)
    datatype = find_datatype(column.type, name, options.collection_config)
    if datatype is Datatype.UINT8 and not _is_bits(vector_base(column.type)):
        warnings.append(
            f"{table.qualified_name}: column {column.name} is stored as uint8: its components are "
            "cut to whole numbers from 0 to 255"
        )
    return VectorPlan(
        name=name,
        kind=kind,
        size=_dimension(table, column, facts, options),
        metric=_metric(table, column, facts, options, warnings),
        datatype=datatype,
        hnsw_m=facts.hnsw_m,
        hnsw_ef_construct=facts.hnsw_ef_construct,
    )


def _check_sparse(
    table: Table,
    column: Column,
    facts: VectorIndexes,
    options: PlanOptions,
    warnings: list[str],
) -> None:
    configured = options.metrics.get(column.name)
    if configured is not None and configured.upper() != Metric.DOT.name:
        raise ConfigError(
            f"{table.qualified_name}: `metrics` gives column {column.name} the metric "
            f"{configured}, but "
            "Qdrant compares sparse vectors by dot product only",
            "Leave the column out of `metrics`.",
        )
    others = [index for index, metric in facts.metrics.items() if metric is not Metric.DOT]
    if others and configured is None:
        warnings.append(
            f"{table.qualified_name}: index {others[0]} compares column {column.name} by another "
            "metric, "
            "but Qdrant compares sparse vectors by dot product only"
        )


def _dimension(table: Table, column: Column, facts: VectorIndexes, options: PlanOptions) -> int:
    size = find_dimension(table, column, facts, options).size
    if not 1 <= size <= MAX_DIMENSION:
        raise unusable(
            table,
            f"column {column.name} has {size} dimensions; Qdrant takes up to {MAX_DIMENSION}",
            _leave_out(table, column.name),
        )
    return size


def _metric(
    table: Table,
    column: Column,
    facts: VectorIndexes,
    options: PlanOptions,
    warnings: list[str],
) -> Metric:
    metric, origin = find_metric(table, column, facts, options)
    if origin == DEFAULT and metric is Metric.COSINE:
        warnings.append(
            f"{table.qualified_name}: no vector index tells the metric of column {column.name}; it "
            "is Cosine unless `metrics` says otherwise"
        )
    return metric


def _check_vector_options(
    table: Table, columns: Sequence[ColumnPlan], options: PlanOptions
) -> None:
    vectors = {column.name for column in columns if column.vector is not None}
    unnamed = [options.unnamed_vector] if options.unnamed_vector is not None else []
    named = {
        "metrics": options.metrics,
        "dimensions": options.dimensions,
        "unnamed_vector": unnamed,
        "bit_vectors": options.bit_vectors,
    }
    for setting, names in named.items():
        for name in names:
            if name not in vectors:
                raise ConfigError(
                    f"{table.qualified_name}: `{setting}` names column {name}, which does not "
                    "become "
                    "a vector",
                    f"Its vectors are: {', '.join(sorted(vectors)) or 'none'}.",
                )


class DimensionChangedError(MappingError):
    """The column of a vector has another dimension than the vector in the collection."""


def replan(
    plan: TablePlan, columns: Sequence[tuple[str, PgType]], options: PlanOptions
) -> TablePlan:
    """Return the plan for the columns of a changed Relation message, in their order.

    New columns become payload; new vector columns are left out, since a vector is added with the
    collection only. Columns that are gone go. Raises :class:`MappingError` if a key column is gone
    or of another kind, if the column of a vector has another dimension or kind, or if a new
    column's type cannot be mapped.
    """
    before = {column.name: column for column in plan.columns}
    key = [plan.columns[position].name for position in plan.key]
    present = {name for name, _ in columns}
    for name in key:
        if name not in present:
            raise MappingError(
                f"{plan.qualified_name}: key column {name} is gone",
                "Name the new key columns as `key` and copy the table anew.",
            )
    planned = []
    for name, type_ in columns:
        if name in options.exclude:
            continue
        if options.columns is not None and name not in options.columns and name not in key:
            continue
        column = _replan_column(plan, name, type_, before.get(name), name in key, options)
        if column is not None:
            planned.append(column)
    _check_new_fields(plan, planned, options)
    check_parts(plan, planned)
    positions = {column.name: position for position, column in enumerate(planned)}
    fields = {column.field for column in planned} | {name for name, _ in plan.marks}
    fields |= set(options.indexes)
    kept = {column.vector.name for column in planned if column.vector is not None}
    gone = {vector.name for vector in plan.vectors} - kept
    return dataclasses.replace(
        plan,
        columns=tuple(planned),
        key=tuple(positions[name] for name in key),
        payload_indexes=tuple(index for index in plan.payload_indexes if index.field in fields),
        collection_config=without_vectors(plan.collection_config, gone),
    )


def _replan_column(
    plan: TablePlan,
    name: str,
    type_: PgType,
    before: ColumnPlan | None,
    in_key: bool,
    options: PlanOptions,
) -> ColumnPlan | None:
    where = f"{plan.qualified_name}: column {name}"
    if before is not None and before.vector is not None:
        _check_same_vector(where, before, before.vector, type_)
        return ColumnPlan(name, type_, None, before.vector)
    if in_key and before is not None:
        if key_family(before.type) != key_family(type_):
            raise MappingError(
                f"{where} is part of the key and changed its type from {describe(before.type)} to "
                f"{describe(type_)}, so the points' ids change",
                "Copy the table anew.",
            )
        return ColumnPlan(name, type_, before.field, None, before.part)
    skipped = selects(options.skip_bytea, name) and _is_bytea(type_)
    if vector_kind(type_, name in options.bit_vectors) is not None or skipped:
        return None
    try:
        binary_decoder(type_)
    except MappingError as error:
        raise MappingError(f"{where}: {error.message}", error.remedy) from error
    part = column_part(options, name, in_key)
    field_name = payload_field(options, name) if part in (None, Part.MEMBER) else None
    return ColumnPlan(name, type_, field_name, None, part)


def _check_new_fields(plan: TablePlan, columns: Sequence[ColumnPlan], options: PlanOptions) -> None:
    """Refuse a new column that would write the payload field of something else."""
    taken = reserved_fields(options) | {
        name: "a constant of the configuration" for name, _ in plan.constants
    }
    # The new ones last, so that the message names them.
    before = {column.name for column in plan.columns}
    for column in sorted(columns, key=lambda one: one.name not in before):
        if column.field is None or column.part is not None:
            continue
        if (purpose := taken.get(column.field)) is not None:
            raise MappingError(
                f"{plan.qualified_name}: column {column.name} has the name of the payload field "
                f"that holds {purpose}",
                "Leave it out with `exclude`, or `rename` it, and copy the table anew.",
            )
        taken[column.field] = f"column {column.name}"


def _check_same_vector(where: str, before: ColumnPlan, vector: VectorPlan, type_: PgType) -> None:
    remedy = (
        "A collection's vectors cannot change. Name another `collection` and copy the table anew, "
        "or "
        "change the column back."
    )
    old, new = vector_base(before.type), vector_base(type_)
    same_bits = _is_bits(old) and _is_bits(new)
    if not same_bits and (
        (old.extension, old.name) != (new.extension, new.name)
        or vector_kind(before.type) is not vector_kind(type_)
    ):
        raise MappingError(
            f"{where} changed its type from {describe(before.type)} to {describe(type_)}", remedy
        )
    size = declared_dimension(type_)
    if vector.size is not None and size is not None and size != vector.size:
        raise DimensionChangedError(
            f"{where} now has {size} dimensions, the vector in the collection has {vector.size}",
            f'{remedy} Or let the collection be made anew: on_dimension_change = "rebuild".',
        )


def key_family(type_: PgType) -> str:
    """Return what decides how values of a key column become ids; types of one family give the same
    ids.
    """
    base = type_.base
    if base.kind is TypeKind.BASE and base.schema == "pg_catalog":
        if base.name in ("int2", "int4", "int8", "oid"):
            return "integer"
        if base.name in ("text", "varchar"):
            return "text"
    return f"{base.extension or base.schema}.{base.name}"
