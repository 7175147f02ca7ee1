"""Types and plans for tests of the mapping: short ways to write them, and their look-up in a real
catalog.
"""

from __future__ import annotations

from typing import Final

import psycopg

from cdc_sync.mapping.ids import id_scheme
from cdc_sync.mapping.plan import ColumnPlan, TablePlan
from cdc_sync.mapping.table import PgType, TypeKind

Connection = psycopg.Connection[tuple[object, ...]]

SESSION_SETTINGS: Final = (
    "-c datestyle=ISO -c timezone=UTC -c intervalstyle=iso_8601 "
    "-c extra_float_digits=3 -c bytea_output=hex"
)


def core(name: str, typmod: int = -1) -> PgType:
    """Return a type of ``pg_catalog``."""
    return PgType(0, "pg_catalog", name, typmod=typmod)


def pgvector(name: str, dimension: int = -1, schema: str = "public") -> PgType:
    """Return a type of the pgvector extension."""
    return PgType(90001, schema, name, extension="vector", typmod=dimension)


def array(element: PgType, typmod: int = -1) -> PgType:
    """Return the array type of an element type."""
    return PgType(
        0, element.schema, f"_{element.name}", TypeKind.ARRAY, element=element, typmod=typmod
    )


def domain(base: PgType, typmod: int = -1) -> PgType:
    """Return a domain."""
    return PgType(0, "public", f"d_{base.name}", TypeKind.DOMAIN, element=base, typmod=typmod)


def composite(*fields: tuple[str, PgType]) -> PgType:
    """Return a composite type."""
    return PgType(0, "public", "composed", TypeKind.COMPOSITE, fields=fields)


def range_of(subtype: PgType) -> PgType:
    """Return a range type."""
    return PgType(0, "pg_catalog", f"{subtype.name}range", TypeKind.RANGE, element=subtype)


def multirange_of(subtype: PgType) -> PgType:
    """Return a multirange type."""
    return PgType(
        0, "pg_catalog", f"{subtype.name}multirange", TypeKind.MULTIRANGE, element=subtype
    )


def table_plan(
    *columns: ColumnPlan,
    key: tuple[int, ...] = (0,),
    namespace: str | None = None,
    drop_nulls: bool = False,
    numeric_as_string: bool = False,
) -> TablePlan:
    """Return a plan of ``public.docs``."""
    return TablePlan(
        oid=1,
        schema="public",
        table="docs",
        collection="docs",
        columns=columns,
        key=key,
        id_scheme=id_scheme([columns[position].type for position in key], namespace),
        namespace=namespace,
        drop_nulls=drop_nulls,
        numeric_as_string=numeric_as_string,
    )


_LOOK_UP: Final = """
SELECT n.nspname, t.typname, t.typtype, t.typcategory, t.typelem, t.typbasetype, t.typtypmod,
       t.typrelid, t.typsend <> 0, t.typsubscript::text, e.extname,
       coalesce(r.rngsubtype, m.rngsubtype, 0)::int8
FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
LEFT JOIN pg_range r ON r.rngtypid = t.oid
LEFT JOIN pg_range m ON m.rngmultitypid = t.oid
LEFT JOIN pg_depend d ON d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
LEFT JOIN pg_extension e ON e.oid = d.refobjid
WHERE t.oid = %s
"""
_ATTRIBUTES: Final = """
SELECT attname, atttypid::int8, atttypmod FROM pg_attribute
WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_KINDS: Final = {
    "b": TypeKind.BASE,
    "c": TypeKind.COMPOSITE,
    "d": TypeKind.DOMAIN,
    "e": TypeKind.ENUM,
    "r": TypeKind.RANGE,
    "m": TypeKind.MULTIRANGE,
    "p": TypeKind.PSEUDO,
}


def look_up(connection: Connection, oid: int, typmod: int = -1) -> PgType:
    """Return a type of a live database with everything below it."""
    row = connection.execute(_LOOK_UP, (oid,)).fetchone()
    assert row is not None
    schema, name, typtype, category, element, base, base_typmod = row[:7]
    relation, binary, _subscript, extension, subtype = row[7:]
    kind = _KINDS[str(typtype)]
    if kind is TypeKind.BASE and category == "A":
        kind = TypeKind.ARRAY
    below = {
        TypeKind.ARRAY: element,
        TypeKind.DOMAIN: base,
        TypeKind.RANGE: subtype,
        TypeKind.MULTIRANGE: subtype,
    }.get(kind)
    fields = []
    if kind is TypeKind.COMPOSITE:
        for attribute, type_oid, modifier in connection.execute(_ATTRIBUTES, (relation,)):
            field = look_up(connection, int(str(type_oid)), int(str(modifier)))
            fields.append((str(attribute), field))
    return PgType(
        oid=oid,
        schema=str(schema),
        name=str(name),
        kind=kind,
        element=None if below is None else look_up(connection, int(str(below))),
        fields=tuple(fields),
        extension=None if extension is None else str(extension),
        typmod=typmod if typmod >= 0 else int(str(base_typmod)),
        has_binary_output=bool(binary),
    )
