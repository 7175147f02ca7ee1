"""Types of Postgres, resolved down to their base: what ``pg_type`` and its neighbours say."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import psycopg

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.postgres.connect import PgConnection, translate

_TYPE: Final = """
SELECT n.nspname, t.typname, t.typtype::text, t.typbasetype, t.typtypmod, t.typelem, t.typrelid,
       t.typsend <> 0,
       t.typelem <> 0 AND t.typsubscript = 'array_subscript_handler'::regproc,
       (SELECT r.rngsubtype FROM pg_range r
         WHERE r.rngtypid = t.oid OR r.rngmultitypid = t.oid),
       (SELECT e.extname FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
         WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
           AND d.refclassid = 'pg_extension'::regclass)
  FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
 WHERE t.oid = %s
"""

_FIELDS: Final = """
SELECT a.attname, a.atttypid, a.atttypmod FROM pg_attribute a
 WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

#: One unit of money as the integer that the binary format carries: 100 where money has two digits.
_MONEY_UNIT: Final = "SELECT encode(cash_send((1)::money), 'hex')"
_MONEY_OID: Final = 790

_KINDS: Final = {
    "b": TypeKind.BASE,
    "c": TypeKind.COMPOSITE,
    "d": TypeKind.DOMAIN,
    "e": TypeKind.ENUM,
    "r": TypeKind.RANGE,
    "m": TypeKind.MULTIRANGE,
    "p": TypeKind.PSEUDO,
}


class TypeResolver:
    """Resolves types by OID over one connection, and remembers them.

    OIDs of extension types differ between databases and change when the extension is created anew,
    so nothing is known beforehand (R13); :meth:`forget` makes the next :meth:`resolve` look again.
    """

    def __init__(self, conn: PgConnection) -> None:
        self._conn = conn
        self._types: dict[int, PgType] = {}

    def resolve(self, oid: int, typmod: int = -1) -> PgType:
        """Return the type with everything below it.

        ``typmod`` is the column's. An array hands it on to its element (``vector(3)[]``); a domain
        has its own; ``money`` gets the number of fraction digits of ``lc_monetary`` instead. Raises
        :class:`SourceError` TABLE_UNUSABLE when there is no such type (any more).
        """
        type_ = self._types.get(oid)
        if type_ is None:
            try:
                type_ = self._types[oid] = self._read(oid)
            except psycopg.Error as exc:
                raise translate(exc, f"reading type {oid}") from exc
        return type_ if typmod == -1 else _with_typmod(type_, typmod)

    def forget(self, oid: int) -> None:
        """Forget the type and all that contain it."""
        self._types = {
            key: type_ for key, type_ in self._types.items() if not _contains(type_, oid)
        }

    def _read(self, oid: int) -> PgType:
        row = self._conn.execute(_TYPE, (oid,)).fetchone()
        if row is None:
            raise SourceError(
                ErrorKind.TABLE_UNUSABLE,
                f"there is no type with OID {oid} in this database",
                "Start cdc-sync again: the type was dropped while its table was being read.",
            )
        (
            schema,
            name,
            typtype,
            base,
            base_typmod,
            element,
            relation,
            sends,
            array,
            subtype,
            extension,
        ) = row
        kind = TypeKind.ARRAY if array else _KINDS[typtype]
        type_ = PgType(oid, schema, name, kind, extension=extension, has_binary_output=sends)
        if kind is TypeKind.ARRAY:
            # From 18 on the extension owns the array type too; the element says whose it is.
            return replace(type_, element=self.resolve(element), extension=None)
        if kind is TypeKind.DOMAIN:
            return replace(type_, element=self.resolve(base, base_typmod), typmod=base_typmod)
        if kind in (TypeKind.RANGE, TypeKind.MULTIRANGE):
            return replace(type_, element=self.resolve(subtype))
        if kind is TypeKind.COMPOSITE:
            fields = self._conn.execute(_FIELDS, (relation,)).fetchall()
            return replace(
                type_, fields=tuple((name, self.resolve(*rest)) for name, *rest in fields)
            )
        if oid == _MONEY_OID:
            return replace(type_, typmod=self._money_digits())
        return type_

    def _money_digits(self) -> int:
        row = self._conn.execute(_MONEY_UNIT).fetchone()
        assert row is not None
        return len(str(int(row[0], 16))) - 1


def _with_typmod(type_: PgType, typmod: int) -> PgType:
    if type_.kind is TypeKind.ARRAY and type_.element is not None:
        return replace(type_, typmod=typmod, element=_with_typmod(type_.element, typmod))
    return replace(type_, typmod=typmod)


def _below(type_: PgType) -> tuple[PgType, ...]:
    fields = tuple(field for _, field in type_.fields)
    return fields if type_.element is None else (*fields, type_.element)


def _contains(type_: PgType, oid: int) -> bool:
    return type_.oid == oid or any(_contains(below, oid) for below in _below(type_))


def sends_binary(type_: PgType) -> bool:
    """Whether the type and everything below it has a binary output function."""
    return type_.has_binary_output and all(map(sends_binary, _below(type_)))
