"""The plan of a table: what each column becomes in Qdrant. Built once per table, compiled into
encoders once."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cdc_sync.mapping.table import PgType


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
    """An index on a payload field."""

    field: str
    type: PayloadIndexType


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """What becomes of one column: a vector, a payload field, or only part of the key (both
    None)."""

    name: str
    type: PgType
    field: str | None = None
    vector: VectorPlan | None = None


@dataclass(frozen=True, slots=True)
class TablePlan:
    """What becomes of one table.

    ``columns`` is the order of raw rows (the order in which the copy selects them). ``key`` holds
    positions in ``columns``, in key order. ``namespace`` is part of every id and is written to the
    payload field ``_table`` when several tables share a collection. ``drop_nulls`` leaves NULL
    columns out of the payload; ``numeric_as_string`` writes numeric values as strings always.
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
    drop_nulls: bool = False
    numeric_as_string: bool = False

    @property
    def qualified_name(self) -> str:
        """``schema.table``, unquoted: for people, logs and metric labels."""
        return f"{self.schema}.{self.table}"

    @property
    def vectors(self) -> tuple[VectorPlan, ...]:
        """The collection's vectors, in column order."""
        return tuple(column.vector for column in self.columns if column.vector is not None)


#: The payload field that holds :attr:`TablePlan.namespace`.
NAMESPACE_FIELD = "_table"
