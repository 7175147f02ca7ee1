"""Preflight: what of a server, a role and its tables is refused before anything is made."""

from __future__ import annotations

import pytest

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.preflight import (
    check_readable,
    preflight_source,
)
from tests.support.fix_postgres import Database, PrivatePostgres
from tests.support.source_tables import source_settings


def test_preflight_of_the_least_privileged_role(database: Database) -> None:
    database.execute(
        "CREATE SCHEMA app; CREATE TABLE app.docs (id int PRIMARY KEY, tenant text);"
        "CREATE TABLE app.parts (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE app.part1 PARTITION OF app.parts FOR VALUES FROM (0) TO (9)"
    )
    role = database.create_cdc_role(["app.docs"])
    source = source_settings(role.url)
    with connect(source) as conn:
        docs, parts = find_table(conn, "app.docs"), find_table(conn, "app.parts")

        def attempt(*tables: Table) -> SourceError:
            with pytest.raises(SourceError) as caught:
                preflight_source(conn, source, tables=tables, slot_exists=False, publication=None)
            assert caught.value.kind is ErrorKind.SOURCE_PERMISSION
            return caught.value

        check_readable(conn, docs)
        error = attempt(docs)
        assert 'CREATE PUBLICATION "cdc_sync" FOR TABLE ONLY "app"."docs"' in error.remedy
        assert "does not own docs" in error.message
        assert f'GRANT SELECT ON "app"."parts" TO "{role.name}";' in attempt(parts).remedy
        database.execute(f"GRANT SELECT ON app.parts TO {role.name}")
        assert '"app"."part1"' in attempt(parts).remedy
        database.execute("ALTER TABLE app.docs ENABLE ROW LEVEL SECURITY")
        assert "BYPASSRLS" in attempt(docs).remedy
        assert find_table(conn, "app.docs").row_security
        database.execute(f"ALTER ROLE {role.name} BYPASSRLS")
        check_readable(conn, docs)
        assert not find_table(conn, "app.docs").row_security
        database.execute(f"REVOKE USAGE ON SCHEMA app FROM {role.name}")
        assert f'GRANT USAGE ON SCHEMA "app" TO "{role.name}";' in attempt(docs).remedy
        database.execute(f"ALTER ROLE {role.name} NOREPLICATION")
        assert "REPLICATION;" in attempt(docs).remedy


@pytest.mark.requirement("R86")
def test_forced_row_level_security_applies_to_the_owner_too(database18: Database) -> None:
    role = database18.create_cdc_role([])
    database18.execute(
        f"CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO {role.name};"
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY"
    )
    with connect(source_settings(role.url)) as conn:
        check_readable(conn, find_table(conn, "t"))
        database18.execute("ALTER TABLE t FORCE ROW LEVEL SECURITY")
        with pytest.raises(SourceError, match="row level security"):
            check_readable(conn, find_table(conn, "t"))


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE app.docs DROP COLUMN note",
        "ALTER TABLE app.docs RENAME COLUMN note TO text",
        "DROP TABLE app.docs",
        "ALTER TABLE app.docs SET SCHEMA public; DROP SCHEMA app",
    ],
)
def test_what_is_altered_before_it_is_checked_is_for_the_stream(
    database18: Database, change: str
) -> None:
    """Only what is there and may not be read is refused."""
    database18.execute(
        "CREATE SCHEMA app; CREATE TABLE app.docs (id int PRIMARY KEY, note text, secret text)"
    )
    role = database18.create_cdc_role([])
    database18.execute(
        f"GRANT USAGE ON SCHEMA app TO {role.name};"
        f"GRANT SELECT (id, note) ON app.docs TO {role.name}"
    )
    with connect(source_settings(role.url)) as conn:
        docs = find_table(conn, "app.docs")
        with pytest.raises(SourceError, match="may not read"):
            check_readable(conn, docs, ["id", "secret"])
        database18.execute(f"GRANT SELECT ON app.docs TO {role.name}")
        database18.execute(change)
        check_readable(conn, docs)


@pytest.mark.requirement("R64")
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("wal_level", "replica", "wal_level is replica"),
        ("max_replication_slots", "0", "no replication slot left"),
    ],
)
def test_preflight_of_server_settings(
    private_postgres: PrivatePostgres, setting: str, value: str, message: str
) -> None:
    server = private_postgres({setting: value})
    source = source_settings(server.url())
    with connect(source) as conn:
        with pytest.raises(SourceError, match=message) as caught:
            preflight_source(conn, source, tables=[], slot_exists=False, publication=None)
        assert caught.value.kind is ErrorKind.SOURCE_SETTING
        assert f"ALTER SYSTEM SET {setting}" in caught.value.remedy


def test_preflight_passes(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    source = source_settings(database.url)
    with connect(source) as conn:
        tables = [find_table(conn, "t")]
        preflight_source(conn, source, tables=tables, slot_exists=False, publication=None)
