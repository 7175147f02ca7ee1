"""Plans and raw rows for tests of the sinks: a few column types, encoded as Postgres sends them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import orjson

from cdc_sync.mapping.plan import (
    ColumnPlan,
    Datatype,
    IdScheme,
    Metric,
    PayloadIndex,
    PayloadIndexType,
    TablePlan,
    VectorKind,
    VectorPlan,
)
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.rows import RawValue, Row, Unchanged

INT8 = PgType(20, "pg_catalog", "int8")
TEXT = PgType(25, "pg_catalog", "text")
JSONB = PgType(3802, "pg_catalog", "jsonb")


def pgvector(name: str, size: int = -1) -> PgType:
    """A type of the pgvector extension."""
    return PgType(70000, "public", name, extension="vector", typmod=size)


def array_of(element: PgType) -> PgType:
    """An array type."""
    return PgType(
        70001, "public", f"_{element.name}", TypeKind.ARRAY, element, typmod=element.typmod
    )


BIT = PgType(1560, "pg_catalog", "bit", typmod=8)


def int8(value: int) -> bytes:
    return struct.pack(">q", value)


def text(value: str) -> bytes:
    return value.encode()


def jsonb(value: object) -> bytes:
    return b"\x01" + orjson.dumps(value)


def vector(*components: float) -> bytes:
    return struct.pack(f">Hh{len(components)}f", len(components), 0, *components)


def halfvec(*components: float) -> bytes:
    return struct.pack(f">Hh{len(components)}e", len(components), 0, *components)


def sparsevec(size: int, components: Mapping[int, float]) -> bytes:
    head = struct.pack(">iii", size, len(components), 0)
    indices = struct.pack(f">{len(components)}i", *components)
    return head + indices + struct.pack(f">{len(components)}f", *components.values())


def vector_array(rows: Sequence[bytes]) -> bytes:
    if not rows:
        return struct.pack(">iii", 0, 0, 70000)
    items = b"".join(struct.pack(">i", len(row)) + row for row in rows)
    return struct.pack(">iiiii", 1, 0, 70000, len(rows), 1) + items


def bits(value: str) -> bytes:
    return struct.pack(">i", len(value)) + int(value, 2).to_bytes(len(value) // 8, "big")


def column(name: str, type_: PgType) -> ColumnPlan:
    """A payload column."""
    return ColumnPlan(name, type_, field=name)


def dense(
    name: str,
    size: int,
    metric: Metric = Metric.EUCLID,
    *,
    vector_name: str | None = None,
    m: int | None = None,
) -> ColumnPlan:
    """A ``vector(size)`` column."""
    plan = VectorPlan(
        name if vector_name is None else vector_name, VectorKind.DENSE, size, metric, hnsw_m=m
    )
    return ColumnPlan(name, pgvector("vector", size), vector=plan)


def plan_of(
    collection: str,
    columns: Sequence[ColumnPlan],
    *,
    namespace: str | None = None,
    indexes: Sequence[PayloadIndex] = (),
) -> TablePlan:
    """A plan whose first column is the key."""
    return TablePlan(
        oid=1,
        schema="public",
        table="items",
        collection=collection,
        columns=tuple(columns),
        key=(0,),
        id_scheme=IdScheme.INTEGER,
        namespace=namespace,
        payload_indexes=tuple(indexes),
    )


#: id, title, a document that may be UNCHANGED, and two vectors that may be UNCHANGED or NULL.
COLUMNS = (
    column("id", INT8),
    column("title", TEXT),
    column("doc", JSONB),
    dense("small", 2),
    dense("large", 3),
)


def items_plan(collection: str, namespace: str | None = None) -> TablePlan:
    """The plan that most tests use."""
    indexes = (PayloadIndex("title", PayloadIndexType.KEYWORD),)
    return plan_of(collection, COLUMNS, namespace=namespace, indexes=indexes)


def item(
    key: int,
    title: str | Unchanged | None = "t",
    doc: object = None,
    small: Sequence[float] | Unchanged | None = (1.0, 2.0),
    large: Sequence[float] | Unchanged | None = (3.0, 4.0, 5.0),
) -> Row:
    """A row of :func:`items_plan`. ``doc`` None is SQL NULL."""
    return [
        int8(key),
        text(title) if isinstance(title, str) else title,
        doc if doc is None or isinstance(doc, Unchanged) else jsonb(doc),
        _vector(small),
        _vector(large),
    ]


def _vector(components: Sequence[float] | Unchanged | None) -> RawValue:
    if components is None or isinstance(components, Unchanged):
        return components
    return vector(*components)


#: One vector of every kind that a collection may have.
EVERY_KIND = (
    column("id", INT8),
    dense("cosine", 2, Metric.COSINE, m=32),
    dense("dot", 2, Metric.DOT),
    dense("manhattan", 2, Metric.MANHATTAN),
    ColumnPlan(
        "half",
        pgvector("halfvec", 2),
        vector=VectorPlan("half", VectorKind.DENSE, 2, Metric.EUCLID, Datatype.FLOAT16),
    ),
    ColumnPlan(
        "bits",
        BIT,
        vector=VectorPlan("bits", VectorKind.DENSE, 8, Metric.MANHATTAN, Datatype.UINT8),
    ),
    ColumnPlan(
        "sparse",
        pgvector("sparsevec", 100),
        vector=VectorPlan("sparse", VectorKind.SPARSE, None, Metric.DOT),
    ),
    ColumnPlan(
        "multi",
        array_of(pgvector("vector", 2)),
        vector=VectorPlan("multi", VectorKind.MULTI, 2, Metric.COSINE),
    ),
)
