"""Publications: reading, checking and creating them. One that we did not create is never changed.

Source: PostgreSQL documentation, "CREATE PUBLICATION", "pg_publication_tables".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import psycopg

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.catalog import ServerInfo
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import column_list, qualified, quote_ident

#: A table and the columns wanted of it (None: all that logical replication can carry).
Wanted: TypeAlias = tuple[Table, Sequence[str] | None]

_COLUMN_LISTS_SINCE: Final = 150000
_GENERATED_SINCE: Final = 180000


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table of a publication: the columns its messages carry, and the SQL of its row filter.

    ``oid`` is the table that messages name: of a partitioned table the root if ``via_root``, else
    each leaf.
    """

    oid: int
    columns: tuple[str, ...]
    row_filter: str | None


@dataclass(frozen=True, slots=True)
class Publication:
    """A publication as the server has it."""

    name: str
    all_tables: bool
    inserts: bool
    updates: bool
    deletes: bool
    truncates: bool
    via_root: bool
    tables: dict[int, PublishedTable]


_PUBLICATION: Final = """
SELECT pubname, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot
  FROM pg_publication WHERE pubname = %s
"""

# Before 15 there are neither column lists nor row filters, before 18 no generated columns.
_TABLES: Final = """
SELECT c.oid,
       ARRAY(SELECT a.attname::text FROM pg_attribute a
              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                AND {listed} ORDER BY a.attnum),
       {row_filter}
  FROM pg_publication_tables p
  JOIN pg_namespace n ON n.nspname = p.schemaname
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
 WHERE p.pubname = %s
"""
_TABLES_14: Final = _TABLES.format(listed="a.attgenerated = ''", row_filter="NULL::text")
_TABLES_15: Final = _TABLES.format(
    listed="a.attname = ANY (p.attnames) AND a.attgenerated = ''", row_filter="p.rowfilter"
)
_TABLES_18: Final = _TABLES.format(listed="a.attname = ANY (p.attnames)", row_filter="p.rowfilter")


def read_publication(conn: PgConnection, name: str) -> Publication | None:
    """Read a publication by its name; None when there is none. Raises :class:`SourceError`."""
    version = conn.info.server_version
    query = _TABLES_14
    if version >= _COLUMN_LISTS_SINCE:
        query = _TABLES_18 if version >= _GENERATED_SINCE else _TABLES_15
    try:
        row = conn.execute(_PUBLICATION, (name,)).fetchone()
        if row is None:
            return None
        tables = {
            oid: PublishedTable(oid, tuple(columns), row_filter)
            for oid, columns, row_filter in conn.execute(query, (name,)).fetchall()
        }
    except psycopg.Error as exc:
        raise translate(exc, f"reading publication {name}") from exc
    published, all_tables, inserts, updates, deletes, truncates, via_root = row
    return Publication(
        published, all_tables, inserts, updates, deletes, truncates, via_root, tables
    )


# Rows of the catalog that say what a publication does with a table: the publication itself, the
# table's own entry, those of tables that inherit from it, and of its schema. xmin changes with
# every ALTER, also one that is undone. Entries of partitions mean nothing where the root is
# published.
_IDENTITIES: Final = """
WITH RECURSIVE tree (root, oid) AS (
    SELECT wanted.oid, wanted.oid FROM unnest(%(oids)s::oid[]) AS wanted (oid)
    UNION
    SELECT tree.root, i.inhrelid
      FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid
      JOIN pg_class parent ON parent.oid = tree.oid AND parent.relkind <> 'p')
SELECT tree.root,
       concat_ws(',', min(concat_ws('/', p.oid, p.xmin)),
                 string_agg(nullif(concat_ws('/', r.oid, r.xmin), ''), ';'
                            ORDER BY r.oid){schemas})
  FROM pg_publication p CROSS JOIN tree
  LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = tree.oid
 WHERE p.pubname = %(name)s
 GROUP BY tree.root
"""
_SCHEMAS: Final = """,
                 (SELECT string_agg(concat_ws('/', s.oid, s.xmin), ';' ORDER BY s.oid)
                    FROM pg_publication_namespace s JOIN pg_publication sp ON sp.oid = s.pnpubid
                    JOIN pg_class c ON c.relnamespace = s.pnnspid
                   WHERE sp.pubname = %(name)s AND c.oid = tree.root)"""


def publication_identities(conn: PgConnection, name: str, oids: Sequence[int]) -> dict[int, str]:
    """Return by table what changes whenever the publication is altered for it. Empty when there is
    no such publication. Raises :class:`SourceError`."""
    schemas = _SCHEMAS if conn.info.server_version >= _COLUMN_LISTS_SINCE else ""
    query = _IDENTITIES.format(schemas=schemas)
    try:
        rows = conn.execute(query.encode(), {"oids": list(oids), "name": name}).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, f"reading publication {name}") from exc
    return {int(oid): str(identity) for oid, identity in rows}


def known_identity(recorded: str) -> str:
    """An identity on record as :func:`publication_identities` gives it: to begin with whatever had
    no entry left an empty one."""
    parts = (";".join(filter(None, part.split(";"))) for part in recorded.split(","))
    return ",".join(filter(None, parts))


def create_publication_sql(
    name: str,
    tables: Sequence[Wanted],
    *,
    server_version: int = 180000,
    row_filters: Mapping[int, str] | None = None,
) -> str:
    """Return the statement that creates the publication (one line, but for row filters with
    comments). ``row_filters`` are SQL by the OID of the table.
    """
    filters = row_filters or {}
    entries = []
    generated = False
    for table, columns in tables:
        entries.append(publication_entry(table, columns, server_version, filters.get(table.oid)))
        generated = generated or (
            _column_list(table, columns, server_version) is None
            and _identity_needs_generated(table, server_version)
        )
    options = ["publish_via_partition_root = true"]
    if generated:
        options.append("publish_generated_columns = stored")
    return (
        f"CREATE PUBLICATION {quote_ident(name)} FOR TABLE {', '.join(entries)}"
        f" WITH ({', '.join(options)});"
    )


def publication_entry(
    table: Table,
    columns: Sequence[str] | None,
    server_version: int,
    row_filter: str | None = None,
) -> str:
    """Return a table as it stands in CREATE PUBLICATION and ALTER PUBLICATION ... ADD TABLE.

    It gets a column list only when less than all is wanted; the replica identity's columns are
    always in it, since the application's updates fail otherwise. Postgres 14 has no column lists.
    """
    entry = _relation(table)
    listed = _column_list(table, columns, server_version)
    if listed is not None:
        entry += f" ({column_list(listed)})"
    return entry if row_filter is None else f"{entry} WHERE {in_parentheses(row_filter)}"


def _relation(table: Table) -> str:
    return table.only + qualified(table.schema, table.name)


def in_parentheses(predicate: str) -> str:
    """Return a predicate in parentheses, of which a comment at its end does not take one away."""
    return f"({predicate}\n)" if "--" in predicate else f"({predicate})"


def _column_list(
    table: Table, columns: Sequence[str] | None, server_version: int
) -> list[str] | None:
    if columns is None or server_version < _COLUMN_LISTS_SINCE:
        return None
    wanted = {*columns, *table.identity_columns}
    listable = [
        column.name
        for column in table.columns
        if not column.generated or (column.generated == "s" and server_version >= _GENERATED_SINCE)
    ]
    listed = [name for name in listable if name in wanted]
    sent_anyway = [column.name for column in table.columns if not column.generated]
    # Under FULL the identity is the whole row: a list would make updates fail.
    return None if listed == sent_anyway or table.replica_identity == "f" else listed


def _identity_needs_generated(table: Table, server_version: int) -> bool:
    """Whether updates fail unless generated columns are published (18 and later, under FULL)."""
    return (
        server_version >= _GENERATED_SINCE
        and table.replica_identity == "f"
        and any(column.generated == "s" for column in table.columns)
    )


def create_publication(
    conn: PgConnection,
    name: str,
    tables: Sequence[Wanted],
    server: ServerInfo,
    row_filters: Mapping[int, str] | None = None,
) -> None:
    """Create the publication. ``row_filters`` are SQL by the OID of the table.

    Raises :class:`SourceError`: SOURCE_PERMISSION with the exact SQL and who must run it when the
    role may not; PUBLICATION_UNUSABLE when the server refuses the statement. One that another
    process created meanwhile is left as it is: check it afterwards.
    """
    statement = create_publication_sql(
        name, tables, server_version=server.version_num, row_filters=row_filters
    )
    _unless_done(conn, "create", name, statement)


def add_to_publication(
    conn: PgConnection,
    name: str,
    tables: Sequence[Wanted],
    server: ServerInfo,
    row_filters: Mapping[int, str] | None = None,
) -> None:
    """Add tables to a publication that we have created. ``row_filters`` are SQL by the OID of the
    table. Errors as :func:`create_publication`.

    Changes that were made before are not sent: the tables must be copied under a snapshot that
    sees every transaction which was open at that time.
    """
    if not tables:
        return
    filters = row_filters or {}
    entries = ", ".join(
        publication_entry(table, columns, server.version_num, filters.get(table.oid))
        for table, columns in tables
    )
    statement = f"ALTER PUBLICATION {quote_ident(name)} ADD TABLE {entries};"
    _unless_done(conn, "alter", name, statement)


def publish_anew(
    conn: PgConnection,
    name: str,
    wanted: Wanted,
    server: ServerInfo,
    row_filter: str | None = None,
) -> None:
    """Publish a table of a publication that we have created by other columns, in one transaction.
    The connection is in autocommit mode and idle. Errors as :func:`create_publication`.

    Changes of transactions that were open at that time may be sent by the columns of before.
    """
    table, columns = wanted
    entry = publication_entry(table, columns, server.version_num, row_filter)
    statements = (
        f"ALTER PUBLICATION {quote_ident(name)} DROP TABLE {_relation(table)};",
        f"ALTER PUBLICATION {quote_ident(name)} ADD TABLE {entry};",
    )
    try:
        with conn.transaction():
            for statement in statements:
                conn.execute(statement.encode())
    except psycopg.Error as exc:
        raise _refused(conn, "alter", name, " ".join(statements), exc) from exc


def _unless_done(
    conn: PgConnection, verb: Literal["create", "alter"], name: str, statement: str
) -> None:
    """Run a statement, unless another process has done the same meanwhile."""
    try:
        conn.execute(statement.encode())
    except psycopg.errors.DuplicateObject:
        return
    except psycopg.Error as exc:
        raise _refused(conn, verb, name, statement, exc) from exc


def _refused(
    conn: PgConnection,
    verb: Literal["create", "alter"],
    name: str,
    statement: str,
    exc: psycopg.Error,
) -> SourceError:
    """What becomes of a statement that the server refuses."""
    if isinstance(exc, psycopg.errors.InsufficientPrivilege):
        return SourceError(
            ErrorKind.SOURCE_PERMISSION,
            f"role {conn.info.user} may not {verb} publication {name}: {exc.diag.message_primary}",
            publication_remedy(statement, conn.info.dbname),
        )
    error = translate(exc, f"trying to {verb} publication {name}")
    if error.kind in (ErrorKind.PROTOCOL, ErrorKind.TABLE_UNUSABLE):
        return SourceError(ErrorKind.PUBLICATION_UNUSABLE, error.message, statement)
    return error


def drop_publication(conn: PgConnection, name: str) -> bool:
    """Drop a publication that we have created; False when there is none. Raises
    :class:`SourceError`."""
    try:
        conn.execute(f"DROP PUBLICATION {quote_ident(name)}".encode())
    except psycopg.errors.UndefinedObject:
        return False
    except psycopg.Error as exc:
        raise translate(exc, f"dropping publication {name}") from exc
    return True


def publication_remedy(statement: str, database: str) -> str:
    """Say who must run the statement."""
    return (
        f"As the owner of the tables (with CREATE on database {quote_ident(database)})"
        f" or a superuser, run:\n{statement}"
    )


def check_publication(
    publication: Publication,
    wanted: Sequence[Wanted],
    server: ServerInfo,
    row_filters: Mapping[int, str | None] | None = None,
) -> None:
    """Check that the publication carries every change of every wanted column (R37, R34, R36).

    ``row_filters`` are the filters it must have, as the server prints them, by the OID of the table
    (None: it must have none; a table that is not among them may have any). Raises
    :class:`SourceError` PUBLICATION_UNUSABLE with the SQL that mends it.
    """
    name = quote_ident(publication.name)
    missing = [
        operation
        for operation, published in (
            ("insert", publication.inserts),
            ("update", publication.updates),
            ("delete", publication.deletes),
            ("truncate", publication.truncates),
        )
        if not published
    ]
    if missing:
        raise _unusable(
            f"publication {publication.name} does not publish {' and '.join(missing)}",
            f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate');",
        )
    filters = row_filters or {}
    for table, columns in wanted:
        published = publication.tables.get(table.oid)
        row_filter = published.row_filter if published is not None else None
        _check_table(
            publication,
            table,
            columns,
            server,
            filters.get(table.oid, row_filter),
        )


def _check_table(
    publication: Publication,
    table: Table,
    columns: Sequence[str] | None,
    server: ServerInfo,
    row_filter: str | None,
) -> None:
    name = quote_ident(publication.name)
    if table.partitioned and not publication.via_root:
        raise _unusable(
            f"publication {publication.name} sends changes of the partitioned table"
            f" {table.qualified_name} under the names of its partitions",
            f"ALTER PUBLICATION {name} SET (publish_via_partition_root = true);",
        )
    published = publication.tables.get(table.oid)
    if published is None:
        entry = publication_entry(table, None, server.version_num, row_filter)
        raise _unusable(
            f"publication {publication.name} does not have table {table.qualified_name}",
            f"ALTER PUBLICATION {name} ADD TABLE {entry};"
            " (for a partition of a partitioned table, name that table instead)",
        )
    sendable = [column.name for column in table.columns if not column.generated]
    needed = {*(sendable if columns is None else columns), *table.identity_columns}
    absent = [
        column.name
        for column in table.columns
        if column.name in needed and column.name not in published.columns
    ]
    if absent:
        raise _unusable(
            f"publication {publication.name} does not publish {column_list(absent)}"
            f" of {table.qualified_name}",
            _columns_remedy(publication, table, absent, server, columns, row_filter),
        )
    if published.row_filter != row_filter:
        raise filter_mismatch(publication, table, columns, server, row_filter)


def filter_mismatch(
    publication: Publication,
    table: Table,
    columns: Sequence[str] | None,
    server: ServerInfo,
    row_filter: str | None,
) -> SourceError:
    """Return the error for a publication that filters the rows of a table otherwise than is wanted,
    with the SQL that mends it."""
    published = publication.tables[table.oid]
    found = "no rows" if published.row_filter is None else f"rows by {published.row_filter}"
    wanted = "none" if row_filter is None else "by " + " ".join(row_filter.split())
    return _unusable(
        f"publication {publication.name} filters {found} of {table.qualified_name}, and the"
        f" configuration wants {wanted}",
        _readd(publication, table, columns, server, row_filter),
    )


def _readd(
    publication: Publication,
    table: Table,
    columns: Sequence[str] | None,
    server: ServerInfo,
    row_filter: str | None,
) -> str:
    """Return the SQL that publishes a table anew."""
    name = quote_ident(publication.name)
    if publication.all_tables:
        return f"It is FOR ALL TABLES, which cannot filter rows: DROP PUBLICATION {name};"
    entry = publication_entry(table, columns, server.version_num, row_filter)
    return (
        f"ALTER PUBLICATION {name} DROP TABLE {_relation(table)};"
        f" ALTER PUBLICATION {name} ADD TABLE {entry};"
    )


def _columns_remedy(
    publication: Publication,
    table: Table,
    absent: list[str],
    server: ServerInfo,
    columns: Sequence[str] | None,
    row_filter: str | None,
) -> str:
    name = quote_ident(publication.name)
    generated = {column.name: column.generated for column in table.columns if column.generated}
    never = [
        column
        for column in absent
        if generated.get(column) == "v"
        or (column in generated and server.version_num < _GENERATED_SINCE)
    ]
    if never:
        return (
            f"Leave {column_list(never)} out with tables.columns: this server does not send"
            " generated columns of that kind."
        )
    if any(column in generated for column in absent):
        return f"ALTER PUBLICATION {name} SET (publish_generated_columns = stored);"
    return _readd(publication, table, columns, server, row_filter)


def publication_warnings(publication: Publication, wanted: Sequence[Wanted]) -> list[str]:
    """Return what works but costs more than it must, one sentence each (R88)."""
    warnings = []
    if publication.all_tables:
        warnings.append(
            f"Publication {publication.name} is FOR ALL TABLES: changes of every table are sent and"
            " thrown away here, and a new table without replica identity refuses updates. Name the"
            " tables instead."
        )
    else:
        others = len(publication.tables.keys() - {table.oid for table, _ in wanted})
        if others:
            warnings.append(
                f"Publication {publication.name} has {others} more tables than this pipeline takes;"
                " their changes are sent and thrown away."
            )
    for table, columns in wanted:
        published = publication.tables.get(table.oid)
        if published is None or columns is None:
            continue
        extra = [
            column
            for column in published.columns
            if column not in columns and column not in table.identity_columns
        ]
        if extra:
            warnings.append(
                f"Publication {publication.name} sends {column_list(extra)} of"
                f" {table.qualified_name}, which the pipeline does not take; a column list"
                " (Postgres 15 and later) would leave them out."
            )
    return warnings


def _unusable(message: str, remedy: str) -> SourceError:
    return SourceError(ErrorKind.PUBLICATION_UNUSABLE, message, remedy)
