"""What server, role and tables must offer before a pipeline starts; failures say what to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import psycopg

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.catalog import ServerInfo, server_info
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import column_list, qualified, quote_ident
from cdc_sync.postgres.publication import (
    Publication,
    Wanted,
    create_publication_sql,
    publication_remedy,
)
from cdc_sync.postgres.role_script import Read, grant, relations
from cdc_sync.postgres.slot import free_slots, validate_slot_name

OLDEST_VERSION: Final = 140000
#: From here on partitions that are attached are followed.
_PARTITIONS_SINCE: Final = 150000


def preflight_source(
    conn: PgConnection,
    source: SourceSettings,
    *,
    tables: Sequence[Table],
    slot_exists: bool,
    publication: Publication | None,
    wanted: Sequence[Wanted] | None = None,
    row_filters: Mapping[int, str] | None = None,
    columns_read: Mapping[int, Sequence[str]] | None = None,
) -> None:
    """Check everything that can be checked without changing anything.

    ``wanted`` (default: all columns of the tables) and ``row_filters``, by the OID of the table,
    are what a publication that is to be created will hold; ``columns_read``, by the OID too, the
    columns that the copy reads (default: all).

    Raises the first of :class:`SourceError`: SOURCE_SETTING (version, recovery, ``wal_level``,
    output plugins, free slots and senders), SOURCE_PERMISSION (REPLICATION, SELECT, USAGE, row
    level security, the right to create a missing publication), TABLE_UNUSABLE (replica identity).
    """
    validate_slot_name(source.slot)
    server = server_info(conn)
    check_server(conn, server)
    check_role(conn)
    if not slot_exists:
        check_room(conn)
    for table in tables:
        check_partitions(table, server)
        check_identity(table)
        check_readable(conn, table, (columns_read or {}).get(table.oid))
    if publication is None:
        entries = [(table, None) for table in tables] if wanted is None else wanted
        check_may_publish(conn, source, entries, row_filters)


def _setting(conn: PgConnection, name: str) -> str | None:
    # Unlike current_setting(), the view leaves out what the role may not see, instead of failing.
    row = _row(conn, "SELECT (SELECT setting FROM pg_settings WHERE name = %s)", (name,))
    return None if row[0] is None else str(row[0])


def _row(
    conn: PgConnection, query: str, parameters: tuple[str | int, ...] = ()
) -> tuple[object, ...]:
    try:
        row = conn.execute(query.encode(), parameters or None).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "checking the server") from exc
    assert row is not None
    return row


def check_server(conn: PgConnection, server: ServerInfo) -> None:
    """Check version, recovery, ``wal_level`` and the allowed output plugins (R64)."""
    if server.version_num < OLDEST_VERSION:
        raise _setting_error(
            f"this is Postgres {server.major}; cdc_sync needs 14 or later",
            "Upgrade the server.",
        )
    if server.in_recovery:
        raise _setting_error(
            "this server is a standby in recovery", "Connect to the primary: change source.url."
        )
    # From 19 on a server raises its WAL level by itself when a logical slot is made.
    level = _setting(conn, "effective_wal_level") or _setting(conn, "wal_level")
    if level != "logical" and server.major < 19:
        raise _setting_error(
            f"wal_level is {level}, which logical replication cannot use",
            "ALTER SYSTEM SET wal_level = logical; then restart Postgres. On managed services:"
            " rds.logical_replication = 1 (RDS), cloudsql.logical_decoding = on (Cloud SQL).",
        )
    allowed = _setting(conn, "output_plugin_libraries")
    if allowed is not None and "pgoutput" not in (name.strip() for name in allowed.split(",")):
        raise _setting_error(
            "output_plugin_libraries does not allow pgoutput",
            "ALTER SYSTEM SET output_plugin_libraries = 'pgoutput'; SELECT pg_reload_conf();",
        )


def _setting_error(message: str, remedy: str) -> SourceError:
    return SourceError(ErrorKind.SOURCE_SETTING, message, remedy)


def check_role(conn: PgConnection) -> None:
    """Check that the role may replicate. RDS grants that by membership."""
    row = _row(
        conn,
        "SELECT r.rolname::text, r.rolsuper OR r.rolreplication OR EXISTS ("
        " SELECT FROM pg_roles m WHERE m.rolname IN ('rds_replication', 'rds_superuser')"
        " AND pg_has_role(r.oid, m.oid, 'member')) FROM pg_roles r WHERE r.rolname = current_user",
    )
    role, allowed = str(row[0]), bool(row[1])
    if not allowed:
        raise SourceError(
            ErrorKind.SOURCE_PERMISSION,
            f"role {role} may not replicate",
            f"As a superuser, run: ALTER ROLE {quote_ident(role)} REPLICATION;"
            f" (on RDS: GRANT rds_replication TO {quote_ident(role)};)",
        )


def check_room(conn: PgConnection) -> None:
    """Check that a slot can be made and a WAL sender started."""
    slots, senders = free_slots(conn)
    for free, name, what in (
        (slots, "max_replication_slots", "replication slot"),
        (senders, "max_wal_senders", "WAL sender"),
    ):
        if free < 1:
            raise _setting_error(
                f"the server has no {what} left ({name} is {_setting(conn, name)})",
                f"Drop slots nobody uses (SELECT slot_name, active FROM pg_replication_slots;), or"
                f" ALTER SYSTEM SET {name} = 20; and restart Postgres.",
            )


def check_partitions(table: Table, server: ServerInfo) -> None:
    """Postgres 14 goes on without partitions that were attached while it was decoding: their rows
    are lost, and nothing says so (R35). Raises :class:`SourceError` TABLE_UNUSABLE."""
    if table.partitioned and server.version_num < _PARTITIONS_SINCE:
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"table {table.schema}.{table.name} is partitioned, and Postgres before 15 loses "
            "changes of partitions that are attached later",
            "Upgrade Postgres to 15 or later.",
        )


def check_identity(table: Table) -> None:
    """Refuse a table whose updates and deletes fail once it is published (R25)."""
    name = qualified(table.schema, table.name)
    if table.identity_columns:
        return
    remedy = (
        f"ALTER TABLE {name} ADD PRIMARY KEY (…); or, with a unique index on NOT NULL columns:"
        f" ALTER TABLE {name} REPLICA IDENTITY USING INDEX …;"
    )
    if table.replica_identity == "n" and table.primary_key and not table.deferrable_key:
        remedy = f"ALTER TABLE {name} REPLICA IDENTITY DEFAULT;"
    reason = "it has no primary key"
    if table.replica_identity == "n":
        reason = "its REPLICA IDENTITY is NOTHING"
    elif table.replica_identity == "i":
        reason = "the index of its REPLICA IDENTITY is gone or invalid"
    elif table.deferrable_key:
        reason = "its primary key is deferrable"
    raise SourceError(
        ErrorKind.TABLE_UNUSABLE,
        f"table {table.qualified_name} has no replica identity: {reason};"
        " once published, its updates and deletes would fail",
        remedy,
    )


#: By oid and number these functions give NULL for what is gone by now; by name they would fail.
_READABLE: Final = """
SELECT has_schema_privilege(c.relnamespace, 'USAGE'), has_table_privilege(c.oid, 'SELECT'),
       row_security_active(c.oid),
       ARRAY(SELECT a.attname::text FROM unnest(%s::text[]) WITH ORDINALITY AS taken (name, place)
               JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = taken.name
              WHERE NOT has_column_privilege(c.oid, a.attnum, 'SELECT') ORDER BY place)
  FROM pg_class c WHERE c.oid = %s::oid
"""


def check_readable(conn: PgConnection, table: Table, columns: Sequence[str] | None = None) -> None:
    """Check USAGE and SELECT on the table and its partitions; refuse hidden rows (R86).

    ``columns``: those that are read (default: all). SELECT on them and on ``ctid`` is enough.
    """
    role = quote_ident(str(_row(conn, "SELECT current_user::text")[0]))
    taken = [c.name for c in table.columns] if columns is None else list(columns)
    read = Read(table, tuple(taken))
    grants: list[str] = []
    unreadable: list[str] = []
    hidden = []
    for relation in relations(table):
        oid, schema, name, blocks = relation
        needed = ["ctid", *taken] if blocks else taken
        usage, select, row_security, missing = _readable(conn, oid, needed)
        if not usage:
            grants.append(f"GRANT USAGE ON SCHEMA {quote_ident(schema)} TO {role};")
        if not select and missing:
            some = len(missing) < len(needed)
            grants.append(grant(read, relation, role, missing if some and not read.whole else None))
            unreadable.append(
                f"{column_list(missing)} of {schema}.{name}" if some else f"{schema}.{name}"
            )
        elif not usage:
            unreadable.append(f"{schema}.{name}")
        if row_security:
            hidden.append(f"{schema}.{name}")
    user = conn.info.user
    if grants:
        raise SourceError(
            ErrorKind.SOURCE_PERMISSION,
            f"role {user} may not read {', '.join(unreadable)}",
            "As its owner, run:\n" + "\n".join(dict.fromkeys(grants)),
        )
    if hidden:
        raise SourceError(
            ErrorKind.SOURCE_PERMISSION,
            f"row level security applies to role {user} on {', '.join(hidden)}: the copy would"
            " miss rows that the stream sends",
            f"As a superuser, run: ALTER ROLE {role} BYPASSRLS;",
        )


def _readable(
    conn: PgConnection, oid: int, columns: Sequence[str]
) -> tuple[bool, bool, bool, list[str]]:
    """Whether the role may use the schema and read the table, whether rows are hidden from it, and
    which columns it may not read. What was dropped meanwhile is for the stream to notice."""
    try:
        row = conn.execute(_READABLE, (list(columns), oid)).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "checking what the role may read") from exc
    if row is None or row[1] is None:
        return True, True, False, []
    usage, select, row_security, missing = row
    return usage, select, row_security, missing


_MAY_PUBLISH: Final = """
SELECT current_user::text, has_database_privilege(current_database(), 'CREATE'),
       ARRAY(SELECT c.relname::text FROM pg_class c
              WHERE c.oid = ANY (%s::oid[]) AND NOT pg_has_role(c.relowner, 'USAGE'))
"""


def check_may_publish(
    conn: PgConnection,
    source: SourceSettings,
    wanted: Sequence[Wanted],
    row_filters: Mapping[int, str] | None = None,
) -> None:
    """Check that the role may create the publication, which is absent: CREATE, and ownership."""
    try:
        row = conn.execute(_MAY_PUBLISH, ([table.oid for table, _ in wanted],)).fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "checking the right to create a publication") from exc
    assert row is not None
    role, may_create, foreign = row
    if may_create and not foreign:
        return
    reason = f"does not own {', '.join(foreign)}" if foreign else "has no CREATE on the database"
    statement = create_publication_sql(
        source.publication,
        wanted,
        server_version=conn.info.server_version,
        row_filters=row_filters,
    )
    raise SourceError(
        ErrorKind.SOURCE_PERMISSION,
        f"publication {source.publication} does not exist, and role {role} may not create it:"
        f" it {reason}",
        publication_remedy(statement, conn.info.dbname),
    )
