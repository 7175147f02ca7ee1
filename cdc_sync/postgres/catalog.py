"""The catalog: what server this is, which tables it has and how they look."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import psycopg

from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.table import Column, Index, IndexColumn, Leaf, Table
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import parse_name, qualified, quote_ident
from cdc_sync.postgres.pg_types import TypeResolver
from cdc_sync.postgres.watch import definitions

__all__ = [
    "ServerInfo",
    "TypeResolver",
    "find_table",
    "qualified",
    "quote_ident",
    "read_table",
    "server_info",
]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What server and database a connection leads to.

    ``version_num`` is as in ``server_version_num`` (180006). ``system_identifier`` is given when
    the cluster is made and shared by its standbys and backups; ``timeline`` grows with every
    promotion.
    """

    version_num: int
    system_identifier: str
    timeline: int
    database: str
    in_recovery: bool

    @property
    def major(self) -> int:
        """Major version."""
        return self.version_num // 10000


_SERVER: Final = """
SELECT current_setting('server_version_num')::int4,
       (SELECT system_identifier::text FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery()
            THEN (SELECT timeline_id FROM pg_control_checkpoint())
            -- The control file learns of a promotion at a checkpoint, WAL file names at once.
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
                 )::bit(32)::int4 END,
       current_database(),
       pg_is_in_recovery()
"""


def server_info(conn: PgConnection) -> ServerInfo:
    """Read what server this is. Raises :class:`SourceError`."""
    try:
        row = conn.execute(_SERVER).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "reading the server's identity") from exc
    assert row is not None
    return ServerInfo(*row)


_FIND: Final = """
SELECT c.oid, c.relkind::text, c.relpersistence::text, n.nspname, c.relname
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relname = %s AND n.nspname = ANY (%s)
 ORDER BY array_position(%s, n.nspname)
 LIMIT 1
"""

_ALL_TABLES: Final = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
   AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
 ORDER BY 1, 2 LIMIT 5000
"""

#: Why a relation of this kind cannot be followed.
_REFUSED_KINDS: Final = {
    "v": "is a view; logical replication carries tables only. Name the table below it.",
    "m": "is a materialized view; logical replication carries tables. Name the table below it.",
    "f": "is a foreign table; its rows are on another server. Point source.url at that server.",
    "S": "is a sequence.",
    "c": "is a composite type.",
    "t": "is a TOAST table.",
    "i": "is an index. Name its table.",
    "I": "is an index. Name its table.",
}
_REFUSED_PERSISTENCE: Final = {
    "u": "is unlogged: its changes never reach the write-ahead log.",
    "t": "is a temporary table: its changes never reach the write-ahead log.",
}


def find_table(conn: PgConnection, name: str) -> Table:
    """Find a table by its name as in SQL (``t``, ``s.t``, ``"Odd ""name"``), along the role's
    search path. Else, where nothing is quoted, one whose name is exactly that (``my-docs``).

    Raises :class:`SourceError` TABLE_UNUSABLE when there is none (naming similar ones) or when it
    is something that logical replication does not carry, and :class:`ConfigError` when the name is
    not a name.
    """
    try:
        try:
            parts = parse_name(name)
        except ValueError as exc:
            if _find_verbatim(conn, name) is None:
                raise ConfigError(
                    f"tables.name {name!r} is not a table's name",
                    'Write it as in SQL: docs, app.docs, or in quotes: app."Docs".',
                ) from exc
            parts = (name,)
        return _find(conn, name, parts)
    except psycopg.Error as exc:
        raise translate(exc, f"looking for table {name}") from exc


def _find_verbatim(conn: PgConnection, name: str) -> tuple[Any, ...] | None:
    """Look for a table whose name is exactly that, as Qdrant's migration tool does."""
    if '"' in name or "\0" in name:
        return None
    schemas = _search_path(conn)
    return conn.execute(_FIND, (name, schemas, schemas)).fetchone()


def _find(conn: PgConnection, name: str, parts: tuple[str, ...]) -> Table:
    if len(parts) == 3 and parts[0] != conn.info.dbname:
        raise ConfigError(
            f"table {name} is in another database than source.url names ({conn.info.dbname})",
            "A pipeline follows one database; make another pipeline for the other one.",
        )
    schemas = [parts[-2]] if len(parts) > 1 else _search_path(conn)
    row = conn.execute(_FIND, (parts[-1], schemas, schemas)).fetchone()
    if row is None:
        row = _find_verbatim(conn, name)
    if row is None:
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"there is no table {name} in database {conn.info.dbname}",
            _did_you_mean(conn, parts, schemas),
        )
    oid, kind, persistence, schema, relation = row
    full_name = qualified(schema, relation)
    _refuse(full_name, kind, persistence)
    if schema in ("pg_catalog", "information_schema"):
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"{full_name} is a system table",
            "Name a table of your own; logical replication does not carry system tables.",
        )
    return read_table(conn, oid)


def _refuse(full_name: str, kind: str, persistence: str) -> None:
    if kind in _REFUSED_KINDS:
        what, _, remedy = _REFUSED_KINDS[kind].partition(". ")
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"{full_name} {what.rstrip('.')}",
            remedy or "Name a table.",
        )
    if persistence in _REFUSED_PERSISTENCE:
        remedy = "Name a permanent table."
        if persistence == "u":
            remedy = f"ALTER TABLE {full_name} SET LOGGED;"
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"{full_name} {_REFUSED_PERSISTENCE[persistence].rstrip('.')}",
            remedy,
        )


def _search_path(conn: PgConnection) -> list[str]:
    """Return the schemas of the role's own search path; our sessions have an empty one."""
    row = conn.execute(
        "SELECT pg_catalog.set_config('search_path', s.reset_val, false)"
        "  FROM pg_settings s WHERE s.name = 'search_path'"
    ).fetchone()
    assert row is not None
    try:
        row = conn.execute("SELECT pg_catalog.current_schemas(false)").fetchone()
    finally:
        if not conn.closed:
            conn.execute("SELECT pg_catalog.set_config('search_path', '', false)")
    assert row is not None
    return list(row[0])


def _did_you_mean(conn: PgConnection, parts: tuple[str, ...], schemas: list[str]) -> str:
    spelled: dict[str, str] = {}
    for schema, relation in conn.execute(_ALL_TABLES).fetchall():
        written = f"{_as_written(schema)}.{_as_written(relation)}"
        spelled.setdefault(f"{schema}.{relation}".lower(), written)
        spelled.setdefault(relation.lower(), written)
    wanted = [".".join(parts[-2:]).lower(), parts[-1].lower()]
    found = [
        spelled[match]
        for text in wanted
        for match in difflib.get_close_matches(text, spelled, n=3, cutoff=0.75)
    ]
    if found:
        return f"Did you mean {' or '.join(dict.fromkeys(found))}?"
    where = ", ".join(schemas) or "no schema (the search path is empty)"
    return (
        f"Searched in {where}. Write the schema too (schema.table), and quote names with capitals."
    )


def _as_written(name: str) -> str:
    """Quote a name only where SQL would read it differently without quotes."""
    try:
        return name if parse_name(name) == (name,) else quote_ident(name)
    except ValueError:
        return quote_ident(name)


_RELATION: Final = """
SELECT n.nspname, c.relname, c.relkind::text, c.relpersistence::text, c.relreplident::text,
       row_security_active(c.oid)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s
"""

_COLUMNS: Final = """
SELECT a.attname, a.attnum, a.atttypid, a.atttypmod, a.attnotnull, a.attgenerated::text,
       a.attstorage::text
  FROM pg_attribute a
 WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

#: Indexes of a table and, for a partitioned one, those that its leaves have on their own.
_INDEXES: Final = """
SELECT i.indrelid, c.relname, m.amname, i.indisunique, i.indisprimary, i.indisvalid,
       i.indimmediate, i.indisreplident, c.reloptions, pg_get_expr(i.indpred, i.indrelid),
       (SELECT array_agg(ARRAY[
                 a.attname::text, o.opcname::text,
                 CASE WHEN a.attname IS NULL
                      THEN pg_get_indexdef(i.indexrelid, k.position::int4, false) END
               ] ORDER BY k.position)
          FROM ROWS FROM (unnest(i.indkey::int2[]), unnest(i.indclass::oid[]))
               WITH ORDINALITY AS k(attnum, opclass, position)
          JOIN pg_opclass o ON o.oid = k.opclass
          LEFT JOIN pg_attribute a
            ON a.attrelid = i.indrelid AND a.attnum = k.attnum AND k.attnum > 0
         WHERE k.position <= i.indnkeyatts)
  FROM pg_index i
  JOIN pg_class c ON c.oid = i.indexrelid
  JOIN pg_am m ON m.oid = c.relam
 WHERE i.indislive
   AND (i.indrelid = %(table)s
        OR i.indrelid = ANY (%(leaves)s)
           AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = i.indexrelid))
 ORDER BY i.indrelid <> %(table)s, c.relname
"""

_LEAVES: Final = """
SELECT c.oid, n.nspname, c.relname, pg_relation_filenode(c.oid),
       pg_relation_size(c.oid) / current_setting('block_size')::int8,
       c.reltuples,
       CASE c.relreplident
         WHEN 'f' THEN ARRAY(SELECT a.attname::text FROM pg_attribute a
                              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
         ELSE ARRAY(SELECT a.attname::text
                      FROM pg_index i JOIN pg_attribute a
                        ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey::int2[])
                     WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
                       AND CASE c.relreplident WHEN 'd' THEN i.indisprimary
                                               WHEN 'i' THEN i.indisreplident ELSE false END)
       END,
       c.relkind::text, c.relpersistence::text
  FROM (WITH RECURSIVE tree (oid) AS (
          SELECT %(table)s::oid UNION
          SELECT i.inhrelid FROM pg_inherits i JOIN tree
              ON i.inhparent = tree.oid AND NOT i.inhdetachpending)
        SELECT oid FROM tree) tree
  JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind <> 'p'
 ORDER BY n.nspname, c.relname
"""


def read_table(conn: PgConnection, oid: int, types: TypeResolver | None = None) -> Table:
    """Read everything the mapping and the copy need to know about a table.

    Raises :class:`SourceError` TABLE_UNUSABLE when the table is gone, or has leaf partitions whose
    changes are not logged.
    """
    try:
        return _read(conn, oid, types or TypeResolver(conn))
    except psycopg.Error as exc:
        raise translate(exc, f"reading the definition of table {oid}") from exc


def _read(conn: PgConnection, oid: int, types: TypeResolver) -> Table:
    # First: if the table changes meanwhile, the next look finds it changed.
    definition = definitions(conn, [oid]).get(oid, "")
    row = conn.execute(_RELATION, (oid,)).fetchone()
    if row is None:
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"the table with OID {oid} is gone",
            "Remove it from the configuration, or create it again and start cdc-sync again.",
        )
    schema, name, kind, persistence, identity, row_security = row
    _refuse(qualified(schema, name), kind, persistence)
    columns = tuple(
        Column(column, attnum, types.resolve(type_oid, typmod), not_null, generated, storage)
        for column, attnum, type_oid, typmod, not_null, generated, storage in conn.execute(
            _COLUMNS, (oid,)
        ).fetchall()
    )
    leaves = _leaves(conn, oid)
    leaf_oids = [leaf.oid for leaf in leaves if leaf.oid != oid]
    found = conn.execute(_INDEXES, {"table": oid, "leaves": leaf_oids}).fetchall()
    own = [(_index(row), row[7]) for row in found if row[0] == oid]
    primary = next((index for index, _ in own if index.primary), None)
    return Table(
        oid=oid,
        schema=schema,
        name=name,
        partitioned=kind == "p",
        columns=columns,
        primary_key=_column_names(primary) if primary else (),
        replica_identity=identity,
        identity_columns=_identity(identity, columns, primary, own),
        indexes=_distinct(
            [index for index, _ in own],
            [(row[0], _index(row)) for row in found if row[0] != oid],
            leaves,
        ),
        leaves=leaves,
        deferrable_key=primary is not None and not primary.immediate,
        row_security=row_security,
        definition=definition,
    )


def _index(row: tuple[Any, ...]) -> Index:
    _, name, method, unique, primary, valid, immediate, _, options, predicate, columns = row
    return Index(
        name=name,
        method=method,
        columns=tuple(
            IndexColumn(column, opclass, expression) for column, opclass, expression in columns
        ),
        unique=unique,
        primary=primary,
        valid=valid,
        immediate=immediate,
        predicate=predicate,
        options=dict(option.split("=", 1) for option in options or ()),
    )


def _column_names(index: Index) -> tuple[str, ...]:
    return tuple(column.column for column in index.columns if column.column is not None)


def _identity(
    identity: str, columns: tuple[Column, ...], primary: Index | None, own: list[tuple[Index, bool]]
) -> tuple[str, ...]:
    """Return the columns of old-key tuples, as the server's relation cache decides them."""
    if identity == "f":
        return tuple(column.name for column in columns if not column.generated)
    if identity == "i":
        index = next((index for index, identifies in own if identifies and index.valid), None)
        return _column_names(index) if index else ()
    # A deferrable primary key is no replica identity.
    if identity == "d" and primary is not None and primary.valid and primary.immediate:
        return _column_names(primary)
    return ()


def _distinct(
    own: list[Index], of_leaves: list[tuple[int, Index]], leaves: Sequence[Leaf]
) -> tuple[Index, ...]:
    """Add the leaves' own indexes, each shape once; unique there says nothing about the whole."""

    def shape(index: Index) -> tuple[object, ...]:
        options = tuple(sorted(index.options.items()))
        return (index.method, index.columns, index.predicate, options, index.valid)

    names = {leaf.oid: f"{leaf.schema}.{leaf.name}" for leaf in leaves}
    known = {shape(index) for index in own}
    added: dict[tuple[object, ...], tuple[Index, set[int]]] = {}
    for oid, index in of_leaves:
        if shape(index) not in known:
            added.setdefault(shape(index), (index, set()))[1].add(oid)
    indexes = list(own)
    for index, having in added.values():
        first, *others = sorted(names[oid] for oid in having)
        more = f" and {len(others)} more" if others else ""
        relation = "" if having == set(names) else first + more
        indexes.append(replace(index, unique=False, primary=False, relation=relation))
    return tuple(indexes)


def _leaves(conn: PgConnection, oid: int) -> tuple[Leaf, ...]:
    leaves = []
    for row in conn.execute(_LEAVES, {"table": oid}).fetchall():
        leaf, schema, name, filenode, pages, rows, identity, leaf_kind, persistence = row
        _refuse(qualified(schema, name), leaf_kind, persistence)
        leaves.append(Leaf(leaf, schema, name, filenode, pages, rows, tuple(identity)))
    return tuple(leaves)
