"""The SQL that makes a role with the least rights a pipeline needs.

Streaming takes the REPLICATION attribute; the copy and the second look at single rows take SELECT.
A role without CREATE on the database that does not own the tables cannot make the publication, so
the script makes it, and the role is left with nothing that changes the database.

Source: PostgreSQL documentation, "Logical Replication", Security; "GRANT"; "CREATE PUBLICATION".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ConfigError
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import column_list, qualified, quote_ident
from cdc_sync.postgres.publication import Wanted, create_publication_sql

#: The role that is proposed where a superuser is connected.
DEFAULT_ROLE: Final = "cdc_sync"
_LONGEST_NAME_BYTES: Final = 63


@dataclass(frozen=True, slots=True)
class Read:
    """What a pipeline reads of a table: the columns of the copy, those of its row filter too."""

    table: Table
    columns: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether that is every column."""
        return {column.name for column in self.table.columns} <= set(self.columns)


_STANDBY_SNAPSHOT_SINCE: Final = 160000
_FACTS: Final = """
SELECT current_database()::text, current_user::text,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
       EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_replication')
"""
_ROLE: Final = "SELECT FROM pg_roles WHERE rolname = %s"
_ROW_SECURITY: Final = """
SELECT n.nspname::text, c.relname::text
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = ANY (%s::oid[]) AND c.relrowsecurity ORDER BY 1, 2
"""


def role_script(
    conn: PgConnection,
    source: SourceSettings,
    reads: Sequence[Read],
    wanted: Sequence[Wanted],
    *,
    role: str | None = None,
    row_filters: Mapping[int, str] | None = None,
    published: bool = False,
    also_read: Sequence[str] = (),
) -> str:
    """Return the script, to be run by a superuser in the pipeline's database.

    ``role`` defaults to the connected one, or to :data:`DEFAULT_ROLE` if that is a superuser.
    ``wanted`` and ``row_filters`` are what the publication is to hold, unless it is ``published``
    already. ``also_read`` are further objects with their privileges, as they stand in GRANT.

    Raises :class:`~cdc_sync.errors.SourceError` when the catalog cannot be read, and
    :class:`ConfigError` for what is no name of a role.
    """
    try:
        facts = conn.execute(_FACTS).fetchone()
        assert facts is not None
        database, user, superuser, on_rds = facts
        name = role or (DEFAULT_ROLE if superuser else user)
        if not 0 < len(name.encode()) <= _LONGEST_NAME_BYTES:
            raise ConfigError("The name of a role has 1 to 63 bytes.", "Give --sql-role a name.")
        found = conn.execute(_ROLE, (name,)).fetchone()
        oids = [relation[0] for read in reads for relation in relations(read.table)]
        hidden = conn.execute(_ROW_SECURITY, (oids,)).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, "reading what the role needs") from exc
    grantee = quote_ident(name)
    parts = [
        _head(database),
        _role(grantee, exists=found is not None, on_rds=on_rds),
        _grants(grantee, database, reads, also_read),
    ]
    if hidden:
        parts.append(_beyond_policies(grantee, [qualified(*relation) for relation in hidden]))
    if not published:
        statement = create_publication_sql(
            source.publication,
            wanted,
            server_version=conn.info.server_version,
            row_filters=row_filters,
        )
        parts.append(_publication(statement))
    # A line break in the name would end the comment.
    if conn.info.server_version >= _STANDBY_SNAPSHOT_SINCE and grantee.isprintable():
        parts.append(_standby_snapshot(grantee))
    return "\n\n".join(parts) + "\n"


def relations(table: Table) -> list[tuple[int, str, str, bool]]:
    """Return the relations that are read of a table, itself and its leaves: OID, schema, name, and
    whether rows are read from its own blocks."""
    own = any(leaf.oid == table.oid for leaf in table.leaves)
    found = [(table.oid, table.schema, table.name, own)]
    found += [(x.oid, x.schema, x.name, True) for x in table.leaves if x.oid != table.oid]
    return found


def _head(database: str) -> str:
    where = " ".join(database.split())
    return (
        "-- The least rights that cdc-sync needs. Run this as a superuser, or as whoever may do\n"
        f"-- what it says, in database {where}."
    )


def _role(grantee: str, *, exists: bool, on_rds: bool) -> str:
    lines = [
        "-- REPLICATION reads the changes of every published table of the cluster, whatever the",
        "-- grants on it: keep the role for this, and its password out of the command line.",
    ]
    verb = "ALTER" if exists else "CREATE"
    if on_rds:
        lines += [f"{verb} ROLE {grantee} LOGIN;", f"GRANT rds_replication TO {grantee};"]
    else:
        lines.append(f"{verb} ROLE {grantee} LOGIN REPLICATION;")
    if not exists:
        lines.append(r"-- Then give it a password, in psql: \password followed by its name.")
    return "\n".join(lines)


def _grants(grantee: str, database: str, reads: Sequence[Read], also_read: Sequence[str]) -> str:
    schemas = {read.table.schema for read in reads}
    # Functions of pgvector are called by the schema it is in.
    schemas |= {column.type.base.schema for read in reads for column in read.table.columns}
    schemas -= {"pg_catalog", "information_schema"}
    lines = [f"GRANT CONNECT ON DATABASE {quote_ident(database)} TO {grantee};"]
    lines += [f"GRANT USAGE ON SCHEMA {quote_ident(s)} TO {grantee};" for s in sorted(schemas)]
    for read in reads:
        lines += [grant(read, relation, grantee) for relation in relations(read.table)]
    lines += [f"GRANT {privileges} TO {grantee};" for privileges in also_read]
    if any(len(relations(read.table)) > 1 for read in reads):
        lines.append("-- Partitions that come later need the same: they are read one by one.")
    if not all(read.whole for read in reads):
        lines.append(
            "-- Only the columns that are taken; ctid, the place of a row, is how the copy is cut."
        )
    return "\n".join(lines)


def grant(
    read: Read,
    relation: tuple[int, str, str, bool],
    grantee: str,
    missing: Sequence[str] | None = None,
) -> str:
    """Return the GRANT that lets a role, quoted already, read a relation of a table; of its columns
    only those that are ``missing``, if given."""
    _, schema, name, blocks = relation
    what = ""
    if missing is not None:
        what = f" ({column_list(list(missing))})"
    elif not read.whole:
        what = f" ({column_list([*(['ctid'] if blocks else []), *read.columns])})"
    return f"GRANT SELECT{what} ON {qualified(schema, name)} TO {grantee};"


def _beyond_policies(grantee: str, names: Sequence[str]) -> str:
    listed = "\n".join(f"--   {' '.join(name.split())}" for name in names)
    return (
        "-- Row level security would hide rows from the copy that the stream sends all the same:\n"
        f"{listed}\nALTER ROLE {grantee} BYPASSRLS;"
    )


def _publication(statement: str) -> str:
    return (
        "-- CREATE PUBLICATION takes ownership of the tables and CREATE on the database. The role\n"
        "-- needs neither: once the publication is there, it is only used. Make it before the\n"
        "-- slot, so before cdc-sync runs. Tables that are added to the configuration later must\n"
        "-- be added to it too (ALTER PUBLICATION ... ADD TABLE, as its owner).\n"
        f"{statement}"
    )


def _standby_snapshot(grantee: str) -> str:
    return (
        "-- Not needed, but it helps: the server can then drop the WAL that it kept for a window\n"
        "-- of the copy right after it, and not only some seconds later.\n"
        f"-- GRANT EXECUTE ON FUNCTION pg_catalog.pg_log_standby_snapshot() TO {grantee};"
    )
