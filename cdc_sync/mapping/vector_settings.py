"""Decides metric, dimension and datatype of a vector, and says where each was found."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

from cdc_sync.errors import ConfigError
from cdc_sync.mapping.keys import quoted, sql_name, unusable
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import Datatype, Metric
from cdc_sync.mapping.table import Column, PgType, Table, TypeKind
from cdc_sync.mapping.vector_indexes import VectorIndexes
from cdc_sync.mapping.vectors import declared_dimension, vector_base

#: Where something was found.
CONFIGURED: Final = "the configuration"
DECLARED: Final = "the column's type"
DEFAULT: Final = "the default"

_DATATYPES: Final = {
    "halfvec": Datatype.FLOAT16,
    "bit": Datatype.UINT8,
    "varbit": Datatype.UINT8,
}


class FoundMetric(NamedTuple):
    """A metric and where it was found."""

    metric: Metric
    origin: str


class FoundDimension(NamedTuple):
    """A dimension and where it was found."""

    size: int
    origin: str


def find_metric(
    table: Table, column: Column, facts: VectorIndexes, options: PlanOptions
) -> FoundMetric:
    """Return the metric: the configured one, else that of the column's indexes, else the default.

    Raises :class:`SourceError` TABLE_UNUSABLE when two indexes disagree, naming both.
    """
    configured = options.metrics.get(column.name)
    if configured is not None:
        return FoundMetric(Metric[configured.upper()], CONFIGURED)
    first: tuple[str, Metric] | None = None
    for index, metric in facts.metrics.items():
        if first is not None and metric is not first[1]:
            raise unusable(
                table,
                f"indexes of column {column.name} disagree about its metric: {first[0]} is for "
                f"{first[1].value}, {index} for {metric.value}",
                f'metrics = {{ {quoted(column.name)} = "{first[1].name.lower()}" }} (or another) '
                "in the table's configuration.",
            )
        first = first or (index, metric)
    if first is not None:
        found = next(one for one in facts.found if one.name == first[0])
        return FoundMetric(first[1], f"index {found.name} ({found.index.method}, {found.opclass})")
    bits = vector_base(column.type).name in ("bit", "varbit")
    return FoundMetric(Metric.MANHATTAN if bits else Metric.COSINE, DEFAULT)


def find_dimension(
    table: Table, column: Column, facts: VectorIndexes, options: PlanOptions
) -> FoundDimension:
    """Return the dimension: that of the type, else the configured one, else that of an index on a
    cast of the column.

    Raises :class:`SourceError` TABLE_UNUSABLE when there is none, or indexes disagree, and
    :class:`ConfigError` when the configuration contradicts the type.
    """
    declared = declared_dimension(column.type)
    configured = options.dimensions.get(column.name)
    if declared is not None:
        if configured is not None and declared != configured:
            raise ConfigError(
                f"{table.qualified_name}: `dimensions` gives column {column.name} {configured} "
                f"dimensions, its type declares {declared}",
                f"Leave {column.name} out of `dimensions`.",
            )
        return FoundDimension(declared, DECLARED)
    if configured is not None:
        return FoundDimension(configured, CONFIGURED)
    first: tuple[str, int] | None = None
    for index, size in facts.dimensions.items():
        if first is not None and size != first[1]:
            raise unusable(
                table,
                f"column {column.name} is declared without a dimension, and its indexes have "
                f"different ones: {first[0]} has {first[1]}, {index} has {size}",
                f"dimensions = {{ {quoted(column.name)} = {first[1]} }} (or another) in the "
                "table's configuration; rows of another dimension are then set aside.",
            )
        first = first or (index, size)
    if first is None:
        raise _without_dimension(table, column)
    return FoundDimension(first[1], f"index {first[0]}")


def _without_dimension(table: Table, column: Column) -> Exception:
    base = vector_base(column.type)
    suffix = "[]" if column.type.base.kind is TypeKind.ARRAY else ""
    return unusable(
        table,
        f"column {column.name} is declared without a dimension, and a collection needs one",
        f"ALTER TABLE {sql_name(table)} ALTER COLUMN {quoted(column.name)} "
        f"TYPE {base.name}(<n>){suffix};\n"
        f"or dimensions = {{ {quoted(column.name)} = <n> }} in the table's configuration; "
        "rows of another dimension are then set aside.",
    )


def find_datatype(type_: PgType, name: str, collection_config: Mapping[str, object]) -> Datatype:
    """Return how the components of a dense vector are stored: as ``collection_config`` says, else
    as the column's type has them. What is no datatype there is left to the check of the whole.
    """
    vectors = collection_config.get("vectors")
    given = vectors.get(name) if isinstance(vectors, Mapping) else None
    if not name and given is None:
        given = vectors
    wanted = given.get("datatype") if isinstance(given, Mapping) else None
    if isinstance(wanted, str) and wanted in {datatype.value for datatype in Datatype}:
        return Datatype(wanted)
    return _DATATYPES.get(vector_base(type_).name, Datatype.FLOAT32)


def without_vectors(
    collection_config: Mapping[str, object], names: Collection[str]
) -> Mapping[str, object]:
    """Return the settings without those of these vectors, which the plan no longer has."""
    if not names:
        return collection_config
    kept = dict(collection_config)
    for part in ("vectors", "sparse_vectors"):
        vectors = kept.get(part)
        if not isinstance(vectors, Mapping):
            continue
        kept[part] = {name: value for name, value in vectors.items() if name not in names}
        if part == "vectors" and "" in names and "" not in vectors:
            # They are those of the unnamed vector itself.
            del kept[part]
    return kept
