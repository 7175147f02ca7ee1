"""Presets: options for the tables of other libraries, by which their own Qdrant stores read the
points.

The layouts were read from, and tested against, the versions in :data:`KNOWN`; docs/presets.md says
what each becomes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from cdc_sync.errors import ConfigError
from cdc_sync.mapping.column_options import selects
from cdc_sync.mapping.decoding import describe
from cdc_sync.mapping.keys import quoted, sql_name
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import Part, PayloadIndexType, VectorKind
from cdc_sync.mapping.planner import vector_kind
from cdc_sync.mapping.table import Table
from cdc_sync.mapping.vector_indexes import vector_indexes
from cdc_sync.mapping.vectors import declared_dimension

PresetName: TypeAlias = Literal["langchain", "llamaindex", "vecs"]

#: The versions whose tables the presets know.
KNOWN: Final[Mapping[PresetName, str]] = {
    "langchain": "langchain-postgres 0.0.19 (PGVector and PGVectorStore) and langchain-community",
    "llamaindex": "llama-index-vector-stores-postgres 0.9.0",
    "vecs": "vecs 0.4.5",
}

#: Of ``langchain_pg_embedding``: to which LangChain collection a row belongs.
LANGCHAIN_COLLECTION: Final = "collection_id"

_TEXT: Final = frozenset({"text", "varchar"})
_JSON: Final = frozenset({"json", "jsonb"})
_UUID: Final = frozenset({"uuid"})
_VECTOR: Final = frozenset({"vector", "halfvec"})
_NAMES: Final = {
    _TEXT: "text or varchar",
    _JSON: "json or jsonb",
    _UUID: "uuid",
    _VECTOR: "vector or halfvec",
}
_Layout: TypeAlias = Mapping[str, frozenset[str]]

_PGVECTOR: Final[_Layout] = {
    LANGCHAIN_COLLECTION: _UUID,
    "embedding": _VECTOR,
    "document": _TEXT,
    "cmetadata": _JSON,
}
#: ``PGVectorStore`` of langchain-postgres: one table a store, under its default column names.
_PGVECTORSTORE: Final[_Layout] = {
    "langchain_id": _UUID | _TEXT,
    "content": _TEXT,
    "embedding": _VECTOR,
}
_LLAMAINDEX: Final[_Layout] = {
    "node_id": _TEXT,
    "text": _TEXT,
    "metadata_": _JSON,
    "embedding": _VECTOR,
}
_VECS: Final[_Layout] = {"id": _TEXT, "vec": _VECTOR, "metadata": _JSON}


@dataclass(frozen=True, slots=True)
class Expansion:
    """The options that a preset stands for, and sentences about what the operator may not
    expect."""

    options: PlanOptions
    warnings: tuple[str, ...] = ()


def expand(
    preset: PresetName, table: Table, options: PlanOptions, collection: bytes | None = None
) -> Expansion:
    """Return the options of a table with what its preset adds; what the configuration says of a
    column or a vector is kept.

    ``collection`` is the uuid, in binary format, of the LangChain collection whose rows are taken
    (None: those of all). Raises :class:`ConfigError` if the table has not the preset's layout, or
    the configuration contradicts it.
    """
    if options.payload_key is not None:
        raise ConfigError(
            f"{table.qualified_name}: `preset` and `payload_key` both say how the payload is built",
            "Take out one of them.",
        )
    if preset == "llamaindex":
        return _llamaindex(table, options)
    if preset == "vecs":
        return Expansion(_vecs(table, options))
    if _is_pgvectorstore(table):
        if collection is not None:
            raise no_collections(table)
        return Expansion(_pgvectorstore(table, options))
    return Expansion(_pgvector(table, options, collection))


def no_collections(table: Table) -> ConfigError:
    """Return the error for `preset_collection` where a table holds one store only."""
    return ConfigError(
        f"{table.qualified_name}: `preset_collection` is for the tables of LangChain's PGVector, "
        f"which have a column {LANGCHAIN_COLLECTION}",
        "Leave `preset_collection` out: all rows of this table belong together.",
    )


def vector_column(preset: PresetName) -> str:
    """Return the column that holds the embeddings."""
    return "vec" if preset == "vecs" else "embedding"


def lacks_dimension(preset: PresetName, table: Table, options: PlanOptions) -> bool:
    """Tell whether the column of the embeddings has no dimension, as LangChain makes it unless told
    one, and neither the configuration gives one nor the indexes, all the same."""
    name = vector_column(preset)
    column = next((column for column in table.columns if column.name == name), None)
    return (
        column is not None
        and vector_kind(column.type) is VectorKind.DENSE
        and declared_dimension(column.type) is None
        and name not in options.dimensions
        and len(set(vector_indexes(table, name).dimensions.values())) != 1
    )


# -- layouts


def _is_pgvectorstore(table: Table) -> bool:
    names = {column.name for column in table.columns}
    return not names & {LANGCHAIN_COLLECTION, "document", "cmetadata"} and bool(
        names & {"langchain_id", "langchain_metadata", "content"}
    )


def _pgvector(table: Table, options: PlanOptions, collection: bytes | None) -> PlanOptions:
    """``langchain_pg_embedding``, of langchain-postgres (key ``id``) or langchain-community (key
    ``uuid``)."""
    _check_layout("langchain", table, options, _PGVECTOR)
    found = _complete(
        options,
        rename={"document": "page_content", "cmetadata": "metadata"},
        vector="embedding",
        # The library takes a missing text for an empty one, and none for an error.
        drop_nulls=("document",),
    )
    if collection is None:
        field = options.rename.get(LANGCHAIN_COLLECTION, LANGCHAIN_COLLECTION)
        return dataclasses.replace(found, indexes={field: PayloadIndexType.UUID})
    found = dataclasses.replace(found, only=(LANGCHAIN_COLLECTION, collection))
    if LANGCHAIN_COLLECTION in options.rename:
        return found
    return _hide(found, [LANGCHAIN_COLLECTION])


def _pgvectorstore(table: Table, options: PlanOptions) -> PlanOptions:
    """A table of ``PGVectorStore``: metadata in columns of their own, the rest in a json column if
    there is one."""
    _check_layout("langchain", table, options, _PGVECTORSTORE)
    found = _complete(options, rename={"content": "page_content"}, vector="embedding")
    if "langchain_id" not in options.rename:
        found = _hide(found, ["langchain_id"])
    parts: dict[str, Part] = dict(found.parts)
    by_name = {column.name: column for column in table.columns}
    if "langchain_metadata" in by_name:
        _check_types("langchain", table, {"langchain_metadata": _JSON})
        parts["langchain_metadata"] = Part.MEMBERS
    return dataclasses.replace(
        _leave_out(found, table, ["content_tsv"]),
        parts=parts,
        other_columns=Part.MEMBER,
        object_field="metadata",
    )


def _llamaindex(table: Table, options: PlanOptions) -> Expansion:
    """``data_<name>`` of ``PGVectorStore``: the node's text is in a column of its own, its metadata
    and all else in a json column.

    The library finds nodes by point id; it can be their node id only where that is the key.
    """
    _check_layout("llamaindex", table, options, _LLAMAINDEX)
    key = options.key
    if key is None and table.identity_columns == ("node_id",):
        # Then no other column is in the messages of deleted rows.
        key = ("node_id",)
    by_node = key is not None and tuple(key) == ("node_id",)
    found = _complete(options, rename={}, vector="embedding", metric="cosine")
    found = _leave_out(found, table, ["text_search_tsv", *([] if by_node else ["node_id"])])
    names = tuple(key) if key is not None else table.primary_key
    found = _hide(found, [name for name in names if name not in options.rename])
    found = dataclasses.replace(
        found,
        key=key,
        parts={**found.parts, "text": Part.NODE_TEXT, "metadata_": Part.MEMBERS},
        indexes={"doc_id": PayloadIndexType.KEYWORD},
    )
    return Expansion(found, () if by_node else (_by_row_id(table),))


def _by_row_id(table: Table) -> str:
    name = sql_name(table)
    index = quoted(f"{table.name}_node_id")
    return (
        f"{table.qualified_name}: points have the ids of rows, so LlamaIndex finds its nodes by "
        "similarity and by metadata but not by node id. Where node ids are unique, make them the "
        f"key: ALTER TABLE {name} ALTER node_id SET NOT NULL; CREATE UNIQUE INDEX {index} ON "
        f"{name} (node_id); ALTER TABLE {name} REPLICA IDENTITY USING INDEX {index};"
    )


def _vecs(table: Table, options: PlanOptions) -> PlanOptions:
    """A table of the schema ``vecs``: metadata becomes the payload."""
    _check_layout("vecs", table, options, _VECS)
    found = _complete(options, rename={"id": "_id"}, vector="vec")
    return dataclasses.replace(found, parts={"metadata": Part.MEMBERS})


# -- options


def _complete(
    options: PlanOptions,
    *,
    rename: Mapping[str, str],
    vector: str,
    metric: str | None = None,
    drop_nulls: tuple[str, ...] = (),
) -> PlanOptions:
    """Return the options with what all presets add; what is configured comes first."""
    unnamed = options.unnamed_vector
    if unnamed is None and vector not in options.rename:
        unnamed = vector
    metrics = options.metrics if metric is None else {vector: metric, **options.metrics}
    nulls = options.drop_nulls
    missing = tuple(name for name in drop_nulls if not selects(nulls, name))
    if missing:
        nulls = (*(nulls if isinstance(nulls, tuple) else ()), *missing)
    return dataclasses.replace(
        options,
        rename={**rename, **options.rename},
        unnamed_vector=unnamed,
        metrics=metrics,
        drop_nulls=nulls,
        text_uuids=True,
    )


def _hide(options: PlanOptions, names: Sequence[str]) -> PlanOptions:
    """Have columns read, but not written."""
    columns = options.columns
    if columns is not None:
        columns = (*columns, *(name for name in names if name not in columns))
    return dataclasses.replace(
        options,
        columns=columns,
        exclude=tuple(name for name in options.exclude if name not in names),
        parts={**options.parts, **dict.fromkeys(names, Part.HIDDEN)},
    )


def _leave_out(options: PlanOptions, table: Table, names: Sequence[str]) -> PlanOptions:
    """Leave columns out, those the table has and the configuration does not ask for."""
    existing = {column.name for column in table.columns}
    asked = {*options.rename, *options.exclude, *(options.columns or ())}
    more = [name for name in names if name in existing and name not in asked]
    return dataclasses.replace(options, exclude=(*options.exclude, *more))


# -- checks


def _check_layout(preset: PresetName, table: Table, options: PlanOptions, layout: _Layout) -> None:
    existing = {column.name for column in table.columns}
    missing = [name for name in layout if name not in existing]
    if missing:
        raise ConfigError(
            f"{table.qualified_name}: preset {preset} needs a column {missing[0]} "
            f"({_NAMES.get(layout[missing[0]], 'uuid or text')}), which the table does not have. "
            f"It looked for {', '.join(layout)}, and found {', '.join(sorted(existing))}",
            f"The preset knows the tables of {KNOWN[preset]}. For others say what columns become "
            "with `rename`, `exclude` and `payload_key`.",
        )
    left_out = [
        name
        for name in layout
        if name in options.exclude or (options.columns is not None and name not in options.columns)
        if name not in (LANGCHAIN_COLLECTION, "node_id", "id", "langchain_id")
    ]
    if left_out:
        setting = "exclude" if left_out[0] in options.exclude else "columns"
        raise ConfigError(
            f"{table.qualified_name}: `{setting}` leaves out column {left_out[0]}, which preset "
            f"{preset} reads",
            "Take it in, or take out `preset`.",
        )
    _check_types(preset, table, layout)


def _check_types(preset: PresetName, table: Table, layout: _Layout) -> None:
    types = {column.name: column.type for column in table.columns}
    for name, wanted in layout.items():
        base = types[name].base
        ours = base.is_pgvector if wanted is _VECTOR else base.schema == "pg_catalog"
        if not ours or base.name not in wanted:
            raise ConfigError(
                f"{table.qualified_name}: column {name} is of type {describe(types[name])}; preset "
                f"{preset} expects {_NAMES.get(wanted, 'uuid or text')}",
                f"The preset knows the tables of {KNOWN[preset]}.",
            )
