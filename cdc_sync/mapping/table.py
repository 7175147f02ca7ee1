"""What the mapping needs to know about a source table: plain facts, read from the catalog by
``postgres/catalog.py``."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

#: Characters of the digest of the columns, with which a definition begins.
_DIGEST: Final = 32


class TypeKind(enum.Enum):
    """``pg_type.typtype``, with arrays told apart from other base types."""

    BASE = "base"
    ARRAY = "array"
    DOMAIN = "domain"
    ENUM = "enum"
    COMPOSITE = "composite"
    RANGE = "range"
    MULTIRANGE = "multirange"
    PSEUDO = "pseudo"


@dataclass(frozen=True, slots=True)
class PgType:
    """A Postgres type with everything below it resolved.

    ``element`` is the array's element, the domain's base type, or the (multi)range's subtype.
    ``fields`` are a composite's attributes. ``extension`` is the extension that owns the type
    ("vector", "postgis", "hstore", ...). ``typmod`` is what the column, or else the domain,
    declares (-1: nothing). ``has_binary_output`` is false if the type itself has no send function.
    """

    oid: int
    schema: str
    name: str
    kind: TypeKind = TypeKind.BASE
    element: PgType | None = None
    fields: tuple[tuple[str, PgType], ...] = ()
    extension: str | None = None
    typmod: int = -1
    has_binary_output: bool = True

    @property
    def base(self) -> PgType:
        """The type under all domains."""
        type_ = self
        while type_.kind is TypeKind.DOMAIN and type_.element is not None:
            type_ = type_.element
        return type_

    @property
    def is_pgvector(self) -> bool:
        """Whether this is a type of the pgvector extension (in whatever schema)."""
        return self.extension == "vector"


@dataclass(frozen=True, slots=True)
class Column:
    """A live column. ``generated`` is "" (no), "s" (stored) or "v" (virtual); ``storage`` is
    ``attstorage``."""

    name: str
    attnum: int
    type: PgType
    not_null: bool = False
    generated: str = ""
    storage: str = "p"


@dataclass(frozen=True, slots=True)
class IndexColumn:
    """A key column of an index: ``column`` is None for an expression, whose SQL is then in
    ``expression``."""

    column: str | None
    opclass: str
    expression: str | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """An index; ``options`` are its storage parameters (``m``, ``ef_construction``, ``lists``...).

    ``relation`` says, for people, which leaf partitions have it by themselves; "" for an index of
    the table, or of every leaf.
    """

    name: str
    method: str
    columns: tuple[IndexColumn, ...]
    unique: bool = False
    primary: bool = False
    valid: bool = True
    immediate: bool = True
    predicate: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    relation: str = ""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A relation that holds rows of the table: the table itself, or a leaf partition.

    ``pages`` is the actual size in blocks; ``estimated_rows`` the planner's estimate (-1: never
    analysed). ``identity_columns`` are those of the relation's own old-key tuples.
    """

    oid: int
    schema: str
    name: str
    relfilenode: int
    pages: int
    estimated_rows: float
    identity_columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """A table or partitioned table.

    ``replica_identity`` is "d", "n", "f" or "i"; ``identity_columns`` the columns that old-key
    tuples carry (all of them under "f", none under "n"). ``primary_key`` is in index order and
    empty when there is none. ``deferrable_key`` says that the primary key constraint is deferrable.
    ``row_security`` says that policies would apply to the current role. ``definition`` is not newer
    than the rest; compare it with :func:`redefined`.
    """

    oid: int
    schema: str
    name: str
    partitioned: bool
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    replica_identity: str
    identity_columns: tuple[str, ...]
    indexes: tuple[Index, ...]
    leaves: tuple[Leaf, ...]
    deferrable_key: bool = False
    row_security: bool = False
    definition: str = ""

    @property
    def qualified_name(self) -> str:
        """``schema.table``, unquoted: for people, logs and metric labels."""
        return f"{self.schema}.{self.name}"

    @property
    def children(self) -> tuple[Leaf, ...]:
        """The tables that inherit from it (partitions made by hand), when it is a plain one.

        Their changes come under their own names, and their keys and identities are their own.
        """
        if self.partitioned:
            return ()
        return tuple(leaf for leaf in self.leaves if leaf.oid != self.oid)

    @property
    def only(self) -> str:
        """``ONLY`` before the table's name in SQL, where it holds its rows by itself."""
        return "" if self.partitioned or self.children else "ONLY "


def may_lack_rows(before: str, after: str) -> bool:
    """Whether rows of a partitioned table may be gone without a message between two definitions
    (R34): a leaf partition is, or was attached again, or other files hold its rows (TRUNCATE, but
    VACUUM FULL too, and what rewrites rows)."""
    was, now = _parts(before), _parts(after)
    if was.leaves is None or now.leaves is None:
        return was.storage != now.storage
    return any(now.leaves.get(oid) != leaf for oid, leaf in was.leaves.items())


def attached_leaves(before: str, after: str) -> frozenset[int]:
    """OIDs of the leaf partitions of which rows may have come without a message between two
    definitions (R34): they were attached, or detached and attached again. Empty where a definition
    does not name them; :func:`redefined` is then true of such a change."""
    was, now = _parts(before).leaves, _parts(after).leaves
    if was is None or now is None:
        return frozenset()
    return frozenset(
        int(oid)
        for oid, leaf in now.items()
        if oid not in was or was[oid].partition("-")[0] != leaf.partition("-")[0]
    )


def redefined(before: str, after: str) -> bool:
    """Whether a table's columns changed between two definitions, or ALTER TABLE computed its rows
    anew.

    A definition is ``columns.storage.versions.labels.leaves``: the columns and partitions, the
    files that hold the rows, the transactions that last touched the columns' catalog entries,
    digests of the labels of enums and of the attributes of composites, by their OIDs, and of a
    partitioned table its leaves, each with what says when it was attached, and its file. What
    rewrites rows and keeps the columns (``ALTER COLUMN n TYPE int USING n * 2``) changes storage
    and versions at once; VACUUM FULL and TRUNCATE change only the files, SET DEFAULT and GRANT only
    the versions. A label that is added is in no row yet; one that is renamed is in rows that were
    written before. Partitions that come and go leave the columns, and the files of others, as they
    are; but where one definition does not name them, that of an older version of ours, they count.
    """
    was, now = _parts(before), _parts(after)
    return (
        was.columns != now.columns
        or (was.versions != now.versions and _is_stored_anew(was, now))
        or _relabelled(was.labels, now.labels)
        or ((was.leaves is None or now.leaves is None) and was.partitions != now.partitions)
    )


class _Parts(NamedTuple):
    columns: str
    partitions: str
    storage: str
    versions: str
    labels: str
    leaves: dict[str, str] | None


def _parts(definition: str) -> _Parts:
    columns, *others = definition.split(".")
    storage, versions, labels, *leaves = [*others, *[""] * (3 - len(others))]
    return _Parts(
        columns[:_DIGEST],
        columns[_DIGEST:],
        storage,
        versions,
        labels,
        _assigned(leaves[0]) if leaves else None,
    )


def _assigned(text: str) -> dict[str, str]:
    """``name=value``, separated by commas."""
    return dict(one.split("=") for one in text.split(",") if one)


def _is_stored_anew(was: _Parts, now: _Parts) -> bool:
    """Whether rows that were there are in other files now."""
    if was.leaves is None or now.leaves is None:
        return was.storage != now.storage
    return any(
        oid in now.leaves and now.leaves[oid].partition("-")[2] != leaf.partition("-")[2]
        for oid, leaf in was.leaves.items()
    )


def _relabelled(before: str, after: str) -> bool:
    """Whether a label that was there is another now, or a composite that was there has other
    attributes: ``oid=digest``, separated by commas."""
    now, known = _assigned(after), _assigned(before)
    return any(now.get(oid, digest) != digest for oid, digest in known.items())
