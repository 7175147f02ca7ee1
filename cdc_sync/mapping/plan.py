"""The plan of a table: what each column becomes in Qdrant. Built once per table, compiled into
encoders once."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from cdc_sync.mapping.table import PgType

#: Value of a constant payload field: integers within int64, floats finite.
Constant: TypeAlias = str | int | float | bool | None


class Metric(enum.Enum):
    """Distance metrics, by Qdrant's names."""

    COSINE = "Cosine"
    EUCLID = "Euclid"
    DOT = "Dot"
    MANHATTAN = "Manhattan"


class VectorKind(enum.Enum):
    """Shapes of vectors."""

    DENSE = "dense"
    SPARSE = "sparse"
    MULTI = "multi"


class Datatype(enum.Enum):
    """Storage types of vector components, by Qdrant's names."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"
    TURBO4 = "turbo4"
    TURBO8 = "turbo8"
    TURBO16 = "turbo16"


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """A vector of the collection. ``name`` is "" for the unnamed vector. ``size`` is None for
    sparse vectors.

    ``hnsw_m`` and ``hnsw_ef_construct`` are set when the source index has other than default
    values.
    """

    name: str
    kind: VectorKind
    size: int | None
    metric: Metric
    datatype: Datatype = Datatype.FLOAT32
    hnsw_m: int | None = None
    hnsw_ef_construct: int | None = None


class IdScheme(enum.Enum):
    """How a key becomes a point id."""

    INTEGER = "integer"  #: one integer column: the number itself if >= 0, else hashed
    UUID = "uuid"  #: one uuid column: the uuid itself
    HASHED = "hashed"  #: anything else: UUIDv5 of a canonical text of the key
    #: As Qdrant's migration tool computes them; see ``migration_ids.py``.
    MIGRATION = "qdrant-migration"
    MIGRATION_UUID = "qdrant-migration-uuid"
    MIGRATION_HEX = "qdrant-migration-hex"
    TEXT_UUID = "text uuid"  #: one text column: the uuid it spells, else hashed


class PayloadIndexType(enum.Enum):
    """Payload index types, by Qdrant's names."""

    KEYWORD = "keyword"
    INTEGER = "integer"
    FLOAT = "float"
    BOOL = "bool"
    DATETIME = "datetime"
    UUID = "uuid"
    TEXT = "text"
    GEO = "geo"


@dataclass(frozen=True, slots=True)
class PayloadIndex:
    """An index on a payload field; on one of the object ``parent`` if that is given."""

    field: str
    type: PayloadIndexType
    parent: str | None = None


class Part(enum.Enum):
    """What a column is to the object of the payload that several columns make together."""

    MEMBERS = "members"  #: a json object whose members are the object's
    MEMBER = "member"  #: one field of the object; it wins over a member of the same name
    NODE_TEXT = "node text"  #: the text of the node that LlamaIndex's ``_node_content`` describes
    HIDDEN = "hidden"  #: nothing: it is read, and not written


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """What becomes of one column: a vector, a payload field, ``part`` of an object (with the
    object's field, if it is one), or only part of the key (all None)."""

    name: str
    type: PgType
    field: str | None = None
    vector: VectorPlan | None = None
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class TablePlan:
    """What becomes of one table.

    ``columns`` is the order of raw rows (the order in which the copy selects them). ``key`` holds
    positions in ``columns``, in key order. ``namespace`` is part of every id and is written to the
    payload field ``_table`` when several tables share a collection. ``shard`` ("i/n") is written to
    the payload field ``_shard`` when this pipeline keeps a part of the rows only. ``drop_nulls``
    leaves NULLs out of the payload, ``numeric_as_string`` writes numeric values as strings always:
    of all columns, or of these. ``payload_key`` is the payload field that holds all others but
    those two as one object. ``object_field`` is the field of the object that columns with a
    ``part`` make; None: its fields are fields of the payload. ``constants`` are fields and values
    that every point has.
    ``collection_config`` holds settings of a collection that is created, by Qdrant's REST names.
    ``inherited``: rows of the tables that inherit from it are taken too.
    """

    oid: int
    schema: str
    table: str
    collection: str
    columns: tuple[ColumnPlan, ...]
    key: tuple[int, ...]
    id_scheme: IdScheme
    namespace: str | None = None
    payload_indexes: tuple[PayloadIndex, ...] = ()
    drop_nulls: bool | tuple[str, ...] = False
    numeric_as_string: bool | tuple[str, ...] = False
    payload_key: str | None = None
    object_field: str | None = None
    constants: tuple[tuple[str, Constant], ...] = ()
    shard: str | None = None
    inherited: bool = False
    # Not compared: it decides how a collection is made, not what its points are.
    collection_config: Mapping[str, object] = field(default_factory=dict, compare=False)

    @property
    def qualified_name(self) -> str:
        """``schema.table``, unquoted: for people, logs and metric labels."""
        return f"{self.schema}.{self.table}"

    @property
    def vectors(self) -> tuple[VectorPlan, ...]:
        """The collection's vectors, in column order."""
        return tuple(column.vector for column in self.columns if column.vector is not None)

    @property
    def marks(self) -> tuple[tuple[str, str], ...]:
        """Payload fields and values, beside all others, that tell the table's points from others in
        the collection: those of its namespace and of its shard, as far as it has them."""
        found = ((NAMESPACE_FIELD, self.namespace), (SHARD_FIELD, self.shard))
        return tuple((name, value) for name, value in found if value is not None)


#: The payload field that holds :attr:`TablePlan.namespace`.
NAMESPACE_FIELD = "_table"
#: The payload field that holds :attr:`TablePlan.shard`.
SHARD_FIELD = "_shard"
